"""What mixed precision relies on: what is not finite is found where stock finds it, and loss scaling is undisturbed."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fewbit_hooks as fewbit
from fewbit_hooks import _plan, _policy

from .conftest import quiet

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SMOOTH = [a.name for a in fewbit.activations() if not a.exact]
VALUES = [math.nan, math.inf, -math.inf]


class Model(nn.Module):
    """An activation; before a Linear, which keeps its output, or not."""

    def __init__(self, name: str, dtype: torch.dtype, kept: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(32, 32).to(dtype) if kept else None
        self.function = next(a for a in fewbit.activations() if a.name == name).function
        if name == "quick_gelu":  # it is recognised by its module
            modules = pytest.importorskip("transformers.activations", reason="transformers is not installed")
            self.function = modules.QuickGELUActivation()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.function(x * 1)
        return y * 1 if self.linear is None else self.linear(y)


def gradient(model: nn.Module, x: Tensor, around: Any) -> Tensor:
    leaf = x.clone().requires_grad_()
    with around:
        y = model(leaf)
    (slope,) = torch.autograd.grad(y, leaf, torch.ones_like(y))  # finite: only the derivative may be what is not
    return slope


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """As there, the host does not look at what is in a tensor."""
    monkeypatch.setattr(_plan, "may_look", lambda t: False)


@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SMOOTH)
def test_where_nobody_looks_some_element_of_the_gradient_is_nan_if_one_of_stocks_is(
    name: str, dtype: torch.dtype
) -> None:
    model, x = Model(name, dtype, False), torch.linspace(-3, 3, 32 * 32).view(32, 32).to(dtype).t()
    opened = quiet(bits=3)
    for value in (0.5, *VALUES):
        bad = x.clone()
        bad[3, 5] = value
        exact = gradient(model, bad, contextlib.nullcontext())
        coded = gradient(model, bad, opened)
        # what a vectorised kernel makes of one NaN depends on its position
        if not (math.isnan(value) and name in ("celu", "elu", "hardswish", "selu")):
            assert coded.isnan().any() == exact.isnan().any(), value
        assert coded.isnan().sum() <= 1
        (row,) = opened.report().rows
        assert row.bits == 3
        assert row.stored_bytes == 32 * 32 * 3 // 8 + (8 if dtype == torch.float64 else 4)


@pytest.mark.parametrize("kept", [False, True], ids=["codes", "beside the output"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SMOOTH)
def test_the_gradient_is_nan_where_stocks_is(name: str, dtype: torch.dtype, kept: bool) -> None:
    model, x = Model(name, dtype, kept), torch.linspace(-3, 3, 32 * 32).view(32, 32).to(dtype)
    opened = quiet(bits=3)
    for _ in range(3):
        gradient(model, x, opened)
    assert opened.report().rows[0].bits is not None or name in ("tanh", "sigmoid", "tanhshrink")
    for value in VALUES:
        bad = x.clone()
        bad[3, 5] = value
        if kept and value == math.inf and dtype in (torch.float32, torch.float64):
            continue  # looked up in 16 bits; who keeps the output, which is infinite, has an infinite gradient
        if kept and value == -math.inf and name == "hardswish":
            continue  # its output is NaN, its gradient is not
        expected = gradient(model, bad, contextlib.nullcontext())
        assert torch.equal(gradient(model, bad, opened).isfinite(), expected.isfinite()), value


def test_the_report_says_that_it_is_kept_for_what_is_not_finite() -> None:
    x = torch.linspace(-3, 3, 64)
    x[7] = math.nan
    opened = quiet(bits=3)
    expected = gradient(Model("gelu", torch.float32, False), x, contextlib.nullcontext())
    assert torch.equal(gradient(Model("gelu", torch.float32, False), x, opened).nan_to_num(), expected.nan_to_num())
    (row,) = opened.report().rows
    assert (row.bits, row.reason) == (None, "holds NaN or infinities, where stock's gradient is NaN")


@pytest.mark.parametrize("value", [math.inf, -math.inf])
@pytest.mark.parametrize("name", ["sigmoid", "tanh", "softplus", "elu", "logsigmoid"])
def test_infinities_that_stock_has_a_gradient_for_are_coded(name: str, value: float) -> None:
    x = torch.linspace(-3, 3, 64)
    x[7] = value  # a gate that is masked, say
    opened = quiet(bits=3)
    assert gradient(Model(name, torch.float32, False), x, opened).isfinite().all()
    assert opened.report().rows[0].bits == 3


class Overflow(nn.Module):
    """One pre-activation is not finite, although all that the layer before it saves is."""

    value = 0.0

    def forward(self, x: Tensor) -> Tensor:
        bad = torch.zeros_like(x)
        bad[2, 3] = self.value
        return x + bad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", [{"bits": 3}, {"exact": True}, {"bits": 3, "recompute": True}], ids=str)
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("loss", [Tensor.mean, lambda y: y.square().mean()], ids=["mean", "square"])
@pytest.mark.parametrize("more", [False, True], ids=["alone", "with layers behind it"])
@pytest.mark.parametrize("look", [True, False], ids=["", "on CUDA"])
def test_a_gradient_scaler_finds_it_where_it_would_without_a_scope(
    look: bool,
    more: bool,
    loss: Any,
    value: float,
    settings: dict[str, Any],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Under autocast. Where nothing trainable is behind the activation, a linear loss has a finite gradient."""
    monkeypatch.setattr(_plan, "may_look", lambda t: look)

    def scales(around: Any) -> list[float]:
        torch.manual_seed(0)
        overflow = Overflow()
        net = nn.Sequential(nn.Linear(8, 32), overflow, nn.GELU())
        if more:
            net.extend([nn.Dropout(0.1), nn.Linear(32, 16), nn.SiLU()])
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=100)
        found = []
        for step in range(6):
            x = torch.randn(16, 8)
            overflow.value = value if step in (1, 4) else 0.0
            optimizer.zero_grad()
            with around, torch.autocast("cpu", dtype=dtype):
                total = loss(net(x))
            scaler.scale(total).backward()
            scaler.step(optimizer)
            scaler.update()
            found.append(scaler.get_scale())
        assert all(p.isfinite().all() for p in net.parameters())
        return found

    expected = scales(contextlib.nullcontext())
    assert expected == [2.0**8, *[2.0**7] * 3, *[2.0**6] * 2]
    assert scales(quiet(**settings)) == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", [{"exact": True}, {"exact": True, "recompute": True}], ids=str)
def test_scaled_training_under_autocast_is_bit_equal_where_it_is_exact(
    settings: dict[str, Any], dtype: torch.dtype
) -> None:
    def train(around: Any) -> list[Tensor]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 1))
        optimizer = torch.optim.Adam(net.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for _ in range(5):
            optimizer.zero_grad()
            with around, torch.autocast("cpu", dtype=dtype):
                loss = F.mse_loss(net(torch.randn(16, 8)), torch.zeros(16, 1))
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
        return [p.detach().clone() for p in net.parameters()]

    assert all(map(torch.equal, train(quiet(**settings)), train(contextlib.nullcontext())))


@pytest.mark.parametrize(("outer", "inner"), list(itertools.permutations([torch.float16, torch.bfloat16, None], 2)))
def test_autocast_that_changes_within_a_model_codes_each_part_in_its_dtype(
    outer: torch.dtype | None, inner: torch.dtype | None
) -> None:
    first, last = nn.Linear(8, 32), nn.Linear(32, 8)

    def cast(dtype: torch.dtype | None) -> Any:
        return torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None)

    def gradients(around: Any) -> list[Tensor]:
        x = torch.linspace(-2, 2, 128).view(16, 8)
        with around, cast(outer):
            h = F.gelu(first(x))
            with cast(inner):
                y = F.silu(last(h.float()))
            loss = y.float().square().mean()
        return list(torch.autograd.grad(loss, [first.weight, last.weight]))

    opened = quiet(bits=8)
    for mine, exact in zip(gradients(opened), gradients(contextlib.nullcontext()), strict=True):
        assert mine.dtype == exact.dtype
        assert (mine - exact).norm() < 0.02 * exact.norm()
    assert {row.activation: row.bits for row in opened.report().rows} == {"gelu": 8, "silu": 8}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("call", [torch.relu, F.relu6, F.leaky_relu, F.hardshrink, F.softshrink, F.hardsigmoid])
def test_tables_are_made_under_an_autocast_of_the_other_kind(
    call: Callable[[Tensor], Tensor], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_policy, "_plans", {})  # as in a fresh process
    x = torch.linspace(-8, 8, 64, dtype=dtype, requires_grad=True)
    with quiet(exact=True), torch.autocast("cpu", torch.bfloat16 if dtype == torch.float16 else torch.float16):
        y = call(x * 1)
    assert torch.equal(*(torch.autograd.grad(result.sum(), x)[0] for result in (y, call(x * 1))))


def test_a_composite_is_looked_at_under_an_autocast_of_the_other_kind() -> None:
    modules = pytest.importorskip("transformers.activations", reason="transformers is not installed")
    module = modules.NewGELUActivation()
    x = torch.linspace(-8, 8, 64, dtype=torch.float16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        stock = module(x * 1)
        with quiet(bits=3) as memory:
            y = module(x * 1)
    assert torch.equal(y, stock)
    assert {(row.activation, row.bits) for row in memory.report().rows} == {("gelu", 3)}
