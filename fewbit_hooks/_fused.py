"""The fused engine: one kernel computes an activation and its codes.

NOTE [ What is fused ]

Where `engine="fused"` has a node of ours (`_one_node.serves`) that keeps codes, the forward, too, may be made by a
kernel of ours. It is for calls on CUDA

1. of the activations that `formula_of` knows, with any parameters, from dense inputs;
2. outside of `recompute=True`: what is computed again there must be bit for bit what it was, by the same kernel;
3. where Triton works (NOTE [ Trust ] in `ops/_dispatch.py`).

Products of gated units, whose activation nobody else sees, are one kernel, too: NOTE [ Gated units ] in `_gated.py`.

The forward is Triton's and may differ from PyTorch's in the last places (NOTE [ Formulas ] in `ops/_triton_fused.py`),
against rule "the forward is bit for bit what it was". Therefore this engine is used only where it is asked for. It is
not yet measured on a GPU.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops
from ._plan import Plan

SELU = 1.6732632423543772, 1.0507009873554805, 1.0
"""selu is elu with these: alpha and scale of PyTorch's Activation.cpp, in float64."""


class Formula(NamedTuple):
    """What the kernel is told.

    Attributes:
        name: of a formula in `ops/_triton_fused.py`.
        parameters: in the formula's order.
    """

    name: str
    parameters: tuple[float, ...] = ()


def formula_of(name: str, parameters: Any) -> Formula | None:
    """The formula of an activation with these parameters; None where there is none.

    >>> formula_of("gelu", {"approximate": "tanh"}).name, formula_of("celu", {"alpha": 2.0}), formula_of("softsign", {})
    ('gelu_tanh', Formula(name='elu', parameters=(2.0, 1.0, 0.5)), None)
    """
    if name == "gelu":
        return {"none": Formula("gelu"), "tanh": Formula("gelu_tanh")}.get(parameters["approximate"])
    if name in ("silu", "mish", "tanh", "sigmoid", "hardswish"):
        return Formula(name)
    if name == "elu":
        return Formula("elu", (parameters["alpha"], parameters["scale"], parameters["input_scale"]))
    if name == "selu":
        return Formula("elu", SELU)
    if name == "celu" and parameters["alpha"]:
        return Formula("elu", (parameters["alpha"], 1.0, 1.0 / parameters["alpha"]))
    if name == "softplus":
        return Formula("softplus", (parameters["beta"], parameters["threshold"]))
    return None


class _Parameters:
    """Those of a plan's formula, as the kernels read them: made once for each dtype and device."""

    def __init__(self, formula: Formula | None) -> None:
        self.formula = formula
        self._on: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def can_be_on(self, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether they are there, or may be put there: not while a CUDA graph is captured."""
        return (dtype, device) in self._on or not ops.capturing(device)

    def on(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """In the dtype of the computation."""
        if (dtype, device) not in self._on:
            assert self.formula is not None
            # of no parameters a kernel reads none, but wants a pointer
            numbers = torch.tensor(self.formula.parameters or (0.0,), dtype=torch.float64, device="cpu")
            self._on[dtype, device] = ops.put(numbers.to(dtype), device)
        return self._on[dtype, device]


_parameters: weakref.WeakKeyDictionary[Plan, _Parameters] = weakref.WeakKeyDictionary()


def forward_of(plan: Plan, x: Tensor) -> Callable[[], tuple[Tensor, Tensor, Tensor | None]] | None:
    """What computes the activation, its codes and a flag in one kernel; None where the call is made another way."""
    kernels = kernels_for(plan, x)
    if kernels is None:
        return None
    name, parameters = formula_on(plan, x)
    return functools.partial(kernels.forward, name, x, plan.bits, plan.thresholds, parameters, plan.flags(x))


def kernels_for(plan: Plan, x: Tensor) -> ModuleType | None:
    """The kernels, where they serve; see the note above."""
    if plan.thresholds is None or plan.inplace or plan.is_cast(x.device) or not ops.is_dense(x):
        return None
    if plan not in _parameters:
        _parameters[plan] = _Parameters(formula_of(plan.activation.name, plan.parameters))
    found = _parameters[plan]
    if found.formula is None or plan.thresholds.count != (1 << plan.bits) - 1 or ops.results_may_change():
        return None
    kernels = ops.fused_backend(x.device).kernels
    return kernels if kernels is not None and found.can_be_on(ops.computed_in(x.dtype), x.device) else None


def formula_on(plan: Plan, x: Tensor) -> tuple[str, Tensor]:
    """The formula's name, and its parameters as the kernels read them; where `kernels_for` has found some."""
    found = _parameters[plan]
    assert found.formula is not None
    return found.formula.name, found.on(ops.computed_in(x.dtype), x.device)
