"""The registry: what an activation is, what its node saves for backward, and its derivative.

No derivative is written down here: `Activation.derivative` asks the node's own backward, in float64, and a plan asks it
where the two-valued ones jump. So a codebook is always that of the function that runs, with the parameters that it runs
with, in the torch that it runs in. Which *call* is which activation is the business of `_calls.py`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from . import _hooked, ops
from ._codebook import Parameter as Parameter
from ._errors import FewbitTypeError, FewbitValueError


def _no_jumps(**parameters: Parameter) -> tuple[float, ...]:
    return ()


@dataclass(frozen=True, eq=False)
class Activation:
    """A pointwise function and what is known of it.

    >>> import fewbit_hooks as fewbit
    >>> gelu = next(a for a in fewbit.activations() if a.name == "gelu")
    >>> gelu.parameters, gelu.saves, gelu.exact
    ({'approximate': 'none'}, 'input', False)

    Attributes:
        name: as `bits={"name": ...}` and `codebook("name", ...)` take it.
        function: `function(x, **parameters)`, the out-of-place form.
        parameters: the names of its parameters with PyTorch's defaults.
        saves: what the out-of-place node keeps for backward: "input", "output" or "several". In-place forms may differ.
        even: the derivative is even, so that its codebooks are folded.
        exact: the derivative has two values: one bit an element, and a gradient that is bit-for-bit stock's.
        nan_by_position: stock's gradient at a NaN depends on where in the tensor it stands (vectorised body or scalar
            tail of the CPU kernel), so that no bit can stand for it.
        jumps_of: `jumps_of(**parameters)`, where the derivative jumps.
        derivative_of: `derivative_of(x, **parameters)` of a float64 tensor, in the place of the node's own.
        weight, interval: what its codebooks are optimal for, as `codebook()` takes them.
        one_node: it is the user's own, and is run as a node of ours: a level need not be a value of the derivative.
        calls: the recognised calls, as a user writes them.
    """

    name: str
    function: Callable[..., Tensor]
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    saves: str = "input"
    even: bool = False
    exact: bool = False
    nan_by_position: bool = False
    jumps_of: Callable[..., tuple[float, ...]] = _no_jumps
    derivative_of: Callable[..., Any] | None = None
    weight: Any = "uniform"
    interval: tuple[float, float] = (-10.0, 10.0)
    one_node: bool = False
    calls: tuple[str, ...] = ()

    def check(self, parameters: Mapping[str, object]) -> dict[str, Parameter]:
        """Fill in the defaults; numbers become floats, but integers where the default is one.

        Raises:
            FewbitValueError: a parameter that this activation does not have, or that is not finite.
            FewbitTypeError: a parameter that is neither a number nor, where the default is one, a string.
        """
        unknown = sorted(parameters.keys() - self.parameters.keys())
        if unknown:
            allowed = ", ".join(self.parameters) or "none"
            raise FewbitValueError(f"{self.name} has no parameter {unknown[0]!r}. Its parameters: {allowed}.")
        return {key: self._normal(key, parameters.get(key, default)) for key, default in self.parameters.items()}

    def _normal(self, key: str, value: object) -> Parameter:
        if isinstance(value, str) != isinstance(self.parameters[key], str):
            raise FewbitTypeError(f"{self.name}: {key} must be like {self.parameters[key]!r}, got {value!r}")
        if isinstance(value, str) or value is None:
            return value
        if isinstance(self.parameters[key], bool):
            if not isinstance(value, (bool, np.bool_)):
                raise FewbitTypeError(f"{self.name}: {key} must be True or False, got {value!r}")
            return bool(value)
        if isinstance(value, Tensor) or not isinstance(value, (int, float, np.number)):
            raise FewbitTypeError(f"{self.name}: {key} must be a number, got {type(value).__name__}")
        if isinstance(self.parameters[key], int) and isinstance(value, (int, np.integer)):
            return int(value)  # of a function that takes no float there
        try:
            number = float(value)
        except OverflowError:  # an int of more than 308 digits
            number = np.nan
        if np.isnan(number):
            raise FewbitValueError(f"{self.name}: {key} must be a number that a float can hold, got {value!r}")
        return number

    def jumps(self, **parameters: Parameter) -> tuple[float, ...]:
        """Where the derivative jumps."""
        return tuple(j for j in self.jumps_of(**self.check(parameters)) if np.isfinite(j))

    def derivative(self, x: ArrayLike, **parameters: Parameter) -> NDArray[np.float64]:
        """f'(x) in float64, from the node's own backward.

        >>> import fewbit_hooks as fewbit
        >>> silu = next(a for a in fewbit.activations() if a.name == "silu")
        >>> silu.derivative([0.0, 20.0]).round(6)
        array([0.5, 1. ])
        """
        parameters = self.check(parameters)
        try:
            with pristine():
                s = torch.tensor(np.asarray(x, np.float64), device="cpu")
                if self.derivative_of is not None:
                    return np.asarray(self.derivative_of(s, **parameters), np.float64)
                y = self.function(s.requires_grad_(), **parameters)
                (slope,) = torch.autograd.grad(y, s, torch.ones_like(y))
        except ops.OUT_OF_MEMORY:
            raise
        except RuntimeError as error:
            given = ", ".join(f"{key}={value!r}" for key, value in parameters.items())
            raise FewbitValueError(f"{self.name}({given}) has no derivative: {error}") from error
        result: NDArray[np.float64] = slope.numpy()
        return result


@contextlib.contextmanager
def pristine(*, autocast: bool = False) -> Iterator[None]:
    """Run torch as if nothing surrounded the call, and record gradients: no modes, no autocast, no hooks of others,
    no look for anomalies.

    Args:
        autocast: leave it as it is.
    """
    devices = () if autocast else ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    with (
        ops.unseen(),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autograd.set_detect_anomaly(False),  # NaN is asked for
        contextlib.ExitStack() as without,
        _hooked.allowed(),
        torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach(), lambda t: t),
    ):
        for device in devices:
            without.enter_context(torch.autocast(device, enabled=False))
        yield


def _elu_jumps(alpha: float, scale: float = 1.0, input_scale: float = 1.0) -> tuple[float, ...]:
    return () if alpha * input_scale == 1.0 else (0.0,)


def _softplus_jumps(beta: float, threshold: float) -> tuple[float, ...]:
    return (threshold / beta,) if beta else ()


# fmt: off
_BUILT_IN = (
    # smooth: 1 to 8 bits
    Activation("celu", torch.celu, {"alpha": 1.0}),
    Activation("elu", torch.ops.aten.elu, {"alpha": 1.0, "scale": 1.0, "input_scale": 1.0}, jumps_of=_elu_jumps),
    Activation("gelu", F.gelu, {"approximate": "none"}),
    Activation("hardswish", F.hardswish, jumps_of=lambda: (-3.0, 3.0)),
    Activation("logsigmoid", F.logsigmoid, saves="several"),
    Activation("mish", F.mish),
    Activation("quick_gelu", lambda x: x * torch.sigmoid(1.702 * x), saves="several"),
    Activation("selu", torch.selu, jumps_of=lambda: (0.0,)),
    Activation("sigmoid", torch.sigmoid, saves="output", even=True),
    Activation("silu", F.silu),
    Activation("softplus", F.softplus, {"beta": 1.0, "threshold": 20.0}, jumps_of=_softplus_jumps),
    Activation("softsign", F.softsign, saves="several", even=True),
    Activation("tanh", torch.tanh, saves="output", even=True),
    Activation("tanhshrink", F.tanhshrink, saves="several", even=True),
    # two-valued: 1 bit, exact
    Activation("clamp", torch.clamp, {"min": None, "max": None}, exact=True),
    Activation("hardshrink", torch.hardshrink, {"lambd": 0.5}, exact=True, nan_by_position=True),
    Activation("hardsigmoid", F.hardsigmoid, exact=True),
    Activation("hardtanh", F.hardtanh, {"min_val": -1.0, "max_val": 1.0}, exact=True, nan_by_position=True),
    Activation("leaky_relu", F.leaky_relu, {"negative_slope": 0.01}, exact=True),
    Activation("relu", torch.relu, saves="output", exact=True),
    Activation("relu6", F.relu6, exact=True, nan_by_position=True),
    Activation("softshrink", F.softshrink, {"lambd": 0.5}, exact=True, nan_by_position=True),
    Activation("threshold", torch.threshold, {"threshold": 0.0, "value": 0.0}, exact=True),
)
# fmt: on

_lock = threading.Lock()
_registry: dict[str, Activation] = {a.name: a for a in _BUILT_IN}


def add(activation: Activation) -> None:
    """Add an activation, or put one that knows more (its calls) in the place of the one of that name."""
    with _lock:
        _registry[activation.name] = activation


def find(name: str, also: Collection[str] = ()) -> Activation:
    """The activation of that name.

    Args:
        also: other names that would have been allowed, for the message.

    Raises:
        FewbitValueError: there is none; the message lists those that there are.
    """
    try:
        return _registry[name]
    except (KeyError, TypeError):
        known = ", ".join(sorted({*_registry, *also}))
        raise FewbitValueError(
            f"no activation {name!r}. Known activations: {known}. Register yours with fewbit_hooks.register(...)."
        ) from None


def activations() -> tuple[Activation, ...]:
    """The recognised activations, by name: parameters, what the node saves, exact or approximated, the calls.

    >>> import fewbit_hooks as fewbit
    >>> [a.name for a in fewbit.activations() if a.exact][:3]
    ['clamp', 'hardshrink', 'hardsigmoid']
    """
    return tuple(_registry[name] for name in sorted(_registry))
