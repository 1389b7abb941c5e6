"""Activations under torch.compile: the same codes, in the compiled graph.

NOTE [ Codes in a compiled graph ]

Saved-tensor hooks break a graph that Dynamo traces, and what a compiled graph saves is its partitioner's choice. So
while a function is compiled, a recognised call becomes a `torch.autograd.Function` of plain torch operations, whose
forward returns the activation and saves its packed codes: a compiler fuses the coding into the activation's kernel, and
the graph saves the codes in the activation's place (or, where it keeps that anyway, computes them again).

1. All that depends on the codebook is a constant of the graph: asked for once, when the graph is traced.
2. What the graph depends on beside that is guarded by Dynamo: the mode on the stack, the number of bits. A new scope
   with the same bits uses the same graph; other bits, or no scope, another one.
3. Only what is traced can be known: no call sites, so nothing is learned and nothing is counted; two-valued
   activations and masks are left to the compiler.
4. The byte layout is that of `ops/_torch.py`, but for the end: the last group of 8 codes is whole.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _policy
from ._calls import Call
from ._policy import Settings
from .ops._torch import mask

UNROLLED = 4
"""Bits up to which levels and boundaries are constants in the kernel; with more they are looked up in a tensor."""

is_exporting = getattr(torch.compiler, "is_exporting", bool)  # torch 2.6 has none
Constants = tuple[int, tuple[float, ...], tuple[float, ...], bool]
"""Bits, boundaries, levels, folded."""

traced = False
"""Whether a call was ever traced under a scope: then a scope that counts nothing need not be one that does nothing."""


class Coding(NamedTuple):
    """What a scope's settings say about a compiled graph.

    Attributes:
        bits: of an activation that is not named.
        named: of those that are.
        min_bytes: as the scope's.
    """

    bits: int | None
    named: tuple[tuple[str, int | None], ...]
    min_bytes: int


def coding(settings: Settings) -> Coding | None:
    """None where nothing is coded in compiled graphs: exact, or what goes by modules, tensors or given codebooks."""
    by_module_or_tensor = settings.exclude.rules or callable(settings.bits)
    if settings.exact or by_module_or_tensor or settings.codebooks or settings.bits is None:
        return None
    if isinstance(settings.bits, Mapping):
        named = tuple(sorted((name, bits) for name, bits in settings.bits.items() if name != "default"))
        return _coding(settings.bits.get("default"), named, settings.min_bytes)
    return _coding(settings.bits, (), settings.min_bytes)


@functools.cache
def _coding(bits: int | None, named: tuple[tuple[str, int | None], ...], min_bytes: int) -> Coding:
    """One object for equal settings: Dynamo guards what is handed to `_constants` by its identity."""
    return Coding(bits, named, min_bytes)


def run(
    coding: Coding | None,
    call: Call,
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    composite: bool = False,
) -> Any:
    """Make a recognised call while it is traced. Dynamo reads this function, too: it must be plain.

    Args:
        composite: it is written in primitives, of which none is coded where the whole is not.
    """
    if coding is None or call.activation is None or call.one_node is not None or not torch.is_grad_enabled():
        return func(*args, **kwargs)
    if is_exporting():  # what is exported is the model, without the scope that it happens to be in
        return func(*args, **kwargs)
    x = args[0] if args else kwargs.get("input", kwargs.get("self"))
    if type(x) is not Tensor or not x.requires_grad or x.numel() * x.element_size() < coding.min_bytes:
        return func(*args, **kwargs)
    rest = {key: value for key, value in kwargs.items() if key not in ("input", "self")}
    for value in (*args[1:], *rest.values()):
        if isinstance(value, Tensor):
            return func(*args, **kwargs)
    fixed = (*rest.items(), *call.fixed)
    constants = _constants(call.name, call.names, call.inplace, coding, args[1:], fixed, str(x.dtype))
    if constants is None and composite:
        with torch._C.DisableTorchFunction():
            return func(*args, **kwargs)
    if constants is None:
        return func(*args, **kwargs)
    return _Coded.apply(x, func, args[1:], rest, constants)  # type: ignore[no-untyped-call]


def _constants(
    name: str,
    names: tuple[str, ...],
    inplace: bool,
    coding: Coding,
    rest: tuple[Any, ...],
    named: tuple[tuple[str, Any], ...],
    dtype: str,
) -> Constants | None:
    """Runs in Python, when the graph is traced: how the call is coded; None keeps it."""
    global traced
    from ._activations import find
    from ._catalog import codebook
    from ._errors import FewbitError

    traced = True
    activation = find(name)
    bits = dict(coding.named).get(name, coding.bits)
    given = {**dict(zip(names, rest, strict=False)), **dict(named)}
    if activation.exact or bits is None or inplace or given.pop("inplace", False):
        return None
    if dtype not in {str(d) for d in _policy.DTYPES}:
        return None
    try:
        parameters = activation.check(given)
        book = codebook(name, bits, weight=activation.weight, interval=activation.interval, **parameters)
    except FewbitError:
        return None
    return bits, tuple(book.boundaries.tolist()), tuple(book.levels.tolist()), book.folded


# What torch.compiler.assume_constant_result does; itself it would import all of Dynamo.
_constants._dynamo_marked_constant = True  # type: ignore[attr-defined]


class _Coded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, func: Any, rest: tuple[Any, ...], named: dict[str, Any], constants: Constants
    ) -> Tensor:
        y: Tensor = func(x, *rest, **named)
        bits, boundaries, _, folded = constants
        ctx.save_for_backward(pack_bits(encode(x, boundaries, folded), bits))
        ctx.constants = constants
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (packed,) = ctx.saved_tensors
        bits, _, levels, _ = ctx.constants
        codes = unpack_bits(packed, bits, grad.numel()).view(grad.shape)
        return grad * decode(codes, levels, grad.dtype), None, None, None, None


def encode(x: Tensor, boundaries: tuple[float, ...], folded: bool) -> Tensor:
    """Code i where boundaries[i-1] < x <= boundaries[i]; uint8, of the shape of `x`."""
    v = x.abs() if folded else x
    if v.dtype != torch.float64:
        v = v.float()  # which holds every boundary exactly
    if len(boundaries) >= 1 << UNROLLED:
        limits = torch.tensor(boundaries, dtype=v.dtype, device=v.device)
        return torch.bucketize(v, limits, out_int32=True).to(torch.uint8)
    codes = torch.zeros_like(
        v
    )  # in its dtype: Inductor's vectors of masks turn into such at once, and into bytes slowly
    for boundary in boundaries:
        codes = codes + torch.where(v <= boundary, 0.0, 1.0)  # NaN gets the last one, as from bucketize
    return codes.to(torch.uint8)


def decode(codes: Tensor, levels: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """The level of each code."""
    if len(levels) > 1 << UNROLLED:
        return torch.tensor(levels, dtype=dtype, device=codes.device)[codes.long()]
    slope = torch.full_like(codes, levels[0], dtype=dtype)
    for code, level in enumerate(levels[1:], 1):
        slope = torch.where(codes >= code, level, slope)
    return slope


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """The bytes of the codes, in groups of 8: (ceil(n / 8), bits), uint8."""
    flat = codes.reshape(-1)
    if bits == 8:
        return flat
    # As in ops/_torch.py: eight codes are a word. Column by column Inductor's kernels for a CPU would be no vectors.
    words = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(torch.int64)
    for codes_in_field in (1, 2, 4):
        field, distance = codes_in_field * bits, codes_in_field * 8
        low = mask(field, every=2 * distance)
        words = (words & low) | ((words >> (distance - field)) & (low << field))
    return words.view(-1, 1).view(torch.uint8)[:, :bits].contiguous()


def unpack_bits(packed: Tensor, bits: int, n: int) -> Tensor:
    """The n codes, int32."""
    if bits == 8:
        return packed.to(torch.int32)
    columns = packed.to(torch.int32)
    codes = []
    for i in range(8):
        first, shift = divmod(i * bits, 8)
        code = columns[:, first] >> shift
        if shift + bits > 8:
            code = code | (columns[:, first + 1] << (8 - shift))
        codes.append(code & ((1 << bits) - 1))
    return torch.stack(codes, 1).view(-1)[:n]
