"""Outputs that live on in a padded copy: the derivative is had from there."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import fewbit_hooks as fewbit
from fewbit_hooks import _learning
from fewbit_hooks._copies import inside

from .conftest import held_for_backward

Change = Callable[[Tensor], Tensor]


class Padded(nn.Module):
    """A layer, an activation, and a convolution that is handed what `pad` makes of the activation's output."""

    def __init__(self, activation: nn.Module, pad: Change, *, after: type[nn.Module] | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.activation = activation
        self.pad = pad
        self.next = after() if after is not None else nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.next(self.pad(self.activation(self.first(x))))


def zeros(y: Tensor) -> Tensor:
    return F.pad(y, (0, 1, 2, 0))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 16, 16)


@pytest.fixture
def opened() -> fewbit.scope:
    return fewbit.scope(bits=3, min_bytes=0)


def step(model: nn.Module, x: Tensor, around: Any) -> tuple[int, list[Tensor]]:
    """A training step: the bytes that its graph holds, and the gradients."""
    model.zero_grad()
    with around:
        loss = model(x).square().sum()
    held = sum(held_for_backward(loss, [*model.parameters(), x], tables=False).values())
    loss.backward()
    return held, [p.grad.clone() for p in model.parameters()]


def learn(model: nn.Module, x: Tensor, opened: fewbit.scope) -> tuple[int, list[Tensor]]:
    """The third step."""
    for _ in range(2):
        step(model, x, opened)
    return step(model, x, opened)


def bits(opened: fewbit.scope) -> list[object]:
    return [f"y+{row.bits}" if row.beside_output else row.bits for row in opened.report().rows]


PADS = {
    "zeros": zeros,
    "nothing": lambda y: F.pad(y, (0, 0, 0, 0)),
    "by keyword": lambda y: F.pad(input=y, pad=(1, 1, 1, 1), mode="constant", value=2.0),
    "reflect": lambda y: F.pad(y, (1, 1, 1, 1), mode="reflect"),
    "replicate": nn.ReplicationPad2d(2),
    "circular": nn.CircularPad2d((1, 2, 0, 1)),
    "a dimension of channels": lambda y: F.pad(y, (1, 0, 0, 1, 0, 0)),
    "constant_pad_nd": lambda y: torch.constant_pad_nd(y, (1, 1)),
    "the module": nn.ZeroPad2d(1),
}


@pytest.mark.parametrize("pad", PADS.values(), ids=PADS)
def test_the_output_is_had_from_the_padded_copy(pad: Change, x: Tensor, opened: fewbit.scope) -> None:
    model = Padded(nn.ReLU6(), pad)
    stock, exact = step(model, x, contextlib.nullcontext())
    held, gradients = learn(model, x, opened)
    assert bits(opened) == ["y+0"]
    assert stock - held == x.nbytes  # the activation's input
    assert all(torch.equal(a, b) for a, b in zip(gradients, exact, strict=True))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("activation", "beside", "error"),
    [
        (nn.ReLU(), "y+0", 0),
        (nn.ReLU(inplace=True), "y+0", 0),
        (nn.ReLU6(), "y+0", 0),
        (nn.LeakyReLU(), "y+0", 0),
        (nn.Tanh(), "y+0", 0),
        (nn.Sigmoid(), "y+0", 0),
        (nn.Hardsigmoid(), 1, 0),
        (nn.SiLU(), "y+1", 0.003),
        (nn.GELU(), "y+1", 0.003),
        (nn.Softplus(), "y+0", 0.003),
    ],
    ids=str,
)
def test_each_activation_before_a_padded_convolution(
    activation: nn.Module,
    beside: object,
    error: float,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    x: Tensor,
    opened: fewbit.scope,
) -> None:
    model = Padded(activation, zeros).to(dtype)
    x = x.to(dtype).to(memory_format=memory_format)
    _, exact = step(model, x, contextlib.nullcontext())
    _, gradients = learn(model, x, opened)
    assert bits(opened) == [beside]
    for mine, stocks in zip(gradients, exact, strict=True):
        assert (mine - stocks).norm() <= error * stocks.norm()


def test_nan_and_infinity_are_treated_as_by_stock(x: Tensor, opened: fewbit.scope) -> None:
    activation = nn.ReLU6()
    model = Padded(activation, zeros)
    model.first = nn.Identity()

    def gradient(x: Tensor, around: Any) -> Tensor:
        leaf = x.clone().requires_grad_()
        with around:
            y = model(leaf * 1)
        y.backward(torch.ones_like(y))
        return leaf.grad

    for _ in range(2):
        gradient(x, opened)
    x = torch.randn(2, 3, 16, 16).mul_(4)
    x.view(-1)[::7], x.view(-1)[1::11], x.view(-1)[2::13] = float("nan"), float("inf"), -float("inf")
    coded = gradient(x, opened)
    assert bits(opened) == ["y+0"]
    assert torch.equal(coded.view(torch.int32), gradient(x, contextlib.nullcontext()).view(torch.int32))


def test_a_copy_that_nobody_keeps_serves_nobody(x: Tensor, opened: fewbit.scope) -> None:
    model = Padded(nn.ReLU6(), zeros, after=nn.Identity)
    for _ in range(3):
        with opened:
            loss = model(x).sum()
        loss.backward()
    assert bits(opened) == [1]


def test_a_cropped_output_is_no_copy(x: Tensor, opened: fewbit.scope) -> None:
    learn(Padded(nn.ReLU6(), lambda y: F.pad(y, (1, 1, -1, 0))), x, opened)
    assert bits(opened) == [1]


def test_the_copy_of_a_part_serves_nobody(x: Tensor, opened: fewbit.scope) -> None:
    model = Padded(nn.ReLU6(), lambda y: torch.cat([F.pad(y[:1], (1, 1, 1, 1)), F.pad(y[1:], (1, 1, 1, 1))]))
    _, exact = step(model, x, contextlib.nullcontext())
    _, gradients = learn(model, x, opened)
    assert bits(opened) == [1]
    assert all(torch.equal(a, b) for a, b in zip(gradients, exact, strict=True))


def test_the_copy_of_the_transposed_output_serves_nobody(x: Tensor, opened: fewbit.scope) -> None:
    model = Padded(nn.ReLU6(), lambda y: F.pad(y.transpose(2, 3), (1, 1, 1, 1)))
    _, exact = step(model, x, contextlib.nullcontext())
    _, gradients = learn(model, x, opened)
    assert bits(opened) == [1]
    assert all(torch.equal(a, b) for a, b in zip(gradients, exact, strict=True))


def test_an_output_that_is_kept_itself_is_taken_before_its_copy(x: Tensor, opened: fewbit.scope) -> None:
    model = Padded(nn.SiLU(), lambda y: F.pad(y, (0, 0, 0, 0)) * y)
    stock, _ = step(model, x, contextlib.nullcontext())
    held, _ = learn(model, x, opened)
    assert bits(opened) == ["y+1"]
    assert stock - held == x.nbytes - x.numel() // 8


@pytest.mark.parametrize("change", [lambda y: zeros(y.mul_(2)), lambda y: zeros(y).mul_(2)], ids=["output", "copy"])
def test_what_is_changed_in_place_is_never_relied_upon(change: Change, x: Tensor, opened: fewbit.scope) -> None:
    model = Padded(nn.ReLU6(), change)
    _, exact = step(model, x, contextlib.nullcontext())
    for _ in range(4):
        _, gradients = step(model, x, opened)
        assert bits(opened) == [1]
        assert all(torch.equal(a, b) for a, b in zip(gradients, exact, strict=True))


def test_a_change_of_the_copy_that_comes_later_is_noticed_and_learned(x: Tensor, opened: fewbit.scope) -> None:
    model = Padded(nn.ReLU6(), zeros)
    learn(model, x, opened)
    model.pad = lambda y: zeros(y).mul_(2)
    with opened:
        loss = model(x).square().sum()
    with pytest.raises(fewbit.FewbitError, match=r"the output of hardtanh.*modified by an inplace operation"):
        loss.backward()
    _, exact = step(model, x, contextlib.nullcontext())
    _, gradients = step(model, x, opened)
    assert bits(opened) == [1]
    assert all(torch.equal(a, b) for a, b in zip(gradients, exact, strict=True))


def test_a_copy_that_is_not_made_any_more_costs_no_more_than_stock(x: Tensor, opened: fewbit.scope) -> None:
    model = Padded(nn.ReLU6(), zeros)
    learn(model, x, opened)
    model.pad = lambda y: y[:, :, ::2].square()
    stock, exact = step(model, x, contextlib.nullcontext())
    held, gradients = step(model, x, opened)
    assert held <= stock
    assert all(torch.equal(a, b) for a, b in zip(gradients, exact, strict=True))


def test_one_output_in_two_copies_of_which_one_is_kept_stays_with_codes(x: Tensor, opened: fewbit.scope) -> None:
    model = Padded(nn.ReLU6(), lambda y: zeros(y) + F.pad(y, (0, 1, 2, 0), value=1.0).detach().mean())
    learn(model, x, opened)
    assert bits(opened) == [1]


def test_a_composite_has_its_derivative_from_the_copy(x: Tensor, opened: fewbit.scope) -> None:
    class Swish(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(x)

    fewbit.register_module(Swish, "silu")
    model = Padded(Swish(), zeros)
    _, exact = step(model, x, contextlib.nullcontext())
    held, gradients = learn(model, x, opened)
    assert bits(opened) == ["y+1"]
    padded = 2 * 3 * 18 * 17 * 4
    assert held == x.nbytes * 0 + padded + x.numel() // 8 + model(x).nbytes
    for mine, stocks in zip(gradients, exact, strict=True):
        assert (mine - stocks).norm() <= 0.003 * stocks.norm()


@pytest.mark.parametrize("activation", [nn.SiLU(), nn.ReLU6(), nn.ReLU()], ids=str)
@pytest.mark.parametrize("setting", ["3 bits", "3 bits, recompute"])
def test_the_profile_foretells_it(setting: str, activation: nn.Module, x: Tensor) -> None:
    model = Padded(activation, zeros)
    stock, _ = step(model, x, contextlib.nullcontext())
    held, _ = learn(model, x, fewbit.scope(bits=3, min_bytes=0, recompute="recompute" in setting))
    prediction = next(p for p in fewbit.profile(model, x, min_bytes=0).predictions if p.setting == setting)
    assert stock - held == prediction.freed_bytes - prediction.stored_bytes


def test_under_transforms_and_other_hooks_padding_is_as_ever(x: Tensor, opened: fewbit.scope) -> None:
    model = Padded(nn.ReLU6(), zeros)
    learn(model, x, opened)
    with opened:
        inner = torch.func.grad(lambda v: model(v).sum())(x)
        with torch.autograd.graph.save_on_cpu():
            loss = model(x.requires_grad_()).sum()
    loss.backward()
    assert torch.equal(inner, x.grad)


def test_nothing_of_a_dropped_graph_is_held_by_what_is_learned(x: Tensor) -> None:
    model = Padded(nn.ReLU6(), zeros)
    opened = fewbit.enable(bits=3, min_bytes=0)
    try:
        for _ in range(4):
            model(x).square().sum().backward()
        storages = []

        def note(_: nn.Module, __: Any, y: Tensor) -> None:
            storages.append(StorageWeakRef(y.untyped_storage()))

        hook = model.activation.register_forward_hook(note)
        for _ in range(3):
            model(x)
        hook.remove()
        gc.collect()
        assert all(storage.expired() for storage in storages)
    finally:
        opened.remove()


def test_a_site_that_sees_both_kinds_in_one_step_stays_with_codes() -> None:
    module = weakref.ref(nn.ReLU6())
    site = _learning.Site(module, module)
    for number in range(3):
        site.see(False, False, True, _learning.Verdict.CODES, number)
        site.see(False, True, False, _learning.Verdict.CODES, number)
    assert site.verdict is not _learning.Verdict.COPY
    assert site.verdict is not _learning.Verdict.OUTPUT


def test_the_inside_of_what_was_padded() -> None:
    x = torch.randn(2, 3, 4, requires_grad=True)
    for pad in [(1, 2), (0, 0, 3, 1), (1, 1, 0, 0, 2, 2), ()]:
        copy = inside((x, pad), {}, F.pad(x, pad) if pad else x.clone())
        assert torch.equal(copy, x)
    assert inside((x, (1, -1)), {}, F.pad(x, (1, -1))) is None
    assert inside((x, (0, 0)), {}, x) is None
    assert inside((x.detach(), (1, 1)), {}, F.pad(x.detach(), (1, 1))) is None


def check_gradients(net: nn.Module, x: Tensor, parameter: Tensor) -> None:
    """Through four steps of one scope they are stock's, bit for bit."""
    stock = torch.autograd.grad(net(x), parameter)[0]
    opened = fewbit.scope(exact=True, min_bytes=0)
    for _ in range(4):
        with opened:
            loss = net(x)
        assert torch.equal(torch.autograd.grad(loss, parameter)[0], stock)


def test_a_copy_of_another_part_of_the_storage_is_no_copy_of_the_output() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3), nn.Conv2d(6, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            t = self.first(x)
            a, b = t[:2], t[2:]  # as large as each other
            a = torch.relu_(a)
            return self.second(F.pad(a, (1, 1, 1, 1))).sum() + self.third(F.pad(b, (1, 1, 1, 1))).square().sum()

    torch.manual_seed(0)
    net, x = Halves(), torch.randn(4, 3, 5, 5)
    check_gradients(net, x, net.first.weight)


def test_a_copy_in_another_order_gives_the_gradient_its_own_order() -> None:
    class Circular(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")
            self.strides: list[tuple[int, ...]] = []

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            h.register_hook(lambda grad: self.strides.append(grad.stride()))
            return self.second(F.relu(h)).square().sum()

    torch.manual_seed(0)
    net, x = Circular(), torch.randn(4, 8, 14, 14).contiguous(memory_format=torch.channels_last)
    check_gradients(net, x, net.first.bias)
    assert len(set(net.strides)) == 1
