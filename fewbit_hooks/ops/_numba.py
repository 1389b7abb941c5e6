"""The numba backend: the bytes of `_torch.py` on the CPU, by compiled loops, each tensor read once.

Imported where numba is installed, when the first CPU tensor is coded, by `_dispatch.py`; never by `import
fewbit_hooks`.

NOTE [ Compiled loops ]

1. A loop is compiled when it first meets a dtype, which takes a moment, and kept on disk by numba.
2. It runs without the GIL: on the calling thread, or, of many elements, on those of torch (NOTE [ Torch's threads ] in
   `_team.py`). Numba's own threads survive no fork.
3. All loops take the same: `source`, what is read; `codes`, packed; a `table`; `target`, what is written; the bits of
   a code; a scale. What a loop does not use is empty. They are handed over as addresses: each call of torch or numpy
   that prepares an array takes 5 us and more where a step has cooled the caches. (measured, 24,576 float32 elements in
   such a step) to encode a bit takes 45 us in place of 105, to decode beside an output 158 in place of 251.
4. What is only moved (stand-ins, values to be looked up) is moved as integers. So a dtype that numba does not know is
   none of its business, and no NaN changes its bits.
5. Indices are in range by construction, whatever the data is: numba does not check them.
6. float32 is rounded to float16 by the processor's own instruction: x86 has had it since 2012 (F16C), every 64-bit ARM
   has it. By integers it would take longer than all the rest. Where there is none, LLVM calls a function that is not
   there: then there is no backend.

(measured, AVX-512, two cores, 2^22 float32 elements; in brackets plain torch) encode and decode 3 bits 0.5 ns an
element (1.2), beside an output 0.6 (1.2), a mask 0.26 (0.9).
"""

from __future__ import annotations

import functools
import math
import platform
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core.registry import cpu_target
from numba.extending import intrinsic, overload, register_jitable
from torch import Tensor

from . import _beside, _team, _torch, _two_values
from ._beside import in_order_of
from ._coders import FEW as FEW_IN_TORCH
from ._coders import Between, Coder, Lookup, Thresholds
from ._layout import Layout, chunks, pieces
from ._torch import in_a_row, packed_bytes
from ._two_values import as_integers

if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
    raise ImportError("NUMBA_DISABLE_JIT is set")
_features = cpu_target.target_context.codegen().magic_tuple()[2]  # that code is made for
if "+f16c" not in _features and platform.machine() not in ("aarch64", "arm64"):
    raise ImportError("numba makes code for a processor that does not convert float32 to float16")

Loop = Callable[..., None]
Types = tuple[Any, Any, Any]
"""Of the elements of a loop's source, table and target."""
Way = tuple[Loop, Types, Tensor, float]
"""The loop, its types, its table and its scale."""

CPU = torch.device("cpu")

FLOATS = {torch.float32: np.float32, torch.float64: np.float64, torch.float16: np.uint16, torch.bfloat16: np.uint16}
"""As what numba reads floats whose values count: 16-bit ones by their bits, which are looked up."""
MOVED = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}
"""By size in bytes: as what it moves and compares the others; `_layout.INTEGERS` in its own words."""


# --- loops: arithmetic only, and of whole groups of 8 elements: a count that is known is unrolled ---


@intrinsic
def _half(typing_context, value):
    """The bits of a float32 as a float16."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), generate


def _sixteen_bits(value, scale):
    """As `_coders.sixteen_bits`: what is looked up of an element."""


@overload(_sixteen_bits, inline="always")
def _typed_sixteen_bits(value, scale):
    if isinstance(value, types.Integer):
        return lambda value, scale: value
    return lambda value, scale: _half(np.float32(value) * np.float32(scale))


@register_jitable
def _encode_lookup(source, codes, table, target, bits, scale):
    """`table`: the code of each 16-bit float."""
    for group in range(source.size // 8):
        word = np.uint64(0)
        for i in range(8):
            word |= np.uint64(table[_sixteen_bits(source[8 * group + i], scale)]) << np.uint64(i * bits)
        for byte in range(bits):
            codes[group * bits + byte] = np.uint8(word >> np.uint64(8 * byte))


@register_jitable
def _encode_between(source, codes, table, target, bits, scale):
    """`table`: `Between.limits`."""
    low, high = table[0], table[1]
    open_low, open_high, nan = table[2] != 0, table[3] != 0, table[4] != 0
    for group in range(source.size // 8):
        byte = np.uint8(0)
        for i in range(8):
            v = source[8 * group + i]
            outside = (v < low) | (v > high) | (open_low & (v == low)) | (open_high & (v == high))
            byte |= np.uint8((not outside) & (nan | (v == v))) << np.uint8(i)
        codes[group] = byte


@_team.cached(numba.njit, nogil=True)
def _first(x):
    """The first that is not 0; 0 where there is none."""
    for v in x:
        if v != 0:
            return v
    return x.dtype.type(0)


@register_jitable
def _encode_mask(source, codes, table, target, bits, scale):
    """Whether each element is 0 or the other value, `table[0]`; if one is neither, `table[1]` is set to 1."""
    third, other = np.uint8(0), table[0]
    for group in range(source.size // 8):
        byte = np.uint8(0)
        for i in range(8):
            v = source[8 * group + i]
            one = np.uint8(v != 0)
            third |= np.uint8(one & np.uint8(v != other))
            byte |= one << np.uint8(i)
        codes[group] = byte
    if third:
        table[1] = 1


@register_jitable
def _decode_bits(source, codes, table, target, bits, scale):
    """1 bit: a choice, which vectors can make. `table`: as for `_decode`."""
    zero, one = table[0], table[table.size >> 1]
    for group in range(target.size // 8):
        byte = np.uint32(codes[group])
        for i in range(8):
            target[8 * group + i] = one if (byte >> np.uint32(i)) & np.uint32(1) else zero


@register_jitable
def _decode(source, codes, table, target, bits, scale):
    """`table`: rows, of which row c begins with the value of code c."""
    low, in_row = np.uint64((1 << bits) - 1), np.uint64(table.size >> bits)
    for group in range(target.size // 8):
        word = np.uint64(0)
        for byte in range(bits):
            word |= np.uint64(codes[group * bits + byte]) << np.uint64(8 * byte)
        for i in range(8):
            target[8 * group + i] = table[((word >> np.uint64(i * bits)) & low) * in_row]


@register_jitable
def _decode_beside(source, codes, table, target, bits, scale):
    """`source`: the output; `codes`: the sides."""
    for group in range(source.size // 8):
        byte = np.uint32(codes[group])
        for i in range(8):
            side = (byte >> np.uint32(i)) & np.uint32(1)
            at = np.uint32(_sixteen_bits(source[8 * group + i], scale))
            target[8 * group + i] = table[at + (side << np.uint32(16))]


@register_jitable
def _decode_from(source, codes, table, target, bits, scale):
    """The same without sides."""
    for i in range(source.size):
        target[i] = table[_sixteen_bits(source[i], scale)]


# --- launchers: they allocate, and run loops; what has no whole groups is left to plain torch ---

FEW = 1 << 17
"""(measured, 2 cores) fewer elements take the calling thread about as long as it takes the team to begin and end."""


def _run(
    loop: Loop,
    of: Types,
    n: int,
    *,
    source: int = 0,
    codes: int = 0,
    table: int = 0,
    entries: int = 0,
    target: int = 0,
    bits: int = 1,
    scale: float = 1.0,
) -> None:
    """Run a loop over n elements in whole groups; all that it takes is given by its address."""
    if n < FEW or _team.threads() == 1:
        _alone(loop, *of)(n // 8, bits, source, codes, table, entries, target, scale)
        return
    job = np.array([n // 8, bits, source, codes, table, entries, target, 0])
    job.view(np.float64)[-1] = scale
    _team.run(_together(loop, *of), job)


@functools.cache
def _alone(loop: Loop, of_source: Any, of_table: Any, of_target: Any) -> Any:
    """The loop on the calling thread."""

    @_team.cached(numba.njit, nogil=True)
    def alone(groups, bits, source, codes, table, entries, target, scale):
        loop(
            _team.array_at(source, groups * 8, of_source),
            _team.array_at(codes, groups * bits, np.uint8),
            _team.array_at(table, entries, of_table),
            _team.array_at(target, groups * 8, of_target),
            bits,
            scale,
        )

    return alone


@functools.cache
def _together(loop: Loop, of_source: Any, of_table: Any, of_target: Any) -> int:
    """The address of the loop as a region of torch's team: each thread's share of the groups."""
    of_one, of_other = 8 * of_source().itemsize, 8 * of_target().itemsize

    @_team.region
    def region(data):
        job = _team.job_at(data)
        first, groups = _team.share_of(job[0])
        bits = job[1]
        loop(
            _team.array_at(job[2] + first * of_one, groups * 8, of_source),
            _team.array_at(job[3] + first * bits, groups * bits, np.uint8),
            _team.array_at(job[4], job[5], of_table),
            _team.array_at(job[6] + first * of_other, groups * 8, of_target),
            bits,
            _team.scale_of(data),
        )

    address: int = region.address
    return address


def encode(x: Tensor, bits: int, coder: Coder) -> Tensor:
    """As `_torch.encode`, byte for byte.

    A coder that neither compares nor looks up (a predicate, thresholds of float64) is left to that.
    """
    n = x.numel()
    way = _way(coder, x.dtype) if not n % 8 and isinstance(coder, (Lookup, Thresholds, Between)) else None
    if way is None:
        return _torch.encode(x, bits, coder)
    loop, of, table, scale = way
    packed = torch.empty(packed_bytes(n, bits), dtype=torch.uint8, device=CPU)
    at, entries = packed.data_ptr(), table.numel()
    for begin, piece in pieces(x):
        codes, elements = at + begin // 8 * bits, piece.numel()
        _run(
            loop, of, elements, source=piece.data_ptr(), codes=codes, table=table.data_ptr(), entries=entries,
            bits=bits, scale=scale,
        )  # fmt: skip
    return packed


def _way(coder: Lookup | Thresholds | Between, dtype: torch.dtype) -> Way | None:
    """How elements of the dtype are coded; None where no loop does it. The coder remembers it."""
    if dtype not in coder.ways:
        found = coder.lookup(dtype, CPU)
        if found is not None:
            coder.ways[dtype] = _encode_lookup, (FLOATS[dtype], np.uint8, np.uint8), found[0].table, found[1]
        elif isinstance(coder, Between):
            of = FLOATS[dtype]
            coder.ways[dtype] = _encode_between, (of, of, np.uint8), coder.limits(dtype, CPU), 1.0
        else:
            coder.ways[dtype] = None
    way: Way | None = coder.ways[dtype]
    return way


def encode_two_values(x: Tensor) -> tuple[Tensor, int] | None:
    """As `_two_values.encode_two_values`."""
    if x.numel() % 8:
        return _two_values.encode_two_values(x)
    packed = torch.empty(packed_bytes(x.numel(), 1), dtype=torch.uint8, device=CPU)
    other, moved = 0, MOVED[x.element_size()]
    for begin, piece in chunks(as_integers(x.detach())):
        other = other or int(_first(piece.numpy()))
        if other < 0:
            return None
        table = np.array([other, 0], moved)
        _run(
            _encode_mask, (moved, moved, np.uint8), piece.numel(), source=piece.data_ptr(),
            codes=packed.data_ptr() + begin // 8, table=table.ctypes.data, entries=2,
        )  # fmt: skip
        if table[1]:
            return None
    return packed, other


def decode(packed: Tensor, rows: Tensor, bits: int, layout: Layout) -> Tensor:
    """As `_torch.decode`, bit for bit; and by that, of many elements, where an index of a row is a byte or two, which
    its gather reads."""
    in_row = in_a_row(rows, bits)
    n, size = math.prod(layout.shape), layout.dtype.itemsize
    small = rows.element_size() < in_row * size  # rows of int8, to be converted
    if n % 8 or (n > FEW_IN_TORCH and bits in (2, 4, 8)) or (small and size < 4):
        return _torch.decode(packed, rows, bits, layout)
    of_table, of_target = (np.int8, FLOATS[layout.dtype]) if small else (MOVED[size], MOVED[size])
    out = layout.empty()
    _run(
        _decode_bits if bits == 1 else _decode, (np.uint8, of_table, of_target), n, codes=packed.data_ptr(),
        table=rows.data_ptr(), entries=in_row << bits, target=out.data_ptr(), bits=bits,
    )  # fmt: skip
    return out


def decode_beside(output: Tensor, packed: Tensor | None, table: Tensor, layout: Layout) -> Tensor:
    """As `_beside.decode_beside`, bit for bit."""
    if output.numel() % 8:
        return _beside.decode_beside(output, packed, table, layout)
    out = layout.empty()
    size = layout.dtype.itemsize
    of = FLOATS[output.dtype], MOVED[size], MOVED[size]
    sides, loop = (0, _decode_from) if packed is None else (packed.data_ptr(), _decode_beside)
    for begin, piece in pieces(output if output.stride() == layout.stride else in_order_of(layout, output.detach())):
        _run(
            loop, of, piece.numel(), source=piece.data_ptr(), codes=sides + begin // 8, table=table.data_ptr(),
            entries=table.numel(), target=out.data_ptr() + begin * size,
        )  # fmt: skip
    return out
