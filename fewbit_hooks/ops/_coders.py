"""Coders: from the elements of a chunk to their codes."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from .. import _float16
from .._codebook import rounded_down
from ._devices import put
from ._layout import computed_in

Coder = Callable[[Tensor], Tensor]
"""Maps a contiguous 1-D chunk to its codes: uint8, or bool where there is one bit."""


def compare(predicate: Callable[[Any], Any], chunk: Tensor) -> Tensor:
    """`predicate(chunk)`, of comparisons and `&`, `|`, `~`; on the CPU by numpy, whose comparisons are vectorised.

    >>> compare(lambda v: (v > 0) & (v < 2), torch.tensor([-1.0, 1.0, 2.0]))
    tensor([False,  True, False])

    (measured, one core) 0.1 to 0.2 ns a comparison of float32, and 0.7 to 1.0 by torch; bfloat16 by way of float32 0.3.
    """
    if chunk.dtype in (torch.float16, torch.bfloat16):
        chunk = chunk.float()  # on CUDA a comparison would round the number to 16 bits
    if not chunk.is_cpu:
        result: Tensor = predicate(chunk)
        return result
    return torch.from_numpy(predicate(chunk.numpy()))


class Lookup:
    """The coder of a 16-bit dtype that looks each value up.

    >>> values = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    >>> Lookup((values >= 1).to(torch.uint8))(torch.tensor([0.5, 1.0, 2.0], dtype=torch.bfloat16))
    tensor([0, 1, 1], dtype=torch.uint8)

    Args:
        table: uint8, the code of each of the 65,536 values in the order of their bits; on the device of the chunks.

    Attributes:
        ways: what a backend remembers of the coder, by dtype; so in the other coders.
    """

    def __init__(self, table: Tensor) -> None:
        self.table = table
        self.ways: dict[torch.dtype, Any] = {}

    def __call__(self, chunk: Tensor) -> Tensor:
        return self.of(chunk.view(torch.uint16))

    def lookup(self, dtype: torch.dtype, device: torch.device) -> tuple[Lookup, float]:
        """As `Thresholds.lookup`."""
        return self, 1.0

    def of(self, values: Tensor) -> Tensor:
        """The codes of values that are given by their bits, uint16."""
        return look_up(self.table, values.to(torch.int64), torch.empty_like(values, dtype=torch.uint8))


class Thresholds:
    """The coder of a codebook: code i where boundaries[i-1] < x <= boundaries[i].

    >>> Thresholds([-1.0, 0.0, 2.0])(torch.tensor([-1.0, -0.5, 1.0, 9.0]))
    tensor([0, 1, 2, 3], dtype=torch.uint8)

    Sixteen-bit inputs, and float32 inputs where `_float16.find_scale` finds a scale, are looked up (see the note in
    `_float16`); all others are bucketized. The codes are the same. What a device needs is copied there on first use and
    kept: a later use copies nothing, so that a CUDA graph can be captured after one warm-up.

    Args:
        boundaries: ascending, float64.
        folded: whether the boundaries are on |x|.
    """

    def __init__(self, boundaries: ArrayLike, folded: bool = False) -> None:
        boundaries = np.asarray(boundaries, np.float64)
        self.folded = folded
        cpu = torch.device("cpu")
        self._boundaries = {cpu: torch.tensor(boundaries, dtype=torch.float64, device=cpu)}
        self._limits: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._scales = {torch.float32: _float16.find_scale(boundaries), torch.float16: 1.0, torch.bfloat16: 1.0}
        self._lookups: dict[tuple[torch.dtype, torch.device], Lookup] = {}
        self.ways: dict[torch.dtype, Any] = {}

    def __call__(self, chunk: Tensor) -> Tensor:
        """The codes of a chunk, the fast way where there is one."""
        found = self.lookup(chunk.dtype, chunk.device)
        if found is None:
            return self.bucketize(chunk)
        lookup, scale = found
        return lookup.of(sixteen_bits(chunk, scale))

    def bucketize(self, chunk: Tensor) -> Tensor:
        """The slow twin: float64 holds every input and every boundary exactly, so this is the definition itself."""
        exact = chunk.double()
        if chunk.device not in self._boundaries:
            self._boundaries[chunk.device] = put(self._boundaries[torch.device("cpu")], chunk.device)
        boundaries = self._boundaries[chunk.device]
        return torch.bucketize(exact.abs() if self.folded else exact, boundaries, out_int32=True).to(torch.uint8)

    @property
    def count(self) -> int:
        """The number of boundaries: one less than that of codes."""
        return self._boundaries[torch.device("cpu")].numel()

    def limits(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The boundaries for a kernel to compare inputs of `dtype` with: float64 for float64, float32 for all others.

        >>> coder = Thresholds([0.1, 0.2])
        >>> coder.limits(torch.float32, torch.device("cpu")).tolist()
        [0.09999999403953552, 0.19999998807907104]

        Of a boundary b that is no float32 number it is the next below: no float32 number lies between the two, and so
        x <= b and x <= limit are the same for every float32 x, and for every float16 and bfloat16 x, which are float32
        numbers too.
        """
        dtype = computed_in(dtype)
        if (dtype, device) not in self._limits:
            limits = rounded_down(self._boundaries[torch.device("cpu")], dtype)
            self._limits[dtype, device] = put(limits, device)
        return self._limits[dtype, device]

    def lookup(self, dtype: torch.dtype, device: torch.device) -> tuple[Lookup, float] | None:
        """Where inputs of this dtype are looked up, and the scale for `sixteen_bits`; None where they are not."""
        scale = self._scales.get(dtype)
        if scale is None:
            return None
        if (dtype, device) not in self._lookups:
            values = _all_sixteen_bits().view(torch.bfloat16 if dtype == torch.bfloat16 else torch.float16)
            table = self.bucketize(values.double() / scale)
            self._lookups[dtype, device] = Lookup(put(table, device))
        return self._lookups[dtype, device], scale


def _all_sixteen_bits() -> Tensor:
    """The bits of all 16-bit floats, uint16."""
    return torch.arange(1 << 16, dtype=torch.int32, device="cpu").to(torch.uint16)


class Between:
    """The coder of an interval, at 1 bit: whether an element lies in it. NaN has a bit of its own.

    >>> Between(0.5, 1.0, open_low=True)(torch.tensor([0.5, 0.75, 1.0, 2.0, torch.nan]))
    tensor([False,  True,  True, False, False])

    An end that is open is no more than that: `v > 0` could be had as `v >= 1e-45`, but not where denormals are flushed.

    (measured, one core, float32) a comparison takes half the time of a look-up.

    Args:
        low, high: the ends, float64. Where low > high nothing lies between.
        open_low, open_high: whether the end itself lies outside.
        nan: the bit of NaN.
    """

    def __init__(
        self,
        low: float = -math.inf,
        high: float = math.inf,
        *,
        open_low: bool = False,
        open_high: bool = False,
        nan: bool = False,
    ) -> None:
        self.open_low, self.open_high, self.nan = open_low, open_high, nan
        self._ends = low, high
        self._limits: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._lookups: dict[tuple[torch.dtype, torch.device], Lookup] = {}
        self.ways: dict[torch.dtype, Any] = {}

    def __call__(self, chunk: Tensor) -> Tensor:
        """The codes of a chunk."""
        low, high, *_ = self.limits(chunk.dtype, torch.device("cpu")).tolist()
        if self.nan:
            below, beyond = (
                operator.le if self.open_low else operator.lt,
                operator.ge if self.open_high else operator.gt,
            )
            return compare(lambda v: ~(below(v, low) | beyond(v, high)), chunk)
        above, within = operator.gt if self.open_low else operator.ge, operator.lt if self.open_high else operator.le
        if high == math.inf and not self.open_high:
            return compare(lambda v: above(v, low), chunk)
        if low == -math.inf and not self.open_low:
            return compare(lambda v: within(v, high), chunk)
        return compare(lambda v: above(v, low) & within(v, high), chunk)

    def limits(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The ends for a kernel to compare inputs of `dtype` with, of the dtype of `Thresholds.limits`: the same of its
        numbers lie between them. Behind them 0 or 1 for `open_low`, `open_high` and `nan`.
        """
        dtype = computed_in(dtype)
        if (dtype, device) not in self._limits:
            low, high = torch.tensor(self._ends, dtype=torch.float64, device="cpu")
            low = rounded_down(low, dtype) if self.open_low else -rounded_down(-low, dtype)
            high = -rounded_down(-high, dtype) if self.open_high else rounded_down(high, dtype)
            flags = torch.tensor([self.open_low, self.open_high, self.nan], dtype=dtype, device="cpu")
            self._limits[dtype, device] = put(torch.cat([torch.stack([low, high]), flags]), device)
        return self._limits[dtype, device]

    def lookup(self, dtype: torch.dtype, device: torch.device) -> tuple[Lookup, float] | None:
        """As `Thresholds.lookup`: 16-bit dtypes are looked up."""
        if dtype.itemsize != 2:
            return None
        if (dtype, device) not in self._lookups:
            table = self(_all_sixteen_bits().view(dtype)).to(torch.uint8)
            self._lookups[dtype, device] = Lookup(put(table, device))
        return self._lookups[dtype, device], 1.0


def sixteen_bits(chunk: Tensor, scale: float = 1.0) -> Tensor:
    """The bits of 16-bit floats, uint16: a bfloat16's own; of any other dtype, times the scale, those of its float16.

    >>> sixteen_bits(torch.tensor([1.0, -2.0])).tolist() == [0x3C00, 0xC000]
    True
    """
    if chunk.dtype != torch.bfloat16:
        chunk = (chunk if scale == 1.0 else chunk * scale).half()
    return chunk.view(torch.uint16)


FEW = 1 << 16
"""(measured, CPU, 2 cores) so many elements are looked up faster by the one thread of index_select."""


def look_up(table: Tensor, index: Tensor, out: Tensor) -> Tensor:
    """`out[:] = table[index]`, all 1-D; returns `out`. The index is int32 or int64."""
    if index.numel() <= FEW or index.is_cuda:
        return torch.index_select(table, 0, index, out=out)
    # As lines: gather shares lines out among the CPU's threads, a single one not at all (on 2 cores twice the time).
    lines = 64 if index.numel() % 64 == 0 else 1
    torch.gather(table.expand(lines, -1), 1, index.view(lines, -1).to(torch.int64), out=out.view(lines, -1))
    return out
