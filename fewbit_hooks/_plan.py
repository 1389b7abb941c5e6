"""A plan: how the tensors saved by one call, with one set of parameters, are coded.

Computed once and cached; applying it is the business of the hooks. Everything that depends on the saved tensor's
dtype and device is made when the first such tensor comes along.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import ops
from ._activations import Activation, Parameter, pristine
from ._codebook import Codebook
from ._errors import FewbitError
from ._inverse import Inverse, Itself, find_inverse, serves_itself
from ._standins import Function, Saves, all_values, derivative_from, saved_by, saves, standins, standins_16bit

SIXTEEN_BIT = (torch.float16, torch.bfloat16)
NAN = "holds NaN, where stock's gradient depends on the position"
NOT_FINITE = "holds NaN or infinities, where stock's gradient is NaN"

Coder = Callable[[Tensor], Tensor]
Saved = list[Tensor | None]


class Plan:
    """How the tensors saved by one call are coded.

    Attributes:
        activation, parameters: what the call computes.
        codebook: None for the two-valued activations.
        bits: bits an element.
        inplace: the call overwrites its input.
        function: the call, of its input alone.
        thresholds: the codebook's boundaries, as a coder; None where there is no codebook.
    """

    def __init__(
        self,
        activation: Activation,
        parameters: Mapping[str, Parameter],
        codebook: Codebook | None,
        function: Function,
        inplace: bool,
    ) -> None:
        self.activation = activation
        self.parameters = parameters
        self.codebook = codebook
        self.bits = codebook.bits if codebook else 1
        self.inplace = inplace
        self.function = function
        self._coders: dict[tuple[torch.dtype, torch.device], Coder] = {}
        self._rows: dict[tuple[torch.dtype, torch.device], Saved] = {}
        self._levels: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._primitives: dict[torch.dtype, Saves] = {}
        self._inverse: Inverse | None = None
        self._inverse_sought = False
        self._is_not_a_number: dict[str, tuple[bool, bool]] = {}
        self._serves_itself: dict[tuple[torch.dtype, torch.device], bool] = {}
        self._ready: set[tuple[torch.dtype, torch.device]] = set()
        self._two_valued: set[torch.dtype] = set()  # asked at each call: a dtype's hash takes less than a device's
        self.thresholds = ops.Thresholds(codebook.boundaries, codebook.folded) if codebook else None

    def is_ready(self, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether the tables that an input's codes take are on its device; they are made now, where they can be.

        The host waits until they are there. That it cannot while a CUDA graph is captured.
        """
        key = dtype, device
        if key not in self._ready:
            if ops.capturing(device):
                return False
            with ops.waiting(device):
                self._try_out(torch.zeros(16, dtype=dtype, device=device))
            self._ready.add(key)
        return True

    def _try_out(self, x: Tensor) -> None:
        """Do all that is done with an input of this dtype: what it takes is made, and kernels are compiled."""
        codes, _ = self.encode(x)
        layout = ops.Layout.of(x)
        for rows in self._decoding_rows(x.dtype, x.device):
            if rows is not None:
                ops.decode(codes, rows, self.bits, layout)
        if self.codebook is not None:
            rows = self.level_rows(ops.multiplied_in(x.dtype, x.device), x.device)
            ops.multiply(x, codes, rows, self.bits, layout)

    def coder(self, dtype: torch.dtype, device: torch.device) -> Coder:
        """What maps a flat chunk to codes: of the input if the activation is smooth, else of the saved tensor."""
        if self.thresholds is not None:
            return self.thresholds
        coder = self._two_valued_coder(dtype, device)
        if coder is None:
            name = self.activation.name
            raise FewbitError(
                f"the derivative of {name} in {dtype} on {device} is not two-valued, as it is known to be. Please "
                f"report this; scope(bits={{{name!r}: None, ...}}) keeps it exact."
            )
        return coder

    def rows(self, k: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """The decoding table of the k-th tensor that the call saves; None if that one is not of the input's shape.

        Raises:
            FewbitError: the call saves fewer tensors than that, so that what was learned of it does not hold.
        """
        saved = self._decoding_rows(dtype, device)
        if k >= len(saved):
            raise FewbitError(
                f"{self.activation.name} saved a tensor more than the {len(saved)} it was seen to save. Please report "
                f"this; scope(bits={{{self.activation.name!r}: None, ...}}) keeps it exact."
            )
        return saved[k]

    def inverse(self, x: Tensor, *, copied: bool = False) -> Inverse | Itself | None:
        """How to have the derivative of an input like `x` from the output; None where it cannot be had.

        Args:
            copied: from a copy of the output, which serves those that save their output as well as that.
        """
        if copied and self.activation.saves == "output" and _is_dense(x):
            return Itself()
        if self.codebook is None:
            return Itself() if self._output_serves(x) else None
        if not self._inverse_sought:
            self._inverse = find_inverse(self.function, self._derivative)
        self._inverse_sought = True
        if self._inverse is None:
            return None
        if ops.must_be_ready(x) and not self._inverse.is_ready(x.dtype, x.device):
            return None
        return self._inverse

    def _output_serves(self, x: Tensor) -> bool:
        if not _is_dense(x):
            return False  # the output lies in memory in another way, and which NaN counts depends on the position
        key = x.dtype, x.device
        if key not in self._serves_itself:
            if ops.capturing(x.device):
                return False  # the answer makes the host wait for the device: another time
            with ops.waiting(x.device):
                # how a kernel rounds its limits differs from kernel to kernel: ask the device's own
                values = self._telling_values(x.dtype).to(x.device)
                self._serves_itself[key] = serves_itself(self.function, values)
        return self._serves_itself[key]

    def reason_to_keep(self, t: Tensor) -> str:
        """Why codes cannot stand for what is in a tensor that the call saves; empty where they can, or where the host
        would have to wait for the answer: then there is a flag, see `encode`."""
        if not may_look(t):
            return ""
        with ops.unnoticed():
            if self.codebook is None:
                return NAN if self.activation.nan_by_position and ops.has_nan(t) else ""
            at_nan, at_infinity = self._not_a_number(t.device)
            if (at_infinity and not ops.is_finite(t)) or (at_nan and not at_infinity and ops.has_nan(t)):
                return NOT_FINITE
            return ""

    def encode(self, t: Tensor) -> tuple[Tensor, Tensor | None]:
        """The codes of the input, or, of two-valued activations, of what the call saves; and a flag.

        The flag is a number, on the device of `t`, to be added to one of the stand-ins: 0, or NaN where `t` holds what
        stock's gradient is NaN for. None where the host has looked, or there is no such value.
        """
        with ops.unnoticed():
            coder, flags = self.coder(t.dtype, t.device), self.flags(t)
            if flags is None:
                return ops.encode(t, self.bits, coder), None
            assert self.thresholds is not None
            return ops.encode_flagged(t, self.bits, self.thresholds, or_infinite=flags)

    def flags(self, t: Tensor) -> bool | None:
        """Whether a flag is for infinities as well as for NaN; None: there is none."""
        if may_look(t) or self.codebook is None or not t.numel():
            return None
        at_nan, at_infinity = self._not_a_number(t.device)
        return at_infinity if at_nan else None

    def _not_a_number(self, device: torch.device) -> tuple[bool, bool]:
        """Whether stock's gradient is NaN at NaN, and at an infinity, by the device's kernels: those of elu and
        hardswish differ."""
        found = self._is_not_a_number.get(device.type)
        if found is None:
            with ops.waiting(device):
                # so often, as what a CPU's kernel makes of a NaN may depend on the position
                at = torch.from_numpy(np.repeat([[np.nan], [np.inf], [-np.inf]], 64, axis=1)).to(device)
                slope = derivative_from(self.function, saved_by(self.function, at), at).isnan().any(1).tolist()
            found = self._is_not_a_number[device.type] = slope[0], any(slope[1:])
        return found

    def is_cast(self, device: torch.device) -> bool:
        """Whether autocast runs the call in float32, so that what it saves is no tensor of the caller's."""
        return self.activation.name == "softplus" and torch.is_autocast_enabled(device.type)

    def level_rows(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The decoding table of the derivative itself, for a call that is one node of ours."""
        assert self.codebook is not None
        key = dtype, device
        if key not in self._levels:
            self._levels[key] = self._rows_of(self.codebook.levels, dtype, device)
        return self._levels[key]

    def primitives(self, x: Tensor) -> Saves:
        """What stock autograd would keep for the call, which is written in primitives."""
        found = self._primitives.get(x.dtype)
        if found is None:
            with ops.unseen():
                found = saves(self.function, torch.zeros(8, dtype=x.dtype, device=x.device))
            self._primitives[x.dtype] = found
        return found

    def captures(self, x: Tensor) -> bool:
        """Whether the function, a closure say, depends on a tensor beside its input that requires grad."""
        with pristine():
            y: Tensor = self.function(torch.zeros(1, dtype=x.dtype, device=x.device))
        return y.requires_grad

    def is_two_valued(self, dtype: torch.dtype) -> bool:
        """Of an activation that is exact: whether its derivative has two values in this torch, too, and jumps where it
        was looked for."""
        if dtype not in self._two_valued and self._two_valued_coder(dtype, torch.device("cpu")) is not None:
            self._two_valued.add(dtype)
        return dtype in self._two_valued

    def _two_valued_coder(self, dtype: torch.dtype, device: torch.device) -> Coder | None:
        """Tells which saved values have another derivative than the first; None if there is a third, or no interval."""
        key = dtype, device
        if key not in self._coders:
            with ops.waiting(device):
                coder = self._ask_for_two_values(dtype, device)
                if coder is None:
                    return None
                self._coders[key] = coder
        return self._coders[key]

    def _ask_for_two_values(self, dtype: torch.dtype, device: torch.device) -> Coder | None:
        """What the kernel itself says.

        Ties and limits are not alike in all kernels (in 16 bits each rounds hardtanh's 0.1 in its own way), nor in all
        versions of torch (at the limits of clamp the derivative was 1, and is 0 from 2.14 on).
        """
        if dtype in SIXTEEN_BIT:
            values = all_values(dtype)
        else:
            # all constants of ours are small integers; to sort every bfloat16 takes 10 ms, at each limit of a clipping
            integers = torch.arange(-128.0, 128.0, dtype=dtype, device="cpu")
            infinities = torch.tensor([-math.inf, math.inf], dtype=dtype, device="cpu")
            values = self._and_around_parameters(torch.cat([integers, infinities])).unique()  # ascending
            values = torch.cat([values, torch.full_like(values[:1], math.nan)])
        there = values.to(device)
        slope = derivative_from(self.function, [there], there)
        second = slope != slope[0]
        if (slope[second] != slope[second][:1]).any():
            return None
        if dtype in SIXTEEN_BIT:
            return ops.Lookup(second.to(torch.uint8))
        return _between(values[:-1], second[:-1].cpu(), nan=bool(second[-1]))

    def _decoding_rows(self, dtype: torch.dtype, device: torch.device) -> Saved:
        key = dtype, device
        if key not in self._rows:
            with ops.waiting(device):
                self._rows[key] = self._make_decoding_rows(dtype, device)
        return self._rows[key]

    def _make_decoding_rows(self, dtype: torch.dtype, device: torch.device) -> Saved:
        if self.codebook is None:
            integers = self._middles(np.arange(-128.0, 128.0), dtype)
            if len(integers) == 2 and dtype not in SIXTEEN_BIT:
                return [self._rows_of(np.array([integers[0], integers[1]]), torch.int8, device)]
            return [self._rows_of(self._two_values(dtype), dtype, device)]
        if dtype in SIXTEEN_BIT:
            s = standins_16bit(self.function, self.codebook.levels, dtype)
        else:
            s = standins(self.function, self._derivative, self.codebook.levels, self.codebook.interval, dtype)
        saved = saved_by(self.function, s.to(device=device, dtype=dtype))
        return [ops.rows(t.to(dtype), self.bits) if t.shape == s.shape else None for t in saved]

    def _rows_of(self, values: NDArray[np.float64], dtype: torch.dtype, device: torch.device) -> Tensor:
        return ops.put(ops.rows(torch.tensor(values, device="cpu").to(dtype), self.bits), device)

    def _derivative(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        return self.activation.derivative(x, **self.parameters)

    def _two_values(self, dtype: torch.dtype) -> NDArray[np.float64]:
        """One value for each code, as far from a change of code as there is."""
        values = self._telling_values(dtype).double().numpy()
        # the last resort: clamp(x, -inf, inf) has its second value at NaN alone, clamp(x, min=inf) at inf
        special = np.array([np.nan, np.inf, -np.inf])
        middle = {int(code): float(v) for code, v in zip(self._codes_of(special, dtype), special, strict=True)}
        middle |= self._middles(np.unique(values[np.isfinite(values)]), dtype)
        return np.array([middle.get(0, middle.get(1, 0.0)), middle.get(1, middle.get(0, 0.0))])

    def _middles(self, values: NDArray[np.float64], dtype: torch.dtype) -> dict[int, float]:
        """For each code that ascending values have, the middle of its longest run."""
        codes = self._codes_of(values, dtype)
        starts = np.flatnonzero(np.diff(codes, prepend=-1))
        ends = np.append(starts[1:], len(codes))
        runs = sorted(zip(starts, ends, strict=True), key=lambda run: run[1] - run[0])
        return {int(codes[start]): float(values[(start + end) // 2]) for start, end in runs}  # the longest comes last

    def _telling_values(self, dtype: torch.dtype) -> Tensor:
        """Values among which are, on both sides, all places where a two-valued derivative may jump."""
        return self._and_around_parameters(all_values(dtype if dtype in SIXTEEN_BIT else torch.bfloat16).to(dtype))

    def _and_around_parameters(self, spread: Tensor) -> Tensor:
        """These values, and the parameters, and the neighbours of both; of 0 those that are never flushed to it."""
        numbers = [p for p in self.parameters.values() if isinstance(p, float) and np.isfinite(p)]
        # an interval may be too narrow for the spread: add its ends, -lambd among them, and their mean
        ends = [*numbers, *(-p for p in numbers), float(np.mean(numbers or [0]))]
        with torch.autocast("cpu", enabled=False):  # which refuses to put float16 together, where it is for bfloat16
            at = torch.cat([spread, torch.tensor(ends, dtype=torch.float64, device="cpu").to(spread.dtype)])
            tiny = torch.finfo(at.dtype).smallest_normal
            neighbours = [
                torch.where(at == 0, sign * tiny, torch.nextafter(at, torch.full_like(at, sign * np.inf)))
                for sign in (-1, 1)
            ]
            return torch.cat([at, *neighbours])

    def _codes_of(self, values: NDArray[np.float64], dtype: torch.dtype) -> NDArray[Any]:
        return self.coder(dtype, torch.device("cpu"))(torch.from_numpy(values).to(dtype)).numpy().astype(np.int8)


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


def may_look(t: Tensor) -> bool:
    """Whether the host may ask what is in a tensor: on CUDA it would wait for the device."""
    return not t.is_cuda


def _is_dense(x: Tensor) -> bool:
    return ops.Layout.of(x).stride == x.stride()
