"""What is run again: bit-equal forward and gradient, the input kept once, PyTorch's errors as they were."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from torch import Tensor, nn

import fewbit_hooks as fewbit

from .conftest import held_for_backward, treatment


class Norm(nn.Module):
    """An RMSNorm from primitives, as models define it."""

    def __init__(self, size: int = 32, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        h = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class SixUses(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x + torch.sin(x) * torch.cos(x) + torch.exp(x) * x


class Permuted(nn.Module):
    """Its result is a view."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 4))

    def forward(self, x: Tensor) -> Tensor:
        h = x.permute(0, 2, 3, 1).float()
        return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight).permute(0, 3, 1, 2)


for registered in (Norm, SixUses, Permuted):
    fewbit.register_module(registered)


def again() -> fewbit.scope:
    opened = fewbit.scope(exact=True, recompute=True, min_bytes=0)
    opened._warned = True
    return opened


@pytest.fixture
def x() -> Tensor:
    return (torch.randn(16, 32) * 2).requires_grad_()


def residual(module: nn.Module, x: Tensor) -> Tensor:
    """The input has a consumer before the module, and one behind it."""
    h = x * 1.5
    before = torch.tanh(h)
    y = module(h)
    return (before * y + h * y).sum()


def grads_of(module: nn.Module, x: Tensor, *, scoped: bool) -> list[Tensor]:
    if scoped:
        with again():
            loss = residual(module, x)
    else:
        loss = residual(module, x)
    return [loss.detach(), *torch.autograd.grad(loss, [x, *module.parameters()])]


def all_equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_forward_and_gradients_of_a_norm_are_bit_equal_beside_a_residual(dtype: torch.dtype) -> None:
    module = Norm().to(dtype)
    x = torch.randn(64, 32, dtype=dtype, requires_grad=True)
    assert all_equal(grads_of(module, x, scoped=True), grads_of(module, x, scoped=False))


def test_each_of_six_uses_of_the_input_is_added_up_in_stocks_order(x: Tensor) -> None:
    assert all_equal(grads_of(SixUses(), x, scoped=True), grads_of(SixUses(), x, scoped=False))


def test_the_node_keeps_its_input_and_nothing_else(x: Tensor) -> None:
    module = Norm()
    h = x.clone()
    with again():
        y = module(h)
    assert held_for_backward(y, module.parameters()) == {h.untyped_storage()._cdata: h.nbytes}
    stock = held_for_backward(module(x.clone()), module.parameters())
    assert sum(stock.values()) >= 2 * h.nbytes


def test_an_input_that_is_not_dense_is_rebuilt() -> None:
    module = Norm()
    base = torch.randn(32, 16, requires_grad=True)
    grads = []
    for opened in (again(), fewbit.scope(bits=None)):
        with opened:
            y = module((base * 1.0).t())
        grads.append(torch.autograd.grad(y.square().sum(), [base, module.weight]))
    assert all_equal(list(grads[0]), list(grads[1]))


def test_a_result_that_is_a_view_can_be_changed_in_place() -> None:
    module, w = Permuted(), torch.randn(4, 4, 1, 1)

    def run() -> list[Tensor]:
        leaf = torch.linspace(-2, 2, 128).view(2, 4, 4, 4).requires_grad_()
        y = module(leaf * 1.0)
        y.add_(1.0)
        return list(torch.autograd.grad(torch.conv2d(y, w).square().sum(), [leaf, module.weight]))

    stock = run()
    with again():
        assert all_equal(run(), stock)


@pytest.mark.parametrize("changed", ["input", "weight"])
def test_a_change_in_place_of_what_is_kept_raises_pytorchs_error(changed: str, x: Tensor) -> None:
    module = Norm()
    h = x * 1.0
    with again():
        y = module(h)
    assert treatment(y) == "again"
    with torch.no_grad():
        (h if changed == "input" else module.weight).mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_module_changed_after_the_forward_is_run_again_as_it_was(x: Tensor) -> None:
    module = Norm()
    stock = grads_of(module, x, scoped=False)
    with again():
        loss = residual(module, x)
    module.eps = 10.0
    assert all_equal(list(torch.autograd.grad(loss, [x, module.weight])), stock[1:])


def test_double_backward_is_stocks(x: Tensor) -> None:
    module = Norm().double()
    x = x.detach().double().requires_grad_()

    def second(h: Tensor) -> list[Tensor]:
        loss = module(h * 1.5).pow(3).sum()
        (first,) = torch.autograd.grad(loss, h, create_graph=True)
        return [first.detach(), *torch.autograd.grad(first.pow(2).sum(), [h, module.weight])]

    stock = second(x)
    with again():
        few = second(x)
    assert all_equal(few, stock)


def test_gradgradcheck_of_a_norm_that_is_run_again() -> None:
    module = Norm(4).double()
    v = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    with again():
        assert treatment(module(v * 1.0)) == "again"
        assert torch.autograd.gradcheck(lambda h: module(h * 1.0), (v,))
        assert torch.autograd.gradgradcheck(lambda h: module(h * 1.0), (v,))


def test_backward_twice_on_one_graph(x: Tensor) -> None:
    module = Norm()
    with again():
        loss = residual(module, x)
    first = torch.autograd.grad(loss, [x, module.weight], retain_graph=True)
    assert all_equal(list(first), list(torch.autograd.grad(loss, [x, module.weight])))


@pytest.mark.parametrize("wanted", ["x", "weight"])
def test_a_partial_backward_gives_what_is_asked(wanted: str, x: Tensor) -> None:
    module = Norm()
    stock = dict(zip(["x", "weight"], grads_of(module, x, scoped=False)[1:], strict=True))
    with again():
        loss = residual(module, x)
    (slope,) = torch.autograd.grad(loss, x if wanted == "x" else module.weight)
    assert torch.equal(slope, stock[wanted])


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_what_needs_no_gradient_gets_none(frozen: str) -> None:
    module, x = Norm(), torch.randn(16, 32)
    if frozen == "weight":
        module.weight.requires_grad_(False)
        x.requires_grad_()
    leaf = x if frozen == "weight" else module.weight
    stock = torch.autograd.grad(module(x).square().sum(), leaf)
    with again():
        loss = module(x).square().sum()
    assert all_equal(list(torch.autograd.grad(loss, leaf)), list(stock))


def test_backward_on_another_thread_after_scope_and_model_are_gone(x: Tensor) -> None:
    module = Norm()
    stock = grads_of(module, x, scoped=False)[1]
    opened = again()
    with opened:
        loss = residual(module, x)
    del opened, module
    gc.collect()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert torch.equal(x.grad, stock)


def test_a_graph_that_is_dropped_takes_everything_along(x: Tensor) -> None:
    module = Norm()
    h = x * 1.0
    with again():
        y = module(h)
        dead = [weakref.ref(o) for o in (h, y, module)]
        gc.disable()
        try:
            del h, y, module
            assert [ref() for ref in dead] == [None] * 3  # at once, without the garbage collector, in the open scope
        finally:
            gc.enable()


def test_the_forward_is_run_again_under_the_forwards_autocast(x: Tensor) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.eye(32))

        def forward(self, h: Tensor) -> Tensor:
            return torch.sin(torch.tanh(torch.exp(h @ self.weight)))

    module = fewbit.register_module(Mixed)()

    def run(inside: bool) -> list[Tensor]:
        h = x * 1.0
        with torch.autocast("cpu", torch.bfloat16):
            y = module(h)
        assert y.dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            return [y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, module.weight])]

    stock = run(False)
    for inside in (False, True):
        with again():
            assert all_equal(run(inside), stock)


def test_a_backward_under_another_autocast_changes_nothing(x: Tensor) -> None:
    module = Norm()
    stock = grads_of(module, x, scoped=False)[1:]
    with again():
        loss = residual(module, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert all_equal(list(torch.autograd.grad(loss, [x, module.weight])), stock)


class Overwrites(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h.add_(1.0) * h.sin() * h.cos()


class Returns(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h.view_as(h) if h.sin().cos().sum() else h


@pytest.mark.parametrize("cls", [Overwrites, Returns])
def test_a_forward_that_overwrites_or_returns_its_input_is_left_alone(cls: type[nn.Module], x: Tensor) -> None:
    module = cls()

    def run() -> Tensor:
        return torch.autograd.grad(module(x * 1.0).square().sum(), x)[0]

    stock = run()
    fewbit.register_module(cls)
    with again():
        assert torch.equal(run(), stock)
        assert treatment(module(x * 1.0)) == "stock"


def test_under_hooks_of_others_around_the_scope_it_is_theirs(x: Tensor) -> None:
    seen: list[tuple[int, ...]] = []
    module = Norm()

    def pack(t: Tensor) -> Tensor:
        seen.append(tuple(t.shape))
        return t.detach().clone()

    stock = grads_of(module, x, scoped=False)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outside = len(seen)
        module(x * 1.0)
        expected = seen[outside:]
        with again():
            module(x * 1.0)
        assert seen[-len(expected) :] == expected
        assert all_equal(grads_of(module, x, scoped=True), stock)


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")
def test_anomaly_mode_finds_what_is_nan(x: Tensor) -> None:
    module = Norm()
    with torch.autograd.detect_anomaly(), again():
        loss = residual(module, x)
        loss.backward(retain_graph=True)
        worse = loss * float("nan")
        with pytest.warns(UserWarning, match="Error detected in"), pytest.raises(RuntimeError, match="returned nan"):
            worse.backward()


def test_what_a_partial_backward_does_not_ask_for_is_dropped_when_it_is_over(x: Tensor) -> None:
    module = Norm()
    with again():
        y = module(x * 1.0)
    torch.autograd.grad(y.sum(), module.weight, retain_graph=True)
    held = held_for_backward(y, [module.weight])
    assert sum(nbytes for nbytes in held.values() if nbytes > 8) == x.nbytes  # 8: a number of the formula
