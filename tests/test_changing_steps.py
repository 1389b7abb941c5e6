"""One scope, and steps that change after it has learned: the gradients stay stock's, and errors come once."""

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

pytestmark = pytest.mark.filterwarnings("ignore:fewbit_hooks.scope compressed nothing")

EXACT: list[dict[str, Any]] = [{"exact": True}, {"exact": True, "recompute": True}]
SETTINGS: list[dict[str, Any]] = [*EXACT, {"bits": 8}]
LEARNED = 3
"""The step from which on things are otherwise."""


def opened(settings: dict[str, Any] | None) -> Any:
    return contextlib.nullcontext() if settings is None else fewbit.scope(min_bytes=0, **settings)


class Block(nn.Module):
    """Linear, relu6, whose output is relied upon, and what is done with that; Linear."""

    def __init__(self, then: Callable[[Tensor, bool], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.then = nn.Linear(8, 8), nn.Linear(8, 8), then

    def forward(self, x: Tensor, changed: bool) -> Tensor:
        y: Tensor = self.b(self.then(F.relu6(self.a(x)), changed))
        return y


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(
    "log",
    [lambda y: y.data.mean(), lambda y: y.detach().numpy().mean(), lambda y: y.data_ptr()],
    ids=["data", "numpy", "data_ptr"],
)
def test_a_change_in_place_is_not_forgotten_when_the_memory_is_asked_for(
    log: Callable[[Tensor], Any], settings: dict[str, Any]
) -> None:
    def then(y: Tensor, changed: bool) -> Tensor:
        if changed:
            y.mul_(-1.0)
            log(y)
        return y

    block, scope = Block(then), opened(settings)
    for _ in range(LEARNED):
        with scope:
            loss = block(torch.randn(4, 8), False).square().sum()
        loss.backward()
    with scope:
        loss = block(torch.randn(4, 8), True).square().sum()
    with pytest.raises(fewbit.FewbitError, match="modified by an inplace operation"):
        loss.backward()


def test_a_change_in_place_after_a_backward_within_the_forward_raises_once() -> None:
    other = nn.Linear(8, 1)

    def then(y: Tensor, changed: bool) -> Tensor:
        if changed:
            torch.autograd.grad(other(torch.ones(1, 8)).sum(), list(other.parameters()))
            y.mul_(0.5)
        return y

    block, raised = Block(then), []
    scope = fewbit.scope(min_bytes=0, exact=True)
    for step in range(10):
        with scope:
            loss = block(torch.randn(4, 8), step >= LEARNED).square().sum()
        try:
            loss.backward()
        except fewbit.FewbitError:
            raised.append(step)
    assert raised == [LEARNED]


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(self.a(x))


SPLITS: dict[str, Callable[[Tensor], Any]] = {
    "chunk": lambda y: torch.unsafe_chunk(y, 2, -1),
    "split": lambda y: torch.unsafe_split(y, 4, -1),
    "method": lambda y: y.unsafe_split_with_sizes([4, 4], -1),
    "by name": lambda y: torch.unsafe_chunk(input=y, chunks=2, dim=-1),
    "aten": lambda y: torch.ops.aten.unsafe_split(y, 4, -1),
}


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("split", SPLITS)
def test_parts_with_a_counter_of_their_own_are_changed_in_place(split: str, settings: dict[str, Any]) -> None:
    def found(settings: dict[str, Any] | None) -> list[Tensor]:
        torch.manual_seed(0)
        encoder, b, scope, grads = Encoder(), nn.Linear(4, 8), opened(settings), []
        for step in range(6):
            encoder.zero_grad()
            with scope:
                first, second = SPLITS[split](encoder(torch.randn(4, 8)))
                if step >= LEARNED:
                    first.mul_(-1.0)
                loss = (b(first) + b(second)).square().sum()
            loss.backward()
            assert encoder.a.weight.grad is not None
            grads.append(encoder.a.weight.grad.clone())
        return grads

    assert all(map(torch.equal, found(settings), found(None)))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("between", ["nothing", "a backward", "another entry", "a micro-batch", "the scope is left"])
def test_memory_is_given_away_after_the_forward_was_looked_at(between: str, settings: dict[str, Any]) -> None:
    def gradient(settings: dict[str, Any] | None) -> Tensor:
        torch.manual_seed(0)
        encoder, head, other = Encoder(), nn.Linear(8, 8), nn.Linear(8, 1)
        scope = opened(settings)
        for step in range(LEARNED + 1):
            encoder.zero_grad()
            with scope:
                y = encoder(torch.randn(4, 8))
                if step == LEARNED:
                    if between == "a backward":
                        other(torch.ones(2, 8)).sum().backward()
                    elif between == "another entry":
                        with scope:
                            pass
                    elif between == "a micro-batch":
                        head(encoder(torch.randn(4, 8))).sum().backward()
                        encoder.zero_grad()
                    if between != "the scope is left":
                        y.data.mul_(-1.0)
            with scope:
                if step == LEARNED and between == "the scope is left":
                    y.data.mul_(-1.0)
                loss = head(y).square().sum()
            loss.backward()
        assert encoder.a.weight.grad is not None
        return encoder.a.weight.grad

    assert torch.equal(gradient(settings), gradient(None))


@pytest.mark.parametrize(
    "first",
    [F.gelu, F.dropout, lambda t: F.layer_norm(t, (8,)), lambda t: t.double().float()],
    ids=["gelu", "dropout", "layer_norm", "cast"],
)
@pytest.mark.parametrize("settings", EXACT, ids=str)
def test_what_was_changed_unseen_does_not_become_an_anchor_again(
    first: Callable[[Tensor], Tensor], settings: dict[str, Any]
) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)

        def forward(self, x: Tensor, changed: bool) -> Tensor:
            h = self.a(x)
            y = first(h)
            if changed:
                h.data.mul_(0.5)
            w = self.norm(h)  # which keeps h as it is now
            both: Tensor = self.b(y) + self.c(w)
            return both

    def found(settings: dict[str, Any] | None) -> list[Tensor]:
        torch.manual_seed(0)
        model, scope, grads = Two(), opened(settings), []
        for step in range(5):
            model.zero_grad()
            with scope:
                loss = model(torch.randn(4, 8), step >= LEARNED).square().sum()
            loss.backward()
            assert model.b.weight.grad is not None
            grads.append(model.b.weight.grad.clone())
        return grads

    assert all(map(torch.equal, found(settings), found(None)))


def test_an_output_that_is_changed_while_its_input_serves_is_not_relied_upon_later() -> None:
    def then(y: Tensor, changed: bool) -> Tensor:
        return y.mul_(0.5) if changed else y

    class Smooth(Block):
        def forward(self, x: Tensor, changed: bool) -> Tensor:
            y: Tensor = self.b(self.then(F.gelu(self.a(x)), changed))
            return y

    for begin in (1, 2, 3, 5):
        model, scope = Smooth(then), fewbit.scope(min_bytes=0, bits=8, recompute=True)
        for step in range(9):
            with scope:
                loss = model(torch.randn(4, 8), step >= begin).square().sum()
            loss.backward()


@pytest.mark.parametrize("fused", [False, True])
def test_a_pruned_weight_may_be_changed_before_a_second_backward(fused: bool) -> None:
    class Pruned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))
            self.register_buffer("mask", (torch.rand(8, 8) > 0.5).float())

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight * self.mask)

    def gradient(settings: dict[str, Any] | None) -> Tensor:
        torch.manual_seed(0)
        first, second = nn.Linear(8, 8), Pruned()
        optimizer = torch.optim.SGD(second.parameters(), lr=1.0, fused=fused)
        with opened(settings):
            out = second(first(torch.randn(4, 8)))
        out[:2].square().sum().backward(retain_graph=True)
        optimizer.step()
        first.zero_grad()
        out[2:].square().sum().backward()
        assert first.weight.grad is not None
        return first.weight.grad

    assert torch.equal(gradient({"exact": True, "recompute": True}), gradient(None))


class TanhGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * (x + 0.044715 * torch.pow(x, 3.0))))


@pytest.mark.parametrize("engine", ["hooks", "fused"])
def test_a_loss_that_is_kept_holds_nothing_of_its_graph_after_the_backward(
    engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    act: nn.Module = nn.GELU()
    if engine == "hooks":  # a composite is a node of ours, too
        act = TanhGELU()
        fewbit.register_module(TanhGELU, "gelu", approximate="tanh")
    model, outputs, losses = nn.Sequential(nn.Linear(8, 64), act, nn.Linear(64, 8)), [], []
    act.register_forward_hook(lambda module, args, y: outputs.append(StorageWeakRef(y.untyped_storage())))
    scope = fewbit.scope(min_bytes=0, engine=engine)
    for _ in range(5):
        with scope:
            losses.append(model(torch.randn(4, 8)).square().sum())
        assert not outputs[-1].expired()
        losses[-1].backward()
    gc.collect()
    assert scope.report().rows[0].beside_output
    assert all(ref.expired() for ref in outputs)
    with pytest.raises(RuntimeError, match="second time"):
        losses[-1].backward()


class Scratch(torch.autograd.Function):
    """The square of a tensor, on whose memory its backward works: nobody else had it saved."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        return y * y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        product: Tensor = y.mul_(2).mul_(grad)
        return product


def errors_of_backwards(forward: Callable[[], Tensor]) -> list[str]:
    """What the library says in as many steps as it takes to learn, to err, and to learn anew."""
    said = []
    for _ in range(2 * LEARNED + 2):
        loss = forward()
        try:
            loss.backward()
        except fewbit.FewbitError as error:
            said.append(str(error))
    return said


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_an_output_that_a_backward_works_on_raises_once(settings: dict[str, Any]) -> None:
    block, scope = Block(lambda y, _: Scratch.apply(y)), opened(settings)

    def forward() -> Tensor:
        with scope:
            return block(torch.randn(4, 8), False).square().sum()

    (said,) = errors_of_backwards(forward)
    assert "modified by an inplace operation" in said


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_an_output_whose_memory_is_freed_raises_once(settings: dict[str, Any], inside: bool) -> None:
    outputs: list[Tensor] = []

    def then(y: Tensor, _: bool) -> Tensor:
        outputs.append(y)
        return y * 1.0  # which keeps nothing

    def free() -> None:
        outputs.pop().untyped_storage().resize_(0)

    block, scope = Block(then), opened(settings)

    def forward() -> Tensor:
        with scope:
            loss = block(torch.randn(4, 8), False).square().sum()
            if inside:
                free()
        if not inside:
            free()
        return loss

    raised = errors_of_backwards(forward)
    assert len(raised) == (not inside)  # what is freed before the scope is left is never found to be kept
    assert all("freed: its storage was resized" in said for said in raised)
