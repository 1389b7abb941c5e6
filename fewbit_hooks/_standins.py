"""Stand-ins: inputs for which a node's own backward gives the derivative that is wanted.

NOTE [ Asking the node ]

No formula of a node's backward is copied here. Which tensors a call saves, and what derivative its backward computes
from saved tensors, is found by making the call with hooks that record what is saved, or that hand it other tensors.
So the in-place forms that save their output where the others save their input (`elu_`), the nodes that save several
tensors (logsigmoid) and the composites (softsign) all come out of the same three functions:

    saved_by(function, x)          the tensors saved by function(x)
    derivative_from(function, ts)  the derivative that its backward computes when these are handed to it
    standins(...)                  inputs s_i with f'(s_i) = level_i

What `saved_by(function, standins)` returns is then, code by code, what the unpack hook must return for each saved
tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ._activations import pristine

Function = Callable[[Tensor], Tensor]
Derivative = Callable[[NDArray[np.float64]], NDArray[np.float64]]

SIXTEEN_BIT = (torch.float16, torch.bfloat16)
NEAR = 1e-3
"""Of the derivative's range. (measured) Of every level of `codebook()`, whatever its weight, it comes within 1e-15."""


class Saves(NamedTuple):
    """What a call keeps for backward.

    Attributes:
        extra: bytes in storages other than those of its input and output, for each byte of the input.
        keeps_x: that of its input is kept, too.
        keeps_y: that of its output.
    """

    extra: float
    keeps_x: bool
    keeps_y: bool = False

    def gain(self, x: Tensor) -> float:
        """How much less is kept if the storage of `x` is, and nothing else; as `extra`.

        That of the output, which others may keep, is no reason to keep an input that would not be.
        """
        if self.keeps_x:
            return self.extra + self.keeps_y
        return self.extra - x.untyped_storage().nbytes() / x.nbytes

    def never_kept(self, x: Tensor) -> int:
        """The bytes beside `x` and the output that are not kept if the call is made as one node."""
        return int(self.extra * x.numel() * x.element_size())


def saved_by(function: Function, x: Tensor) -> list[Tensor]:
    """Copies of the tensors that `function(x)` saves for backward, in order."""
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t.detach().clone())
        return saved[-1]

    with pristine(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function(_recorded(x))
    return saved


def derivative_from(function: Function, saved: Sequence[Tensor], like: Tensor) -> Tensor:
    """The derivative that the backward of `function` computes from `saved`, element by element.

    Args:
        like: an input of the shape, dtype and device in question; its values do not matter.
    """
    packed = iter(range(len(saved)))
    with pristine(), torch.autograd.graph.saved_tensors_hooks(lambda _: next(packed), lambda k: saved[k]):
        leaf = like.detach().requires_grad_()
        y = function(leaf.clone())  # an in-place function's result is its argument: differentiate by the leaf
        (slope,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
    return slope


def saves(function: Function, x: Tensor, own: Collection[Tensor] = (), *, autocast: bool = False) -> Saves:
    """What `function(x)` keeps for backward.

    Args:
        own: other tensors that are kept anyway, parameters say.
        autocast: as it is now; else without.
    """
    sizes: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        sizes[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t.detach()

    with pristine(autocast=autocast), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        recorded = _recorded(x)
        y = function(recorded)  # keeps the graph, and so the storages, alive: an address is not used twice
    for t in own:
        sizes.pop(t.untyped_storage()._cdata, None)
    keeps_x = sizes.pop(recorded.untyped_storage()._cdata, None) is not None
    keeps_y = sizes.pop(y.untyped_storage()._cdata, None) is not None
    del y
    return Saves(sum(sizes.values()) / x.nbytes, keeps_x, keeps_y)


def _recorded(x: Tensor) -> Tensor:
    """A non-leaf copy that requires grad: in-place functions accept it."""
    return x.detach().requires_grad_().clone()


def all_values(dtype: torch.dtype) -> Tensor:
    """All 65,536 values of a 16-bit floating-point dtype, in the order of their bits."""
    return torch.arange(65536, dtype=torch.int32, device="cpu").to(torch.uint16).view(dtype)


def standins_16bit(function: Function, levels: NDArray[np.float64], dtype: torch.dtype) -> Tensor:
    """For each level the value of a 16-bit dtype whose saved tensors, rounded to that dtype, give the nearest
    derivative.

    Near saturation the output of tanh or sigmoid has few digits left in 16 bits; looking at every value finds the one
    for which y, as it will be stored, serves best.
    """
    x = all_values(dtype).double()
    x = x[x.abs() <= 64.0]  # past it every derivative here has saturated, and exp() would overflow
    rounded = [t.to(dtype).double() for t in saved_by(function, x)]
    slope = derivative_from(function, rounded, x).numpy()
    slope = np.where(np.isfinite(slope), slope, np.inf)
    order = np.argsort(x.numpy(), kind="stable")
    nearest = [order[_middle_of_the_nearest(slope[order], level)] for level in levels]
    return x[nearest]


def standins(
    function: Function,
    derivative: Derivative,
    levels: NDArray[np.float64],
    interval: tuple[float, float],
    dtype: torch.dtype,
) -> Tensor:
    """For each level an input where the derivative is that level, by bisection in float64.

    A level is the mean of f' over its piece, so a continuous f' attains it there. Where f' jumps a sign change
    may be the jump and no solution; of all sign changes the one that ends nearest wins.

    Args:
        derivative: f' in float64.
        dtype: that of the saved tensors. What counts in the end is what the node computes from them, rounded: next to a
            jump (softplus with a low threshold) rounding may lead to its other side.

    Returns:
        float64, one value a level, on the CPU.
    """
    candidates = torch.from_numpy(_candidates(derivative, levels, interval)).to(dtype)
    slopes = derivative_from(function, saved_by(function, candidates), candidates).double().numpy()
    return candidates[[_middle_of_the_nearest(slopes, level, torch.finfo(dtype).eps) for level in levels]].double()


def never_taken(derivative: Derivative, levels: NDArray[np.float64], interval: tuple[float, float]) -> float | None:
    """The first level that f' takes nowhere, so that no stand-in has it; None: it takes them all.

    Args:
        derivative: f' in float64. It counts as taking a level from which it comes to be a thousandth of its range away.
    """
    slopes = derivative(_candidates(derivative, levels, interval))
    slopes = slopes[np.isfinite(slopes)]
    away = np.abs(slopes[None, :] - levels[:, None]).min(axis=1)
    missed = np.flatnonzero(away > NEAR * np.ptp(slopes))
    return float(levels[missed[0]]) if missed.size else None


def _candidates(
    derivative: Derivative, levels: NDArray[np.float64], interval: tuple[float, float]
) -> NDArray[np.float64]:
    """A grid, and between its points where f' passes a level; ascending."""
    low, high = interval
    margin = (high - low) / 2
    grid = np.linspace(low - margin, high + margin, 2**13 + 1)  # contains 0 for a symmetric interval
    above = derivative(grid)[None, :] >= levels[:, None]
    which, cell = np.nonzero(above[:, 1:] != above[:, :-1])
    left, right, rising = grid[cell], grid[cell + 1], ~above[which, cell]
    for _ in range(60):
        middle = (left + right) / 2
        inside = (derivative(middle) >= levels[which]) == rising
        left, right = np.where(inside, left, middle), np.where(inside, middle, right)
    return np.sort(np.concatenate([left, right, grid]))


def _middle_of_the_nearest(slopes: NDArray[np.float64], level: float, tolerance: float = 0.0) -> int:
    """Where `slopes`, of ascending inputs, come nearest to the level; of many alike the middle, far from any jump."""
    error = np.abs(slopes - level)
    nearest = np.flatnonzero(error <= error.min() + tolerance)
    return int(nearest[len(nearest) // 2])
