"""Activations whose derivative has two values: which inputs have which is asked of the kernel itself.

Ties and limits are not alike in all kernels (in 16 bits each rounds hardtanh's 0.1 in its own way), nor in all versions
of torch (at the limits of clamp the derivative was 1, and is 0 from 2.14 on).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import ops
from ._activations import Parameter
from ._inverse import serves_itself
from ._standins import SIXTEEN_BIT, Function, all_values, derivative_from

CPU = torch.device("cpu")


class TwoValued:
    """Which of the values that a call saves have which of its derivative's two values.

    >>> import torch
    >>> from fewbit_hooks._two_valued import TwoValued
    >>> relu = TwoValued(torch.nn.functional.relu, {})
    >>> relu.coder(torch.float32, torch.device("cpu"))(torch.tensor([-1.0, 0.0, 2.0]))
    tensor([False, False,  True])

    Args:
        function: the call, of its input alone.
        parameters: the call's, about which the derivative may jump.
    """

    def __init__(self, function: Function, parameters: Mapping[str, Parameter]) -> None:
        self._function = function
        self._parameters = parameters
        self._coders: dict[tuple[torch.dtype, torch.device], ops.Coder] = {}
        self._serves: dict[tuple[torch.dtype, torch.device], bool] = {}
        self._holds_in: set[torch.dtype] = set()  # asked at each call: a dtype's hash takes less than a device's

    def holds_in(self, dtype: torch.dtype) -> bool:
        """Whether there are two, in this torch, too, and jumps where they were looked for."""
        if dtype not in self._holds_in and self.coder(dtype, CPU) is not None:
            self._holds_in.add(dtype)
        return dtype in self._holds_in

    def coder(self, dtype: torch.dtype, device: torch.device) -> ops.Coder | None:
        """Tells which saved values have another derivative than the first; None if there is a third, or no interval."""
        key = dtype, device
        if key not in self._coders:
            with ops.waiting(device):
                coder = self._ask(dtype, device)
                if coder is None:
                    return None
                self._coders[key] = coder
        return self._coders[key]

    def output_serves(self, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether a call's output may stand for the input that its node saves; not while a CUDA graph is captured,
        where that is not yet known."""
        key = dtype, device
        if key not in self._serves:
            if ops.capturing(device):
                return False  # the answer makes the host wait for the device: another time
            with ops.waiting(device):
                # how a kernel rounds its limits differs from kernel to kernel: ask the device's own
                self._serves[key] = serves_itself(self._function, self._telling_values(dtype).to(device))
        return self._serves[key]

    def standins(self, dtype: torch.dtype) -> Tensor:
        """One value for each code, as far from a change of code as there is: integers, where they serve."""
        integers = self._middles(np.arange(-128.0, 128.0), dtype)
        if len(integers) == 2 and dtype not in SIXTEEN_BIT:
            return torch.tensor([integers[0], integers[1]], dtype=torch.int8, device=CPU)
        values = self._telling_values(dtype).double().numpy()
        # the last resort: clamp(x, -inf, inf) has its second value at NaN alone, clamp(x, min=inf) at inf
        special = np.array([np.nan, np.inf, -np.inf])
        middle = {int(code): float(v) for code, v in zip(self._codes_of(special, dtype), special, strict=True)}
        middle |= self._middles(np.unique(values[np.isfinite(values)]), dtype)
        both = [middle.get(0, middle.get(1, 0.0)), middle.get(1, middle.get(0, 0.0))]
        return torch.tensor(both, dtype=torch.float64, device=CPU).to(dtype)

    def _ask(self, dtype: torch.dtype, device: torch.device) -> ops.Coder | None:
        """What the kernel itself says."""
        if dtype in SIXTEEN_BIT:
            values = all_values(dtype)
        else:
            # all constants of ours are small integers; to sort every bfloat16 takes 10 ms, at each limit of a clipping
            integers = torch.arange(-128.0, 128.0, dtype=dtype, device=CPU)
            infinities = torch.tensor([-math.inf, math.inf], dtype=dtype, device=CPU)
            values = self._and_around_parameters(torch.cat([integers, infinities])).unique()  # ascending
            values = torch.cat([values, torch.full_like(values[:1], math.nan)])
        there = values.to(device)
        slope = derivative_from(self._function, [there], there)
        second = slope != slope[0]
        if (slope[second] != slope[second][:1]).any():
            return None
        if dtype in SIXTEEN_BIT:
            return ops.Lookup(second.to(torch.uint8))
        return _between(values[:-1], second[:-1].cpu(), nan=bool(second[-1]))

    def _middles(self, values: NDArray[np.float64], dtype: torch.dtype) -> dict[int, float]:
        """For each code that ascending values have, the middle of its longest run."""
        codes = self._codes_of(values, dtype)
        starts = np.flatnonzero(np.diff(codes, prepend=-1))
        ends = np.append(starts[1:], len(codes))
        runs = sorted(zip(starts, ends, strict=True), key=lambda run: run[1] - run[0])
        return {int(codes[start]): float(values[(start + end) // 2]) for start, end in runs}  # the longest comes last

    def _telling_values(self, dtype: torch.dtype) -> Tensor:
        """Values among which are, on both sides, all places where the derivative may jump."""
        return self._and_around_parameters(all_values(dtype if dtype in SIXTEEN_BIT else torch.bfloat16).to(dtype))

    def _and_around_parameters(self, spread: Tensor) -> Tensor:
        """These values, and the parameters, and the neighbours of both; of 0 those that are never flushed to it."""
        numbers = [p for p in self._parameters.values() if isinstance(p, float) and np.isfinite(p)]
        # an interval may be too narrow for the spread: add its ends, -lambd among them, and their mean
        ends = [*numbers, *(-p for p in numbers), float(np.mean(numbers or [0]))]
        with torch.autocast("cpu", enabled=False):  # which refuses to put float16 together, where it is for bfloat16
            at = torch.cat([spread, torch.tensor(ends, dtype=torch.float64, device=CPU).to(spread.dtype)])
            tiny = torch.finfo(at.dtype).smallest_normal
            neighbours = [
                torch.where(at == 0, sign * tiny, torch.nextafter(at, torch.full_like(at, sign * np.inf)))
                for sign in (-1, 1)
            ]
            return torch.cat([at, *neighbours])

    def _codes_of(self, values: NDArray[np.float64], dtype: torch.dtype) -> NDArray[Any]:
        coder = self.coder(dtype, CPU)
        assert coder is not None  # asked before
        return coder(torch.from_numpy(values).to(dtype)).numpy().astype(np.int8)


def _between(values: Tensor, second: Tensor, nan: bool) -> ops.Between | None:
    """The interval of those ascending values that are marked; None if it is no interval."""
    inside = second.nonzero().flatten().tolist()
    if not inside:
        return ops.Between(math.inf, -math.inf, nan=nan)
    first, last = inside[0], inside[-1]
    low, open_low = _end(values, first, max(first - 1, 0))
    high, open_high = _end(values, last, min(last + 1, len(values) - 1))
    found = ops.Between(low, high, open_low=open_low, open_high=open_high, nan=nan)
    return found if torch.equal(found(values), second) else None


def _end(values: Tensor, inside: int, outside: int) -> tuple[float, bool]:
    """The end of an interval, and whether it is open, where two neighbouring values are the last inside and the first
    outside. It is the one nearer to 0: beside a 0 the other one is denormal."""
    within, beyond = float(values[inside]), float(values[outside])
    return (beyond, True) if abs(beyond) < abs(within) else (within, False)
