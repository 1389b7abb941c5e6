"""What a recording consists of: the calls of a step, what each keeps, and what a scope must know of them.

It holds no tensor. A tensor is named by the address of its storage, which names no other as long as the recorder lives.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ._hooks import Kept
from ._learning import Site
from ._modules import ModuleRef

IN, OUT, MADE = "input", "output", "made by the call"
OTHER, ACTIVATION, COPY, MASK, NORM, SOFTMAX, CAST, CONSUMER, EXPOSURE, CHANGE = (
    "other",
    "activation",
    "copy",
    "mask",
    "norm",
    "softmax",
    "cast",
    "consumer",
    "exposure",
    "change",
)


class Ref(NamedTuple):
    """A tensor as it was when a call was over.

    Attributes:
        storage, nbytes: the storage that it is in, all of it.
        parameter: it is one of the model's.
        recorded: it is the result of an operation that autograd records.
        place: its shape, strides and offset, where it lies in its storage.
    """

    storage: int
    nbytes: int
    version: int
    dtype: torch.dtype
    parameter: bool
    recorded: bool
    place: tuple[torch.Size, tuple[int, ...], int] | None = None


@dataclass(eq=False, slots=True)
class Operation:
    """One call that keeps something for backward, or from which a scope knows how a tensor came to be.

    Attributes:
        name: of the torch call, the activation, the module that is run as one node, or the custom Function.
        module, model: the innermost and the outermost module it was made in.
        custom: it is a custom autograd Function.
        kind: what a scope sees in it: an activation; a copy; a mask call (dropout); a change in place; with
            `recompute=True`, a norm, a softmax, a cast, a consumer (Linear, product), the exposure of a tensor's
            memory; or nothing.
        reason: why a scope would keep a recognised call as it is; empty where it would not.
        site: the place in the model that it came from; None outside of any module.
        x, y: its input and its output.
        x_bytes, x_shape: of the input.
        exact: the activation's derivative has two values.
        saves_input: the activation's node does.
        beside: bits an element that its derivative takes beside its output; None where it cannot be had from it.
        beside_copy: the same, beside a copy of its output.
        one_node: a scope treats it as a whole: runs it as one node, or again.
        parts: the calls of its primitives, if it is a module.
        within: the module that would be treated as a whole, in which it was made.
        sources: from these `y` can be computed again; none where it cannot.
        keeps: what its node keeps for certain: others can be computed again from that.
        operands: of a consumer, what it saves.
        waits: its mask is the caller's, who may hold it.
    """

    name: str
    module: ModuleRef | None
    model: ModuleRef | None
    custom: bool = False
    kind: str = OTHER
    reason: str = ""
    site: Site | None = None
    x: Ref | None = None
    y: Ref | None = None
    x_bytes: int = 0
    x_shape: torch.Size | None = None
    exact: bool = False
    saves_input: bool = False
    beside: int | None = None
    beside_copy: int | None = None
    one_node: bool = False
    parts: list[Operation] = field(default_factory=list)
    within: Operation | None = None
    sources: tuple[Ref, ...] = ()
    keeps: tuple[Ref, ...] = ()
    operands: tuple[Ref, ...] = ()
    waits: bool = False


@dataclass(eq=False, slots=True)
class Saved:
    """One tensor that an operation keeps.

    Attributes:
        storage, nbytes: the storage that it is in, all of it.
        role: what it is to the operation: its input, its output, or made by the call.
        leaf: it is not the result of an operation that autograd records.
        mask: it has two values, one of them 0, so that a bit an element is exact.
        copy_of: the storage of the operand that it is autocast's copy of; 0 where it is none.
    """

    operation: Operation
    held: weakref.ref[Kept]
    storage: int
    nbytes: int
    dtype: torch.dtype
    shape: torch.Size
    leaf: bool
    role: str = MADE
    mask: bool = False
    copy_of: int = 0

    @property
    def numel(self) -> int:
        """Elements of the tensor."""
        return self.shape.numel()

    @property
    def tensor_bytes(self) -> int:
        """Bytes of the tensor, which may be a part of its storage."""
        return self.numel * self.dtype.itemsize
