"""Recognition: which torch callable is which activation, and with what parameters it was called.

A `TorchFunctionMode` sees callables, and several of them arrive under another name than the one a user writes
(`F.threshold` as `F._threshold`, `F.sigmoid` as the Tensor method, `nn.ReLU6` as `F.hardtanh`), so the table is made
of what arrives.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _activations
from ._activations import Activation
from ._errors import FewbitError, FewbitTypeError


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The tensor that a callable is applied to, however it was passed."""
    return args[0] if args else kwargs.get("input", kwargs.get("self"))


@dataclass(frozen=True)
class Call:
    """One recognised callable.

    Attributes:
        activation: what it computes; None for callables that are known but always kept exact.
        names: its parameters after the input, in order; "inplace" and "generator" are not parameters of the function.
        inplace: the callable itself overwrites its input (`relu_`).
        kept: why calls of it are kept exact; empty where they are coded.
        one_node: run `function` unrecorded and save codes alone: for a user's own function, which may save anything.
        fixed: parameters that are not the caller's to choose.
    """

    name: str
    activation: Activation | None
    names: tuple[str, ...] = ()
    inplace: bool = False
    kept: str = ""
    one_node: Callable[..., Tensor] | None = None
    fixed: tuple[tuple[str, Any], ...] = ()

    def parameters(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
        """The activation's parameters, and whether this call overwrites its input.

        Raises:
            FewbitError: a parameter for which there is no codebook (a tensor, nan), or that is not known.
        """
        assert self.activation is not None
        if len(args) > 1 + len(self.names):
            raise FewbitTypeError(f"{self.name} is given {len(args) - 1} parameters, and {len(self.names)} are known")
        given = dict(zip(self.names, args[1:], strict=False))
        given.update((key, value) for key, value in kwargs.items() if key not in ("input", "self"))
        inplace = self.inplace or bool(given.pop("inplace", False))
        return self.activation.check(given), inplace


BACKWARD = Call("backward", None)
"""Not an activation: a backward begins, and the ledger must look what is held before it does."""

RECOGNISED: dict[Any, Call] = dict.fromkeys((Tensor.backward, torch.autograd.backward, torch.autograd.grad), BACKWARD)


def register_call(function: Any, call: Call) -> None:
    """From now on a call of `function` is treated as `call` says."""
    RECOGNISED[function] = call


# What a user writes -> the names of the parameters that may follow the input. `torch.ops.aten.f` stands for the
# packet and all its overloads; a trailing underscore for the form that overwrites its input.
_CALLS: dict[str, dict[str, str]] = {
    "celu": {
        "F.celu": "alpha inplace",
        "torch.celu": "alpha",
        "torch.celu_": "alpha",
        "F.celu_": "alpha",
        "torch.ops.aten.celu": "alpha",
        "torch.ops.aten.celu_": "alpha",
    },
    "clamp": {
        "torch.clamp": "min max",
        "torch.clamp_": "min max",
        "torch.clip": "min max",
        "torch.clip_": "min max",
        "torch.clamp_min": "min",
        "torch.clamp_min_": "min",
        "torch.clamp_max": "max",
        "torch.clamp_max_": "max",
        "Tensor.clamp": "min max",
        "Tensor.clamp_": "min max",
        "Tensor.clip": "min max",
        "Tensor.clip_": "min max",
        "Tensor.clamp_min": "min",
        "Tensor.clamp_min_": "min",
        "Tensor.clamp_max": "max",
        "Tensor.clamp_max_": "max",
        "torch.ops.aten.clamp": "min max",
        "torch.ops.aten.clamp_": "min max",
        "torch.ops.aten.clip": "min max",
        "torch.ops.aten.clip_": "min max",
        "torch.ops.aten.clamp_min": "min",
        "torch.ops.aten.clamp_min_": "min",
        "torch.ops.aten.clamp_max": "max",
        "torch.ops.aten.clamp_max_": "max",
    },
    "elu": {
        "F.elu": "alpha inplace",
        "F.elu_": "alpha scale input_scale",
        "torch.ops.aten.elu": "alpha scale input_scale",
        "torch.ops.aten.elu_": "alpha scale input_scale",
    },
    "gelu": {"F.gelu": "approximate", "torch.ops.aten.gelu": "approximate", "torch.ops.aten.gelu_": "approximate"},
    "hardshrink": {
        "F.hardshrink": "lambd",
        "torch.hardshrink": "lambd",
        "Tensor.hardshrink": "lambd",
        "torch.ops.aten.hardshrink": "lambd",
    },
    "hardsigmoid": {"F.hardsigmoid": "inplace", "torch.ops.aten.hardsigmoid": "", "torch.ops.aten.hardsigmoid_": ""},
    "hardswish": {"F.hardswish": "inplace", "torch.ops.aten.hardswish": "", "torch.ops.aten.hardswish_": ""},
    "hardtanh": {
        "F.hardtanh": "min_val max_val inplace",
        "F.hardtanh_": "min_val max_val",
        "torch.ops.aten.hardtanh": "min_val max_val",
        "torch.ops.aten.hardtanh_": "min_val max_val",
    },
    "leaky_relu": {
        "F.leaky_relu": "negative_slope inplace",
        "F.leaky_relu_": "negative_slope",
        "torch.ops.aten.leaky_relu": "negative_slope",
        "torch.ops.aten.leaky_relu_": "negative_slope",
    },
    "logsigmoid": {"F.logsigmoid": "", "torch.ops.aten.log_sigmoid": ""},
    "mish": {"F.mish": "inplace", "torch.ops.aten.mish": "", "torch.ops.aten.mish_": ""},
    "relu": {
        "F.relu": "inplace",
        "F.relu_": "",
        "torch.relu": "",
        "torch.relu_": "",
        "Tensor.relu": "",
        "Tensor.relu_": "",
        "torch.ops.aten.relu": "",
        "torch.ops.aten.relu_": "",
    },
    "relu6": {"F.relu6": "inplace", "torch.ops.aten.relu6": "", "torch.ops.aten.relu6_": ""},
    "selu": {
        "F.selu": "inplace",
        "F.selu_": "",
        "torch.selu": "",
        "torch.selu_": "",
        "torch.ops.aten.selu": "",
        "torch.ops.aten.selu_": "",
    },
    "sigmoid": {
        "F.sigmoid": "",
        "torch.sigmoid": "",
        "torch.sigmoid_": "",
        "torch.special.expit": "",
        "Tensor.sigmoid": "",
        "Tensor.sigmoid_": "",
        "torch.ops.aten.sigmoid": "",
        "torch.ops.aten.sigmoid_": "",
        "torch.ops.aten.special_expit": "",
    },
    "silu": {"F.silu": "inplace", "torch.ops.aten.silu": "", "torch.ops.aten.silu_": ""},
    "softplus": {"F.softplus": "beta threshold", "torch.ops.aten.softplus": "beta threshold"},
    "softshrink": {"F.softshrink": "lambd", "torch.ops.aten.softshrink": "lambd"},
    "softsign": {"F.softsign": ""},
    "tanh": {
        "F.tanh": "",
        "torch.tanh": "",
        "torch.tanh_": "",
        "Tensor.tanh": "",
        "Tensor.tanh_": "",
        "torch.ops.aten.tanh": "",
        "torch.ops.aten.tanh_": "",
    },
    "tanhshrink": {"F.tanhshrink": ""},
    "threshold": {
        "F.threshold": "threshold value inplace",
        "F.threshold_": "threshold value",
        "torch.threshold": "threshold value",
        "torch.threshold_": "threshold value",
        "torch.ops.aten.threshold": "threshold value",
        "torch.ops.aten.threshold_": "threshold value",
    },
}

# Known, and always kept exact.
_KEPT = {
    "F.prelu torch.prelu Tensor.prelu torch.ops.aten.prelu": "the gradient of prelu's weight needs the true input",
    "F.rrelu F.rrelu_ torch.rrelu torch.rrelu_ torch.ops.aten.rrelu torch.ops.aten.rrelu_": "rrelu keeps random slopes",
    "F.glu torch.ops.aten.glu": "the gradient of glu's values needs the true gate",
}

# The public name is a wrapper that arrives as, or calls, another callable.
_ARRIVES_AS = {
    "F.threshold": F._threshold,  # type: ignore[attr-defined]
    "F.sigmoid": Tensor.sigmoid,
    "F.tanh": Tensor.tanh,
}


def _callables(path: str) -> Iterator[Any]:
    """What arrives when a user calls `path`; nothing where this torch has no such function."""
    namespace, _, attribute = path.partition(".")
    root = {"F": F, "Tensor": Tensor, "torch": torch}[namespace]
    try:
        function = _ARRIVES_AS.get(path) or operator.attrgetter(attribute)(root)
    except AttributeError:
        return
    yield function
    if isinstance(function, torch._ops.OpOverloadPacket):
        # An overload with tensor limits or `out=` is told apart by its arguments, in `Activation.check`.
        yield from (getattr(function, overload) for overload in function.overloads() if "out" not in overload)


def _fill() -> None:
    for name, calls in _CALLS.items():
        activation = _activations.find(name)
        for path, names in calls.items():
            call = Call(name, activation, tuple(names.split()), inplace=path.endswith("_"))
            for function in _callables(path):
                register_call(function, call)
        modules = tuple(f"nn.{m}" for m in _MODULES.get(name, "").split())
        _activations.add(replace(activation, calls=(*calls, *modules)))
    for paths, reason in _KEPT.items():
        for path in paths.split():
            for function in _callables(path):
                register_call(function, Call(path.rpartition(".")[2].rstrip("_"), None, kept=reason))


# For the table in the docs: the modules whose forward makes one of the calls above.
_MODULES = {
    "celu": "CELU",
    "elu": "ELU",
    "gelu": "GELU",
    "hardshrink": "Hardshrink",
    "hardsigmoid": "Hardsigmoid",
    "hardswish": "Hardswish",
    "hardtanh": "Hardtanh ReLU6",
    "leaky_relu": "LeakyReLU",
    "logsigmoid": "LogSigmoid",
    "mish": "Mish",
    "relu": "ReLU",
    "selu": "SELU",
    "sigmoid": "Sigmoid",
    "silu": "SiLU",
    "softplus": "Softplus",
    "softshrink": "Softshrink",
    "softsign": "Softsign",
    "tanh": "Tanh",
    "tanhshrink": "Tanhshrink",
    "threshold": "Threshold",
}

_fill()

__all__ = ["RECOGNISED", "Call", "FewbitError", "register_call"]
