"""Logarithms and quotients of saturated activations: these are kept, and their gradients are exact."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import fewbit_hooks as fewbit
from fewbit_hooks import _steep

from .conftest import held_for_backward, quiet

Loss = Callable[[Tensor], Tensor]


def bernoulli(z: Tensor) -> Tensor:
    p = torch.sigmoid(z)
    return -torch.distributions.Bernoulli(probs=p).log_prob((z.detach() < 0).float()).mean()


def normal(z: Tensor) -> Tensor:
    scale = F.softplus(z) + 1e-4
    return -torch.distributions.Normal(torch.zeros_like(z), scale).log_prob(torch.ones_like(z)).mean()


def in_place(z: Tensor) -> Tensor:
    return F.softplus(z).add_(1e-6).log_().mean()


def parts(z: Tensor) -> Tensor:
    first, second = torch.tanh(z).view(-1, 2).unbind(1)
    return torch.log(1.0 - torch.stack([first, second]).pow(2) + 1e-6).mean()


def chosen(z: Tensor) -> Tensor:
    p = torch.lerp(torch.sigmoid(z), torch.zeros(64), 0.1)
    best, second = p.topk(2, dim=1).values.unbind(1)
    return (best.log() - p.amin(1).log() + p.min(0).values.log() + second.flip(0).log()).mean()


def beta(z: Tensor) -> Tensor:
    concentration = F.softplus(z) + 1e-4
    return -torch.distributions.Beta(concentration, 1.0).log_prob(torch.full_like(z, 0.5)).mean()


LOSSES: dict[str, Loss] = {
    "ranking": lambda z: -torch.log(torch.sigmoid(z) + 1e-10).mean(),
    "both sides": lambda z: -(torch.sigmoid(z) + 1e-8).log().mean() - (1 - torch.sigmoid(z) + 1e-8).log().mean(),
    "BCELoss": lambda z: nn.BCELoss()(torch.sigmoid(z), (z.detach() < 0).float()),
    "binary_cross_entropy": lambda z: F.binary_cross_entropy(input=nn.Sigmoid()(z), target=torch.ones_like(z)),
    "Bernoulli": bernoulli,
    "squashed": lambda z: torch.log(1 - torch.tanh(z).pow(2) + 1e-6).mean(),
    "parts": parts,
    "Normal": normal,
    "GaussianNLLLoss": lambda z: nn.GaussianNLLLoss()(torch.zeros_like(z), torch.ones_like(z), F.softplus(z)),
    "PoissonNLLLoss": lambda z: nn.PoissonNLLLoss(log_input=False)(F.softplus(z), torch.ones_like(z)),
    "softplus": lambda z: F.softplus(z).log().mean(),
    "elu": lambda z: torch.log1p(F.elu(z) + 1e-6).mean(),
    "reciprocal": lambda z: (1 / (torch.sigmoid(z) + 1e-6)).mean(),
    "rsqrt": lambda z: (F.softplus(z) + 1e-6).rsqrt().mean(),
    "quotient": lambda z: (z / (torch.sigmoid(z) + 1e-3)).mean(),
    "quotient in place": lambda z: torch.ones_like(z).div_(torch.sigmoid(z) + 1e-3).mean(),
    "square root": lambda z: (F.softplus(z) + 1e-8).sqrt().mean(),
    "power": lambda z: ((torch.sigmoid(z) + 1e-6) ** -0.5).mean(),
    "power in place": lambda z: (F.elu(z) + 1.001).pow_(0.3).mean(),
    "inverse": lambda z: torch.atanh(torch.tanh(z) * 0.9999).mean(),
    "Beta": beta,
    "chosen": chosen,
    "in place": in_place,
    "activation in place": lambda z: (z * 1).sigmoid_().log().mean(),
}


def far_out() -> Tensor:
    torch.manual_seed(0)
    return (5 * torch.randn(64, 64)).requires_grad_()


def gradient(loss: Loss, opened: Any = None) -> Tensor:
    z = far_out()
    with opened if opened is not None else contextlib.nullcontext():
        found = loss(z)
    return torch.autograd.grad(found, z)[0]


@pytest.mark.parametrize("engine", ["hooks", "fused"])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=list(LOSSES))
def test_the_gradient_is_stocks_from_the_first_step_on(loss: Loss, engine: str) -> None:
    opened, stock = quiet(bits=1, engine=engine), gradient(loss)
    for _ in range(3):
        assert torch.equal(gradient(loss, opened), stock)
    kept = {row.activation: row for row in opened.report().rows}
    assert kept.keys() & _steep.SATURATE
    assert all(kept[name].bits is None and not kept[name].freed_bytes for name in kept.keys() & _steep.SATURATE)


@pytest.mark.parametrize("loss", ["ranking", "Normal", "reciprocal"])
def test_a_loss_that_is_a_module(loss: str) -> None:
    class Loss(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return LOSSES[loss](z)

    module, opened, stock = Loss(), quiet(bits=1), gradient(LOSSES[loss])
    assert all(torch.equal(gradient(module, opened), stock) for _ in range(4))


def test_what_is_kept_is_counted_as_that() -> None:
    opened = quiet(bits=3)
    z = far_out()
    with opened:
        h = torch.tanh(z * 1)
        loss = torch.log(torch.sigmoid(z * 1) + 1e-6).mean() + h.sum() * 2
        del h
    assert loss.isfinite()
    rows = {row.activation: row for row in opened.report().rows}
    nbytes = 64 * 64 * 4
    sigmoid, tanh = rows["sigmoid"], rows["tanh"]
    assert (sigmoid.calls, sigmoid.bits, sigmoid.reason) == (1, None, _steep.KEPT)
    assert (sigmoid.original_bytes, sigmoid.stored_bytes, sigmoid.freed_bytes) == (nbytes, 0, 0)
    assert (tanh.bits, tanh.original_bytes, tanh.stored_bytes) == (3, nbytes, nbytes * 3 // 32)
    assert tanh.freed_bytes == nbytes


@pytest.mark.parametrize("loss", ["ranking", "squashed", "Normal", "reciprocal", "parts"])
def test_a_profile_knows_it(loss: str) -> None:
    def held(opened: Any) -> tuple[Tensor, int]:
        z = far_out()
        with opened:
            found = LOSSES[loss](z)
        return found, sum(held_for_backward(found, tables=False).values())

    predicted = fewbit.profile(lambda: LOSSES[loss](far_out()), min_bytes=0).predictions[2]
    found, measured = held(quiet(bits=3))
    assert 0 <= measured - predicted.held_bytes < 64  # numbers that a quotient keeps as tensors
    assert found.requires_grad


@pytest.mark.parametrize(
    "loss",
    [
        lambda z: torch.sigmoid(z).mul(2).sum(),
        lambda z: F.binary_cross_entropy_with_logits(torch.tanh(z), torch.ones_like(z)),
        lambda z: torch.log_softmax(torch.tanh(z), 1).mean(),
        lambda z: (torch.sigmoid(z) / 8.0).sum(),
        lambda z: (torch.sigmoid(z) ** 2).sum(),
        lambda z: (torch.tanh(z) / torch.linalg.vector_norm(torch.tanh(z))).square().sum(),
        lambda z: torch.log(1 + torch.tanh(z) @ torch.eye(64)).sum(),
        lambda z: torch.log(torch.tanh(z.detach()) + 2).sum() + torch.tanh(z).sum(),
    ],
)
def test_elsewhere_codes_stay(loss: Loss) -> None:
    opened = quiet(bits=3)
    z = far_out()
    with opened:
        found = loss(z)
    assert found.requires_grad
    assert {row.bits for row in opened.report().rows} == {3}


def test_the_latest_calls_alone_are_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    z = far_out()
    with quiet(bits=3) as opened:
        y = torch.sigmoid(z)
        others = [torch.tanh(z) for _ in range(_steep.RECENT)]
        loss = torch.log(y + 1e-6).sum() + sum(t.sum() for t in others)
    assert loss.requires_grad
    assert {row.bits for row in opened.report().rows} == {3}


def test_what_is_at_hand_goes_with_the_graph_and_with_the_scope() -> None:
    with quiet(bits=3):
        h = far_out() * 1
        y = F.softplus(h)
        storages = [StorageWeakRef(t.untyped_storage()) for t in (h, y)]
        del h, y
        gc.collect()
        assert all(storage.expired() for storage in storages)
        h = far_out() * 1
        y = F.softplus(h)
        storage = StorageWeakRef(h.untyped_storage())
        del h
        assert not storage.expired()
    assert storage.expired()
    assert y.requires_grad


def test_a_report_in_between_changes_nothing() -> None:
    z = far_out()
    with quiet(bits=1) as opened:
        p = torch.sigmoid(z) + 1e-6
        between = opened.report()
        loss = p.log().mean()
    assert [row.freed_bytes for row in between.rows] == [0]  # it is at hand
    assert torch.equal(torch.autograd.grad(loss, z)[0], gradient(lambda z: (torch.sigmoid(z) + 1e-6).log().mean()))


@pytest.mark.parametrize("engine", ["hooks", "fused"])
def test_under_hooks_of_others_around_the_scope(engine: str) -> None:
    z, opened = far_out(), quiet(bits=1, engine=engine)
    with torch.autograd.graph.save_on_cpu(), opened:
        loss = LOSSES["ranking"](z)
    assert torch.equal(torch.autograd.grad(loss, z)[0], gradient(LOSSES["ranking"]))
    assert [(row.bits, row.stored_bytes) for row in opened.report().rows] == [(None, 0)]


def test_a_backward_inside_the_scope_lets_go_of_what_is_at_hand() -> None:
    with quiet(bits=3):
        h = far_out() * 1
        y = F.softplus(h)
        storage = StorageWeakRef(h.untyped_storage())
        del h
        far_out().sum().backward()
        assert storage.expired()
    assert y.requires_grad


def test_what_was_changed_in_place_is_not_kept() -> None:
    z = far_out()
    with quiet(bits=3) as opened:
        y = torch.sigmoid(z)
        y.mul_(2.0)
        loss = torch.log(y + 1e-6).sum()
    (grad,) = torch.autograd.grad(loss, z)
    assert grad.isfinite().all()
    assert {row.bits for row in opened.report().rows} == {3}


def test_what_is_kept_after_all_is_watched_for_changes_in_place() -> None:
    z = far_out()
    with quiet(bits=3):
        y = torch.sigmoid(z)
        loss = torch.log(y + 1e-6).sum()
        y.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_it_may_be_differentiated_twice() -> None:
    def second(opened: Any) -> Tensor:
        z = far_out()
        with opened:
            loss = -torch.log(torch.sigmoid(z) + 1e-2).sum()
        (grad,) = torch.autograd.grad(loss, z, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), z)[0]

    assert torch.equal(second(quiet(bits=3)), second(contextlib.nullcontext()))


COMPILED = ["ranking", "BCELoss", "Bernoulli", "parts", "chosen", "Normal", "elu", "reciprocal", "in place"]


@pytest.mark.filterwarnings("ignore")  # Dynamo's own
@pytest.mark.parametrize("loss", COMPILED)
def test_in_a_compiled_graph(loss: str, fresh_dynamo: None) -> None:
    compiled = torch.compile(LOSSES[loss], backend="aot_eager", fullgraph=loss != "Normal")
    torch.testing.assert_close(gradient(compiled, quiet(bits=1)), gradient(LOSSES[loss]))


@pytest.mark.filterwarnings("ignore")
def test_codes_stay_in_a_compiled_graph_without_logarithm(fresh_dynamo: None) -> None:
    def loss(z: Tensor) -> Tensor:
        return torch.sigmoid(z).mul(2).sum()

    grad = gradient(torch.compile(loss, backend="aot_eager", fullgraph=True), quiet(bits=1))
    assert len(grad.unique()) == 2


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_block_behind_what_is_at_hand_is_compiled_once(fresh_dynamo: None) -> None:
    block = torch.compile(nn.Sequential(nn.Linear(64, 64), nn.GELU()), backend="aot_eager", fullgraph=True)
    for before in (torch.tanh, torch.relu, torch.tanh):
        with quiet(bits=3):
            loss = block(before(far_out())).sum()
        loss.backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
