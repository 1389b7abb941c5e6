"""The numba backend: the bytes of `_torch.py` on the CPU, by compiled loops, each tensor read once.

Imported where numba is installed, when the first CPU tensor is coded, by `_dispatch.py`; never by `import
fewbit_hooks`.

NOTE [ Compiled loops ]

1. A loop is compiled when it first meets a dtype, which takes a moment, and kept on disk by numba.
2. It runs without the GIL: on the calling thread, or, of many elements, on those of torch (NOTE [ Torch's threads ] in
   `_team.py`). Numba's own threads survive no fork.
3. All loops take the same: `values`, the elements as they lie in memory; `halves`, 16-bit floats by their bits, of
   which values are looked up; `codes`, packed; a `table`; and the bits of a code. What a loop does not use is empty.
4. What is only moved (stand-ins, values to be looked up) is moved as integers. So a dtype that numba does not know is
   none of its business, and no NaN changes its bits.
5. Indices are in range by construction, whatever the data is: numba does not check them.

(measured, AVX-512, two cores, 2^22 float32 elements; in brackets plain torch) encode and decode 3 bits 0.5 ns an
element (1.2), beside an output 0.6 (1.2), a mask 0.26 (0.9). Of 24,576 elements each takes 11 to 25 us, and 27 to 66.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from numba.extending import register_jitable
from torch import Tensor

from . import _beside, _team, _torch, _two_values
from ._beside import in_order_of
from ._coders import Coder, Lookup, Thresholds, sixteen_bits
from ._layout import INTEGERS, Layout, chunks
from ._torch import in_a_row, packed_bytes
from ._two_values import as_integers

if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
    raise ImportError("NUMBA_DISABLE_JIT is set")

Loop = Callable[..., None]
NONE = np.empty(0, np.uint8)
NO_HALVES = np.empty(0, np.uint16)


# --- loops: arithmetic only, and of whole groups of 8 elements: a count that is known is unrolled ---


@register_jitable
def _encode_lookup(values, halves, codes, table, bits):
    """`table`: the code of each 16-bit float."""
    for group in range(halves.size // 8):
        word = np.uint64(0)
        for i in range(8):
            word |= np.uint64(table[halves[8 * group + i]]) << np.uint64(i * bits)
        for byte in range(bits):
            codes[group * bits + byte] = np.uint8(word >> np.uint64(8 * byte))


@_team.cached(numba.njit, nogil=True)
def _first(x):
    """The first that is not 0; 0 where there is none."""
    for v in x:
        if v != 0:
            return v
    return x.dtype.type(0)


@register_jitable
def _encode_mask(values, halves, codes, table, bits):
    """Whether each element is 0 or the other value, `table[0]`; if one is neither, `table[1]` is set to 1."""
    third, other = np.uint8(0), table[0]
    for group in range(values.size // 8):
        byte = np.uint8(0)
        for i in range(8):
            v = values[8 * group + i]
            one = np.uint8(v != 0)
            third |= np.uint8(one & np.uint8(v != other))
            byte |= one << np.uint8(i)
        codes[group] = byte
    if third:
        table[1] = 1


@register_jitable
def _decode_bits(values, halves, codes, table, bits):
    """1 bit: a choice, which vectors can make."""
    zero, one = table[0], table[1]
    for group in range(values.size // 8):
        byte = np.uint32(codes[group])
        for i in range(8):
            values[8 * group + i] = one if (byte >> np.uint32(i)) & np.uint32(1) else zero


@register_jitable
def _decode(values, halves, codes, table, bits):
    low = np.uint64((1 << bits) - 1)
    for group in range(values.size // 8):
        word = np.uint64(0)
        for byte in range(bits):
            word |= np.uint64(codes[group * bits + byte]) << np.uint64(8 * byte)
        for i in range(8):
            values[8 * group + i] = table[(word >> np.uint64(i * bits)) & low]


@register_jitable
def _decode_beside(values, halves, codes, table, bits):
    """`halves`: the output; `codes`: the sides."""
    for group in range(values.size // 8):
        byte = np.uint32(codes[group])
        for i in range(8):
            side = (byte >> np.uint32(i)) & np.uint32(1)
            values[8 * group + i] = table[np.uint32(halves[8 * group + i]) + (side << np.uint32(16))]


@register_jitable
def _decode_from(values, halves, codes, table, bits):
    """The same without sides."""
    for i in range(values.size):
        values[i] = table[halves[i]]


# --- launchers: they allocate, and run loops; what has no whole groups is left to plain torch ---

FEW = 1 << 17
"""(measured, 2 cores) fewer elements take the calling thread about as long as it takes the team to begin and end."""


def _run(loop: Loop, codes: Any, table: Any, bits: int = 1, *, values: Any = NONE, halves: Any = NO_HALVES) -> None:
    """Run a loop over all groups."""
    n = max(values.size, halves.size)
    if n < FEW or _team.threads() == 1:
        _alone(loop)(values, halves, codes, table, bits)
        return
    at = [array.ctypes.data for array in (values, halves, codes, table)]
    _team.run(_together(loop, values.dtype.type, table.dtype.type), np.array([n // 8, bits, *at, table.size]))


@functools.cache
def _alone(loop: Loop) -> Any:
    """The loop on the calling thread."""
    return _team.cached(numba.njit, nogil=True)(loop)


@functools.cache
def _together(loop: Loop, of_values: Any, of_table: Any) -> int:
    """The address of the loop as a region of torch's team: each thread's share of the groups."""
    size = of_values().itemsize

    @_team.region
    def region(data):
        job = _team.job_at(data)
        first, n = _team.share_of(job[0])
        bits = job[1]
        values = _team.array_at(job[2] + first * 8 * size, n * 8, of_values)
        halves = _team.array_at(job[3] + first * 8 * 2, n * 8, np.uint16)
        codes = _team.array_at(job[4] + first * bits, n * bits, np.uint8)
        loop(values, halves, codes, _team.array_at(job[5], job[6], of_table), bits)

    address: int = region.address
    return address


def encode(x: Tensor, bits: int, coder: Coder) -> Tensor:
    """As `_torch.encode`, byte for byte.

    A coder that looks nothing up (a predicate, thresholds of float64) is left to that.
    """
    found = coder.lookup(x.dtype, x.device) if isinstance(coder, (Lookup, Thresholds)) else None
    if found is None or x.numel() % 8:
        return _torch.encode(x, bits, coder)
    table, scale = found[0].table.numpy(), found[1]
    packed = torch.empty(packed_bytes(x.numel(), bits), dtype=torch.uint8, device=x.device)
    codes = packed.numpy()
    for begin, chunk in chunks(x.detach()):
        _run(_encode_lookup, codes[begin // 8 * bits :], table, bits, halves=sixteen_bits(chunk, scale).numpy())
    return packed


def encode_two_values(x: Tensor) -> tuple[Tensor, int] | None:
    """As `_two_values.encode_two_values`."""
    if x.numel() % 8:
        return _two_values.encode_two_values(x)
    packed = torch.empty(packed_bytes(x.numel(), 1), dtype=torch.uint8, device=x.device)
    codes, other = packed.numpy(), 0
    for begin, chunk in chunks(as_integers(x.detach())):
        values = chunk.numpy()
        other = other or int(_first(values))
        if other < 0:
            return None
        table = np.array([other, 0], values.dtype)
        _run(_encode_mask, codes[begin // 8 :], table, values=values)
        if table[1]:
            return None
    return packed, other


def decode(packed: Tensor, rows: Tensor, bits: int, layout: Layout) -> Tensor:
    """As `_torch.decode`, bit for bit; and by that where an index of a row is a byte or two, which its gather reads."""
    in_row = in_a_row(rows, bits)
    n = math.prod(layout.shape)
    if bits in (2, 4, 8) or n % 8:
        return _torch.decode(packed, rows, bits, layout)
    out = layout.empty()
    as_bits = INTEGERS[out.element_size()]
    small = rows.element_size() < in_row * out.element_size()  # rows of int8, to be converted
    # the first value of row c is that of code c, the others those of code 0
    values = rows.view(torch.int8 if small else as_bits)[: in_row << bits : in_row]
    table = (values.to(out.dtype).view(as_bits) if small else values).contiguous().numpy()
    flat = out.as_strided((n,), (1,)).view(as_bits).numpy()
    _run(_decode_bits if bits == 1 else _decode, packed.numpy(), table, bits, values=flat)
    return out


def decode_beside(output: Tensor, packed: Tensor | None, table: Tensor, layout: Layout) -> Tensor:
    """As `_beside.decode_beside`, bit for bit."""
    if output.numel() % 8:
        return _beside.decode_beside(output, packed, table, layout)
    out = layout.empty()
    as_bits = INTEGERS[out.element_size()]
    whole, entries = out.as_strided((out.numel(),), (1,)).view(as_bits).numpy(), table.view(as_bits).numpy()
    sides, loop = (NONE, _decode_from) if packed is None else (packed.numpy(), _decode_beside)
    for begin, chunk in chunks(in_order_of(layout, output.detach())):
        values = whole[begin : begin + chunk.numel()]
        _run(loop, sides[begin // 8 :], entries, values=values, halves=sixteen_bits(chunk).numpy())
    return out
