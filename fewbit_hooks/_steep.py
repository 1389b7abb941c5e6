"""Saturated activations behind a logarithm, or in a denominator: there no codes do.

NOTE [ Steep ]

Far out, where sigmoid's derivative has gone to 0, all inputs share one code, whose level is the mean over them. That is
hardly more than 0, and does no harm; but whoever takes a logarithm of the output, or divides by it, multiplies it by
one over what is left of the output there. Of `-log(sigmoid(z) + 1e-8)` at z = -15 the gradient is 1, and that of 3 bits
is 7,000. Such are `BCELoss`, ranking losses, a tanh-Gaussian policy (`log(1 - a * a + 1e-6)`), a standard deviation
that is a softplus. Roots, and what else has a pole or an infinite slope there, are alike.

So the latest of what was coded stays at hand for a moment, as its node would have kept it. When a logarithm, a quotient
or the like is taken of something that was made of it by pointwise operations, it is kept after all, in the place of its
codes: the gradient is exact, in the first step, too.

1. At hand are the tensors of the latest `RECENT` calls of a thread; none when a scope has been left or a backward
   begins. They lie beside the codes, in what the graph keeps, and go with that.
2. A tensor is at hand detached, with its version. One that was changed meanwhile is not taken.
3. From the logarithm back to the activation the graph is followed through nodes that are `POINTWISE`, or move elements.
   A matrix product, a sum or a softmax between them ends that: hardly is a sum as small as its smallest element.

In a compiled graph the same is asked of what has been traced: `choose` in `_in_graph.py`.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ._calls import _callables
from ._ledger import Ledger, Row

RECENT = 2
"""Of a pair of activations, of a ranking loss say, a logarithm may be taken after both."""
STEPS = 32
"""Nodes that are looked at: those of such a loss are ten or so."""

SATURATE = frozenset({"celu", "elu", "selu", "sigmoid", "softplus", "tanh"})
"""Activations whose derivative goes to 0 with the output, or with its distance from 1."""

KEPT = "a logarithm, or a quotient, of it would magnify what codes leave out"


class Kept(Protocol):
    """A saved tensor as it is, and its version."""

    tensor: Tensor
    version: int

    def unpack(self) -> Tensor:
        """The tensor, unless it has been changed."""


class Instead:
    """What may have a saved tensor itself in place of its codes, and has it at hand for a moment.

    Attributes:
        at_hand: the tensor.
        kept: the same, from `keep` on.
    """

    __slots__ = ("__weakref__", "at_hand", "kept")

    def __init__(self) -> None:
        self.at_hand: Kept | None = None
        self.kept: Kept | None = None

    def keep(self) -> int:
        """Have what is at hand, from now on; returns the bytes of codes that are let go of."""
        self.kept = self.at_hand
        return 0


@dataclass(frozen=True)
class Operand:
    """Which argument of a callable is in the logarithm, or below.

    Attributes:
        place: among those that are given by place.
        name: as it may be given by name.
    """

    place: int
    name: str

    def of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The argument; None where there is none."""
        return args[self.place] if len(args) > self.place else kwargs.get(self.name)


class Base(Operand):
    """That of a power, which is steep where the exponent is less than 1."""

    def of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        exponent = EXPONENT.of(args, kwargs)
        return None if isinstance(exponent, (int, float)) and exponent >= 1 else super().of(args, kwargs)


EXPONENT = Operand(1, "exponent")

# of each name every form that there is: of torch, of a tensor, in place, of torch.special, of torch.ops.aten
_CALLS = {
    Operand(0, "input"): (
        "acos acosh asin atanh digamma erfinv lgamma log log10 log1p log2 logit reciprocal rsqrt sqrt"
    ),
    Operand(1, "other"): "div divide true_divide xlogy",
    Base(0, "input"): "pow",
}
# and of these this one
_BY_NAME = {
    Operand(0, "input"): "Tensor.__rtruediv__ Tensor.__rdiv__ torch.special.entr F.binary_cross_entropy "
    "F.poisson_nll_loss torch.ops.aten.special_entr torch.ops.aten.binary_cross_entropy",
    Operand(1, "other"): "Tensor.__truediv__ Tensor.__itruediv__ Tensor.__div__ torch.special.xlog1py",
    Operand(2, "var"): "F.gaussian_nll_loss",
    Base(0, "input"): "Tensor.__pow__ Tensor.__ipow__",
}
STEEP: dict[Any, Operand] = {}
for _operand, _names in _CALLS.items():
    for _form in ("torch.{}", "torch.{}_", "Tensor.{}", "Tensor.{}_", "torch.special.{}", "torch.ops.aten.{}"):
        STEEP |= {function: _operand for name in _names.split() for function in _callables(_form.format(name))}
for _operand, _names in _BY_NAME.items():
    STEEP |= {function: _operand for path in _names.split() for function in _callables(path)}

_POINTWISE = (
    "Abs Add Addcmul Alias Amax Amin Cat Clamp ClampMax ClampMin Clone Div Expand Flip Gather Index IndexSelect Lerp "
    "MaskedFill MaskedSelect Max Maximum Min Minimum Mul Neg Permute Pow Repeat ReshapeAlias Roll Rsub Select Slice "
    "Sort Split SplitWithSizes Squeeze Stack Sub T ToCopy Topk Transpose Unbind UnsafeView Unsqueeze View Where"
)
POINTWISE = frozenset(_POINTWISE.split())
"""Nodes, as they are named."""


@dataclass(slots=True)
class _Recent:
    """A call that was coded.

    Attributes:
        number: of its node.
        packed: what that keeps; weak, for the graph may be dropped.
        ledger, row: where it is counted.
    """

    number: int
    packed: weakref.ref[Instead]
    ledger: Ledger
    row: Row


class _Thread(threading.local):
    def __init__(self) -> None:
        self.recent: deque[_Recent] = deque()


_thread = _Thread()


def remember(y: Tensor, packed: Instead, ledger: Ledger, row: Row) -> None:
    """A call was coded, and has its output."""
    if y.grad_fn is None:
        packed.at_hand = None
        return
    _thread.recent.append(_Recent(y.grad_fn._sequence_nr(), weakref.ref(packed), ledger, row))
    if len(_thread.recent) > RECENT:
        _let_go(_thread.recent.popleft())


def any_recent() -> bool:
    """Whether anything is at hand on this thread. Runs in Python, where it is traced: no graph depends on it."""
    return bool(_thread.recent)


any_recent._dynamo_marked_constant = True  # type: ignore[attr-defined]


def forget() -> None:
    """Have nothing at hand."""
    while _thread.recent:
        _let_go(_thread.recent.popleft())


def _let_go(call: _Recent) -> None:
    packed = call.packed()
    if packed is not None:
        packed.at_hand = None


def look(operand: Operand, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """A logarithm, or a quotient, is about to be taken: what it is taken of is not to be had from codes."""
    recent = _thread.recent
    numbers = made_of(operand.of(args, kwargs), {call.number for call in recent})
    for call in [call for call in recent if call.number in numbers]:
        recent.remove(call)
        packed = call.packed()
        kept = packed.at_hand if packed is not None else None
        if packed is not None and kept is not None and kept.tensor._version == kept.version:
            call.ledger.kept_after_all(call.row, kept.tensor.untyped_storage()._cdata, packed.keep(), KEPT)
        _let_go(call)


def made_of(t: Any, numbers: Set[int]) -> set[int]:
    """Those of the nodes of these numbers from which something was made, pointwise."""
    found: set[int] = set()
    if type(t) is not Tensor or torch._C._functorch.peek_interpreter_stack() is not None or not numbers:
        return found
    oldest, stack = min(numbers), [t.grad_fn]
    for _ in range(STEPS):
        node: Any = stack.pop() if stack else None
        if node is None or node._sequence_nr() < oldest:
            continue
        if node._sequence_nr() in numbers:
            found.add(node._sequence_nr())
        elif node.name().partition("Backward")[0] in POINTWISE:
            stack.extend(following for following, _ in node.next_functions)
    return found
