"""Modes of others, around a scope or inside it, that do more than to look on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fewbit_hooks as fewbit

from .conftest import quiet

Act = Callable[[Tensor], Tensor]
SETTINGS: list[dict[str, Any]] = [
    {"bits": 8},
    {"bits": 8, "engine": "fused"},
    {"exact": True},
    {"exact": True, "recompute": True},
]
STEPS = 4  # from the third on it is known what is kept


class Instead(TorchFunctionMode):
    """Computes other functions in the place of some."""

    def __init__(self, table: dict[Any, Act]) -> None:
        super().__init__()
        self.table = table

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.table:
            return self.table[func](args[0])
        return func(*args, **(kwargs or {}))


class Penalty(TorchFunctionMode):
    """Sums up squares of what a function returns, as a loss on activities does."""

    def __init__(self, *functions: Any) -> None:
        super().__init__()
        self.functions = functions
        self.total = torch.zeros(())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = func(*args, **(kwargs or {}))
        if func in self.functions:
            self.total = self.total + y.square().mean()
        return y


class Rounding(TorchDispatchMode):
    """Rounds what activations return, as a narrower format would."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = func(*args, **(kwargs or {}))
        named = func.overloadpacket.__name__ in ("gelu", "hardtanh", "leaky_relu", "relu", "softplus")
        return (y * 4).round() / 4 if named else y


class Primitives(nn.Module):
    """A module that is run as a whole."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * (x + 0.044715 * torch.pow(x, 3.0))))


class WithinModules(nn.Module):
    """Another, with a module in it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


fewbit.register_module(Primitives, "gelu", approximate="tanh")
fewbit.register_module(WithinModules, "silu")


def mlp(act: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), act, nn.Linear(64, 16))


def trained(net: nn.Module, around: Any, settings: dict[str, Any] | None) -> list[Tensor]:
    """Gradients of the last of some steps, under a scope inside of what is around it."""
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(1))
    for _ in range(STEPS):
        net.zero_grad()
        with around(), quiet(**settings) if settings is not None else contextlib.nullcontext():
            loss = net(x).square().sum()
        loss.backward()
    return [p.grad.clone() for p in net.parameters()]


def near(expected: Tensor, settings: dict[str, Any]) -> float:
    """What 8 bits may be off by; nothing, where all is exact."""
    return 0.0 if settings.get("exact") else 5e-3 * float(expected.abs().max())


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(
    ("act", "replaced", "by"),
    [
        (nn.ReLU, F.relu, torch.square),
        (nn.GELU, F.gelu, torch.sin),
        (nn.GELU, F.gelu, torch.relu),
        (nn.SiLU, F.silu, lambda x: x * x.sin()),
    ],
)
def test_what_a_mode_around_the_scope_computes_instead_has_its_own_gradient(
    act: Callable[[], nn.Module], replaced: Any, by: Act, settings: dict[str, Any]
) -> None:
    expected = trained(mlp(act()), lambda: Instead({replaced: by}), None)
    for mine, stock in zip(trained(mlp(act()), lambda: Instead({replaced: by}), settings), expected, strict=True):
        assert torch.equal(mine, stock)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_an_activation_that_a_mode_computes_instead_is_coded_as_what_it_is(settings: dict[str, Any]) -> None:
    expected = trained(mlp(nn.ReLU()), lambda: Instead({F.relu: F.gelu}), None)
    for mine, stock in zip(trained(mlp(nn.ReLU()), lambda: Instead({F.relu: F.gelu}), settings), expected, strict=True):
        torch.testing.assert_close(mine, stock, rtol=0, atol=near(stock, settings))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("inside", [False, True], ids=["around", "inside"])
@pytest.mark.parametrize(
    ("act", "seen"), [(nn.GELU, F.gelu), (Primitives, torch.tanh), (nn.Hardtanh, F.hardtanh), (nn.Tanh, Tensor.tanh)]
)
def test_what_a_mode_does_beside_a_call_is_recorded(
    act: Callable[[], nn.Module], seen: Any, inside: bool, settings: dict[str, Any]
) -> None:
    def gradient(settings: dict[str, Any] | None) -> Tensor:
        net, penalty = mlp(act()), Penalty(seen, torch.tanh)
        scope = quiet(**settings) if settings is not None else contextlib.nullcontext()
        with scope if inside else penalty, penalty if inside else scope:
            net(torch.ones(4, 16))
        penalty.total.backward()
        found: Tensor = net[0].weight.grad
        return found

    expected, found = gradient(None), gradient(settings)
    assert expected.norm() > 0.01
    torch.testing.assert_close(found, expected, rtol=0, atol=near(expected, settings))


@pytest.mark.parametrize("settings", [*SETTINGS, {"bits": None}], ids=str)
def test_what_a_hook_does_inside_of_a_module_that_is_run_as_a_whole_is_recorded_and_done_once(
    settings: dict[str, Any],
) -> None:
    net, kept = mlp(WithinModules()), []
    net[1].gate.register_forward_hook(lambda module, args, y: kept.append(y))
    with quiet(**settings):
        net(torch.ones(4, 16))
    (y,) = kept
    y.square().mean().backward()
    found = net[0].weight.grad.clone()
    net.zero_grad()
    net(torch.ones(4, 16))
    kept[1].square().mean().backward()
    torch.testing.assert_close(found, net[0].weight.grad, rtol=0, atol=1e-3 * found.abs().max())


@pytest.mark.parametrize("settings", [s for s in SETTINGS if "recompute" not in s], ids=str)
@pytest.mark.parametrize("act", [nn.GELU, nn.Softplus, nn.ReLU6, nn.LeakyReLU, nn.ReLU])
def test_no_derivative_is_taken_from_an_output_that_a_dispatch_mode_made_another(
    act: Callable[[], nn.Module], settings: dict[str, Any]
) -> None:
    expected = trained(mlp(act()), Rounding, None)
    for mine, stock in zip(trained(mlp(act()), Rounding, settings), expected, strict=True):
        torch.testing.assert_close(mine, stock, rtol=0, atol=near(stock, settings))


def test_two_places_in_a_module_are_two_under_a_mode_that_lies_around() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            kept = F.gelu(self.first(x) * 1)
            return F.gelu(self.second(kept) * 1)  # whose output nobody keeps

    net, opened = Two(), fewbit.scope(bits=3, min_bytes=0)
    for _ in range(STEPS):
        with Penalty(), opened:
            loss = net(torch.randn(64, 64)).sum()
        loss.backward()
    assert sorted((row.bits, row.beside_output) for row in opened.report().rows) == [(1, True), (3, False)]


def test_a_default_device_is_no_mode_that_would_see_into_a_module() -> None:
    with torch.device("cpu"), fewbit.scope(bits=3, min_bytes=0) as memory:
        mlp(Primitives())(torch.ones(4, 16))
    assert [row.bits for row in memory.report().rows] == [3]


@pytest.mark.filterwarnings("ignore")  # Dynamo's own
@pytest.mark.parametrize(("act", "replaced"), [(nn.GELU, F.gelu), (Primitives, torch.tanh)])
@pytest.mark.parametrize("inside", [False, True], ids=["around", "inside"])
def test_what_a_mode_computes_instead_has_its_own_gradient_in_a_compiled_graph(
    act: Callable[[], nn.Module], replaced: Any, inside: bool
) -> None:
    def gradient(settings: dict[str, Any] | None, mode: Any) -> Tensor:
        torch._dynamo.reset()
        net = mlp(act())
        net[2].weight.requires_grad_(False)  # or it would keep the output, and nothing be coded beside that
        scope = quiet(**settings) if settings is not None else contextlib.nullcontext()
        with scope if inside else mode, mode if inside else scope:
            y = torch.compile(net, backend="aot_eager", fullgraph=True)(torch.ones(4, 16))
        y.square().sum().backward()
        found: Tensor = net[0].weight.grad
        return found

    instead = {replaced: torch.sin}
    assert torch.equal(gradient({"bits": 2}, Instead(instead)), gradient(None, Instead(instead)))
    device = torch.device("cpu")  # no mode of anybody's
    assert not torch.equal(gradient({"bits": 2}, device), gradient(None, device))
