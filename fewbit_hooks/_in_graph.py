"""Codes in a compiled graph: plain torch operations, which Dynamo traces and a compiler fuses.

NOTE [ Eighths ]

A compiler makes a loop over each tensor that it writes, and its loops are vectors where they read neighbours and write
neighbours. Eight neighbouring codes in a word, the layout of `ops/_torch.py`, are not that. So here the eight codes
that share bytes are those at one place of each eighth of the tensor, and each byte of a word is a tensor of its own:

    element            i  of n/8   n/8 + i    2n/8 + i   ..  7n/8 + i
    bits of a word     0 .. b-1    b .. 2b-1  2b .. 3b-1     7b .. 8b-1
    packed[k, i]       bits 8k .. 8k+7 of word i

Nothing but the bytes is written in forward, and nothing but the gradient in backward: codes are computed where they are
used, one in four of them twice.

(measured, CPU, one thread, Inductor, gelu, forward and backward, ratio to stock compiled, float32 and bfloat16) 2**24
elements, 3 bits: 0.93 and 1.10. 2**20 elements, 3 bits: 0.98 and 1.03; 4 bits: 1.36 and 1.26; 8 bits: 1.39 and 2.11.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd.function import once_differentiable
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot
from torch.utils.checkpoint import CheckpointPolicy

from ._steep import STEEP
from .ops import Thresholds

COMPARED = 3
"""Bits up to which an input's code is found by comparisons in the kernel; with more it is looked up (NOTE [ Sixteen
bits decide the code ] in `_float16.py`), which Inductor does for one element after the other."""
COMPARED_AT_MOST = 6
"""The same where it cannot be looked up, in float64; with more it is bucketized, which takes longest."""
SELECTED = 4
"""Bits up to which a code's level is selected by comparisons; with more it is looked up."""

Constants = tuple[int, tuple[float, ...], tuple[float, ...], bool]
"""Bits, boundaries, levels, folded."""
UNCODED: Constants = (0, (), (), False)
"""Those of an activation that is not to be approximated; see `again`."""


_MOVE = "_to_copy amax amin cat clone flip gather index index_select masked_select max min repeat roll sort stack topk"
MOVE = frozenset(getattr(torch.ops.aten, name) for name in _MOVE.split())
"""What does not change a number: views do not, either."""
MAGNIFIED_WITHIN = 64
"""Nodes that are looked at."""


class Coded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, func: Any, rest: tuple[Any, ...], named: dict[str, Any], constants: Constants
    ) -> Tensor:
        y: Tensor = func(x, *rest, **named)
        bits, boundaries, _, folded = constants
        ctx.save_for_backward(*pack_bits(encode(x, boundaries, folded), bits))
        ctx.constants = constants
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        bits, _, levels, _ = ctx.constants
        return multiply(grad, ctx.saved_tensors, bits, levels), None, None, None, None


class CodedOrNot(torch.autograd.Function):
    """Behind an activation: its gradient by codes, or by the activation itself where its output or input is kept.

    Only AOTAutograd knows what is, once it traces the backward; see `choose`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, again: bool, constants: Constants) -> Tensor:
        bits, boundaries, _, folded = constants
        y = y.clone()  # a view could not be changed in place; a compiler makes no copy
        ctx.save_for_backward(x, y, *pack_bits(encode(x, boundaries, folded), bits))
        ctx.constants, ctx.again = constants, again
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        bits, _, levels, _ = ctx.constants
        x, y, *packed = ctx.saved_tensors
        of_x, of_y = choose(x, y, multiply(grad, packed, bits, levels), grad, ctx.again)
        return of_x, of_y, None, None


class Dropped(torch.autograd.Function):
    """A `native_dropout` that saves its mask packed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        y, mask = torch.native_dropout(x, p, True)
        ctx.save_for_backward(*pack_bits(mask.to(torch.int32), 1))
        ctx.scale = 1.0 / (1.0 - p)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        parts = zip(_eighths(grad), unpack_bits(ctx.saved_tensors, 1), strict=True)
        backward = torch.ops.aten.native_dropout_backward
        return _whole([backward(part, bit.to(torch.bool), ctx.scale) for part, bit in parts], grad), None


def choose(x: Tensor, y: Tensor, coded: Tensor, grad: Tensor, again: bool) -> tuple[Tensor | None, Tensor | None]:
    """The gradient that goes to an activation's input, from codes, or the one that goes to the activation, which makes
    its own of it. Dynamo leaves the call in the graph; AOTAutograd makes it, while it traces the backward.

    By then all that comes after the activation has been traced, forward and backward. Where the backward reads the
    output, or the input, it is kept or can be computed again from what is: codes beside it would only add to that. What
    is not used of the two ways is no part of the graph in the end.

    Args:
        again: the activation's derivative is of its input. So that is kept, and the output can be computed again, which
            a compiler does not do by itself where a matrix product reads it. Else the output is kept, and not copied.
    """
    proxies = get_proxy_mode()
    if proxies is None:
        return coded, grad  # Dynamo asks what comes out
    given, output = _node_of(x, proxies), _node_of(y, proxies)
    if given is None or output is None:
        return coded, None
    if not (_is_read_in_backward(output) or _is_read_in_backward(given)):
        changed = output.target is not torch.ops.aten.clone.default  # in place: what was made of it before is not seen
        return (None, grad) if changed or _is_magnified(output) else (coded, None)
    _prefer_again(_between(given, output) if again else [output])
    return None, grad


def again(x: Tensor, y: Tensor) -> Tensor:
    """The output of an activation that is not coded: where the backward reads it, it is computed again from the input,
    which is kept. Dynamo leaves the call in the graph; AOTAutograd makes it, while it traces the forward."""
    proxies = get_proxy_mode()
    if proxies is not None and y.requires_grad:
        given, output = _node_of(x, proxies), _node_of(y, proxies)
        if given is not None and output is not None:
            y.register_hook(functools.partial(_look, given, output))  # when all that reads it in backward is traced
    return y


def _look(given: torch.fx.Node, output: torch.fx.Node, _: Tensor) -> None:
    if _is_read_in_backward(output):
        _prefer_again(_between(given, output))


def _prefer_again(nodes: list[torch.fx.Node]) -> None:
    for node in nodes:
        node.meta.setdefault("recompute", CheckpointPolicy.PREFER_RECOMPUTE)


def _node_of(t: Any, proxies: Any) -> torch.fx.Node | None:
    """The node of the graph that is being traced which makes a tensor."""
    while isinstance(t, FunctionalTensor):
        t = torch._from_functional_tensor(t.elem)
    slot: Any = get_proxy_slot(t, proxies.tracer, None)
    return None if slot is None else slot.proxy.node


def _is_read_in_backward(node: torch.fx.Node) -> bool:
    """Whether a tensor, or a view of it, is read by what was traced of the backward, by more than a comparison, whose
    result is kept in its place."""
    for user in node.users:
        if getattr(user.target, "is_view", False):
            if _is_read_in_backward(user):
                return True
        elif user.meta.get("partitioner_tag") == "is_backward":
            made = user.meta.get("val")
            if not isinstance(made, Tensor) or made.dtype != torch.bool:
                return True
    return False


def _is_magnified(output: torch.fx.Node) -> bool:
    """Whether a logarithm or a quotient is taken of what is made of a tensor pointwise: NOTE [ Steep ], `_steep.py`."""
    stack, seen = [output], {output}
    while stack and len(seen) < MAGNIFIED_WITHIN:
        node = stack.pop()
        for user in node.users:
            operand = STEEP.get(user.target)
            if operand is not None and operand.of(user.args, user.kwargs) is node:
                return True
            operation = getattr(user.target, "overloadpacket", None)
            if user not in seen and (operation in MOVE or _is_pointwise(user.target)):
                seen.add(user)
                stack.append(user)
    return False


def _is_pointwise(operation: Any) -> bool:
    """Or makes a view."""
    if operation is operator.getitem or getattr(operation, "is_view", False):
        return True
    return torch.Tag.pointwise in getattr(operation, "tags", ())


def _between(start: torch.fx.Node, end: torch.fx.Node) -> list[torch.fx.Node]:
    """The nodes that lead from one to the other, of which the last is one."""
    starts = {start}
    while getattr(start.target, "is_view", False):  # the activation may have been given the one that this is a view of
        start = start.all_input_nodes[0]
        starts.add(start)
    leads = dict.fromkeys(starts, True)
    stack = [end]
    while stack:
        node = stack[-1]
        unknown = [before for before in node.all_input_nodes if before not in leads]
        stack.extend(unknown)
        if not unknown:
            leads.setdefault(node, any(leads[before] for before in node.all_input_nodes))
            stack.pop()
    return [node for node, does in leads.items() if does and node not in starts]


def encode(x: Tensor, boundaries: tuple[float, ...], folded: bool) -> Tensor:
    """Code i where boundaries[i-1] < x <= boundaries[i]; int32, of the shape of `x`."""
    if len(boundaries) >= 1 << COMPARED:
        found = _lookup(boundaries, folded, str(x.dtype), str(x.device))
        if found is not None:
            name, scale = found
            if x.dtype != torch.bfloat16:
                x = (x * scale).half()
            value = x.reshape(-1).view(torch.int16).to(torch.int32) & 0xFFFF
            table: Tensor = getattr(_tables, name)
            return table[value].to(torch.int32).view(x.shape)
    v = x.abs() if folded else x
    if v.dtype != torch.float64:
        v = v.float()  # which holds every boundary exactly
    if len(boundaries) >= 1 << COMPARED_AT_MOST:
        limits = torch.tensor(boundaries, dtype=v.dtype, device=v.device)
        return torch.bucketize(v, limits, out_int32=True)
    codes = torch.zeros_like(v)  # in its dtype: Inductor's vectors of masks turn into such at once
    for boundary in boundaries:
        codes = codes + torch.where(v <= boundary, 0.0, 1.0)  # NaN gets the last one, as from bucketize
    return codes.to(torch.int32)


class _Tables:
    """What codes are looked up in: of each 16-bit value its code, uint8, in the order of their bits.

    They are attributes, each of a name of its own: of two tensors that one function returns as a constant, Dynamo takes
    but one into a graph; and of a module it does not see the buffers that it comes to have while it is read.
    """


_tables = _Tables()
_numbers = itertools.count()


def _lookup(*key: Any) -> tuple[str, float] | None:
    """Runs in Python, as `_constants`: the name of the table, and what inputs are multiplied by to be looked up in it;
    None where they are not."""
    return _make_table(*key)


@functools.cache
def _make_table(boundaries: tuple[float, ...], folded: bool, dtype: str, device: str) -> tuple[str, float] | None:
    coder = Thresholds(boundaries, folded)
    found = coder.lookup(getattr(torch, dtype.removeprefix("torch.")), torch.device(device))
    if found is None:
        return None
    lookup, scale = found
    torch._dynamo.mark_static_address(lookup.table)  # or with CUDA graphs it would be copied at every call
    name = f"table_{next(_numbers)}"
    setattr(_tables, name, lookup.table)
    return name, scale


_lookup._dynamo_marked_constant = True  # type: ignore[attr-defined]


def pack_bits(codes: Tensor, bits: int) -> list[Tensor]:
    """Codes, int32, as `bits` tensors of ceil(n / 8) bytes; see NOTE [ Eighths ]."""
    parts = _eighths(codes)
    columns = []
    for column in range(bits):
        byte = torch.zeros_like(parts[0])
        for i in range(8):
            shift = i * bits - column * 8
            if -bits < shift < 8:
                byte = byte | (parts[i] << shift if shift >= 0 else parts[i] >> -shift)
        columns.append((byte & 0xFF).to(torch.uint8))
    return columns


def unpack_bits(packed: Sequence[Tensor], bits: int) -> list[Tensor]:
    """The codes of each eighth, int32."""
    columns = [column.to(torch.int32) for column in packed]
    parts = []
    for i in range(8):
        column, shift = divmod(i * bits, 8)
        code = columns[column] >> shift
        if shift + bits > 8:
            code = code | (columns[column + 1] << (8 - shift))
        parts.append(code & ((1 << bits) - 1))
    return parts


def _eighths(t: Tensor) -> Tensor:
    """(8, ceil(n / 8)), with zeros after the end."""
    return torch.nn.functional.pad(t.reshape(-1), (0, -t.numel() % 8)).view(8, -1)


def decode(codes: Tensor, levels: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """The level of each code, of 1-D codes."""
    if len(levels) > 1 << SELECTED:
        return torch.tensor(levels, dtype=dtype, device=codes.device)[codes]
    slope = torch.full_like(codes, levels[0], dtype=dtype)
    for code, level in enumerate(levels[1:], 1):
        slope = torch.where(codes >= code, level, slope)
    return slope


def multiply(grad: Tensor, packed: Sequence[Tensor], bits: int, levels: tuple[float, ...]) -> Tensor:
    """`grad` times the level of each code; by eighths, so that no code is written."""
    parts = zip(_eighths(grad), unpack_bits(packed, bits), strict=True)
    products = [part * decode(codes, levels, grad.dtype) for part, codes in parts]
    return _whole(products, grad)


def _whole(eighths: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(eighths).view(-1)[: like.numel()].view(like.shape)
