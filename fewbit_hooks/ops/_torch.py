"""The reference backend: encode, pack and decode in plain torch, on any device.

Byte layout, the same for every backend: the codes form one little-endian stream of bits. Code i takes the bits
[i * bits, (i + 1) * bits) of the stream, and bit k of the stream is bit k % 8 of byte k // 8. With 3 bits:

    byte           0               1               2
    bit     0 1 2 3 4 5 6 7 0 1 2 3 4 5 6 7 0 1 2 3 4 5 6 7
    code    0 0 0 1 1 1 2 2 2 3 3 3 4 4 4 5 5 5 6 6 6 7 7 7

So 8 codes are a *group* of exactly `bits` bytes, and n codes take `n * bits / 8` bytes, rounded up; the bits left over
are 0. All work is done chunk by chunk (`_layout.CHUNK`), so that no temporary has the size of the tensor; and neither
encoding nor decoding makes the host wait for the device.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ._coders import FEW, Coder, look_up
from ._devices import put
from ._layout import Layout, chunk_size, chunks, computed_in, pieces


def packed_bytes(n: int, bits: int) -> int:
    """The bytes that n codes take."""
    return (n * bits + 7) // 8


def encode(x: Tensor, bits: int, coder: Coder) -> Tensor:
    """The packed codes of the elements of `x`, in the memory order of `Layout.of(x)`.

    >>> encode(torch.tensor([-1.0, 2.0, 0.0, 3.0]), 1, lambda chunk: chunk > 0)
    tensor([10], dtype=torch.uint8)

    Args:
        x: any shape, strides, dtype and device.
        bits: 1 to 8.
        coder: gives a chunk's codes, each below 2**bits; `Thresholds`, `Between`, or a predicate.

    Returns:
        1-D uint8 tensor of `packed_bytes(x.numel(), bits)` elements.
    """
    if bits == 1 and x.is_cpu:  # the same layout: (measured) 0.05 ns an element, on one core
        packs = [np.packbits(coder(chunk).numpy(), bitorder="little") for _, chunk in chunks(x.detach())]
        return torch.from_numpy(packs[0] if len(packs) == 1 else np.concatenate([np.empty(0, np.uint8), *packs]))
    packed = torch.empty(packed_bytes(x.numel(), bits), dtype=torch.uint8, device=x.device)
    for start, chunk in chunks(x.detach()):
        _pack(coder(chunk).view(torch.uint8), bits, packed[start * bits // 8 :])
    return packed


def as_they_are(chunk: Tensor) -> Tensor:
    """The coder of what is codes already."""
    return chunk


def _pack(codes: Tensor, bits: int, packed: Tensor) -> None:
    """Pack the codes of one chunk into the beginning of `packed`."""
    n = codes.numel()
    packed = packed[: packed_bytes(n, bits)]
    if bits == 8:
        packed.copy_(codes)
        return
    if codes.is_cpu and n <= FEW:
        packed.numpy()[:] = _pack_few(codes.numpy(), bits)[: packed.numel()]
        return
    if n % 8 or codes.storage_offset() % 8:  # only whole, aligned groups can be viewed as words
        codes, ragged = codes.new_zeros((n + 7) // 8 * 8), codes
        codes[:n] = ragged
    words = codes.view(torch.int64)  # the 8 codes of a group, one in each byte
    if bits == 1:
        # Code i is moved from bit 8i to bit 56 + i; no two of the products' bits meet, so nothing is carried.
        packed.copy_((words * 0x0102040810204080).bitwise_right_shift_(56))
        return
    words = _join(words, bits)
    groups = words.view(torch.uint8).view(-1, 8)[:, :bits]
    whole = packed.numel() // bits
    packed[: whole * bits].view(-1, bits).copy_(groups[:whole])
    packed[whole * bits :] = groups[whole:].reshape(-1)[: packed.numel() - whole * bits]


def _pack_few(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """The same by numpy, a call of which costs less: (measured) 31 us for 1,024 codes, by torch 85."""
    words = np.zeros((codes.size + 7) // 8, np.int64)
    words.view(np.uint8)[: codes.size] = codes
    groups: NDArray[np.uint8] = _join(words, bits).view(np.uint8).reshape(-1, 8)[:, :bits]
    return groups.reshape(-1)


def _join(words: Any, bits: int) -> Any:
    """Bring the codes in the bytes of each word together, at its low end."""
    for codes_in_field in (1, 2, 4):  # halve the number of fields by joining neighbours: 8 of 1 code, 4 of 2, 2 of 4
        field, distance = codes_in_field * bits, codes_in_field * 8
        low = mask(field, every=2 * distance)
        upper = words >> (distance - field)
        upper &= low << field
        words = words & low
        words |= upper
    return words


def mask(width: int, every: int) -> int:
    """`width` ones at the low end of `every` bits, over a whole word."""
    return sum(((1 << width) - 1) << low for low in range(0, 64, every))


# NOTE [ Rows ]
#
# A packed group is decoded by looking up several codes at once: a *row* is the stand-ins of `r` consecutive codes, and
# the table has one for each of the 2**(r * bits) combinations. A row is at most 16 bytes, so it can be viewed as one
# element (int16 ... complex128) that torch's gather moves in one go: (measured, one core, 3 bits float32) 0.13 ns an
# element, where `index_select` of rows of a 2-D table, a memcpy each, takes 0.51. Where all stand-ins are small
# integers, the rows may be of int8, 8 codes each, and are converted: (measured, one core, 1 bit float32) 0.25 for 0.6.

_ROW_DTYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
_ROW_INDEX_BITS = 14  # at most 16,384 rows of 16 bytes: they should stay in a core's L2 cache


def rows(values: Tensor, bits: int) -> Tensor:
    """The table of rows that `decode` looks up; see the note above.

    Args:
        values: the stand-ins of the 2**bits codes; 1-D, dtype (or int8) and device of the tensor to be decoded.
        bits: 1 to 8.

    Returns:
        1-D tensor whose elements are whole rows.
    """
    size = values.element_size()
    in_row = next(r for r in (8, 4, 2, 1) if r * size <= 16 and (r * bits <= _ROW_INDEX_BITS or r == 1))
    index = torch.arange(1 << (in_row * bits), device=values.device)
    shifts = torch.arange(0, in_row * bits, bits, device=values.device)
    codes = (index[:, None] >> shifts) & ((1 << bits) - 1)
    return values.detach()[codes].view(_ROW_DTYPES[in_row * size]).view(-1)


def in_a_row(rows: Tensor, bits: int) -> int:
    """How many values there are in each of the rows that `rows` made.

    >>> in_a_row(rows(torch.zeros(8), 3), 3)
    4
    """
    return (rows.numel().bit_length() - 1) // bits


def decode(packed: Tensor, rows: Tensor, bits: int, layout: Layout) -> Tensor:
    """A tensor of the given layout that holds each code's stand-in.

    >>> x = torch.tensor([[-1.0, 2.0], [0.0, 3.0]])
    >>> stand_ins = rows(torch.tensor([-0.5, 0.5]), bits=1)
    >>> decode(encode(x, 1, lambda chunk: chunk > 0), stand_ins, 1, Layout.of(x))
    tensor([[-0.5000,  0.5000],
            [-0.5000,  0.5000]])

    Args:
        packed: what `encode` returned.
        rows: what `rows` made of the stand-ins.
        bits: as for `encode`.
        layout: `Layout.of(x)`, with the dtype and device of the stand-ins.
    """
    out = layout.empty()
    flat = out.as_strided((out.numel(),), (1,))
    whole = out.numel() // 8 * 8
    for start in range(0, whole, chunk_size(out.device)):
        stop = min(start + chunk_size(out.device), whole)
        _decode_groups(packed[start // 8 * bits : stop // 8 * bits], rows, bits, flat[start:stop])
    if whole < out.numel():
        rest = packed[whole // 8 * bits :]
        group = packed.new_zeros(bits)
        group[: rest.numel()] = rest
        eight = flat.new_empty(8)
        _decode_groups(group, rows, bits, eight)
        flat[whole:] = eight[: out.numel() - whole]
    return out


def has_nan(x: Tensor) -> bool:
    """Whether any element is NaN. The answer makes the host wait for the device."""
    # amax lets NaN through: (measured) 0.03 to 0.09 ns an element, x.isnan().any() 0.4 to 0.7
    return any(math.isnan(piece.amax().item()) for _, piece in pieces(x.detach()))


def not_a_number(x: Tensor, *, or_infinite: bool = False) -> Tensor:
    """0, or NaN if any element is NaN, on the device of `x`: the host does not wait.

    >>> not_a_number(torch.tensor([1.0, torch.inf])), not_a_number(torch.tensor([1.0, torch.inf]), or_infinite=True)
    (tensor(0.), tensor(nan))

    Args:
        x: of one element or more.
        or_infinite: or infinite.

    Returns:
        0-d, float32, or float64 if `x` is.
    """
    wide = computed_in(x.dtype)
    if or_infinite:
        least, most = x.detach().aminmax()
        return (least * 0 + most * 0).to(wide)
    most = x.detach().amax().to(wide)
    return torch.where(most.isnan(), most, 0)


def is_finite(x: Tensor) -> bool:
    """Whether no element is NaN or infinite. The answer makes the host wait for the device."""
    # (measured) 0.1 to 0.2 ns an element
    return all(math.isfinite(end.item()) for _, piece in pieces(x.detach()) for end in piece.aminmax())


def unpack_bits(packed: Tensor, bits: int, n: int) -> Tensor:
    """The n codes that were packed as they are, as uint8.

    >>> unpack_bits(torch.tensor([209, 0], dtype=torch.uint8), 3, 3)
    tensor([1, 2, 3], dtype=torch.uint8)
    """
    if bits == 1 and packed.is_cpu:
        return torch.from_numpy(np.unpackbits(packed.numpy(), count=n, bitorder="little"))
    return decode(packed, code_rows(bits, packed.device), bits, Layout((n,), (1,), torch.uint8, packed.device))


@functools.lru_cache(maxsize=64)
def code_rows(bits: int, device: torch.device) -> Tensor:
    """The table of rows of the codes themselves."""
    return put(rows(torch.arange(1 << bits, device="cpu").to(torch.uint8), bits), device)


def _indices_of_few(packed: NDArray[np.uint8], bits: int, in_row: int) -> NDArray[np.int64]:
    """The rows that whole groups name, one after the other; by numpy, as `_pack_few`."""
    words = np.zeros(packed.size // bits, np.int64)
    words.view(np.uint8).reshape(-1, 8)[:, :bits] = packed.reshape(-1, bits)
    index = np.empty((words.size, 8 // in_row), np.int64)
    for i in range(8 // in_row):
        np.bitwise_and(words >> (i * in_row * bits), (1 << (in_row * bits)) - 1, out=index[:, i])
    return index


def _decode_groups(packed: Tensor, rows: Tensor, bits: int, out: Tensor) -> None:
    """Decode whole groups: `bits` bytes of `packed` for every 8 elements of `out`."""
    in_row = in_a_row(rows, bits)
    if rows.element_size() < in_row * out.element_size():
        integers = torch.empty(out.numel(), dtype=torch.int8, device=out.device)
        _decode_groups(packed, rows, bits, integers)
        out.copy_(integers)
        return
    width = in_row * bits
    if width == 8:
        index = packed.to(torch.int64)
    elif out.is_cpu and out.numel() <= FEW:
        index = torch.from_numpy(_indices_of_few(packed.numpy(), bits, in_row))
    else:
        words = torch.zeros(out.numel() // 8, dtype=torch.int64, device=out.device)
        words.view(torch.uint8).view(-1, 8)[:, :bits] = packed.view(-1, bits)
        index = torch.empty(words.numel(), 8 // in_row, dtype=torch.int64, device=out.device)
        for i in range(8 // in_row):
            torch.bitwise_and(words >> (i * width), (1 << width) - 1, out=index[:, i])
    look_up(rows, index.view(-1), out.view(rows.dtype))
