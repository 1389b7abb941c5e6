"""Learning what is kept: left alone, beside the output, or codes; site by site."""

from __future__ import annotations

import contextlib
import functools
import gc
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import fewbit_hooks as fewbit
from fewbit_hooks import _learning, _sites
from fewbit_hooks._ledger import HELD

from .conftest import held_for_backward, quiet

N = 64 * 64


def steps(model: Callable[[Tensor], Tensor], opened: fewbit.scope, count: int = 3) -> list[dict[str, object]]:
    """What each of some training steps does, by activation and module: bits, "y+bits" beside the output, or None."""
    seen = []
    for _ in range(count):
        with opened:
            loss = model(torch.randn(64, 64)).square().mean()
        seen.append({f"{r.activation} {r.module}": how(r) for r in opened.report().rows})
        loss.backward()
    return seen


def how(row: fewbit.ReportRow) -> object:
    return f"y+{row.bits}" if row.beside_output else row.bits


@pytest.fixture
def opened() -> fewbit.scope:
    return fewbit.scope(bits=3, min_bytes=0)


def chain(*activations: nn.Module) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(64, 64)]
    for activation in activations:
        layers += [activation, nn.Linear(64, 64)]
    return nn.Sequential(*layers)


def test_an_output_that_the_next_linear_keeps_serves_from_the_third_step_on(opened: fewbit.scope) -> None:
    assert steps(chain(nn.GELU()), opened) == [{"gelu 1": 3}, {"gelu 1": 3}, {"gelu 1": "y+1"}]
    row = opened.report().rows[0]
    assert (row.stored_bytes, row.freed_bytes) == (N // 8, 4 * N)


@pytest.mark.parametrize(
    ("activation", "how"),
    [
        (nn.SiLU(), "y+1"),
        (nn.Mish(), "y+1"),
        (nn.Hardswish(), "y+1"),
        (nn.GELU(approximate="tanh"), "y+1"),
        (nn.ELU(), "y+0"),
        (nn.SELU(), "y+0"),
        (nn.CELU(2.0), "y+0"),
        (nn.Softplus(), "y+0"),
        (nn.LogSigmoid(), "y+0"),
        (nn.Softsign(), "y+0"),
        (nn.Tanhshrink(), "y+0"),
        (nn.SiLU(inplace=True), "y+1"),
        (nn.ReLU(), None),
        (nn.Tanh(), None),
        (nn.Sigmoid(), None),
        (nn.ELU(inplace=True), None),
        (nn.ReLU6(), "y+0"),
        (nn.ReLU6(inplace=True), "y+0"),
        (nn.Hardtanh(-0.1, 0.7), "y+0"),
        (nn.LeakyReLU(), "y+0"),
        (nn.Hardshrink(), "y+0"),
        (nn.Threshold(0.1, -1.0), "y+0"),
        (nn.Threshold(0.1, 1.0), 1),
        (nn.LeakyReLU(-0.5), 1),
        (nn.Softshrink(), 1),
        (nn.Hardsigmoid(), 1),
    ],
    ids=repr,
)
def test_what_is_learned_of_each_activation_before_a_linear(opened: fewbit.scope, activation: nn.Module, how) -> None:
    (found,) = steps(chain(activation), opened)[-1].values()
    assert found == how


def test_a_relu_before_a_linear_is_left_alone_and_exact(opened: fewbit.scope) -> None:
    model = chain(nn.ReLU(), nn.Tanh())
    assert steps(model, opened)[-1] == {"relu 1": None, "tanh 3": None}
    assert {row.reason for row in opened.report().rows} == {HELD}
    x = torch.randn(64, 64)
    with opened:
        loss = model(x).square().mean()
    coded = torch.autograd.grad(loss, list(model.parameters()))
    exact = torch.autograd.grad(model(x).square().mean(), list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(coded, exact, strict=True))


def test_a_frozen_next_layer_keeps_nothing_so_codes_stay(opened: fewbit.scope) -> None:
    model = chain(nn.GELU())
    model[2].requires_grad_(False)
    assert steps(model, opened, 4)[-1] == {"gelu 1": 3}


def test_freezing_and_unfreezing_the_next_layer_is_noticed(opened: fewbit.scope) -> None:
    model = chain(nn.GELU())
    assert steps(model, opened)[-1] == {"gelu 1": "y+1"}
    model[2].requires_grad_(False)
    assert steps(model, opened) == [{"gelu 1": 3}] * 3
    model[2].requires_grad_(True)  # as it was: that is known
    assert steps(model, opened) == [{"gelu 1": "y+1"}] * 3
    model[0].bias.requires_grad_(False)
    assert steps(model, opened) == [{"gelu 1": 3}, {"gelu 1": 3}, {"gelu 1": "y+1"}]


def test_each_mode_of_the_module_is_learned(opened: fewbit.scope) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Dropout(0.5), nn.Linear(64, 64))
    assert steps(model.eval(), opened)[-1] == {"gelu 1": "y+1"}
    assert [step["gelu 1"] for step in steps(model.train(), opened, 4)] == [3, 3, 3, 3]
    assert steps(model.eval(), opened)[0] == {"gelu 1": "y+1"}


@pytest.mark.parametrize("alternating", ["mode", "requires_grad"])
def test_steps_that_alternate_are_learned(alternating: str, opened: fewbit.scope) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Dropout(0.0), nn.Linear(64, 64))
    found = []
    for i in range(6):
        if alternating == "mode":
            model.train(i % 2 == 0)
        else:  # as a GAN's discriminator, in whose steps the generator has none
            model[3].requires_grad_(i % 2 == 0)
        found += [step["gelu 1"] for step in steps(model, opened, 1)]
    assert found == [3, 3, 3, 3, "y+1", "y+1" if alternating == "mode" else 3]


def test_an_old_state_is_forgotten_for_a_new_one(opened: fewbit.scope) -> None:
    model = nn.Sequential(*(layer for _ in range(2 * _sites.STATES) for layer in (nn.Linear(64, 64), nn.GELU())))
    flags = list(model.parameters())
    for frozen in flags:
        for p in flags:
            p.requires_grad_(p is not frozen)
        steps(model, opened, 1)
    (trainable,) = opened._sites._models.values()
    assert len(trainable._states) <= _sites.STATES
    assert all(len(place._sites) <= 2 * _sites.STATES for place in opened._sites._places.values())


def test_an_output_that_is_kept_only_now_and_then_is_not_relied_upon(opened: fewbit.scope) -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.other = nn.Linear(64, 64), nn.Linear(64, 64), False

        def forward(self, x: Tensor) -> Tensor:
            h = F.gelu(self.a(x))
            return h.sum() if self.other else self.b(h).sum()

    model, found = Routed(), []
    for i in range(20):
        model.other = i % 5 == 4
        found += [step["gelu Routed"] for step in steps(model, opened, 1)]
    assert found[:5] == [3, 3, "y+1", "y+1", "y+1"]
    assert found[10:] == [3] * 10  # it was found alone twice


def gradients(model: nn.Module, opened: Any) -> list[Tensor]:
    model.zero_grad()
    torch.manual_seed(0)
    with opened:
        loss = model(torch.randn(64, 64)).square().mean()
    loss.backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


class Routed(nn.Module):
    """An activation before a Linear, or, on another route, a frozen one."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.activation, self.frozen = activation, False
        self.first, self.second, self.other = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.other.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = (self.other if self.frozen else self.second)(self.activation(self.first(x)))
        return y


def test_an_output_that_is_relied_upon_is_not_coded_for_another_look(
    opened: fewbit.scope, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_learning, "LOOK_AGAIN", 5)
    seen = [step["gelu 1"] for step in steps(chain(nn.GELU()), opened, 12)]
    assert seen == [3, 3, *["y+1"] * 10]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "activation",
    [F.relu, functools.partial(F.relu, inplace=True), torch.tanh, torch.sigmoid, lambda h: F.silu(h) + h * h],
    ids=["relu", "relu_", "tanh", "sigmoid", "shared input"],
)
def test_what_is_left_alone_is_looked_at_again_and_stays_exact(
    activation: Callable[[Tensor], Tensor], recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_learning, "LOOK_AGAIN", 5)
    opened = fewbit.scope(bits=3, min_bytes=0, recompute=recompute)
    model, looks = Routed(activation), set()
    stock = gradients(model, contextlib.nullcontext())
    for step in range(24):
        ours = gradients(model, opened)
        if step >= 3:
            assert all(torch.equal(a, b) for a, b in zip(ours, stock, strict=True)), step
            looks |= {site._step for site in the_sites(opened) if site.verdict is _learning.Verdict.LEAVE}
    assert len(looks) >= 3


def the_sites(opened: fewbit.scope) -> list[_learning.Site]:
    return [site for place in opened._sites._places.values() for site in place._sites.values()]


def test_what_is_kept_by_nobody_else_any_more_is_coded_after_another_look(
    opened: fewbit.scope, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_learning, "LOOK_AGAIN", 5)
    model = Routed(torch.tanh)
    assert steps(model, opened)[-1] == {"tanh Routed": None}
    model.frozen = True
    seen = [step["tanh Routed"] for step in steps(model, opened, 12)]
    assert seen == [None] * 5 + [3] * 7
    model.frozen = False
    assert [step["tanh Routed"] for step in steps(model, opened, 3)] == [3, 3, None]


def test_a_look_holds_no_more_than_stock(opened: fewbit.scope, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_learning, "LOOK_AGAIN", 3)
    model, x, held = Routed(torch.tanh), torch.randn(64, 64), []
    stock = sum(held_for_backward(model(x), model.parameters()).values())
    for _ in range(12):
        with opened:
            y = model(x)
        held.append(sum(held_for_backward(y, model.parameters(), tables=False).values()))
        y.sum().backward()
    assert held[2:] == [stock] * 10


@pytest.mark.parametrize("engine", ["hooks", "fused"])
def test_a_call_whose_result_is_thrown_away_says_nothing(engine: str) -> None:
    class Solver(nn.Module):
        """As one of adaptive steps, which does not use the last evaluation."""

        def __init__(self) -> None:
            super().__init__()
            self.f = chain(nn.GELU(), nn.Tanh())

        def forward(self, x: Tensor) -> Tensor:
            for i in range(4):
                y = self.f(x)
                x = y if i < 3 else x
            return x

    opened = fewbit.scope(bits=3, min_bytes=0, engine=engine)
    assert steps(Solver(), opened)[-1] == {"gelu f.1": "y+1", "tanh f.3": None}


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def test_the_product_of_a_gated_unit_keeps_the_output(opened: fewbit.scope) -> None:
    assert steps(Gated(), opened)[-1] == {"silu Gated": "y+1"}


class Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(64, 128)

    def forward(self, x: Tensor) -> Tensor:
        a, g = self.proj(x).chunk(2, dim=-1)
        return a * F.gelu(g)


def test_a_gate_that_shares_its_storage_is_left_alone(opened: fewbit.scope) -> None:
    assert steps(Halves(), opened)[-1] == {"gelu Halves": None}


class Shared(nn.Module):
    """One activation module for two places, as in torchvision's residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.a(x))
        return self.act(self.b(x)) * 3.0


def test_two_places_that_call_one_module_are_two_sites(opened: fewbit.scope) -> None:
    seen = []
    model = nn.Sequential(Shared(), nn.Dropout(0.0))
    for _ in range(3):
        with opened:
            loss = model(torch.randn(64, 64)).sum()
        seen.append(sorted((how(row), row.calls) for row in opened.report().rows if row.bits is not None))
        loss.backward()
    assert seen == [[(1, 2)], [(1, 2)], [(1, 1)]]  # the one before the Linear is left alone, the other is coded


def test_a_bare_call_is_not_learned(opened: fewbit.scope) -> None:
    model = nn.Linear(64, 64)

    def bare(x: Tensor) -> Tensor:
        return F.linear(F.gelu(model(x)), model.weight)

    assert steps(bare, opened, 4)[-1] == {"gelu ": 3}


def test_a_module_still_in_its_forward_is_not_judged() -> None:
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
            self.scope = fewbit.scope(bits=3, min_bytes=0)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            with self.scope:
                y = F.gelu(h)
            return self.b(y)  # here `h` is a variable still, and holds what the next step will not

    model = Inside()
    for _ in range(4):
        model(torch.randn(64, 64)).sum().backward()
    assert model.scope.report().rows[0].bits is not None


class ChangesItsOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
        self.change = True

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.a(x))
        if self.change:
            y += 1.0
        return self.b(y)


def test_an_output_that_is_changed_in_place_is_never_relied_upon(opened: fewbit.scope) -> None:
    assert steps(ChangesItsOutput(), opened, 5)[-1] == {"silu ChangesItsOutput": 3}


def test_a_change_in_place_that_comes_later_is_noticed_and_learned(opened: fewbit.scope) -> None:
    model = ChangesItsOutput()
    model.change = False
    assert steps(model, opened)[-1] == {"silu ChangesItsOutput": "y+1"}
    model.change = True
    with pytest.raises(fewbit.FewbitError, match=r"the output of silu.*modified by an inplace operation.*next step"):
        steps(model, opened, 1)
    assert steps(model, opened, 5) == [{"silu ChangesItsOutput": 3}] * 5


def test_exact_true_takes_a_derivative_from_an_output_only_where_that_is_exact() -> None:
    opened = fewbit.scope(exact=True, min_bytes=0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.ReLU6(), nn.Linear(64, 64))
    assert steps(model, opened, 4)[-1] == {"gelu 1": None, "hardtanh 3": "y+0"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "activation",
    [nn.ReLU6(), nn.Hardtanh(-0.5, 0.75), nn.LeakyReLU(), nn.Hardshrink(), nn.Threshold(0.1, -1.0)],
    ids=repr,
)
def test_a_gradient_from_the_output_itself_is_bit_for_bit_stocks(
    opened: fewbit.scope, activation: nn.Module, dtype: torch.dtype
) -> None:
    """Ties, infinities and NaN included, in the vectorised body of the kernel and in its tail, channels last or not."""
    model = nn.Sequential(activation, nn.Conv2d(3, 4, 1)).to(dtype)
    x = (torch.randn(3, 3, 17, 19) * 4).to(dtype)
    special = torch.tensor(
        [torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 0.1, -0.1, 0.5, -0.5, 0.7, 6.0, 1e-45, 5.9999995]
    )
    flat = x.view(-1)
    flat[: 13 * 200].view(200, 13)[::7] = special.to(dtype)
    flat[-5:] = torch.nan

    def gradient(v: Tensor) -> Tensor:
        leaf = v.detach().requires_grad_()
        model(leaf * 1).sum().backward()
        assert leaf.grad is not None
        return leaf.grad.contiguous().view(torch.uint8)

    clean = x.nan_to_num(1.0, 2.0, 2.0)
    for _ in range(2):
        with opened:
            gradient(clean)
    for v in (x, x.contiguous(memory_format=torch.channels_last)):
        with opened:
            coded = gradient(v)
        assert how(opened.report().rows[0]) == "y+0"
        assert torch.equal(coded, gradient(v))


def test_limits_that_a_dtype_has_to_round_are_left_to_codes(opened: fewbit.scope) -> None:
    """0.7 is 0.69921875 in bfloat16: the backward may compare that output with 0.7 itself."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Hardtanh(-0.1, 0.7), nn.Linear(64, 64)).bfloat16()
    for _ in range(3):
        with opened:
            loss = model(torch.randn(64, 64, dtype=torch.bfloat16)).square().mean()
        loss.backward()
    assert how(opened.report().rows[0]) == 1


def test_an_input_with_gaps_is_coded_although_the_output_would_serve(opened: fewbit.scope) -> None:
    """The output has none, and which NaN counts as which depends on the place in memory."""

    class Cut(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu6(x[:, ::2])

    model = nn.Sequential(nn.Linear(64, 128), Cut(), nn.Linear(64, 8))
    assert steps(model, opened, 4)[-1] == {"relu6 1": 1}


def test_freezing_is_noticed_in_the_second_of_two_models(opened: fewbit.scope) -> None:
    first, second = chain(nn.SiLU()), chain(nn.GELU())

    def both(x: Tensor) -> Tensor:
        return second(first(x))

    assert steps(both, opened)[-1] == {"silu 1": "y+1", "gelu 1": "y+1"}
    second[2].requires_grad_(False)
    assert steps(both, opened, 1) == [{"silu 1": "y+1", "gelu 1": 3}]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_scope_inside_a_checkpoint_trains_for_many_steps(
    use_reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_learning, "LOOK_AGAIN", 1)
    model, opened = chain(nn.GELU(), nn.ReLU()), fewbit.scope(bits=3, min_bytes=0)

    def inside(x: Tensor) -> Tensor:
        with opened:
            return model(x)

    for _ in range(8):
        x = torch.randn(64, 64, requires_grad=True)
        y = torch.utils.checkpoint.checkpoint(inside, x, use_reentrant=use_reentrant)
        y.square().mean().backward()
    assert x.grad is not None


def always_three(name: str, x: Tensor) -> int:
    return 3


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 3},
        {"bits": {"gelu": 3}, "exclude": ["2", nn.ReLU]},
        {"bits": always_three, "codebooks": fewbit.codebook("silu", 3)},
        {"engine": "fused"},
    ],
    ids=["bits", "mapping", "function", "engine"],
)
def test_scopes_of_equal_settings_learn_together(settings: dict[str, Any]) -> None:
    model, seen = chain(nn.GELU()), []
    for step in range(4):
        seen += steps(model, fewbit.scope(min_bytes=0, **settings), 1)
        (other,) = steps(model, fewbit.scope(min_bytes=0, bits=2), 1)  # learns by itself
        assert other == {"gelu 1": 2 if step < 2 else "y+1"}
    assert [step["gelu 1"] for step in seen] == [3, 3, "y+1", "y+1"]


def test_scopes_with_functions_that_are_made_anew_learn_by_themselves() -> None:
    model = chain(nn.GELU())
    seen = [steps(model, fewbit.scope(min_bytes=0, bits=lambda name, x: 3), 1) for _ in range(4)]
    assert seen == [[{"gelu 1": 3}]] * 4
    many = [fewbit.scope(bits=lambda name, x: 3) for _ in range(100)]
    assert len(_sites._learned) <= _sites.SETTINGS < len(many)


def test_a_scope_for_each_block_learns_as_one_for_all() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = chain(nn.GELU())

        def forward(self, x: Tensor) -> Tensor:
            with fewbit.scope(min_bytes=0) as self.scope:
                y: Tensor = self.net(x)
            return y

    model, seen = nn.Sequential(*(Block() for _ in range(4))), []
    for _ in range(9):
        model(torch.randn(64, 64)).square().mean().backward()
        seen.append({how(row) for block in model for row in block.scope.report().rows})
    assert seen == [{3}, {3}, *([{"y+1"}] * 7)]


def test_two_scopes_of_equal_settings_may_take_turns() -> None:
    first, second = (fewbit.scope(min_bytes=0) for _ in range(2))
    model = chain(nn.GELU())
    seen = [steps(model, scope, 1)[0]["gelu 1"] for _ in range(3) for scope in (first, second)]
    assert seen == [3, 3, "y+1", "y+1", "y+1", "y+1"]
    assert (first.report().steps, second.report().steps) == (3, 3)


def test_a_scope_that_learned_from_another_does_not_warn_that_nothing_is_compressed() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    seen = [steps(model, fewbit.scope(min_bytes=0), 1)[0]["relu 1"] for _ in range(4)]  # warnings are errors
    assert seen == [1, 1, None, None]


def test_a_parameter_that_is_replaced_is_let_go_of(opened: fewbit.scope) -> None:
    model = chain(nn.GELU())
    steps(model, opened, 3)
    old = weakref.ref(model[2].weight)
    model[2] = nn.Linear(64, 64)
    assert old() is None
    assert steps(model, opened, 3)[-1] == {"gelu 1": "y+1"}


@pytest.mark.parametrize("backward", ["loss.backward()", "torch.autograd.backward(loss)"])
def test_under_enable_a_backward_is_when_it_learns(backward: str) -> None:
    model = chain(nn.GELU(), nn.ReLU())
    with fewbit.enable(bits=3, min_bytes=0) as handle:
        for _ in range(4):
            loss = model(torch.randn(64, 64)).square().mean()
            eval(backward, {"torch": torch, "loss": loss})
    assert [how(row) for row in handle.report().rows] == ["y+1", None]


def test_what_the_graph_holds_is_stocks_less_the_inputs(opened: fewbit.scope) -> None:
    model = chain(nn.GELU(), nn.ReLU(), nn.SiLU())
    steps(model, opened)
    x = torch.randn(64, 64)
    stock = held_for_backward(model(x), model.parameters())
    with opened:
        y = model(x)
    few = held_for_backward(y, model.parameters())
    assert sum(stock.values()) - sum(few.values()) == 2 * 4 * N - 2 * N // 8


def test_the_gradient_is_nearly_exact() -> None:
    model = chain(nn.GELU(), nn.SiLU(), nn.Mish(), nn.ELU())
    x = torch.randn(64, 64)
    (row,) = fewbit.compare(lambda: model(x).square().mean(), bits=1, min_bytes=0).rows
    assert row.relative_error < 0.005


def test_backward_twice_and_double_backward(opened: fewbit.scope) -> None:
    model = chain(nn.GELU())
    steps(model, opened)
    with opened:
        loss = model(torch.randn(64, 64)).square().mean()
    weight = model[0].weight
    first = torch.autograd.grad(loss, weight, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, weight, retain_graph=True)[0])
    with pytest.raises(fewbit.FewbitError, match="double backward"):
        torch.autograd.grad(loss, weight, create_graph=True)


def test_nothing_is_kept_alive_when_a_graph_is_dropped(opened: fewbit.scope) -> None:
    model = chain(nn.GELU(), nn.SiLU())
    steps(model, opened)
    gc.collect()
    gc.disable()
    try:
        before = sum(type(o) is Tensor for o in gc.get_objects())
        for _ in range(5):
            with opened:
                model(torch.randn(64, 64))
        assert sum(type(o) is Tensor for o in gc.get_objects()) <= before
    finally:
        gc.enable()


def test_sites_of_models_that_are_gone_are_dropped(opened: fewbit.scope, monkeypatch: pytest.MonkeyPatch) -> None:
    opened._sites._purge_at = 8
    for i in range(40):
        steps(chain(nn.GELU()), opened, 1)
        if i % 8 == 0:
            gc.collect()
    assert len(opened._sites._places) < 1024
    opened._sites._purge_at = 0
    steps(chain(nn.GELU()), opened, 1)
    assert len(opened._sites._places) <= 2


def test_a_model_may_have_parameters_of_its_own_making(opened: fewbit.scope) -> None:
    class Groups(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

        def parameters(self, lr: float = 0.1) -> list[dict[str, object]]:  # type: ignore[override]
            return [{"params": self.a.parameters(), "lr": lr}, {"params": self.b.parameters(), "lr": 10 * lr}]

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(F.gelu(self.a(x)))
            return out

    assert steps(Groups(), opened)[-1] == {"gelu Groups": "y+1"}
    assert fewbit.profile(Groups(), torch.randn(64, 64)).nbytes == 3 * 64 * 64 * 4  # what a, gelu and b keep


def interleaved(step: Callable[[int, int], object]) -> list[RuntimeError]:
    """`step(thread, count)` again and again, for seconds, on threads that take turns as fast as they can."""
    interval, errors, until = sys.getswitchinterval(), [], time.monotonic() + 3
    sys.setswitchinterval(1e-6)

    def work(thread: int) -> None:
        count = 0
        while time.monotonic() < until and not errors:
            count += 1
            try:
                step(thread, count)
            except RuntimeError as error:
                errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    return errors


def test_threads_that_share_a_scope_may_bring_new_modules_and_freeze_old_ones(opened: fewbit.scope) -> None:
    def deep() -> nn.Sequential:
        return nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.GELU()) for _ in range(30)])

    models = [deep() for _ in range(4)]

    def step(thread: int, count: int) -> None:
        if thread % 2:
            models[thread][0][0].bias.requires_grad_(count % 2 == 0)
        else:
            models[thread] = deep()
        with opened:
            loss = models[thread](torch.randn(2, 4)).sum()
        loss.backward()

    assert not interleaved(step)


def test_threads_may_make_scopes_of_many_settings() -> None:
    assert not interleaved(lambda thread, count: _sites.learned_under((thread, count % 40)))


def test_threads_that_make_scopes_of_equal_settings_learn_together() -> None:
    made: set[int] = set()
    learns = fewbit.scope(min_bytes=12345)  # and is kept, so that no other can have the address of what it learned
    assert not interleaved(lambda thread, count: made.add(id(fewbit.scope(min_bytes=12345)._sites)))
    assert made == {id(learns._sites)}


def test_threads_may_see_which_states_a_model_was_in() -> None:
    model, trainable = nn.Sequential(*[nn.Linear(2, 2) for _ in range(8)]), _sites.Trainable()
    trainable.renew(model, 0)

    def step(thread: int, count: int) -> None:
        model[count % 8].bias.requires_grad_(count // 8 % (thread + 2) == 0)
        trainable.look(model, 1)

    assert not interleaved(step)


class Subclass(Tensor):
    pass


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda h: h.data.round_(),
        lambda h: h.detach().numpy().round(out=h.detach().numpy()),
        lambda h: nn.Parameter(h.detach()).data.round_(),
        lambda h: h.detach().as_subclass(Subclass).data.round_(),
        lambda h: torch.empty(0).set_(h.storage(), 0, h.shape).round_(),
        lambda h: torch.ops.aten.set_(torch.empty(0), h.detach()).round_(),
    ],
    ids=["data", "numpy", "parameter", "subclass", "storage", "set_"],
)
@pytest.mark.parametrize(
    ("activation", "arguments", "error"),
    [
        (F.relu6, {"exact": True}, 0.0),
        (F.relu6, {"exact": True, "recompute": True}, 0.0),
        (F.hardtanh, {"bits": 3}, 0.0),
        (F.gelu, {"bits": 8}, 0.02),
        (F.softplus, {"bits": 8}, 0.02),
    ],
)
def test_an_output_whose_memory_is_given_away_is_not_relied_upon(
    activation: Callable[[Tensor], Tensor],
    arguments: dict[str, object],
    error: float,
    change: Callable[[Tensor], object],
    late: bool,
) -> None:
    class Rounded(nn.Module):
        changes = False

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            h = activation(self.a(x))
            if late:
                y: Tensor = self.b(h)
                if self.changes:
                    change(h)
                return y
            if self.changes:
                change(h)  # straight through, say
            return self.b(h)

    torch.manual_seed(0)
    net, x, memory = Rounded(), torch.randn(32, 16), fewbit.scope(min_bytes=0, **arguments)
    for step in range(8):
        net.changes = step not in (0, 1, 2, 7)  # after the output is relied upon, for the first time
        stock = torch.autograd.grad(net(x).square().sum(), net.a.weight)[0]
        with memory:
            loss = net(x).square().sum()
        (under,) = torch.autograd.grad(loss, net.a.weight)
        assert (under - stock).norm() <= error * stock.norm(), step


ODD: dict[str, Callable[[], Tensor]] = {
    "sparse": lambda: torch.eye(4).to_sparse(),
    "nested": lambda: torch.nested.as_nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    "meta": lambda: torch.empty(4, device="meta"),
    "wrapper subclass": lambda: TwoTensor(torch.ones(4), torch.ones(4)),
    "subclass": lambda: torch.ones(4).as_subclass(Subclass),
}


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("way", ["data", "untyped_storage", "storage", "data_ptr", "numpy"])
@pytest.mark.parametrize("kind", ODD)
def test_giving_away_the_memory_of_an_odd_tensor_does_what_it_did(kind: str, way: str) -> None:
    def give() -> type:
        try:
            given = getattr(ODD[kind](), way)
            return type(given() if callable(given) else given)
        except Exception as error:
            return type(error)

    expected = give()
    opened = fewbit.scope(exact=True, recompute=True)
    opened._warned = True
    with opened:
        assert give() is expected


class Made(nn.Module):
    """An activation that is made anew in each forward, or is there."""

    def __init__(self, kind: Callable[[], nn.Module], anew: bool) -> None:
        super().__init__()
        self.kind, self.anew = kind, anew
        self.a, self.act, self.b = nn.Linear(16, 64), kind(), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.b((self.kind() if self.anew else self.act)(self.a(x)))


class Own(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.mish(x)


@pytest.mark.parametrize("settings", [{}, {"exact": True}, {"recompute": True}], ids=str)
@pytest.mark.parametrize(
    "kind", [nn.ReLU, nn.SiLU, Own, lambda: nn.Sequential(nn.SiLU())], ids=["relu", "silu", "own", "in a container"]
)
def test_an_activation_that_is_made_anew_in_each_forward_is_learned(
    kind: Callable[[], nn.Module], settings: dict[str, Any]
) -> None:
    held = {}
    for anew in (False, True):
        torch.manual_seed(0)
        model, x, opened = nn.Sequential(Made(kind, anew), Made(kind, anew)), torch.randn(32, 16), quiet(**settings)
        for _ in range(6):
            with opened:
                y = model(x)
            held[anew] = sum(held_for_backward(y, [*model.parameters(), x], tables=False).values())
            y.sum().backward()
        if anew:
            places = len(opened._sites._places)
            for _ in range(3):
                with opened:
                    model(x).sum().backward()
            assert len(opened._sites._places) == places
            assert {row.module for row in opened.report().rows if row.activation != "linear"} == {"0", "1"}
    assert held[True] == held[False]


def test_a_model_at_the_address_of_one_before_learns_as_any(opened: fewbit.scope) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.act, self.b = nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.act(self.a(x)))

    addresses, seen = set(), []
    for _ in range(20):
        block = Block()
        addresses.add(id(block))
        seen.append([step["gelu act"] for step in steps(block, opened, 3)])
        del block
    assert len(addresses) < 20
    assert seen == [[3, 3, "y+1"]] * 20


@pytest.mark.parametrize("settings", [{"bits": 3}, {"bits": 3, "recompute": True}], ids=str)
def test_of_a_forward_that_failed_nothing_is_learned(settings: dict[str, Any]) -> None:
    """Its traceback holds what it had in its hands."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            h = F.gelu(self.first(x))
            return x + self.second(h)

    net, opened = nn.Sequential(Block(), Block(), Block()), fewbit.scope(min_bytes=0, **settings)
    before = steps(net, opened, 6)[-1]

    def out_of_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    for _ in range(2):
        hook = net[1].second.register_forward_pre_hook(out_of_memory)
        with pytest.raises(torch.OutOfMemoryError), opened:
            net(torch.randn(64, 64))
        hook.remove()
        assert steps(net, opened, 2) == [before, before]


def test_of_a_generator_that_is_over_is_learned() -> None:
    net = chain(nn.GELU())
    opened = fewbit.scope(bits=3, min_bytes=0)

    @opened
    def losses() -> Any:
        yield
        kept.append(net(torch.randn(64, 64)).square().mean())

    for _ in range(3):
        kept: list[Tensor] = []
        list(losses())
        rows = [how(row) for row in opened.report().rows]
        kept[0].backward()
    assert rows == ["y+1"]
