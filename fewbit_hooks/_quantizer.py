"""The optimal few-bit quantizer of a derivative. Numpy only: it knows nothing of torch.

NOTE [ The optimum ]

A derivative f' is replaced by the function q of K = 2**bits constant pieces that minimises

    E = integral of (f'(x) - q(x))^2 w(x) dx                 (Novikov et al., arXiv:2202.00441, section 3)

1. *One piece.* The best level of a piece [a, b] is the w-mean of f' on it, and then the piece costs

       cost(a, b) = integral of w f'^2  -  (integral of w f')^2 / (integral of w),

   three differences of prefix integrals, so any piece costs O(1) once those are known.
2. *All pieces.* With k pieces up to node j, best[k][j] = min over i of best[k - 1][i] + cost(i, j). This finds the
   global optimum whatever the shape of f'; that of gelu is not monotone, so no faster recursion holds.
3. *Two grids.* The search runs on about a thousand coarse nodes, dense where f' bends; then all boundaries move at once
   among the nearby nodes of a 32 times finer grid, by the same recursion, until the error falls no more.
4. *Jumps.* They are nodes of both grids, so a boundary can lie on one exactly. A level that f' does not take anywhere
   (the mean over a jump) could not be decoded: such a piece gets the nearest value that f' does take, and the search
   counts what that costs. The jump itself gets the level of the side whose derivative it has: to the error it is all
   one, but inputs that were clipped there, or are numbers of 16 bits, are met more often than those beside it.
5. *Floats.* Boundaries end on numbers that every encoder can apply exactly (NOTE [ Sixteen bits decide the code ]):
   on the cheapest of them near the optimum, again by the same recursion. Where f' is a straight line, as that of
   hardswish, the nearest one is a matter of the last bit, and so of the machine.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ._errors import FewbitTypeError, FewbitValueError
from ._float16 import FLOAT16_MAX, cuts_around, scale_for_cut, snap

Array: TypeAlias = NDArray[np.float64]
Indices: TypeAlias = NDArray[np.intp]
Function: TypeAlias = Callable[[Array], Array]

# Gauss's rule with 3 nodes to a fine cell: E agrees with adaptive quadrature to 1e-9 and better
GAUSS_NODES, GAUSS_WEIGHTS = np.polynomial.legendre.leggauss(3)
FINE_PER_COARSE = 32
REACH = 8  # candidates on each side of a boundary while it moves on the fine grid, and among the cuts
TINY = float(np.finfo(np.float32).tiny)
"""The smallest normal float32 number: beside 0, and never flushed to it."""
SNAP_MAY_COST = 0.01  # a larger loss than 1 % of E, and exactness in float16 is given up for that in float32


class Quantizer(NamedTuple):
    """Level i is taken where boundaries[i - 1] < x <= boundaries[i]; the outermost pieces are infinite."""

    boundaries: Array
    levels: Array
    error: float


def check_bits(bits: object, what: str = "bits") -> int:
    """`bits` as an int from 1 to 8; anything else raises, calling it `what`."""
    if isinstance(bits, bool) or not isinstance(bits, (int, np.integer)):
        raise FewbitTypeError(f"{what} must be an integer from 1 to 8, got {bits!r}")
    if not 1 <= bits <= 8:
        raise FewbitValueError(f"{what} must be an integer from 1 to 8, got {bits}")
    return int(bits)


def check_interval(interval: Any) -> tuple[float, float]:
    """`interval` as two finite floats, the lower first; anything else raises."""
    try:
        low, high = (float(end) for end in interval)
    except (TypeError, ValueError):
        raise FewbitTypeError(f"interval must be two numbers such as (-10.0, 10.0), got {interval!r}") from None
    if not (np.isfinite([low, high]).all() and low < high):
        raise FewbitValueError(f"interval must be two finite numbers, the lower one first, got {interval!r}")
    return low, high


def optimal_quantizer(
    derivative: Function,
    bits: int,
    *,
    weight: Function,
    interval: tuple[float, float],
    folded: bool = False,
    jumps: Sequence[float] = (),
    edges: Sequence[float] = (),
) -> Quantizer:
    """The piecewise-constant function of 2**bits levels nearest to a derivative.

    >>> sech2 = lambda x: np.cosh(x) ** -2.0  # the derivative of tanh is even
    >>> best = optimal_quantizer(sech2, 1, weight=np.ones_like, interval=(-10, 10), folded=True)
    >>> print(best.boundaries.round(2), best.levels.round(2), round(best.error, 4))
    [1.06] [0.74 0.02] 0.1584

    Args:
        derivative: float64 array -> float64 array of the same shape, elementwise.
        bits: 1 to 8.
        weight: float64 array -> float64 array, the density of inputs; need not be normalised.
        interval: where the integral is taken; both ends finite.
        folded: `derivative` is even: boundaries are on |x|, the error is still that of the whole interval.
        jumps: where `derivative` jumps.
        edges: where `weight` jumps.

    Returns:
        2**bits - 1 increasing boundaries (float32 numbers), 2**bits levels, and E.

    Raises:
        FewbitValueError: the weight is negative, not finite, or zero everywhere, or the derivative is not finite.
    """
    pieces = 2 ** check_bits(bits)
    problem = _Problem(derivative, weight, check_interval(interval), folded, jumps, edges)
    optimum = problem.nodes[problem.refine(problem.search(pieces))]

    rounded = problem.fit(problem.with_jumps_on_their_sides(_single(optimum)))
    on_cuts = problem.snapped(optimum)
    if on_cuts is None:
        return rounded
    snapped = problem.fit(problem.choose(*on_cuts))
    return snapped if snapped.error <= (1 + SNAP_MAY_COST) * rounded.error else rounded


def cheapest_path(legs: Sequence[Array]) -> tuple[float, Indices]:
    """The cheapest way from one start to one goal over a row of stops, each with several candidates.

    >>> first, second = np.array([[1.0], [5.0]]), np.array([[7.0, 2.0]])
    >>> cheapest_path([first, second])  # 5 + 2 is less than 1 + 7
    (7.0, array([1]))

    Args:
        legs: legs[k][j, i] is the cost of leg k from candidate i of the stop before it to candidate j of the one after.

    Returns:
        the total cost, and the candidate taken at each of the `len(legs) - 1` stops.
    """
    cost, choices = legs[0][:, 0], []
    total = np.empty_like(legs[1])
    for leg in legs[1:]:
        total = np.add(leg, cost, out=total if total.shape == leg.shape else None)
        choices.append(total.argmin(axis=1))
        cost = np.take_along_axis(total, choices[-1][:, None], axis=1)[:, 0]
    path = [0]
    for choice in reversed(choices):
        path.append(choice[path[-1]])
    return float(cost[0]), np.array(path[:0:-1])


class _Problem:
    """One derivative under one weight: grids, prefix integrals, and the three steps search, refine, fit."""

    def __init__(
        self,
        derivative: Function,
        weight: Function,
        interval: tuple[float, float],
        folded: bool,
        jumps: Sequence[float],
        edges: Sequence[float],
    ) -> None:
        low, high = interval
        self.derivative = _checked(derivative, "the derivative")
        self.weight = _checked(weight, "the weight", nonnegative=True)
        if folded:
            self.weight = _folded(self.weight, low, high)
            jumps, edges = np.abs(jumps).tolist(), np.abs([*edges, low, high]).tolist()
            low, high = max(0.0, low, -high), max(-low, high)
        self.low, self.high = low, high
        self.jumps = np.unique([jump for jump in jumps if low < jump < high])

        self.coarse = self._coarse_nodes(1024)
        subdivided = np.arange((len(self.coarse) - 1) * FINE_PER_COARSE + 1) / FINE_PER_COARSE
        fine = np.interp(subdivided, np.arange(len(self.coarse)), self.coarse)
        self.nodes = np.union1d(fine, [edge for edge in edges if low < edge < high])

        x, f, mass = self._samples(self.nodes)
        self.integrals = _prefix_integrals(f, mass)
        if not self.integrals[0, -1] > 0:
            raise FewbitValueError(f"the weight is zero everywhere on {interval}; it must be positive somewhere")
        self.gaps = _gaps(np.split(f, np.searchsorted(x[:, 0], self.jumps)))

    def _coarse_nodes(self, count: int) -> Array:
        """Half of the nodes even in x; half by (f''^2 w)^(1/3), the density of fine quantizers (Panter, Dite 1951)."""
        around_zero = np.sinh(np.linspace(np.arcsinh(self.low), np.arcsinh(self.high), 4096))  # dense there
        probe = np.union1d(np.linspace(self.low, self.high, 4096), around_zero.clip(self.low, self.high))
        step = np.diff(probe)
        bend = np.cbrt(np.diff(self.derivative(probe)) ** 2 * self.weight(probe[:-1] + step / 2) * step)
        share = step / step.sum() + bend / (bend.sum() or 1.0)
        position = np.append(0.0, share.cumsum())
        nodes = np.interp(np.linspace(0.0, position[-1], count), position, probe)
        return np.union1d(nodes, self.jumps)

    def _samples(self, nodes: Array) -> tuple[Array, Array, Array]:
        """x, f'(x) and the mass w(x) dx at Gauss's points, one row for each cell between two nodes."""
        half = np.diff(nodes)[:, None] / 2
        x = nodes[:-1, None] + half * (1 + GAUSS_NODES)
        f, w = self.derivative(x.ravel()), self.weight(x.ravel())
        return x, f.reshape(x.shape), w.reshape(x.shape) * half * GAUSS_WEIGHTS

    def cost(self, start: Indices, stop: Indices, integrals: Array | None = None) -> Array:
        """The cost of the pieces from node `start` to node `stop` (indices that broadcast); inf for an empty piece."""
        integrals = self.integrals if integrals is None else integrals
        mass, first, second = integrals[:, stop] - integrals[:, start]
        level = np.divide(first, mass, out=np.zeros_like(mass), where=mass > 0)
        cost = second - first * level
        if self.gaps:
            cost += mass * (level - self._nearest_taken(level)) ** 2
        return np.where(start < stop, np.maximum(cost, 0.0), np.inf)

    def search(self, pieces: int) -> Indices:
        """The cheapest boundaries among the coarse nodes, as indices into the fine ones."""
        coarse = np.searchsorted(self.nodes, self.coarse)
        cost = self.cost(coarse[None, :], coarse[:, None])
        _, path = cheapest_path([cost[:, :1], *[cost] * (pieces - 2), cost[-1:]])
        return coarse[path]

    def refine(self, cuts: Indices) -> Indices:
        """Let every boundary move on the fine grid, all at once, first in strides, then node by node."""
        for stride in (FINE_PER_COARSE // REACH, 1):
            before, now = math.inf, sys.float_info.max
            while now < before * (1 - 1e-9):
                stops = (cuts[:, None] + stride * np.arange(-REACH, REACH + 1)).clip(0, len(self.nodes) - 1)
                before, (now, path) = now, self._cheapest(stops, self.integrals)
                cuts = np.take_along_axis(stops, path[:, None], axis=1)[:, 0]
        return cuts

    def choose(self, boundaries: Array, scale: float) -> Array:
        """The cheapest boundaries on cuts, near those given; the nearest cuts need not be the best ones."""
        before, now = math.inf, sys.float_info.max
        while now < before * (1 - 1e-6):
            cuts = cuts_around(boundaries, scale, REACH)
            nodes = np.union1d(self.nodes, cuts[(self.low < cuts) & (cuts < self.high)])
            _, f, mass = self._samples(nodes)
            stops = np.searchsorted(nodes, cuts.T.clip(self.low, self.high))
            before, (now, path) = now, self._cheapest(stops, _prefix_integrals(f, mass))
            if now == math.inf:
                break
            boundaries = np.take_along_axis(cuts, path[None], axis=0)[0]
        return self.with_zero_on_its_side(boundaries, *cuts_around(0.0, scale, 1)[:2])

    def with_zero_on_its_side(self, boundaries: Array, below: float, above: float) -> Array:
        """A boundary at a jump at 0 so that 0 is on the side whose derivative it has.

        Args:
            below, above: the boundaries next to 0 that there can be; that above may be 0.
        """
        if not np.isin(0.0, self.jumps):
            return boundaries
        wrong, own = (below, above) if self._is_left(-TINY, 0.0, TINY) else (above, below)
        return boundaries if own in boundaries else np.where(boundaries == wrong, own, boundaries)

    def with_jumps_on_their_sides(self, boundaries: Array) -> Array:
        """The same at all jumps, of boundaries that are any float32 numbers."""
        for jump, last in self._last_on_the_left():
            boundaries = np.where(boundaries == jump, last, boundaries)
        return self.with_zero_on_its_side(boundaries, -TINY, 0.0)

    def snapped(self, boundaries: Array) -> tuple[Array, float] | None:
        """The boundaries on float16 cuts, and the scale with which most jumps are on their sides; None where that
        cannot be."""
        if np.abs(boundaries).max() >= FLOAT16_MAX / 2:
            return None
        single = boundaries.astype(np.float32)
        cuts = np.array([last for jump, last in self._last_on_the_left() if jump in single])
        scales = [scale_for_cut(cut) for cut in cuts.tolist()]
        scale = max(scales, key=lambda scale: np.count_nonzero(snap(cuts, scale) == cuts), default=1.0)
        snapped = snap(boundaries, scale)
        return (snapped, scale) if np.all(np.diff(snapped) > 0) else None

    def _last_on_the_left(self) -> list[tuple[float, float]]:
        """Of each jump but one at 0, as a float32 number: it, and the last such number on its left, which may be it."""
        found = []
        for jump in self.jumps[self.jumps != 0].astype(np.float32):
            below, above = (float(np.nextafter(jump, np.float32(towards))) for towards in (-np.inf, np.inf))
            found.append((float(jump), float(jump) if self._is_left(below, float(jump), above) else below))
        return found

    def _is_left(self, below: float, jump: float, above: float) -> bool:
        """Whether the derivative at the jump is that on its left."""
        left, at, right = self.derivative(np.array([below, jump, above]))
        return bool(abs(at - left) < abs(at - right))

    def _cheapest(self, stops: Indices, integrals: Array) -> tuple[float, Indices]:
        """The cheapest boundaries, each among its row of nodes: the cost, and which of its row each is."""
        first, last = np.array([[0]]), np.array([[integrals.shape[1] - 1]])
        between = self.cost(stops[:-1, None, :], stops[1:, :, None], integrals)
        ends = self.cost(first, stops[0][:, None], integrals), self.cost(stops[-1][None, :], last, integrals)
        return cheapest_path([ends[0], *between, ends[1]])

    def fit(self, boundaries: Array) -> Quantizer:
        """The best levels for given boundaries, and the error with them, summed without cancellation."""
        inside = boundaries[(self.low < boundaries) & (boundaries < self.high)]
        x, f, mass = (column.ravel() for column in self._samples(np.union1d(self.nodes, inside)))
        piece = np.searchsorted(boundaries, x, side="left")
        total = np.bincount(piece, mass, len(boundaries) + 1)
        ends = self.derivative(np.append(boundaries, self.high))  # the level of a piece that has no weight
        levels = np.divide(np.bincount(piece, mass * f, len(total)), total, out=ends.copy(), where=total > 0)
        levels = self._nearest_taken(levels).clip(f.min(), f.max())  # a mean may round to just outside
        return Quantizer(boundaries, levels, float(np.sum(mass * (f - levels[piece]) ** 2)))

    def _nearest_taken(self, levels: Array) -> Array:
        """Each level, or the nearest end of the gap it lies in."""
        for low, high in self.gaps:
            nearest = np.where(levels - low < high - levels, low, high)
            levels = np.where((low < levels) & (levels < high), nearest, levels)
        return levels


def _gaps(segments: Sequence[Array]) -> list[tuple[float, float]]:
    """The open intervals of values between those that f' takes, given samples of it between its jumps."""
    ranges = sorted((float(segment.min()), float(segment.max())) for segment in segments if segment.size)
    gaps, top = [], ranges[0][1]
    for low, high in ranges:
        if low > top:
            gaps.append((top, low))
        top = max(top, high)
    return gaps


def _prefix_integrals(f: Array, mass: Array) -> Array:
    """The integrals of w, w f' and w f'^2 up to each node."""
    cells = np.stack([mass, mass * f, mass * f * f]).sum(axis=2)
    return np.pad(cells.cumsum(axis=1), ((0, 0), (1, 0)))


def _single(boundaries: Array) -> Array:
    """The boundaries as float32 numbers, pushed apart by one where two became equal."""
    single = boundaries.astype(np.float32)
    for i in range(1, len(single)):
        single[i] = max(single[i], np.nextafter(single[i - 1], np.float32(np.inf)))
    return single.astype(np.float64)


def _folded(weight: Function, low: float, high: float) -> Function:
    """On the half line: the weight of x and of -x together, each where it lies within the interval."""

    def both(x: Array) -> Array:
        x = np.stack([x, -x])
        first, second = np.where((low <= x) & (x <= high), weight(x.ravel()).reshape(x.shape), 0.0)
        return np.asarray(first + second)

    return both


def _checked(function: Function, what: str, *, nonnegative: bool = False) -> Function:
    """`function`, each of its results checked."""

    def checked(x: Array) -> Array:
        y = np.asarray(function(x), np.float64)
        if y.shape != x.shape:
            raise FewbitValueError(f"{what} must map an array to one of the same shape, got {x.shape} -> {y.shape}")
        wrong = ~np.isfinite(y) | (nonnegative & (y < 0))
        if wrong.any():
            allowed = "finite and not negative" if nonnegative else "finite"
            raise FewbitValueError(f"{what} must be {allowed}, got {y[wrong][0]} at x = {x[wrong][0]}")
        return y

    return checked
