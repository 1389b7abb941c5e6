"""How a tensor lies in memory, and its elements as one flat sequence of chunks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Elements worked on at a time: what lies between a tensor and its codes is never larger than a few chunks (about 14
# bytes an element). (measured, CPU, 2 cores, 3 bits, bfloat16) coding takes 1.06 times as long with 2**19, 1.3 with
# 2**18, 1.7 with 2**17. On CUDA, where launches weigh more, four times as many: an estimate, not measured yet.
# Multiples of 8, so that every chunk but the last ends on a whole byte.
CHUNK = 1 << 20
CHUNK_CUDA = 1 << 22


INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By size in bytes: as what elements are looked at that are compared, or moved, bit for bit."""


class Layout(NamedTuple):
    """Shape, strides, dtype and device of a *dense* tensor: one that fills its memory without gaps or overlaps.

    >>> Layout.of(torch.zeros(2, 3).t()).stride, Layout.of(torch.zeros(2, 6)[:, ::2]).stride
    ((1, 3), (3, 1))
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, x: Tensor) -> Layout:
        """The strides of `x` itself where it is dense, else those that `torch.empty_like` gives it."""
        like = x if x.is_contiguous() else torch.empty_like(x, device="meta")
        return cls(tuple(x.shape), like.stride(), x.dtype, x.device)

    def like(self, x: Tensor) -> Tensor:
        """`x` itself where it has these strides, else a copy that has."""
        return x if x.stride() == self.stride else self.empty().copy_(x)

    def empty(self) -> Tensor:
        """A tensor of this layout, not initialised."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which elements of `dtype` are worked on: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def chunk_size(device: torch.device) -> int:
    """The number of elements to work on at a time."""
    return CHUNK_CUDA if device.type == "cuda" else CHUNK


def chunks(x: Tensor, step: int = 0) -> Iterator[tuple[int, Tensor]]:
    """The elements of `x`, in the memory order of its `Layout`, as `(start, contiguous 1-D piece)`.

    Every piece but the last has `step` elements, `chunk_size` if that is 0. The pieces of a dense tensor are views of
    it; of any other tensor (sliced, expanded, overlapping) one piece at a time is copied.
    """
    in_order = in_memory_order(x)
    n, step = x.numel(), step or chunk_size(x.device)
    if 0 < n <= step and in_order.dim() == 1:  # the usual case, which is spared the slicing
        yield 0, in_order.contiguous()
        return
    for start in range(0, n, step):
        yield start, _piece(in_order, start, min(start + step, n)).contiguous()


def pieces(x: Tensor) -> Iterable[tuple[int, Tensor]]:
    """As `chunks`, where nothing is made that has the size of a piece: a tensor that is contiguous is a single one, and
    not looked at further."""
    if x.is_contiguous() and not x.is_neg():
        return ((0, x),) if x.numel() else ()
    return chunks(x.detach())


def in_memory_order(x: Tensor) -> Tensor:
    """A view of `x` whose elements are in the memory order of its `Layout`: contiguous and 1-D where `x` is dense.

    Of a tensor that has its sign in a bit of its own (`z.conj().imag`) it is a copy, which has it in its elements.

    >>> in_memory_order(torch.zeros(2, 3).t()).shape, in_memory_order(torch.zeros(4, 6)[:, ::2].t()).shape
    (torch.Size([6]), torch.Size([4, 3]))
    """
    in_order = x = x.resolve_neg()
    if not x.is_contiguous():
        stride = Layout.of(x).stride
        in_order = x.permute(sorted(range(x.dim()), key=lambda dim: -stride[dim]))
    return in_order.view(-1) if in_order.is_contiguous() else in_order


def is_dense(x: Tensor) -> bool:
    """Whether `x` fills its memory without gaps or overlaps.

    >>> is_dense(torch.zeros(2, 3).t()), is_dense(torch.zeros(2, 6)[:, ::2])
    (True, False)
    """
    return in_memory_order(x).is_contiguous()


def _piece(x: Tensor, start: int, stop: int) -> Tensor:
    """`x.reshape(-1)[start:stop]`, never copying more than that piece."""
    if x.dim() == 1:
        return x[start:stop]
    row = x.numel() // x.shape[0]
    first, last = -(-start // row), stop // row  # the rows first:last lie in the piece as a whole
    if first > last:
        return _piece(x[last], start - last * row, stop - last * row)
    parts = [x[first:last].reshape(-1)]
    if start < first * row:
        parts.insert(0, _piece(x[first - 1], start - (first - 1) * row, row))
    if last * row < stop:
        parts.append(_piece(x[last], 0, stop - last * row))
    return torch.cat(parts) if len(parts) > 1 else parts[0]
