"""A codebook: what is stored of a derivative. 2**bits levels, and the boundaries between the inputs that take them."""

from __future__ import annotations

import json
import math
import os
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import IO, Any, TypeAlias, overload

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ._errors import FewbitError, FewbitTypeError, FewbitValueError
from ._quantizer import check_bits, check_interval

Parameter: TypeAlias = float | str | bool | None


@dataclass(frozen=True, eq=False)
class Codebook:
    """The piecewise-constant function that stands in for the derivative of an activation.

    >>> import numpy as np
    >>> import fewbit_hooks as fewbit
    >>> book = fewbit.codebook("gelu", 2)
    >>> print(book.boundaries.round(2), book.levels.round(2), round(book.error, 4))
    [-0.47 -0.    0.47] [-0.02  0.32  0.68  1.02] 0.0406
    >>> print(book.derivative(np.array([-5.0, -0.1, 5.0])).round(2))
    [-0.02  0.32  1.02]

    Frozen and read-only; two of the same content are equal and hash alike. Build one with `codebook(name, bits)`.

    Attributes:
        name: the activation, as in the registry.
        bits: 1 to 8, bits a code takes.
        boundaries: 2**bits - 1 increasing float64 numbers. Code i is where `boundaries[i - 1] < x <= boundaries[i]`
            (`torch.bucketize` with `right=False`); the outermost pieces are infinite.
        levels: 2**bits float64 numbers, the derivative that code i stands for.
        error: integral of (f'(x) - q(x))^2 w(x) dx, on the whole of `interval`, folded or not.
        folded: the derivative is even, and the boundaries are on |x|.
        parameters: those of the activation, such as `{"alpha": 1.0}`.
        weight: the weight w of the error, in words.
        interval: where the error was integrated.

    Raises:
        FewbitTypeError, FewbitValueError: the fields do not make a codebook.
    """

    name: str
    bits: int
    boundaries: NDArray[np.float64]
    levels: NDArray[np.float64]
    error: float
    folded: bool
    parameters: Mapping[str, Parameter]
    weight: str
    interval: tuple[float, float]

    def __post_init__(self) -> None:
        bits = check_bits(self.bits)
        checked = {
            "name": _is(str, "name", self.name),
            "bits": bits,
            "boundaries": _numbers("boundaries", self.boundaries, 2**bits - 1, bits),
            "levels": _numbers("levels", self.levels, 2**bits, bits),
            "error": _nonnegative("error", self.error),
            "folded": _is(bool, "folded", self.folded),
            "parameters": _parameters(self.parameters),
            "weight": _is(str, "weight", self.weight),
            "interval": check_interval(self.interval),
        }
        if not np.all(np.diff(checked["boundaries"]) > 0):
            raise FewbitValueError(f"boundaries must be strictly increasing, got {self.boundaries}")
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @overload
    def derivative(self, x: Tensor) -> Tensor: ...
    @overload
    def derivative(self, x: ArrayLike) -> NDArray[Any]: ...
    def derivative(self, x: Tensor | ArrayLike) -> Tensor | NDArray[Any]:
        """The level of each input: what the gradient is multiplied by in place of f'(x).

        >>> import torch
        >>> import fewbit_hooks as fewbit
        >>> fewbit.codebook("tanh", 1).derivative(torch.tensor([-3.0, 0.5]))
        tensor([0.0240, 0.7412])

        Compared exactly, whatever the dtype. NaN gets the top code, as `torch.bucketize` has it.

        Args:
            x: a floating-point tensor of any shape, dtype and device; or a number or array.

        Returns:
            a tensor of the same shape, dtype and device; or an array of the same shape and dtype.

        Raises:
            FewbitTypeError: the inputs are not real floating-point numbers.
        """
        if isinstance(x, Tensor):
            if not x.is_floating_point():
                raise FewbitTypeError(f"derivative takes a floating-point tensor, got {x.dtype}")
            precision = torch.float64 if x.dtype == torch.float64 else torch.float32  # not every device has float64
            boundaries = rounded_down(torch.tensor(self.boundaries, device="cpu"), precision).to(x.device)
            x_there = (x.abs() if self.folded else x).detach().to(precision)
            codes = torch.bucketize(x_there.contiguous(), boundaries)
            return torch.tensor(self.levels, dtype=x.dtype, device=x.device)[codes]
        array = np.asarray(x)
        if array.dtype.kind in "iu":
            array = array.astype(np.float64)
        if array.dtype.kind != "f":
            raise FewbitTypeError(f"derivative takes real numbers, got {array.dtype}")
        return self.levels.astype(array.dtype)[
            np.searchsorted(self.boundaries, np.abs(array) if self.folded else array)
        ]

    def to_json(self) -> str:
        """The codebook as text that a person can read and `from_json` takes back exactly."""
        lines = []
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.ndarray):
                numbers = f'"{field.name}": {json.dumps(value.tolist())}'
                lines.append(textwrap.fill(numbers, 118, subsequent_indent="    "))
            else:
                value = dict(value) if isinstance(value, Mapping) else value
                lines.append(f'"{field.name}": {json.dumps(value)}')
        return "{\n  " + ",\n  ".join(lines) + "\n}"

    @classmethod
    def from_json(cls, text: str) -> Codebook:
        """The codebook that `to_json` wrote.

        >>> import fewbit_hooks as fewbit
        >>> book = fewbit.codebook("silu", 3)
        >>> fewbit.Codebook.from_json(book.to_json()) == book
        True

        Raises:
            FewbitValueError: the text is not JSON, or not that of a codebook.
        """
        if not isinstance(text, str):
            raise FewbitTypeError(f"from_json takes a str, got {type(text).__name__}; decode bytes first")
        try:
            return cls.from_content(json.loads(text))
        except (ValueError, TypeError, RecursionError) as reason:
            raise FewbitValueError(
                f"this text is not the JSON of a codebook: {reason}. Write it anew with Codebook.to_json()."
            ) from None

    @classmethod
    def from_content(cls, content: object) -> Codebook:
        """The codebook whose JSON was parsed to `content`."""
        names = {field.name for field in fields(cls)}
        if not isinstance(content, dict) or content.keys() != names:
            found = sorted(content) if isinstance(content, dict) else type(content).__name__
            raise FewbitValueError(f"a codebook has the keys {sorted(names)}, got {found}")
        return cls(**content)

    def plot(self, path: str | os.PathLike[str] | IO[bytes]) -> None:
        """Draw f', the levels and the boundaries into a file; its ending says which format (.png, .svg, .pdf).

        Needs matplotlib: `pip install "fewbit-hooks[plot]"`.

        Raises:
            FewbitError: matplotlib is not installed.
            FewbitValueError: matplotlib does not know the format, or the registry does not know the activation.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise FewbitError(
                'Codebook.plot needs matplotlib, which is not installed: pip install "fewbit-hooks[plot]"'
            ) from None
        from ._activations import find  # the registry comes after the codebooks; only a drawing needs it here

        activation = find(self.name)
        low, high = self._drawn_interval()
        x = np.linspace(low, high, 4001)
        cuts = np.concatenate([-self.boundaries[::-1], self.boundaries]) if self.folded else self.boundaries
        steps = np.concatenate([self.levels[:0:-1], self.levels]) if self.folded else self.levels

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot()
        axes.vlines(
            cuts,
            0,
            1,
            transform=axes.get_xaxis_transform(),
            color="0.75",
            lw=max(0.2, min(0.8, 16 / len(cuts))),
            label="boundaries",
        )
        axes.plot(x, activation.derivative(x, **self.parameters), color="tab:blue", lw=1.8, label="derivative f'")
        axes.stairs(steps, [low, *cuts, high], baseline=None, color="tab:orange", lw=1.8, label="levels")
        axes.set_title(self._title(activation.parameters), loc="left")
        axes.set_xlabel("x")
        axes.set_xlim(low, high)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(facecolor="white", edgecolor="none", framealpha=0.9)
        try:
            figure.savefig(path, dpi=150)
        except ValueError as reason:  # an ending that is no format
            raise FewbitValueError(f"cannot draw into {path!r}: {reason}") from None

    def _drawn_interval(self) -> tuple[float, float]:
        """The boundaries with a margin on both sides: most of `interval` is flat."""
        first, last = (-self.boundaries[-1] if self.folded else self.boundaries[0]), self.boundaries[-1]
        margin = max(0.25 * (last - first), 1.0)
        return first - margin, last + margin

    def _title(self, defaults: Mapping[str, Parameter]) -> str:
        parameters = ", ".join(f"{key}={value}" for key, value in self.parameters.items() if value != defaults[key])
        name = f"{self.name}({parameters})" if parameters else self.name
        unit = "bit" if self.bits == 1 else "bits"
        return f"{name}, {self.bits} {unit}: error {self.error:.3g}"

    def _content(self) -> tuple[object, ...]:
        """All the fields, hashable, in their order."""
        parameters = tuple(sorted(self.parameters.items()))
        numbers = tuple(self.boundaries.tolist()), tuple(self.levels.tolist())
        return self.name, self.bits, *numbers, self.error, self.folded, parameters, self.weight, self.interval

    def __eq__(self, other: object) -> bool:
        return self._content() == other._content() if isinstance(other, Codebook) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._content())

    def __reduce__(self) -> tuple[object, ...]:
        # a read-only mapping cannot be pickled, and arrays come back writable: build it anew
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Codebook, tuple((values | {"parameters": dict(self.parameters)}).values())


def rounded_down(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Float64 numbers on the CPU as those of the dtype that are equal, or the next below: whether an input of that
    dtype is above one of them is what it was."""
    rounded = exact.to(dtype)
    above = rounded.double() > exact
    return torch.where(above, torch.nextafter(rounded, torch.full_like(rounded, -torch.inf)), rounded)


def _is(kind: type, field: str, value: Any) -> Any:
    if not isinstance(value, kind):
        raise FewbitTypeError(f"{field} must be a {kind.__name__}, got {value!r}")
    return value


def _nonnegative(field: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        raise FewbitTypeError(f"{field} must be a number, got {value!r}")
    if not 0 <= value < math.inf:
        raise FewbitValueError(f"{field} must be finite and not negative, got {value!r}")
    return float(value)


def _numbers(field: str, values: Any, count: int, bits: int) -> NDArray[np.float64]:
    """A read-only float64 copy."""
    try:
        array = np.asarray(values)
    except ValueError:  # ragged
        array = np.empty(0, object)
    if array.dtype.kind not in "fiu":
        raise FewbitTypeError(f"{field} must be an array of numbers, got {values!r}")
    if array.shape != (count,):
        raise FewbitValueError(f"{field} must be {count} numbers for bits={bits}, got an array of shape {array.shape}")
    if not np.isfinite(array).all():
        raise FewbitValueError(f"{field} must be finite, got {values}")
    array = array.astype(np.float64)
    array.setflags(write=False)
    return array


def _parameters(parameters: Any) -> Mapping[str, Parameter]:
    """A read-only copy."""
    if not isinstance(parameters, Mapping) or not all(isinstance(key, str) for key in parameters):
        raise FewbitTypeError(f"parameters must be a mapping from names, got {parameters!r}")
    for key, value in parameters.items():
        if not isinstance(value, (int, float, str, type(None))):
            raise FewbitTypeError(f"parameters: {key} must be a number, a str, a bool or None, got {value!r}")
    return MappingProxyType(dict(parameters))
