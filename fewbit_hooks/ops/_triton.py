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

of which the `bits` low bytes are stored at byte `group * bits`. An element past the end has code 0.

1. Where a program starts is of 64 bits: tensors may have more than 2**31 elements, and `index * bits` overflows 32 bits
   sooner. From there on 32 bits do, at half the instructions.
2. Every load and store is masked, except of tables (boundaries, values, codes by value): their indices are in range by
   construction, whatever the data is.
3. What changes from codebook to codebook is read from a small tensor, so that a kernel is compiled once for each dtype
   and number of bits. Boundaries are float32 except for float64 inputs: `Thresholds.limits` says why that is exact.
4. The number of elements is left to Triton to specialise on: knowing that 16 divides it, it moves 16 bytes at a time.
5. What is only moved (stand-ins, values to be looked up) is moved as integers: no NaN changes its bits.

Only what Triton 3.x has from the start is used: `load`, `store`, `arange`, `sum`, `where`, `static_range`.

NOTE [ Instructions ]

A GPU moves a byte in the time of few instructions: 7 for each, at 4.8 TB/s and 132 multiprocessors of 128 lanes at
1.98 GHz. To encode bfloat16 at 3 bits moves 2.4 bytes an element, so that what takes the time are the instructions from
17 on. `benchmarks/count_instructions.py` counts them, and needs no GPU for it. What keeps them few:

1. A word is moved in *units*, as large as fit: 1 byte for 1, 3, 5 and 7 bits, 2 for 2 and 6, 4 for 4, and 8 for 8.
   Where the last group is not whole, or the memory does not lie so, in bytes (`units`).
2. A word is held by the thread that holds its elements. Two neighbouring ones in a thread would be moved at once, but
   had to change places with those of other threads first, through shared memory: hence `max_contiguous`.
3. A code is searched for among the boundaries; the first three steps' are in registers.
4. Whether an element is not finite is asked in the same pass (`note_not_a_number`), at two instructions.
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
from ._coders import Between, Coder, Lookup, Thresholds
from ._layout import INTEGERS, Layout, chunks, computed_in, in_memory_order, is_dense
from ._torch import in_a_row, not_a_number, packed_bytes
from ._two_values import encode_two_values as encode_two_values  # no kernel would spare the host the waiting
from ._two_values import not_zero

GROUPS = 256
"""Groups of 8 elements a program: an estimate (16 elements a thread at 4 warps), not yet measured on a GPU."""

UNITS = {2: torch.uint16, 4: torch.uint32, 6: torch.uint16, 8: torch.uint64}
"""The unit for each number of bits; of the others it is a byte."""

FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


# --- kernels: arithmetic only ---


@triton.jit
def elements(n, GROUPS: tl.constexpr):
    """This program's first element, a 64-bit offset; its elements from there, a group a row; how many there are."""
    start = tl.program_id(0).to(tl.int64) * (GROUPS * 8)
    index = tl.arange(0, GROUPS)[:, None] * 8 + tl.arange(0, 8)[None, :]
    return start, index, tl.minimum(n - start, GROUPS * 8).to(tl.int32)


@triton.jit
def _is_beyond(v, limit):
    return (v <= limit) == 0


@triton.jit
def code_of(v, boundaries, BITS: tl.constexpr, FOLDED: tl.constexpr):
    """Code i where boundaries[i-1] < v <= boundaries[i]; NaN, which is never <=, gets the last code.

    A binary search: each step decides one bit, the highest first.
    """
    if FOLDED:
        v = tl.abs(v)
    before = boundaries - 1
    H: tl.constexpr = 1 << (BITS - 1)
    first = _is_beyond(v, tl.load(before + H))
    code = tl.where(first, H, 0)
    if BITS >= 2:
        Q: tl.constexpr = H // 2
        second = _is_beyond(v, tl.where(first, tl.load(before + 3 * Q), tl.load(before + Q)))
        code += tl.where(second, Q, 0)
    if BITS >= 3:
        E: tl.constexpr = H // 4
        low = tl.where(second, tl.load(before + 3 * E), tl.load(before + E))
        high = tl.where(second, tl.load(before + 7 * E), tl.load(before + 5 * E))
        code += tl.where(_is_beyond(v, tl.where(first, high, low)), E, 0)
    for step in tl.static_range(3, BITS):
        bit = 1 << (BITS - 1 - step)
        code += tl.where(_is_beyond(v, tl.load(before + bit + code)), bit, 0)
    return code


@triton.jit
def _units(packed, start, left, BITS: tl.constexpr, GROUPS: tl.constexpr):
    """Where a program's groups are packed, in units, and the bits that there are of each, or more."""
    group = tl.max_contiguous(tl.arange(0, GROUPS), 1)
    each = BITS * 8 // packed.dtype.element_ty.primitive_bitwidth
    return packed + start // 8 * each + group * each, (left - group * 8) * BITS


@triton.jit
def store_packed(packed, start, code, left, BITS: tl.constexpr, GROUPS: tl.constexpr):
    """Pack the codes of a program's elements."""
    UNIT: tl.constexpr = packed.dtype.element_ty.primitive_bitwidth
    if BITS > 4:
        code = code.to(tl.int64)
    word = tl.sum(code << (tl.arange(0, 8) * BITS).to(code.dtype)[None, :], axis=1)
    at, bits_left = _units(packed, start, left, BITS, GROUPS)
    if UNIT == 8:  # the last group may not be whole; larger units are of whole groups alone
        WORD: tl.constexpr = word.dtype.primitive_bitwidth
        past = (WORD - tl.minimum(tl.maximum(bits_left, 1), BITS * 8)).to(word.dtype)
        word = (word << past).to(tl.uint64 if BITS > 4 else tl.uint32, bitcast=True) >> past
    for i in tl.static_range(BITS * 8 // UNIT):
        tl.store(at + i, (word >> (i * UNIT)).to(packed.dtype.element_ty), mask=bits_left > i * UNIT)


@triton.jit
def load_code(packed, start, left, BITS: tl.constexpr, GROUPS: tl.constexpr):
    """The codes of a program's elements."""
    UNIT: tl.constexpr = packed.dtype.element_ty.primitive_bitwidth
    kind: tl.constexpr = tl.int64 if BITS > 4 else tl.int32
    at, bits_left = _units(packed, start, left, BITS, GROUPS)
    word = tl.zeros([GROUPS], kind)
    for i in tl.static_range(BITS * 8 // UNIT):
        word |= tl.load(at + i, mask=bits_left > i * UNIT, other=0).to(kind) << (i * UNIT)
    shift = (tl.arange(0, 8) * BITS).to(kind)
    return ((word[:, None] >> shift[None, :]) & ((1 << BITS) - 1)).to(tl.int32)


@triton.jit
def note_not_a_number(v, flag, FLAG: tl.constexpr):
    """Make the flag NaN if an element is, or, at FLAG 2, if it is infinite; at FLAG 0 there is none to be made."""
    if FLAG > 0:
        of_group = tl.sum(v * 0.0 if FLAG == 2 else tl.where(v == v, 0.0, v), axis=1)
        tl.store(flag + tl.zeros_like(of_group).to(tl.int32), of_group, mask=of_group != of_group)


@triton.jit
def _encode_thresholds(
    x, packed, boundaries, flag, n,
    BITS: tl.constexpr, FOLDED: tl.constexpr, FLAG: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    start, index, left = elements(n, GROUPS)
    v = tl.load(x + start + index, mask=index < left, other=0.0).to(boundaries.dtype.element_ty)
    note_not_a_number(v, flag, FLAG)
    store_packed(packed, start, code_of(v, boundaries, BITS, FOLDED), left, BITS, GROUPS)


@triton.jit
def _encode_between(
    x, packed, limits, n,
    OPEN_LOW: tl.constexpr, OPEN_HIGH: tl.constexpr, NAN: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    start, index, left = elements(n, GROUPS)
    v = tl.load(x + start + index, mask=index < left, other=0.0).to(limits.dtype.element_ty)
    low, high = tl.load(limits), tl.load(limits + 1)
    if NAN:
        between = ((v <= low if OPEN_LOW else v < low) | (v >= high if OPEN_HIGH else v > high)) == 0
    else:
        between = (v > low if OPEN_LOW else v >= low) & (v < high if OPEN_HIGH else v <= high)
    store_packed(packed, start, tl.where(between, 1, 0), left, 1, GROUPS)


@triton.jit
def _encode_lookup(x, packed, table, n, BITS: tl.constexpr, GROUPS: tl.constexpr):
    """`x`: the bits of 16-bit values, int16."""
    start, index, left = elements(n, GROUPS)
    value = tl.load(x + start + index, mask=index < left, other=0).to(tl.int32) & 0xFFFF
    store_packed(packed, start, tl.load(table + value).to(tl.int32), left, BITS, GROUPS)


@triton.jit
def _encode_not_zero(x, packed, n, GROUPS: tl.constexpr):
    """`x`: the bits of any values, as integers."""
    start, index, left = elements(n, GROUPS)
    code = tl.where(tl.load(x + start + index, mask=index < left, other=0) != 0, 1, 0)
    store_packed(packed, start, code, left, 1, GROUPS)


@triton.jit
def _pack(codes, packed, n, BITS: tl.constexpr, GROUPS: tl.constexpr):
    start, index, left = elements(n, GROUPS)
    code = tl.load(codes + start + index, mask=index < left, other=0).to(tl.int32)
    store_packed(packed, start, code, left, BITS, GROUPS)


@triton.jit
def _decode(packed, values, out, n, IN_ROW: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr):
    start, index, left = elements(n, GROUPS)
    value = tl.load(values + load_code(packed, start, left, BITS, GROUPS) * IN_ROW)
    if values.dtype.element_ty != out.dtype.element_ty:
        # small integers, on the way to any dtype (the interpreter has no int8 to bfloat16)
        value = value.to(tl.float32)
    tl.store(out + start + index, value.to(out.dtype.element_ty), mask=index < left)


@triton.jit
def _at_output(output, packed, start, index, left, SIDES: tl.constexpr, GROUPS: tl.constexpr):
    """Where a table has what belongs to the elements at `index`.

    `output`: int16, the bits of bfloat16 values; else floats, which are looked up as float16.
    """
    y = tl.load(output + start + index, mask=index < left, other=0)
    if output.dtype.element_ty != tl.int16:
        # by way of float32, as torch converts float64: rounding once and rounding twice may differ
        y = y.to(tl.float32).to(tl.float16).to(tl.int16, bitcast=True)
    at = y.to(tl.int32) & 0xFFFF
    if SIDES:
        at += load_code(packed, start, left, 1, GROUPS) << 16
    return at


@triton.jit
def _decode_beside(output, packed, table, out, n, SIDES: tl.constexpr, GROUPS: tl.constexpr):
    start, index, left = elements(n, GROUPS)
    tl.store(
        out + start + index,
        tl.load(table + _at_output(output, packed, start, index, left, SIDES, GROUPS)),
        mask=index < left,
    )


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


@triton.jit
def _multiply(grad, packed, values, out, n, IN_ROW: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr):
    """Computed in the dtype of `values`, and rounded once."""
    start, index, left = elements(n, GROUPS)
    g = tl.load(grad + start + index, mask=index < left, other=0.0).to(values.dtype.element_ty)
    value = tl.load(values + load_code(packed, start, left, BITS, GROUPS) * IN_ROW)
    tl.store(out + start + index, round_to(g * value, out), mask=index < left)


@triton.jit
def _multiply_beside(grad, output, packed, table, out, n, SIDES: tl.constexpr, GROUPS: tl.constexpr):
    """`output`: as for `_decode_beside`; computed in the dtype of `table`, and rounded once."""
    start, index, left = elements(n, GROUPS)
    g = tl.load(grad + start + index, mask=index < left, other=0.0).to(table.dtype.element_ty)
    value = tl.load(table + _at_output(output, packed, start, index, left, SIDES, GROUPS))
    tl.store(out + start + index, round_to(g * value, out), mask=index < left)


# --- launchers: they allocate, size the grid, and see to the device ---


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current stream of the current device; the interpreter runs on the CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def grid(n: int) -> tuple[int]:
    """The number of programs for n elements."""
    return (triton.cdiv(n, 8 * GROUPS),)


def units(packed: Tensor, bits: int, n: int) -> Tensor:
    """The packed bytes of n codes as the kernels move them; see NOTE [ Instructions ]."""
    unit = UNITS.get(bits)
    if unit is None or n % 8 or packed.data_ptr() % unit.itemsize:
        return packed
    return packed.view(unit)


def new_flag(x: Tensor, or_infinite: bool | None) -> tuple[Tensor | None, int]:
    """0, for a kernel to make NaN of, and what for, as it is told; none where `or_infinite` is None."""
    if or_infinite is None:
        return None, 0
    return torch.zeros((), dtype=computed_in(x.dtype), device=x.device), 2 if or_infinite else 1


def encode(x: Tensor, bits: int, coder: Coder) -> Tensor:
    """As `_torch.encode`, byte for byte.

    A coder that is neither a `Thresholds`, a `Between`, a `Lookup` nor `not_zero` is a predicate in plain torch: it is
    run chunk by chunk, and what it gives is packed here.
    """
    return _encode(x, bits, coder, None)[0]


def encode_flagged(x: Tensor, bits: int, thresholds: Thresholds, *, or_infinite: bool) -> tuple[Tensor, Tensor]:
    """As `_dispatch.encode_flagged`."""
    if not _is_known(thresholds, x.dtype, bits):
        return encode(x, bits, thresholds), not_a_number(x, or_infinite=or_infinite)
    packed, flag = _encode(x, bits, thresholds, or_infinite)
    assert flag is not None
    return packed, flag


def _encode(x: Tensor, bits: int, coder: Coder, or_infinite: bool | None) -> tuple[Tensor, Tensor | None]:
    flag, kind = new_flag(x, or_infinite)
    packed = torch.empty(packed_bytes(x.numel(), bits), dtype=torch.uint8, device=x.device)
    x = x.detach()
    with on(x.device):
        for start, piece in _pieces(x, whole=_is_known(coder, x.dtype, bits)):
            its_packed = packed[start * bits // 8 :][: packed_bytes(piece.numel(), bits)]
            _encode_piece(piece, bits, coder, its_packed, flag, kind)
    return packed, flag


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
            _decode[grid(n)](units(packed, bits, n), values, flat, n, IN_ROW=in_row, BITS=bits, GROUPS=GROUPS)
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
                in_memory_order(grad), units(packed, bits, n), values, out.as_strided((n,), (1,)), n,
                IN_ROW=in_row, BITS=bits, GROUPS=GROUPS,
            )  # fmt: skip
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
    if isinstance(coder, Between):
        return dtype in FLOATS and bits == 1
    return isinstance(coder, Lookup) or (coder is not_zero and bits == 1)


def _encode_piece(piece: Tensor, bits: int, coder: Coder, packed: Tensor, flag: Tensor | None, kind: int) -> None:
    n = piece.numel()
    packed = units(packed, bits, n)
    if not _is_known(coder, piece.dtype, bits):
        _pack[grid(n)](coder(piece).view(torch.uint8), packed, n, BITS=bits, GROUPS=GROUPS)
    elif isinstance(coder, Thresholds):
        limits = coder.limits(piece.dtype, piece.device)
        pointer = limits if flag is None else flag  # one is wanted where none is written
        _encode_thresholds[grid(n)](
            piece, packed, limits, pointer, n, BITS=bits, FOLDED=coder.folded, FLAG=kind, GROUPS=GROUPS
        )
    elif isinstance(coder, Between):
        limits = coder.limits(piece.dtype, piece.device)
        _encode_between[grid(n)](
            piece, packed, limits, n,
            OPEN_LOW=coder.open_low, OPEN_HIGH=coder.open_high, NAN=coder.nan, GROUPS=GROUPS,
        )  # fmt: skip
    elif isinstance(coder, Lookup):
        _encode_lookup[grid(n)](piece.view(torch.int16), packed, coder.table, n, BITS=bits, GROUPS=GROUPS)
    else:
        bits_of = piece.view(INTEGERS[piece.element_size()])
        _encode_not_zero[grid(n)](bits_of, packed, n, GROUPS=GROUPS)
