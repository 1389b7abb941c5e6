"""`codebook(name, bits)`: from the shipped defaults, else from this process's cache, else from the quantizer."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache
from importlib import resources
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from ._activations import Activation, find
from ._codebook import Codebook, Parameter
from ._errors import FewbitTypeError, FewbitValueError
from ._locks import lock
from ._quantizer import Array, Function, check_bits, check_interval, optimal_quantizer

WeightLike: TypeAlias = str | tuple[str, float, float] | tuple[ArrayLike, ArrayLike] | Callable[[Array], ArrayLike]

DEFAULT_INTERVAL = (-10.0, 10.0)  # the paper's
NORMAL_REACH = 8.0  # standard deviations; beyond them lies 1e-15 of the inputs

_lock = lock()


def codebook(
    name: str,
    bits: int,
    *,
    weight: WeightLike = "uniform",
    interval: tuple[float, float] = DEFAULT_INTERVAL,
    **parameters: Parameter,
) -> Codebook:
    """The optimal codebook of an activation: the least error that 2**bits levels can have.

    >>> import numpy as np
    >>> import fewbit_hooks as fewbit
    >>> fewbit.codebook("gelu", 3).boundaries.round(2)
    array([-2.4 , -0.71, -0.33, -0.  ,  0.33,  0.71,  2.4 ])
    >>> fewbit.codebook("gelu", 3, approximate="tanh").error < fewbit.codebook("gelu", 2, approximate="tanh").error
    True
    >>> counts, edges = np.histogram([-0.5, 0.1, 0.2, 2.0], bins=8)
    >>> fewbit.codebook("silu", 2, weight=(counts, edges)).weight
    'histogram(8 bins)'

    The defaults (weight and interval, PyTorch's parameters, and gelu with `approximate="tanh"`) ship with the package;
    anything else takes some hundredths of a second the first time, and is cached.

    Args:
        name: an activation of `fewbit_hooks.activations()` that is not exact.
        bits: 1 to 8.
        weight: which inputs count how much.

            - `"uniform"`: w = 1 on `interval`, the paper's convention
            - `"normal"`, `"normal(1.5, 2)"` or `("normal", 1.5, 2)`: that mean and standard deviation
            - `(counts, edges)` as `numpy.histogram` returns them
            - a callable, float64 array -> array: the density on `interval`

            The normal and the histogram are scaled to an integral of 1: `error` is then a mean square.
        interval: where a uniform or callable weight is integrated; the other two bring their own.
        parameters: those of the activation, such as `alpha=0.5`; PyTorch's defaults where not given.

    Raises:
        FewbitTypeError, FewbitValueError: an argument that is none of these.
    """
    bits = check_bits(bits)
    activation = find(name)
    if activation.exact:
        raise FewbitValueError(
            f"{name} is exact at 1 bit and needs no codebook: its derivative takes two values. "
            "Give bits only for the others; fewbit_hooks.activations() says which are exact."
        )
    key = _key(activation.check(parameters))
    density = as_weight(weight, interval)
    with _lock:  # threads that ask for the same codebook at the same time compute it once
        if density.content == "uniform" and density.interval == DEFAULT_INTERVAL and (name, bits, key) in _shipped():
            return _shipped()[name, bits, key]
        return _computed(activation, bits, density, key)


def compute(activation: Activation, bits: int, weight: Weight, parameters: Mapping[str, Parameter]) -> Codebook:
    """The optimal codebook, from the quantizer."""
    best = optimal_quantizer(
        lambda x: activation.derivative(x, **parameters),
        bits,
        weight=weight.density,
        interval=weight.interval,
        folded=activation.even,
        jumps=activation.jumps(**parameters),
        edges=weight.edges,
    )
    return Codebook(activation.name, bits, *best, activation.even, parameters, weight.name, weight.interval)


@lru_cache(maxsize=1024)
def _computed(activation: Activation, bits: int, weight: Weight, key: tuple[tuple[str, Parameter], ...]) -> Codebook:
    # keyed by the activation itself: a name registered anew must not get the old one's codebook
    return compute(activation, bits, weight, dict(key))


@cache
def _shipped() -> dict[tuple[object, ...], Codebook]:
    """The defaults in codebooks.json, which tests/regenerate_codebooks.py writes."""
    return read_defaults(resources.files(__package__).joinpath("codebooks.json").read_text(encoding="utf-8"))


def read_defaults(text: str) -> dict[tuple[object, ...], Codebook]:
    """The codebooks of a JSON list, by name, bits and parameters."""
    try:
        books = [Codebook.from_content(content) for content in json.loads(text)]
    except (ValueError, TypeError) as reason:
        raise FewbitValueError(
            f"the shipped codebooks.json is corrupted: {reason}. Install fewbit-hooks again."
        ) from None
    return {(book.name, book.bits, _key(book.parameters)): book for book in books}


def _key(parameters: Mapping[str, Parameter]) -> tuple[tuple[str, Parameter], ...]:
    return tuple(sorted(parameters.items()))


@dataclass(frozen=True)
class Weight:
    """A density of inputs. Equal by `content` and `interval`, so that it can be part of the cache's key."""

    name: str
    interval: tuple[float, float]
    content: Hashable
    density: Function = field(compare=False)
    edges: tuple[float, ...] = field(default=(), compare=False)


def as_weight(weight: Any, interval: Any = DEFAULT_INTERVAL) -> Weight:
    """The weight that a user means.

    >>> as_weight("normal(1.5, 2)").interval
    (-14.5, 17.5)
    """
    interval = check_interval(interval)
    if isinstance(weight, str):
        if weight == "uniform":
            return Weight("uniform", interval, "uniform", np.ones_like)
        named = re.fullmatch(r"normal(?:\(([^,()]+),([^,()]+)\))?", weight.strip())
        if not named:
            raise FewbitValueError(f"weight must be {_WEIGHTS}, got {weight!r}")
        weight = ("normal", named[1] or "0", named[2] or "1")
    elif callable(weight):
        name = getattr(weight, "__name__", type(weight).__name__)
        return Weight(name, interval, id(weight), weight)  # the cache's key keeps it alive, so its id stays its own
    elif not isinstance(weight, (tuple, list)) or len(weight) not in (2, 3):
        raise FewbitTypeError(f"weight must be {_WEIGHTS}, got {weight!r}")

    brought = _histogram(*weight) if len(weight) == 2 else _normal(*weight)
    if interval not in (DEFAULT_INTERVAL, brought.interval):
        raise FewbitValueError(
            f"interval goes with a uniform or callable weight; {brought.name} brings its own, got {interval}. "
            "Leave interval out."
        )
    return brought


def _normal(name: Any, mean: Any, std: Any) -> Weight:
    try:
        mean, std = float(mean), float(std)
    except (TypeError, ValueError):
        mean = std = np.nan
    if not (isinstance(name, str) and name == "normal" and np.isfinite([mean, std]).all() and std > 0):
        raise FewbitValueError(
            f'a weight of three parts must be ("normal", mean, std), finite and std > 0, got {(name, mean, std)}'
        )

    def density(x: Array) -> Array:
        return np.asarray(np.exp(-0.5 * ((x - mean) / std) ** 2) / (std * np.sqrt(2 * np.pi)))

    interval = (mean - NORMAL_REACH * std, mean + NORMAL_REACH * std)
    return Weight(f"normal({_short(mean)}, {_short(std)})", interval, "normal", density)


def _histogram(counts: Any, edges: Any) -> Weight:
    try:
        counts, edges = (np.asarray(part).astype(np.float64) for part in (counts, edges))
    except (TypeError, ValueError):
        raise FewbitTypeError("a histogram must be two arrays of numbers, (counts, edges)") from None
    if counts.ndim != 1 or edges.shape != (len(counts) + 1,) or len(counts) == 0:
        raise FewbitValueError(
            "a histogram must be (counts, edges) with one edge more than counts, "
            f"got arrays of shapes {counts.shape} and {edges.shape}"
        )
    if not (np.isfinite(edges).all() and np.all(np.diff(edges) > 0)):
        raise FewbitValueError("the edges of a histogram must be finite and strictly increasing")
    if not (np.isfinite(counts).all() and np.all(counts >= 0)):
        raise FewbitValueError("the counts of a histogram must be finite and not negative")
    if not counts.any():
        raise FewbitValueError("the weight is zero everywhere: every count of the histogram is 0")
    heights = counts / counts.sum() / np.diff(edges)

    def density(x: Array) -> Array:
        return np.asarray(heights[np.searchsorted(edges, x).clip(1, len(heights)) - 1])

    content = ("histogram", counts.tobytes(), edges.tobytes())
    interval = (float(edges[0]), float(edges[-1]))
    return Weight(f"histogram({len(counts)} bins)", interval, content, density, tuple(edges.tolist()))


def _short(number: float) -> str:
    return repr(number).removesuffix(".0")


_WEIGHTS = '"uniform", "normal", "normal(mean, std)", ("normal", mean, std), (counts, edges) or a callable'
