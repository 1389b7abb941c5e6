"""`register()`: teach the library a pointwise function of the user's own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, overload

import numpy as np
import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from . import _activations, _compiled, _stack
from ._activations import Activation, pristine
from ._calls import Call, register_call
from ._catalog import WeightLike
from ._errors import FewbitTypeError, FewbitValueError

F = TypeVar("F", bound=Callable[..., Tensor])
_registered: set[str] = set()


@overload
def register(
    function: F,
    name: str | None = None,
    *,
    derivative: Callable[..., Any] | None = None,
    even: bool = False,
    jumps: tuple[float, ...] = (),
    weight: WeightLike = "uniform",
    interval: tuple[float, float] = (-10.0, 10.0),
) -> F: ...


@overload
def register(
    function: None = None,
    name: str | None = None,
    *,
    derivative: Callable[..., Any] | None = None,
    even: bool = False,
    jumps: tuple[float, ...] = (),
    weight: WeightLike = "uniform",
    interval: tuple[float, float] = (-10.0, 10.0),
) -> Callable[[F], F]: ...


def register(
    function: Callable[..., Tensor] | None = None,
    name: str | None = None,
    *,
    derivative: Callable[..., Any] | None = None,
    even: bool = False,
    jumps: tuple[float, ...] = (),
    weight: WeightLike = "uniform",
    interval: tuple[float, float] = (-10.0, 10.0),
) -> Callable[..., Any]:
    """Teach the library a smooth pointwise function; returns the function to call in its place. Also a decorator.

    >>> import torch, fewbit_hooks as fewbit
    >>> @fewbit.register
    ... def swish(x, slope=1.5):
    ...     return x * torch.sigmoid(slope * x)
    >>> x = torch.randn(256, 256, requires_grad=True)
    >>> with fewbit.scope(bits=3) as memory:
    ...     y = swish(x)
    >>> memory.report().stored_bytes == 256 * 256 * 3 // 8
    True

    Outside of a scope the returned function is `function`. Inside, it runs as one node: the function's own forward,
    unrecorded, so that the result is bit-equal; kept for backward are the codes of its input alone, and none of the
    tensors in between. In backward the gradient is multiplied by the codebook's level.

    Args:
        function: maps a tensor, element by element, to one of the same shape and dtype, without changing it. Further
            arguments are its parameters: numbers or strings with a default, part of the codebook's key. A closure
            over a tensor that requires grad (a learned slope) runs as it is, uncompressed.
        name: as reports and `bits={"name": ...}` use it; the function's own name by default.
        derivative: `derivative(x, **parameters)` of a float64 tensor; by default autograd's, taken on the quantizer's
            grid. It may be another function than the true derivative, a surrogate gradient say.
        even: the derivative is even, so that |x| is coded, at 3 to 6 times less error.
        jumps: where the derivative jumps.
        weight, interval: what its codebooks are optimal for, as `codebook()` takes them.

    Raises:
        FewbitTypeError: not a function, or one whose parameters have no default.
        FewbitValueError: the name is taken, or the function is not pointwise, or its derivative is not finite.
    """
    if function is None:
        return functools.partial(
            register, name=name, derivative=derivative, even=even, jumps=jumps, weight=weight, interval=interval
        )
    if not callable(function):
        raise FewbitTypeError(f"register takes a function of a tensor, got {function!r}")
    if derivative is not None and not callable(derivative):
        raise FewbitTypeError(f"register: derivative must be a function of a tensor, got {derivative!r}")
    name = str(name or getattr(function, "__name__", ""))
    if not name:
        raise FewbitValueError(f"register: {function!r} has no name. Give it one: name='my_function'")
    if not name.isidentifier() or name == "default":
        raise FewbitValueError(f"register: name must be an identifier other than 'default', got {name!r}")
    if name not in _registered and any(a.name == name for a in _activations.activations()):
        raise FewbitValueError(
            f"register: the name {name!r} is that of a built-in activation. Give another: name='my_{name}'"
        )
    first, parameters = _parameters(function, name)
    try:
        own = tuple(float(j) for j in jumps)
    except (TypeError, ValueError):
        raise FewbitTypeError(f"register: jumps must be numbers, got {jumps!r}") from None
    activation = Activation(
        name,
        function,
        parameters,
        saves="several",
        even=even,
        jumps_of=lambda **_: own,
        derivative_of=derivative,
        weight=weight,
        interval=(float(interval[0]), float(interval[1])),
        one_node=True,
        calls=(name,),
    )
    _check_pointwise(activation)

    call = Call(name, activation, tuple(parameters), one_node=function)

    @functools.wraps(function)
    def registered(*args: Any, **kwargs: Any) -> Any:
        if not args and first in kwargs:
            args = (kwargs.pop(first),)
        if torch.compiler.is_compiling():  # Dynamo asks no mode of a function that it reads
            return _compiled.run(_stack.coding_here(), call, function, args, kwargs)
        if args and has_torch_function_unary(args[0]):
            return handle_torch_function(registered, args[:1], *args, **kwargs)
        return function(*args, **kwargs)

    register_call(registered, call)
    register_call(function, call)  # for one that torch dispatches by itself, such as torch.ops.my_library.f
    _activations.add(activation)
    _registered.add(name)
    return registered


def _parameters(function: Callable[..., Any], name: str) -> tuple[str, dict[str, Any]]:
    """The name of the input, and the parameters with their defaults."""
    try:
        first, *given = inspect.signature(function).parameters.values()
    except ValueError:  # a builtin: torch.ops.my_library.f, or one without arguments
        return "input", {}
    if variadic := next((p for p in given if p.kind is p.VAR_POSITIONAL), None):
        raise FewbitTypeError(f"register: {name} takes any number of arguments, *{variadic.name}: give each a name")
    without = [p.name for p in given if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    if without:
        raise FewbitTypeError(
            f"register: {name}'s parameter {without[0]!r} needs a default: it is part of the codebook's key"
        )
    return first.name, {p.name: p.default for p in given if p.default is not p.empty}


def _check_pointwise(activation: Activation) -> None:
    low, high = activation.interval
    grid = np.linspace(low, high, 65)
    with pristine(), torch.no_grad():
        x = torch.from_numpy(grid)
        y = activation.function(x)
        # not bit for bit: the body and the tail of a vectorised kernel may round differently
        each = torch.cat([activation.function(part) for part in x.split(13)])
    if not isinstance(y, Tensor) or y.shape != x.shape or y.dtype != x.dtype or not torch.allclose(y, each):
        if isinstance(y, Tensor) and y.is_floating_point() and not y.isfinite().all():
            raise FewbitValueError(
                f"register: {activation.name} is not finite on the interval {low, high}. Give one on which it is: "
                "interval=(low, high)"
            )
        raise FewbitValueError(
            f"register: {activation.name} is not pointwise: each output must depend on its own input alone"
        )
    if not np.isfinite(activation.derivative(grid)).all():
        raise FewbitValueError(
            f"register: the derivative of {activation.name} is not finite on the interval {low, high}"
        )
    if activation.even:
        _check_even(activation)


def _check_even(activation: Activation) -> None:
    x = np.linspace(0.0, min(-activation.interval[0], activation.interval[1]), 65)[1:] * 0.997  # not where it may jump
    there, mirrored = activation.derivative(x), activation.derivative(-x)
    if not np.allclose(there, mirrored, rtol=1e-6, atol=1e-6):
        worst = x[np.abs(there - mirrored).argmax()]
        raise FewbitValueError(
            f"register: even=True says that the derivative of {activation.name} is the same at x and -x, but at "
            f"{worst:.4g} and {-worst:.4g} it is not. Leave even=True out"
        )
