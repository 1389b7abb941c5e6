"""The numba backend: the bytes of `_torch.py` on the CPU, by compiled loops, each tensor read once.

Imported where numba is installed, when the first CPU tensor is coded, by `_dispatch.py`; never by `import
fewbit_hooks`.

NOTE [ Compiled loops ]

1. A loop is compiled when it first meets a dtype, which takes a moment, and kept on disk by numba.
2. It runs without the GIL, on the calling thread: numba's own threads survive no fork. What is large is shared out
   among threads of ours (`_share`).
3. What is only moved (stand-ins, values to be looked up) is moved as integers. So a dtype that numba does not know is
   none of its business, and no NaN changes its bits.
4. Indices are in range by construction, whatever the data is: numba does not check them.

(measured, AVX-512, float32; in brackets plain torch on two cores) encode 3 bits 0.7 ns an element (1.1), decode 0.4
(0.5), decode beside an output 0.65 (1.5), a mask packed 0.7 (0.9) and unpacked 0.16 (0.4). Of 24,576 elements the same
take 14 to 25 us, and 27 to 66.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numba
import numpy as np
import torch
from torch import Tensor

from . import _beside, _torch, _two_values
from ._beside import in_order_of
from ._coders import Coder, Lookup, Thresholds, sixteen_bits
from ._layout import INTEGERS, Layout, chunks
from ._torch import in_a_row, packed_bytes
from ._two_values import as_integers

if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
    raise ImportError("NUMBA_DISABLE_JIT is set")

T = TypeVar("T")


def compiled(loop: Any) -> Any:
    """The loop, to be compiled on first use."""
    try:
        return numba.njit(nogil=True, cache=True)(loop)
    except RuntimeError:  # there is no place on disk that it could be kept in
        return numba.njit(nogil=True)(loop)


# --- loops: arithmetic only, and of whole groups of 8 elements: a count that is known is unrolled ---


@compiled
def _encode_lookup(values, table, bits, packed):
    """`values`: uint16, the bits of 16-bit floats; `table`: the code of each."""
    for group in range(values.size // 8):
        word = np.uint64(0)
        for i in range(8):
            word |= np.uint64(table[values[8 * group + i]]) << np.uint64(i * bits)
        for byte in range(bits):
            packed[group * bits + byte] = np.uint8(word >> np.uint64(8 * byte))


@compiled
def _first(x):
    """The first that is not 0; 0 where there is none."""
    for v in x:
        if v != 0:
            return v
    return x.dtype.type(0)


@compiled
def _encode_mask(x, other, packed):
    """Whether each element is 0 or the other value."""
    third = np.uint8(0)
    for group in range(x.size // 8):
        byte = np.uint8(0)
        for i in range(8):
            v = x[8 * group + i]
            one = np.uint8(v != 0)
            third |= np.uint8(one & np.uint8(v != other))
            byte |= one << np.uint8(i)
        packed[group] = byte
    return third == 0


@compiled
def _decode_bits(packed, zero, one, out):
    """1 bit: a choice, which vectors can make."""
    for group in range(out.size // 8):
        byte = np.uint32(packed[group])
        for i in range(8):
            out[8 * group + i] = one if (byte >> np.uint32(i)) & np.uint32(1) else zero


@compiled
def _decode(packed, table, bits, out):
    low = np.uint64((1 << bits) - 1)
    for group in range(out.size // 8):
        word = np.uint64(0)
        for byte in range(bits):
            word |= np.uint64(packed[group * bits + byte]) << np.uint64(8 * byte)
        for i in range(8):
            out[8 * group + i] = table[(word >> np.uint64(i * bits)) & low]


@compiled
def _decode_beside(output, packed, table, out):
    """`output`: uint16, the bits of 16-bit floats."""
    for group in range(out.size // 8):
        byte = np.uint32(packed[group])
        for i in range(8):
            side = (byte >> np.uint32(i)) & np.uint32(1)
            out[8 * group + i] = table[np.uint32(output[8 * group + i]) + (side << np.uint32(16))]


@compiled
def _decode_from(output, table, out):
    """The same without sides."""
    for i in range(out.size):
        out[i] = table[output[i]]


# --- launchers: they allocate, and share the work out; what has no whole groups is left to plain torch ---

PIECE = 1 << 18
"""Elements that a thread is worth waking for."""


def _share(n: int, work: Callable[[int, int], T]) -> list[T]:
    """What `work` makes of the elements `start` to `stop`, for pieces of whole groups that make up n.

    They are shared out among half as many threads as torch has: its own go on spinning for a while after an operation.
    (measured, 2 cores, in a step) a second thread gains nothing.
    """
    pieces = min(torch.get_num_threads() // 2, n // PIECE) if n >= 2 * PIECE else 1
    if pieces <= 1:
        return [work(0, n)]
    ends = [n * i // pieces // 8 * 8 for i in range(1, pieces + 1)]
    others = [_threads().submit(work, start, stop) for start, stop in itertools.pairwise(ends)]
    return [work(0, ends[0]), *(other.result() for other in others)]


@functools.lru_cache(maxsize=1)
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), "fewbit_hooks")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_threads.cache_clear)  # threads survive no fork


def encode(x: Tensor, bits: int, coder: Coder) -> Tensor:
    """As `_torch.encode`, byte for byte.

    A coder that looks nothing up (a predicate, thresholds of float64) is left to that.
    """
    found = coder.lookup(x.dtype, x.device) if isinstance(coder, (Lookup, Thresholds)) else None
    if found is None or x.numel() % 8:
        return _torch.encode(x, bits, coder)
    table, scale = found[0].table.numpy(), found[1]
    packed = torch.empty(packed_bytes(x.numel(), bits), dtype=torch.uint8, device=x.device)
    for begin, chunk in chunks(x.detach()):
        values, codes = sixteen_bits(chunk, scale).numpy(), packed.numpy()[begin // 8 * bits :]
        _share(values.size, functools.partial(_encode_piece, values, table, bits, codes))
    return packed


def _encode_piece(values: Any, table: Any, bits: int, codes: Any, start: int, stop: int) -> None:
    _encode_lookup(values[start:stop], table, bits, codes[start // 8 * bits :])


def encode_two_values(x: Tensor) -> tuple[Tensor, int] | None:
    """As `_two_values.encode_two_values`."""
    if x.numel() % 8:
        return _two_values.encode_two_values(x)
    packed = torch.empty(packed_bytes(x.numel(), 1), dtype=torch.uint8, device=x.device)
    other = 0
    for begin, chunk in chunks(as_integers(x.detach())):
        values, codes = chunk.numpy(), packed.numpy()[begin // 8 :]
        other = other or int(_first(values))
        if other < 0 or not all(_share(values.size, functools.partial(_encode_mask_piece, values, other, codes))):
            return None
    return packed, other


def _encode_mask_piece(values: Any, other: int, codes: Any, start: int, stop: int) -> bool:
    alone: bool = _encode_mask(values[start:stop], values.dtype.type(other), codes[start // 8 :])
    return alone


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
    _share(n, functools.partial(_decode_piece, packed.numpy(), table, bits, flat))
    return out


def _decode_piece(codes: Any, table: Any, bits: int, out: Any, start: int, stop: int) -> None:
    if bits == 1:
        _decode_bits(codes[start // 8 :], table[0], table[1], out[start:stop])
    else:
        _decode(codes[start * bits // 8 :], table, bits, out[start:stop])


def decode_beside(output: Tensor, packed: Tensor | None, table: Tensor, layout: Layout) -> Tensor:
    """As `_beside.decode_beside`, bit for bit."""
    if output.numel() % 8:
        return _beside.decode_beside(output, packed, table, layout)
    out = layout.empty()
    as_bits = INTEGERS[out.element_size()]
    whole, values = out.as_strided((out.numel(),), (1,)).view(as_bits).numpy(), table.view(as_bits).numpy()
    for begin, chunk in chunks(in_order_of(layout, output.detach())):
        half, flat = sixteen_bits(chunk).numpy(), whole[begin : begin + chunk.numel()]
        sides = packed.numpy()[begin // 8 :] if packed is not None else None
        _share(flat.size, functools.partial(_decode_beside_piece, half, sides, values, flat))
    return out


def _decode_beside_piece(output: Any, sides: Any, table: Any, out: Any, start: int, stop: int) -> None:
    if sides is None:
        _decode_from(output[start:stop], table, out[start:stop])
    else:
        _decode_beside(output[start:stop], sides[start // 8 :], table, out[start:stop])
