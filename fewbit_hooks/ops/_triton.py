"""The Triton backend: the bytes of `_torch.py`, each tensor read once and nothing made on the way.

Imported when the first CUDA tensor is coded, by `_dispatch.py`; never by `import fewbit_hooks`. Not yet measured on a
GPU.

NOTE [ One program ]

A program works on GROUPS groups of 8 consecutive elements, a row each. The 8 codes of a group meet in one word, code i
shifted by i * bits, and no two of them share a bit, so their sum is the little-endian stream of `_torch.py`, drawn here
for 3 bits:

    element        0  1  2  3  4  5  6  7
    word      bit  0  3  6  9 12 15 18 21 .. 24
    stored as      byte 0 | byte 1 | byte 2

of which the `bits` low bytes are stored at byte `group * bits`. An element past the end has code 0. Unpacking needs no
groups: a code lies in one byte or in two neighbours.

1. Offsets are of 64 bits: tensors may have more than 2**31 elements, and `index * bits` overflows 32 bits sooner.
2. Every load and store is masked, except of tables (boundaries, values, codes by value): their indices are in range by
   construction, whatever the data is.
3. What changes from codebook to codebook is read from a small tensor, so that a kernel is compiled once for each dtype
   and number of bits. Boundaries are float32 except for float64 inputs: `Thresholds.limits` says why that is exact.
4. The number of elements is left to Triton to specialise on: knowing that 16 divides it, it moves 16 bytes at a time.
5. What is only moved (stand-ins, values to be looked up) is moved as integers: no NaN changes its bits.

Only what Triton 3.x has from the start is used: `load`, `store`, `arange`, `sum`, `where`, `static_range`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._beside import in_order_of
from ._coders import Above, Coder, Lookup, Thresholds
from ._layout import INTEGERS, Layout, chunks, computed_in, in_memory_order, is_dense
from ._torch import in_a_row, packed_bytes
from ._two_values import encode_two_values as encode_two_values  # no kernel would spare the host the waiting
from ._two_values import not_zero

GROUPS = 256
"""Groups of 8 elements a program: an estimate (16 elements a thread at 4 warps), not yet measured on a GPU."""

FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


# --- kernels: arithmetic only ---


@triton.jit
def elements(GROUPS: tl.constexpr):
    """This program's groups, and the elements of each, as 64-bit offsets."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    return group, group[:, None] * 8 + tl.arange(0, 8)[None, :]


@triton.jit
def code_of(v, boundaries, BITS: tl.constexpr, FOLDED: tl.constexpr):
    """Code i where boundaries[i-1] < v <= boundaries[i]; NaN, which is never <=, gets the last code."""
    if FOLDED:
        v = tl.abs(v)
    code = tl.zeros_like(v).to(tl.int32)
    if BITS <= 4:  # the boundaries in registers: the code is the number of them that v is beyond
        for i in tl.static_range((1 << BITS) - 1):
            code += tl.where(v <= tl.load(boundaries + i), 0, 1)
    else:  # a binary search: each step decides one bit, the highest first
        for step in tl.static_range(BITS):
            half = 1 << (BITS - 1 - step)
            code += tl.where(v <= tl.load(boundaries + code + (half - 1)), 0, half)
    return code


@triton.jit
def store_packed(packed, group, code, index, n, n_bytes, BITS: tl.constexpr):
    """Pack the codes of whole groups; see the note above."""
    code = tl.where(index < n, code, 0)
    shift = tl.arange(0, 8) * BITS
    if BITS <= 3:
        word = tl.sum(code << shift[None, :], axis=1).to(tl.int64)
    else:
        word = tl.sum(code.to(tl.int64) << shift.to(tl.int64)[None, :], axis=1)
    byte = tl.arange(0, 8)
    at = group[:, None] * BITS + byte[None, :]
    value = (word[:, None] >> (byte * 8).to(tl.int64)[None, :]) & 255
    tl.store(packed + at, value.to(tl.uint8), mask=(byte < BITS)[None, :] & (at < n_bytes))


@triton.jit
def load_code(packed, index, n, BITS: tl.constexpr):
    """The codes of the elements at `index`."""
    bit = index * BITS
    first, shift = bit >> 3, (bit & 7).to(tl.int32)
    word = tl.load(packed + first, mask=index < n, other=0).to(tl.int32)
    if 8 % BITS != 0:  # a code may reach into the next byte, which is there whenever it does
        spills = (index < n) & (shift + BITS > 8)
        word |= tl.load(packed + first + 1, mask=spills, other=0).to(tl.int32) << 8
    return (word >> shift) & ((1 << BITS) - 1)


@triton.jit(do_not_specialize=["n_bytes"])
def _encode_thresholds(
    x, packed, boundaries, n, n_bytes, BITS: tl.constexpr, FOLDED: tl.constexpr, GROUPS: tl.constexpr
):
    group, index = elements(GROUPS)
    v = tl.load(x + index, mask=index < n, other=0.0).to(boundaries.dtype.element_ty)
    store_packed(packed, group, code_of(v, boundaries, BITS, FOLDED), index, n, n_bytes, BITS)


@triton.jit(do_not_specialize=["n_bytes"])
def _encode_above(x, packed, limit, n, n_bytes, GROUPS: tl.constexpr):
    group, index = elements(GROUPS)
    v = tl.load(x + index, mask=index < n, other=0.0).to(limit.dtype.element_ty)
    store_packed(packed, group, tl.where(v > tl.load(limit), 1, 0), index, n, n_bytes, 1)


@triton.jit(do_not_specialize=["n_bytes"])
def _encode_lookup(x, packed, table, n, n_bytes, BITS: tl.constexpr, GROUPS: tl.constexpr):
    """`x`: the bits of 16-bit values, int16."""
    group, index = elements(GROUPS)
    value = tl.load(x + index, mask=index < n, other=0).to(tl.int32) & 0xFFFF
    store_packed(packed, group, tl.load(table + value).to(tl.int32), index, n, n_bytes, BITS)


@triton.jit(do_not_specialize=["n_bytes"])
def _encode_not_zero(x, packed, n, n_bytes, GROUPS: tl.constexpr):
    """`x`: the bits of any values, as integers."""
    group, index = elements(GROUPS)
    code = tl.where(tl.load(x + index, mask=index < n, other=0) != 0, 1, 0)
    store_packed(packed, group, code, index, n, n_bytes, 1)


@triton.jit(do_not_specialize=["n_bytes"])
def _pack(codes, packed, n, n_bytes, BITS: tl.constexpr, GROUPS: tl.constexpr):
    group, index = elements(GROUPS)
    code = tl.load(codes + index, mask=index < n, other=0).to(tl.int32)
    store_packed(packed, group, code, index, n, n_bytes, BITS)


@triton.jit(do_not_specialize=["stride"])
def _decode(packed, values, out, n, stride, BITS: tl.constexpr, GROUPS: tl.constexpr):
    _, index = elements(GROUPS)
    value = tl.load(values + load_code(packed, index, n, BITS) * stride)
    if values.dtype.element_ty != out.dtype.element_ty:
        value = value.to(
            tl.float32
        )  # small integers, on the way to any dtype (the interpreter has no int8 to bfloat16)
    tl.store(out + index, value.to(out.dtype.element_ty), mask=index < n)


@triton.jit
def _at_output(output, packed, index, n, SIDES: tl.constexpr):
    """Where a table has what belongs to the elements at `index`.

    `output`: int16, the bits of bfloat16 values; else floats, which are looked up as float16.
    """
    y = tl.load(output + index, mask=index < n, other=0)
    if output.dtype.element_ty != tl.int16:
        # by way of float32, as torch converts float64: rounding once and rounding twice may differ
        y = y.to(tl.float32).to(tl.float16).to(tl.int16, bitcast=True)
    at = y.to(tl.int32) & 0xFFFF
    if SIDES:
        at += load_code(packed, index, n, 1) << 16
    return at


@triton.jit
def _decode_beside(output, packed, table, out, n, SIDES: tl.constexpr, GROUPS: tl.constexpr):
    _, index = elements(GROUPS)
    tl.store(out + index, tl.load(table + _at_output(output, packed, index, n, SIDES)), mask=index < n)


INTERPRETED = not isinstance(code_of, triton.runtime.JITFunction)
"""Triton's interpreter is on (TRITON_INTERPRET=1)."""

if INTERPRETED:

    @triton.jit
    def round_to(x, like):
        if like.dtype.element_ty == tl.bfloat16:  # the interpreter would cut the last 16 bits off
            bits = x.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
            nearest = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), bits) >> 16
            return nearest.to(tl.int16).to(tl.bfloat16, bitcast=True)
        return x.to(like.dtype.element_ty)

else:

    @triton.jit
    def round_to(x, like):
        return x.to(like.dtype.element_ty)  # to the nearest, ties to even


@triton.jit(do_not_specialize=["stride"])
def _multiply(grad, packed, values, out, n, stride, BITS: tl.constexpr, GROUPS: tl.constexpr):
    """Computed in the dtype of `values`, and rounded once."""
    _, index = elements(GROUPS)
    g = tl.load(grad + index, mask=index < n, other=0.0).to(values.dtype.element_ty)
    value = tl.load(values + load_code(packed, index, n, BITS) * stride)
    tl.store(out + index, round_to(g * value, out), mask=index < n)


@triton.jit
def _multiply_beside(grad, output, packed, table, out, n, SIDES: tl.constexpr, GROUPS: tl.constexpr):
    """`output`: as for `_decode_beside`; computed in the dtype of `table`, and rounded once."""
    _, index = elements(GROUPS)
    g = tl.load(grad + index, mask=index < n, other=0.0).to(table.dtype.element_ty)
    value = tl.load(table + _at_output(output, packed, index, n, SIDES))
    tl.store(out + index, round_to(g * value, out), mask=index < n)


# --- launchers: they allocate, size the grid, and see to the device ---


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current stream of the current device; the interpreter runs on the CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def grid(n: int) -> tuple[int]:
    """The number of programs for n elements."""
    return (triton.cdiv(n, 8 * GROUPS),)


def encode(x: Tensor, bits: int, coder: Coder) -> Tensor:
    """As `_torch.encode`, byte for byte.

    A coder that is neither a `Thresholds`, an `Above`, a `Lookup` nor `not_zero` is a predicate in plain torch: it is
    run chunk by chunk, and what it gives is packed here.
    """
    packed = torch.empty(packed_bytes(x.numel(), bits), dtype=torch.uint8, device=x.device)
    x = x.detach()
    with on(x.device):
        for start, piece in _pieces(x, whole=_is_known(coder, x.dtype, bits)):
            _encode_piece(piece, bits, coder, packed[start * bits // 8 :])
    return packed


def decode(packed: Tensor, rows: Tensor, bits: int, layout: Layout) -> Tensor:
    """As `_torch.decode`, bit for bit."""
    out = layout.empty()
    n = out.numel()
    if n:
        in_row = in_a_row(rows, bits)
        small = rows.element_size() < in_row * out.element_size()  # rows of int8, to be converted
        values = rows.view(torch.int8 if small else INTEGERS[out.element_size()])
        flat = out.as_strided((n,), (1,))
        if not small or out.dtype == torch.bool:
            flat = flat.view(INTEGERS[out.element_size()])
        with on(out.device):  # the first value of row c is that of code c, the others those of code 0
            _decode[grid(n)](packed, values, flat, n, in_row, BITS=bits, GROUPS=GROUPS)
    return out


def multiply(grad: Tensor, packed: Tensor, rows: Tensor, bits: int, layout: Layout) -> Tensor:
    """As `_dispatch.multiply`; for values of `computed_in(layout.dtype)`."""
    out = layout.empty()
    n = out.numel()
    if n:
        in_row = in_a_row(rows, bits)
        grad, values = layout.like(grad.detach()), rows.view(computed_in(layout.dtype))
        with on(out.device):
            _multiply[grid(n)](
                in_memory_order(grad), packed, values, out.as_strided((n,), (1,)), n, in_row, BITS=bits, GROUPS=GROUPS
            )
    return out


def decode_beside(output: Tensor, packed: Tensor | None, table: Tensor, layout: Layout) -> Tensor:
    """As `_beside.decode_beside`, bit for bit."""
    out = layout.empty()
    n = out.numel()
    if n:
        bits_of = INTEGERS[out.element_size()]
        flat, table = out.as_strided((n,), (1,)).view(bits_of), table.view(bits_of)
        with on(out.device):
            for start, y, side, m in _outputs(output, packed, table, layout):
                _decode_beside[grid(m)](y, side, table, flat[start:], m, SIDES=packed is not None, GROUPS=GROUPS)
    return out


def multiply_beside(grad: Tensor, output: Tensor, packed: Tensor | None, table: Tensor, layout: Layout) -> Tensor:
    """As `_dispatch.multiply_beside`; for a table of `computed_in(layout.dtype)`."""
    out = layout.empty()
    n = out.numel()
    if n:
        flat, factors = out.as_strided((n,), (1,)), in_memory_order(layout.like(grad.detach()))
        with on(out.device):
            for start, y, side, m in _outputs(output, packed, table, layout):
                _multiply_beside[grid(m)](
                    factors[start:], y, side, table, flat[start:], m, SIDES=packed is not None, GROUPS=GROUPS
                )
    return out


def _outputs(
    output: Tensor, packed: Tensor | None, table: Tensor, layout: Layout
) -> Iterator[tuple[int, Tensor, Tensor, int]]:
    """Pieces of an output, with their sides: where each starts, and its length."""
    for start, piece in _pieces(in_order_of(layout, output.detach()), whole=True):
        y = piece.view(torch.int16) if piece.dtype == torch.bfloat16 else piece
        side = packed[start // 8 :] if packed is not None else table  # not read where there are no sides
        yield start, y, side, piece.numel()


def _pieces(x: Tensor, whole: bool) -> Any:
    """All of a dense tensor at once; else chunk by chunk, copying one at a time."""
    if whole and is_dense(x):
        return [(0, in_memory_order(x))] if x.numel() else []
    return chunks(x)


def _is_known(coder: Coder, dtype: torch.dtype, bits: int) -> bool:
    if isinstance(coder, Thresholds):
        return dtype in FLOATS and coder.count == (1 << bits) - 1
    if isinstance(coder, Above):
        return dtype in FLOATS and bits == 1
    return isinstance(coder, Lookup) or (coder is not_zero and bits == 1)


def _encode_piece(piece: Tensor, bits: int, coder: Coder, packed: Tensor) -> None:
    n = piece.numel()
    n_bytes = packed_bytes(n, bits)
    if not _is_known(coder, piece.dtype, bits):
        _pack[grid(n)](coder(piece).view(torch.uint8), packed, n, n_bytes, BITS=bits, GROUPS=GROUPS)
    elif isinstance(coder, Thresholds):
        limits = coder.limits(piece.dtype, piece.device)
        _encode_thresholds[grid(n)](piece, packed, limits, n, n_bytes, BITS=bits, FOLDED=coder.folded, GROUPS=GROUPS)
    elif isinstance(coder, Above):
        limit = coder.limits(piece.dtype, piece.device)
        _encode_above[grid(n)](piece, packed, limit, n, n_bytes, GROUPS=GROUPS)
    elif isinstance(coder, Lookup):
        _encode_lookup[grid(n)](piece.view(torch.int16), packed, coder.table, n, n_bytes, BITS=bits, GROUPS=GROUPS)
    else:
        bits_of = piece.view(INTEGERS[piece.element_size()])
        _encode_not_zero[grid(n)](bits_of, packed, n, n_bytes, GROUPS=GROUPS)
