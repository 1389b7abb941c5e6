"""A plan: how the tensors saved by one call, with one set of parameters, are coded.

Computed once and cached; applying it is the business of the hooks. Everything that depends on the saved tensor's
dtype and device is made when the first such tensor comes along.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import ops
from ._activations import Activation, Parameter, pristine
from ._codebook import Codebook
from ._errors import FewbitError
from ._inverse import Inverse, Itself, find_inverse
from ._standins import SIXTEEN_BIT, Function, Saves, derivative_from, saved_by, saves, standins, standins_16bit
from ._two_valued import TwoValued

NAN = "holds NaN, where stock's gradient depends on the position"
NOT_FINITE = "holds NaN or infinities, where stock's gradient is NaN"

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
        two_valued: tells the derivative's two values apart where there is none.
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
        self._rows: dict[tuple[torch.dtype, torch.device], Saved] = {}
        self._levels: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._primitives: dict[torch.dtype, Saves] = {}
        self._inverse: Inverse | None = None
        self._inverse_sought = False
        self._is_not_a_number: dict[str, tuple[bool, bool]] = {}
        self._ready: set[tuple[torch.dtype, torch.device]] = set()
        self.thresholds = ops.Thresholds(codebook.boundaries, codebook.folded) if codebook else None
        self.two_valued = TwoValued(function, parameters) if codebook is None else None

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

    def coder(self, dtype: torch.dtype, device: torch.device) -> ops.Coder:
        """What maps a flat chunk to codes: of the input if the activation is smooth, else of the saved tensor."""
        if self.thresholds is not None:
            return self.thresholds
        coder = self.two_valued.coder(dtype, device) if self.two_valued is not None else None
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
        if self.two_valued is not None:
            # where the output lies in memory in another way, which NaN counts depends on the position
            return Itself() if _is_dense(x) and self.two_valued.output_serves(x.dtype, x.device) else None
        if not self._inverse_sought:
            self._inverse = find_inverse(self.function, self._derivative)
        self._inverse_sought = True
        if self._inverse is None:
            return None
        if ops.must_be_ready(x) and not self._inverse.is_ready(x.dtype, x.device):
            return None
        return self._inverse

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
            levels = torch.tensor(self.codebook.levels, device="cpu").to(dtype)
            self._levels[key] = ops.put(ops.rows(levels, self.bits), device)
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

    def _decoding_rows(self, dtype: torch.dtype, device: torch.device) -> Saved:
        key = dtype, device
        if key not in self._rows:
            with ops.waiting(device):
                self._rows[key] = self._make_decoding_rows(dtype, device)
        return self._rows[key]

    def _make_decoding_rows(self, dtype: torch.dtype, device: torch.device) -> Saved:
        if self.two_valued is not None:
            return [ops.put(ops.rows(self.two_valued.standins(dtype), self.bits), device)]
        assert self.codebook is not None
        if dtype in SIXTEEN_BIT:
            s = standins_16bit(self.function, self.codebook.levels, dtype)
        else:
            s = standins(self.function, self._derivative, self.codebook.levels, self.codebook.interval, dtype)
        saved = saved_by(self.function, s.to(device=device, dtype=dtype))
        return [ops.rows(t.to(dtype), self.bits) if t.shape == s.shape else None for t in saved]

    def _derivative(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        return self.activation.derivative(x, **self.parameters)


def may_look(t: Tensor) -> bool:
    """Whether the host may ask what is in a tensor: on CUDA it would wait for the device."""
    return not t.is_cuda


def _is_dense(x: Tensor) -> bool:
    return ops.Layout.of(x).stride == x.stride()
