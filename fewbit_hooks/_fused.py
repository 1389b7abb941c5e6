"""The fused engine: one kernel computes an activation and its codes, one multiplies grad by the level.

NOTE [ What is fused ]

`engine="fused"` changes what is done where codes are stored, and nothing else: a call whose input is kept anyway is
left alone, and one whose output is kept takes its derivative from that, as ever. Fused are calls on CUDA

1. of the activations that `formula_of` knows, with any parameters, not in place, from dense inputs;
2. outside of `recompute=True`: what is computed again there must be bit for bit what it was, by the same kernel;
3. where Triton works (NOTE [ Trust ] in `ops/_dispatch.py`).

All others go through the hooks; but products of gated units, whose activation nobody else sees, are one kernel:
NOTE [ Gated units ] in `_gated.py`.

The forward is Triton's and may differ from PyTorch's in the last places (NOTE [ Formulas ] in `ops/_triton_fused.py`),
against rule "the forward is bit for bit what it was". Therefore this engine is used only where it is asked for:
`engine="auto"` is the hooks, until a measurement on a GPU says otherwise. It is not yet measured on a GPU.
"""

from __future__ import annotations

import weakref
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from . import ops
from ._hooks import begin_backward, flagged, nbytes
from ._ledger import CODES, Ledger, Step
from ._plan import Plan
from ._sites import Site, Verdict, Watch

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


class _Tables:
    """What the kernels read beside the data, for one plan: made once for each dtype and device."""

    def __init__(self, plan: Plan) -> None:
        assert plan.codebook is not None
        self.formula = formula_of(plan.activation.name, plan.parameters)
        self._levels = torch.tensor(plan.codebook.levels, device="cpu")
        self._on: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    def on(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """Parameters and levels in the dtype of the computation."""
        if (dtype, device) not in self._on:
            assert self.formula is not None
            # of no parameters a kernel reads none, but wants a pointer
            numbers = torch.tensor(self.formula.parameters or (0.0,), dtype=torch.float64, device="cpu")
            parameters, levels = (t.to(dtype).to(device, non_blocking=True) for t in (numbers, self._levels))
            self._on[dtype, device] = parameters, levels
        return self._on[dtype, device]


_tables: weakref.WeakKeyDictionary[Plan, _Tables] = weakref.WeakKeyDictionary()


def run(plan: Plan, ledger: Ledger, x: Tensor, site: Site | None) -> Tensor | None:
    """Make a call of an activation in one kernel, and keep codes; None where it must be made another way.

    Args:
        plan: how the call is coded.
        x: its input.
        ledger: the books.
        site: where the call was made; None if it was in no module.
    """
    kernels = kernels_for(plan, x)
    if kernels is None:
        return None
    name = plan.activation.name
    row = ledger.row(name, plan.bits, how=CODES, site=site)
    y: Tensor = _Fused.apply(x, plan, kernels, ledger.step)  # type: ignore[no-untyped-call]
    saved = y if plan.activation.saves == "output" else x
    ledger.original(row, saved)
    flag = y.grad_fn.flag  # type: ignore[union-attr]
    ledger.stored(row, ops.packed_bytes(x.numel(), plan.bits) + nbytes(flag))
    if site is not None:
        ledger.watch(Watch(site, [StorageWeakRef(saved.untyped_storage())], y, Verdict.CODES))
    return y


def kernels_for(plan: Plan, x: Tensor) -> ModuleType | None:
    """The kernels, where they serve; see the note above."""
    if plan.codebook is None or plan.inplace or plan.thresholds is None:
        return None
    if plan not in _tables:
        _tables[plan] = _Tables(plan)
    if _tables[plan].formula is None or plan.thresholds.count != (1 << plan.bits) - 1:
        return None
    if plan.activation.name == "softplus" and torch.is_autocast_enabled(x.device.type):
        return None  # autocast runs it in float32
    if not ops.is_dense(x):
        return None  # and if it is, its codes are smaller than its storage
    return ops.fused_backend(x.device).kernels


def formula_on(plan: Plan, x: Tensor) -> tuple[str, Tensor]:
    """The formula's name, and its parameters as the kernels read them; where `kernels_for` has found some."""
    tables = _tables[plan]
    assert tables.formula is not None
    parameters, _ = tables.on(ops.computed_in(x.dtype), x.device)
    return tables.formula.name, parameters


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: Plan, kernels: ModuleType, step: Step) -> Tensor:
        name, parameters = formula_on(plan, x)
        y: Tensor
        y, codes = kernels.forward(name, x, plan.bits, plan.thresholds, parameters)
        ctx.save_for_backward(codes)  # others' hooks are handed them
        ctx.plan, ctx.kernels, ctx.step, ctx.layout = plan, kernels, step, ops.Layout.of(x)
        ctx.flag = plan.flag(x)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        plan, kernels, layout = ctx.plan, ctx.kernels, ctx.layout
        begin_backward(plan.activation.name, ctx.step)
        (codes,) = ctx.saved_tensors
        with torch._C.DisableTorchFunction():
            if is_batched(grad):  # is_grads_batched=True: no kernel of ours can read it
                slope = ops.decode(codes, plan.level_rows(layout.dtype, layout.device), plan.bits, layout)
                return flagged(slope, ctx.flag) * grad, None, None, None
            _, levels = _tables[plan].on(ops.computed_in(layout.dtype), layout.device)
            return flagged(kernels.backward(grad, codes, plan.bits, levels, layout), ctx.flag), None, None, None


def is_batched(t: Tensor) -> bool:
    """Whether it stands for several, one of which a vmap is about to compute."""
    return bool(torch._C._functorch.is_batchedtensor(t) or torch._C._functorch.is_legacy_batchedtensor(t))
