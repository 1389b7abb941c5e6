"""The derivative from the output: what a kept output, and at most one bit, say about f'.

NOTE [ Beside a kept output ]

Where somebody else keeps y = f(x) anyway (the next trainable Linear, the product of a gated unit), it costs nothing
to use. A monotone f can be inverted: y alone gives x, and so f'. gelu, silu, mish and hardswish fall to one minimum
and then rise: y and one bit, which side of the minimum x lay on, give x.

Inverting is one look-up: y, rounded to 16 bits, and the side address a table of 2 x 65,536 inputs, the stand-ins. A
bfloat16 or float16 y is that number already. A float32 or float64 y loses digits, those that a derivative needs
least: (measured, N(0, 1) inputs) the relative RMS error of f' is 0.2 % in bfloat16 and 0.03 % in the others, where the
optimal 3-bit codebooks have 9 to 10 %. It is largest at the minimum itself, where y says little about x: there f',
which is near 0, is off by up to sqrt(2 f''(x) dy), dy being the rounding of y: 0.04 in bfloat16, 0.01 in the others.

The backward of some two-valued activations cannot tell y from x: relu6 asks whether its input lies between 0 and 6, and
its output does so exactly where the input did. There y is handed to the node as it is: nothing is stored, nothing is
computed, and the gradient is bit for bit stock's, NaN included, which stands in y where it stood in x.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import ops
from ._activations import pristine
from ._standins import Function, all_values, derivative_from, saved_by

Array = NDArray[np.float64]

REACH = 32.0
"""Inputs are sought in [-32, 32]: beyond it every derivative here has saturated."""
POINTS = 2**17 + 1
"""Odd, so that 0, where selu bends, is one. Linear between them is exact to 1e-7, less than float16 tells apart."""


class Inverse:
    """How f is undone.

    Args:
        function: the call, of a tensor.
        derivative: f' in float64.
        minimum: where f has its minimum; None where it rises everywhere.
    """

    def __init__(self, function: Function, derivative: Callable[[Array], Array], minimum: float | None) -> None:
        self._function = function
        self._derivative = derivative
        self.minimum = minimum
        self._side = ops.Between(minimum, open_low=True) if minimum is not None else None
        self._tables: dict[tuple[torch.dtype, torch.dtype, torch.device], list[Tensor | None]] = {}
        self._slopes: dict[tuple[torch.dtype, torch.dtype, torch.device], Tensor] = {}

    @property
    def bits(self) -> int:
        """Bits an element that must be kept beside the output."""
        return 0 if self.minimum is None else 1

    @property
    def side(self) -> ops.Between:
        """The bit: right of the minimum."""
        assert self._side is not None
        return self._side

    def is_ready(self, dtype: torch.dtype, device: torch.device) -> bool:
        """As `Plan.is_ready`, for outputs of the dtype."""
        if (dtype, dtype, device) not in self._tables:
            if ops.capturing(device):
                return False
            with ops.waiting(device):
                self.slopes(dtype, ops.multiplied_in(dtype, device), device)
                self.table(0, dtype, dtype, device)
                if self._side is not None:
                    ops.encode(torch.zeros(16, dtype=dtype, device=device), 1, self._side)
        return True

    def standins(self, k: int, output: Tensor, packed: Tensor | None, layout: ops.Layout) -> Tensor:
        """What to hand the node for the k-th tensor that the call saves."""
        return ops.decode_beside(output, packed, self.table(k, output.dtype, layout.dtype, layout.device), layout)

    def slope(self, output: Tensor, packed: Tensor | None, layout: ops.Layout) -> Tensor:
        """The derivative itself, for a node of ours."""
        return ops.decode_beside(output, packed, self.slopes(output.dtype, layout.dtype, layout.device), layout)

    def product(self, grad: Tensor, output: Tensor, packed: Tensor | None, layout: ops.Layout) -> Tensor:
        """`grad`, of the layout's dtype, times the derivative."""
        slopes = self.slopes(output.dtype, ops.multiplied_in(layout.dtype, layout.device), layout.device)
        return ops.multiply_beside(grad, output, packed, slopes, layout)

    def table(self, k: int, output: torch.dtype, dtype: torch.dtype, device: torch.device) -> Tensor:
        """What to hand the node for the k-th tensor that the call saves, by output and side.

        Args:
            output: the output's dtype, by which `ops.decode_beside` looks up.
            dtype, device: of the saved tensor.

        Returns:
            65,536 values, or 2 x 65,536. The k-th saved tensor must be of the input's shape.
        """
        key = output, dtype, device
        if key not in self._tables:
            with ops.waiting(device):
                s = self.inputs(output)
                saved = saved_by(self._function, s.to(dtype).to(device))
                self._tables[key] = [t.to(dtype) if t.shape == s.shape else None for t in saved]
        table = self._tables[key][k]
        assert table is not None
        return table

    def slopes(self, output: torch.dtype, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The derivative itself by output and side; as `table`."""
        key = output, dtype, device
        if key not in self._slopes:
            with ops.waiting(device):
                slopes = torch.from_numpy(self._derivative(self.inputs(output).numpy()))
                self._slopes[key] = slopes.to(dtype).to(device)
        return self._slopes[key]

    def inputs(self, output: torch.dtype) -> Tensor:
        """The inputs, in float64, of all 16-bit values of an output: those left of the minimum, then those right.

        NaN is the input of NaN; and of an infinity that infinity, where it is not one for being looked up in 16 bits.
        """
        dtype = _looked_up(output)
        y = all_values(dtype).double().numpy()
        if output != dtype:
            y = np.clip(y, -65504, 65504)
        if self.minimum is None:
            return torch.from_numpy(self._solve(y, np.linspace(-REACH, REACH, POINTS)))
        # in steps that grow from the minimum, where y changes with the square of the distance
        steps = np.linspace(0.0, 1.0, POINTS) ** 2
        left = self._solve(y, self.minimum - steps[::-1] * (REACH + self.minimum))
        right = self._solve(y, self.minimum + steps * (REACH - self.minimum))
        return torch.from_numpy(np.concatenate([left, right]))

    def _solve(self, y: Array, x: Array) -> Array:
        """Where f reaches y among `x`, linear between them; the nearer end where it never does."""
        reached, first = np.unique(_evaluate(self._function, x), return_index=True)  # of a flat piece the first x
        solution: Array = np.interp(y, reached, x[first])
        return np.where(np.isinf(y), y, solution)


class Itself:
    """The output serves as it is, in the place of the input."""

    bits = 0

    def standins(self, k: int, output: Tensor, packed: Tensor | None, layout: ops.Layout) -> Tensor:
        """What to hand the node: the output; with a NaN in it, in the memory order of what it saved.

        On the CPU it depends on the position in memory what a kernel makes of NaN. What lies inside a padded copy is in
        other positions; but a look for NaN takes a quarter of the time of a copy.
        """
        if output.stride() == layout.stride:
            return output
        same_order = ops.Layout.of(output).stride == layout.stride  # or the gradient would lie in memory as the copy
        if same_order and (output.is_cuda or not ops.has_nan(_storage_of(output))):
            return output
        return layout.empty().copy_(output)


def _storage_of(t: Tensor) -> Tensor:
    """All that lies in its storage."""
    return t.as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,), 0)


def serves_itself(function: Function, values: Tensor) -> bool:
    """Whether backward computes the same from the output as from the input.

    >>> import torch, torch.nn.functional as F
    >>> x = torch.linspace(-8, 8, 33)
    >>> serves_itself(F.relu6, x), serves_itself(F.hardsigmoid, x)
    (True, False)

    Args:
        values: inputs on both sides of each jump of the derivative, and on it.
    """
    saved = saved_by(function, values)
    if len(saved) != 1 or not torch.equal(saved[0].nan_to_num(), values.nan_to_num()):
        return False  # it saves its output anyway
    with pristine(), torch.no_grad():
        y = function(values.clone())
    return torch.equal(derivative_from(function, [y], values), derivative_from(function, [values], values))


def find_inverse(function: Function, derivative: Callable[[Array], Array]) -> Inverse | None:
    """How to undo f; None where f falls for good, or turns more than once, or saves its output itself.

    >>> import torch, fewbit_hooks as fewbit
    >>> silu = next(a for a in fewbit.activations() if a.name == "silu")
    >>> round(find_inverse(silu.function, silu.derivative).minimum, 4)
    -1.2785
    """
    grid = np.linspace(-REACH, REACH, 2**14 + 1)
    saved = saved_by(function, torch.from_numpy(grid))
    if len(saved) == 1 and np.array_equal(saved[0].numpy(), _evaluate(function, grid)):
        return None  # whoever keeps the output keeps what the node saves: there is nothing to be freed
    slope = derivative(grid)
    flat = 1e-12 * np.abs(slope).max()
    rising, falling = np.flatnonzero(slope > flat), np.flatnonzero(slope < -flat)
    if not len(rising):
        return None
    if not len(falling):
        return Inverse(function, derivative, None)
    if falling[-1] > rising[0]:
        return None
    low, high = grid[falling[-1]], grid[rising[0]]
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if derivative(np.array([middle]))[0] < 0 else (low, middle)
    return Inverse(function, derivative, float(high))


def _looked_up(output: torch.dtype) -> torch.dtype:
    """The 16-bit dtype by whose bits `ops.decode_beside` looks an output up."""
    return torch.bfloat16 if output == torch.bfloat16 else torch.float16


def _evaluate(function: Function, x: Array) -> Array:
    with pristine(), torch.no_grad():
        y: Array = function(torch.from_numpy(x.copy())).numpy()
    return y
