"""Freed means freed: the ledger counts storages, each once, and looks whether they are gone."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fewbit_hooks as fewbit
from fewbit_hooks._ledger import HELD, SWEEP

from .conftest import held_for_backward


def row(memory: fewbit.scope, activation: str):
    (found,) = [row for row in memory.report().rows if row.activation == activation]
    return found


def test_relu_before_a_linear_frees_nothing_and_says_why() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    with fewbit.scope(min_bytes=0) as memory:
        y = model(torch.randn(64, 64))
    relu = row(memory, "relu")
    assert (relu.original_bytes, relu.stored_bytes, relu.freed_bytes) == (64 * 64 * 4, 64 * 64 // 8, 0)
    assert relu.reason == HELD
    assert y.requires_grad


def test_gelu_before_a_linear_frees_its_input() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    with fewbit.scope(min_bytes=0) as memory:
        y = model(torch.randn(64, 64))
    gelu = row(memory, "gelu")
    assert (gelu.original_bytes, gelu.freed_bytes, gelu.reason) == (64 * 64 * 4, 64 * 64 * 4, "")
    assert y.requires_grad


def test_a_gated_unit_whose_halves_share_a_storage_frees_nothing() -> None:
    proj = nn.Linear(64, 128)

    def gated(x: Tensor) -> Tensor:
        a, g = proj(x).chunk(2, dim=-1)
        return a * F.gelu(g)

    with fewbit.scope(min_bytes=0) as memory:
        y = gated(torch.randn(64, 64))
    gelu = row(memory, "gelu")
    assert (gelu.original_bytes, gelu.freed_bytes, gelu.reason) == (64 * 128 * 4, 0, HELD)
    assert y.requires_grad


def test_x_times_act_of_x_frees_nothing_of_x() -> None:
    proj = nn.Linear(64, 64)

    def swish(x: Tensor) -> Tensor:
        h = proj(x)
        return h * F.silu(h)

    with fewbit.scope(min_bytes=0) as memory:
        y = swish(torch.randn(64, 64))
    assert row(memory, "silu").freed_bytes == 0
    assert y.requires_grad


def test_a_storage_that_two_activations_keep_is_counted_once() -> None:
    proj = nn.Linear(64, 64)

    def both(x: Tensor) -> Tensor:
        h = proj(x)
        return F.gelu(h) + F.silu(h)

    with fewbit.scope(min_bytes=0) as memory:
        y = both(torch.randn(64, 64))
    report = memory.report()
    assert report.original_bytes == report.freed_bytes == 64 * 64 * 4
    assert report.stored_bytes == 2 * 64 * 64 * 3 // 8
    assert sum(held_for_backward(y).values()) > 0


def test_a_variable_of_the_users_holds_a_storage_until_it_is_gone() -> None:
    h = nn.Linear(64, 64)(torch.randn(64, 64))
    with fewbit.scope(min_bytes=0) as memory:
        y = F.gelu(h)
    assert row(memory, "gelu").freed_bytes == 0
    del h
    assert row(memory, "gelu").freed_bytes == 64 * 64 * 4
    assert y.requires_grad


@pytest.mark.parametrize("backward", ["method", "torch.autograd.backward", "torch.autograd.grad"])
def test_what_backward_releases_is_not_taken_for_freed(backward: str) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    with fewbit.scope(min_bytes=0) as memory:
        loss = model(torch.randn(64, 64)).sum()
        if backward == "method":
            loss.backward()
        elif backward == "torch.autograd.backward":
            torch.autograd.backward(loss)
        else:
            torch.autograd.grad(loss, list(model.parameters()))
    assert row(memory, "relu").freed_bytes == 0


def test_the_report_is_about_the_latest_step() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 1))
    memory = fewbit.scope(min_bytes=0)
    for batch in (64, 64, 32):
        with memory:
            loss = model(torch.randn(batch, 64)).sum()
        loss.backward()
    assert memory.report().steps == 3
    assert memory.report().original_bytes == 32 * 64 * 4


def test_forwards_without_a_backward_between_them_are_one_step() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 1))
    memory = fewbit.scope(min_bytes=0)
    losses = []
    for _ in range(3):
        with memory:
            losses.append(model(torch.randn(64, 64)).sum())
    report = memory.report()
    assert (report.steps, report.rows[0].calls, report.original_bytes) == (1, 3, 3 * 64 * 64 * 4)
    sum(losses).backward()


def test_the_ledger_holds_no_tensor_alive() -> None:
    proj = nn.Linear(64, 64)
    with fewbit.scope(min_bytes=0) as memory:
        h = proj(torch.randn(64, 64))
        y = F.gelu(h)
    gone = [weakref.ref(h), weakref.ref(y)]
    gc.disable()
    try:
        del h, y
        assert [ref() for ref in gone] == [None, None]
    finally:
        gc.enable()
    assert memory.report().rows


def test_the_ledger_of_a_loop_that_never_runs_backward_stays_small() -> None:
    proj = nn.Linear(8, 8)
    x = torch.randn(8, 8)
    with fewbit.scope(min_bytes=0) as memory:
        for _ in range(SWEEP + 10):
            F.gelu(proj(x))
    assert len(memory._ledger.step.pending) <= 20
    assert memory.report().freed_bytes == (SWEEP + 10) * 8 * 8 * 4


def test_tiny_tensors_pass_without_module_or_storage() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU())
    with fewbit.scope(min_bytes=0):
        model(torch.randn(8, 8))
    with pytest.warns(fewbit.FewbitWarning, match="smaller than min_bytes"), fewbit.scope() as memory:
        y = model(torch.randn(8, 8))
    gelu = row(memory, "gelu")
    assert (gelu.module, gelu.bits, gelu.original_bytes) == ("", None, 8 * 8 * 4)
    assert not memory._ledger.step.pending
    assert y.requires_grad


def test_tiny_tensors_that_pass_in_a_loop_are_all_counted_and_added_up_now_and_then() -> None:
    x = torch.randn(8, requires_grad=True)
    memory = fewbit.enable().scope
    try:
        for _ in range(SWEEP + 10):
            F.dropout(x, 0.5)
        assert len(memory._ledger.step.passed) == 10
        passed = row(memory, "dropout")
        assert (passed.calls, passed.original_bytes) == (SWEEP + 10, (SWEEP + 10) * 8 * 4)
        assert not memory._ledger.step.passed
    finally:
        fewbit.disable()


def test_rows_name_the_module_as_the_model_does() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 64)
            self.act = nn.GELU()

        def forward(self, x: Tensor) -> Tensor:
            return F.silu(self.act(self.fc(x)))

    model = nn.Sequential(Block(), Block())
    with fewbit.scope(min_bytes=0) as memory:
        y = model(torch.randn(64, 64))
    rows = {(row.activation, row.module) for row in memory.report().rows}
    assert rows == {("gelu", "0.act"), ("silu", "0"), ("gelu", "1.act"), ("silu", "1")}
    assert y.requires_grad


def test_rows_name_a_module_as_the_model_does_that_was_run_alone_before() -> None:
    model, x = nn.Sequential(nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.GELU())), torch.randn(64, 64)
    memory = fewbit.scope(min_bytes=0)
    names = []
    for module in (model[0], model, model, model[0]):
        with memory:
            y = module(x)
        names.append([row.module for row in memory.report().rows])
        y.sum().backward()
    assert names == [["1", "2"], ["0.1", "0.2"], ["0.1", "0.2"], ["1", "2"]]


def test_a_step_in_two_threads_is_booked_whole() -> None:
    memory = fewbit.scope(min_bytes=0)

    def work() -> None:
        for _ in range(200):
            with memory:
                F.gelu(torch.randn(8, 8, requires_grad=True) * 1)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert memory.report().rows[0].calls == 400


def test_reading_a_report_does_not_change_it() -> None:
    with fewbit.scope(min_bytes=0) as memory:
        y = F.gelu(torch.randn(64, 64, requires_grad=True) * 1)
    assert memory.report() == memory.report()
    assert y.requires_grad


@pytest.mark.parametrize("length", [0, None], ids=["empty", "raises"])
def test_a_model_is_not_asked_for_its_length(length: int | None) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.Dropout(0.5))

        def __len__(self) -> int:
            if length is None:
                raise TypeError("no length")
            return length

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    model, opened = Model(), fewbit.scope(min_bytes=0)
    for _ in range(3):
        with opened:
            loss = model(torch.randn(64, 64)).sum()
        loss.backward()
    assert [row.module for row in opened.report().rows] == ["inner.1", "inner.3"]


def test_what_the_garbage_collector_finds_may_leave_a_scope() -> None:
    opened = fewbit.scope(min_bytes=0)
    with opened:
        F.gelu(torch.randn(64, 64).requires_grad_() * 1)
    done = []

    def work() -> None:
        with opened._ledger.step.lock, opened:  # as where an allocation under the lock collects a generator
            F.gelu(torch.randn(64, 64).requires_grad_() * 1)
        done.append(True)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(10)
    assert done


@pytest.mark.parametrize(
    "arguments", [{"bits": None}, {"exact": True}, {"exact": True, "recompute": True}, {"bits": 3}], ids=str
)
@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU])
@pytest.mark.filterwarnings("ignore:fewbit_hooks.scope compressed nothing")
def test_a_backward_outside_ends_the_step_though_it_has_nothing_to_unpack(
    arguments: dict[str, object], activation: type[nn.Module]
) -> None:
    model = nn.Sequential(nn.Linear(64, 64), activation(), nn.Linear(64, 8))
    memory = fewbit.scope(min_bytes=0, **arguments)
    for step in range(1, 8):
        with memory:
            loss = model(torch.randn(32, 64)).square().mean()
        report = memory.report()
        assert report.steps == step
        assert {r.calls for r in report.rows} == {1}
        loss.backward()


@pytest.mark.filterwarnings("ignore:fewbit_hooks.scope compressed nothing")
def test_a_site_is_looked_at_again_with_backward_outside() -> None:
    first, gelu, last = nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8)
    memory = fewbit.scope(min_bytes=0)
    for step in range(140):
        with memory:
            h = first(torch.randn(32, 64))
            loss = last(gelu(h)).square().mean()
            if step >= 3:
                del h  # until then somebody holds the input
        loss.backward()
        h = None
    assert [r.bits for r in memory.report().rows] == [1]


def relu_then_linear() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))


def test_a_report_after_a_backward_outside_says_what_was_freed_before_it() -> None:
    with fewbit.scope(min_bytes=0) as memory:
        loss = relu_then_linear()(torch.randn(64, 64)).sum()
    loss.backward()  # by the first unpack, the last Linear has let go of what it shares with relu
    assert (row(memory, "relu").freed_bytes, row(memory, "relu").reason) == (0, HELD)


def test_a_report_asked_for_during_the_backward_changes_nothing() -> None:
    with fewbit.scope(min_bytes=0) as memory:
        y = relu_then_linear()(torch.randn(64, 64))
    freed = []
    y.register_hook(lambda _: freed.append(memory.report().freed_bytes))
    y.sum().backward()
    assert [*freed, memory.report().freed_bytes] == [0, 0]


def masked_twice(x: Tensor) -> Tensor:
    masks.append(x > 0)
    return (x * 1).masked_fill(masks[-1], 0.0).masked_fill(masks[-1], 0.0)


masks: list[Tensor] = []


@pytest.mark.filterwarnings("ignore:fewbit_hooks.scope compressed nothing")
@pytest.mark.parametrize(
    "call",
    [masked_twice, lambda x: F.gelu((x * 1)[:1, :1].clone().expand(64, 64)), lambda x: F.gelu(x + float("nan"))],
    ids=["a waiting mask", "no gain", "not finite"],
)
def test_a_step_ends_with_a_backward_outside_where_our_hooks_kept_everything(call: Callable[[Tensor], Tensor]) -> None:
    memory, leaf = fewbit.scope(min_bytes=0), torch.randn(64, 64, requires_grad=True)
    for step in range(1, 5):
        with memory:
            loss = call(leaf).sum()
        loss.backward()
        report = memory.report()
        assert (report.steps, report.freed_bytes) == (step, 0)


@pytest.mark.filterwarnings("ignore:fewbit_hooks.scope compressed nothing")
@pytest.mark.parametrize("parts", [1, 3, 8])
def test_a_norm_that_keeps_its_input_counts_all_of_its_storage_once(parts: int) -> None:
    class Norms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64 * parts), nn.Linear(64, 64)
            self.first, self.second = nn.RMSNorm(64), nn.RMSNorm(64)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)[:, :64]
            y: Tensor = self.b(self.first(h))
            return y if parts > 1 else y + self.b(self.second(h))

    model, x = Norms().bfloat16(), torch.randn(64, 64, dtype=torch.bfloat16)
    memory = fewbit.scope(min_bytes=0, exact=True, recompute=True)
    for _ in range(2):
        with memory:
            y = model(x)
        held = sum(held_for_backward(y, [*model.parameters(), x]).values())
        freed = memory.report().freed_bytes - memory.report().stored_bytes
        y.sum().backward()
    y = model(x)
    stock = sum(held_for_backward(y, [*model.parameters(), x]).values())
    assert held <= stock
    assert abs((stock - held) - freed) <= 512  # what the norms keep of each row


@pytest.mark.parametrize("engine", ["hooks", "fused"])
def test_an_output_that_nobody_else_keeps_any_more_is_counted_and_not_relied_upon_again(engine: str) -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.act, self.b = nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)

        def forward(self, x: Tensor, alone: bool) -> Tensor:
            y = self.act(self.a(x))
            z: Tensor = y + 1 if alone else self.b(y)
            return z

    model, memory, seen = Sometimes(), fewbit.scope(min_bytes=0, engine=engine), []
    for alone in (False, False, False, True, True):
        with memory:
            loss = model(torch.randn(64, 64), alone).sum()
        gelu = row(memory, "gelu")
        seen.append((gelu.beside_output, gelu.freed_bytes, gelu.stored_bytes))
        loss.backward()
    size, bits = 64 * 64 * 4, 64 * 64 // 8
    assert seen == [
        (False, size, 3 * bits),
        (False, size, 3 * bits),
        (True, size, bits),
        (True, size, bits + size),
        (False, size, 3 * bits),
    ]


@pytest.mark.filterwarnings("ignore:fewbit_hooks.scope compressed nothing")
@pytest.mark.parametrize("settings", [{"bits": None}, {"exact": True}])
@pytest.mark.parametrize("call", [F.logsigmoid, F.softsign, lambda x: F.rrelu(x, training=True)])
def test_all_is_counted_that_a_call_keeps_which_saves_several_tensors(
    call: Callable[[Tensor], Tensor], settings: dict[str, Any]
) -> None:
    x = torch.randn(64, 64).requires_grad_()
    with fewbit.scope(min_bytes=0, **settings) as memory:
        y = call(-x)
    assert memory.report().original_bytes == sum(held_for_backward(y, [x]).values())


class HandmadeSigmoid(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.reciprocal(1 + torch.exp(-x))  # which saves its output


class HandmadeSoftmax(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(x - torch.logsumexp(x, -1, keepdim=True))


@pytest.mark.filterwarnings("ignore:fewbit_hooks.scope compressed nothing")
@pytest.mark.parametrize("settings", [{"bits": 3}, {"exact": True}, {"exact": True, "recompute": True}])
@pytest.mark.parametrize("act", [HandmadeSigmoid, HandmadeSoftmax])
def test_an_output_that_primitives_keep_is_freed_where_nobody_else_keeps_it(
    act: type[nn.Module], settings: dict[str, Any]
) -> None:
    fewbit.register_module(HandmadeSigmoid, "sigmoid")
    fewbit.register_module(HandmadeSoftmax, name="softmax")
    model, x = nn.Sequential(nn.Linear(64, 64), act(), nn.Linear(64, 64)), torch.randn(64, 64)
    y = model(x)
    stock = sum(held_for_backward(y, [*model.parameters(), x]).values())
    memory = fewbit.scope(min_bytes=0, **settings)
    for _ in range(4):
        with memory:
            y = model(x)
        held = sum(held_for_backward(y, [*model.parameters(), x], tables=False).values())
        freed = memory.report().freed_bytes - memory.report().stored_bytes
        y.sum().backward()
    assert abs((stock - held) - freed) <= 512
    assert held < stock or "recompute" not in settings
