"""Nothing piles up: not tensors, not entries of the ledger, not memory, in loops as long as training is.

(The reference cycles that only the garbage collector would see are in `test_hazards.py`, H3.)
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import fewbit_hooks as fewbit

from .conftest import torch_threads

FUNCTIONS: list[Callable[[Tensor], Tensor]] = [
    F.gelu,
    torch.tanh,
    F.relu,
    torch.sigmoid_,
    lambda h: F.silu(h, inplace=True),
    F.logsigmoid,
    lambda h: F.softplus(h, beta=2.0),
]

MIB = 2**20
RSS_BOUND = 12 * MIB
"""What the process may grow by between the tenth part of a loop and its end. (measured) It grows by 0 to 7 MiB; one
kept tensor of 16 KiB an iteration would be 14 MiB in 1,000 steps, 140 MiB in 10,000 forwards."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny operations on a busy machine: a second thread would only be waited for."""
    with torch_threads(1):
        yield


def tensors_alive() -> int:
    """Tensors that the garbage collector knows."""
    gc.collect()
    return sum(issubclass(type(o), Tensor) for o in gc.get_objects())


def rss() -> int:
    """Resident bytes, without what malloc has ready for later: (measured) that comes and goes by 50 MiB."""
    with contextlib.suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss


def pending(memory: fewbit.scope) -> tuple[int, int]:
    """Rows and storages in the ledger of a scope."""
    return len(memory._ledger.step.rows), len(memory._ledger.step.pending)


@contextlib.contextmanager
def opened_by(how: str) -> Iterator[tuple[fewbit.scope, Callable[[], Any]]]:
    """The scope, and what each iteration enters: under "enable" it is open all along."""
    if how == "scope":
        memory = fewbit.scope(bits=3, min_bytes=0)
        yield memory, lambda: memory
    elif how == "new scope":  # one an iteration, as a user's function that opens its own
        yield fewbit.scope(bits=3, min_bytes=0), lambda: fewbit.scope(bits=3, min_bytes=0)
    else:
        with fewbit.enable(bits=3, min_bytes=0) as handle:
            yield handle.scope, contextlib.nullcontext


def assert_flat(memory: fewbit.scope, iterations: int, iterate: Callable[[int], None], max_pending: int) -> None:
    """Run a loop; tensors, ledger and memory at its end are what they were after its first tenth."""
    for i in range(iterations // 10):
        iterate(i)
    before, rss_before, rows = tensors_alive(), rss(), pending(memory)[0]
    for i in range(iterations // 10, iterations):
        iterate(i)
        if i % 100 == 0:
            assert pending(memory)[1] <= max_pending
    rss_after = rss()
    assert tensors_alive() <= before
    assert pending(memory)[0] == rows
    assert rss_after - rss_before < RSS_BOUND


@pytest.mark.parametrize("how", ["scope", "new scope", "enable"])
def test_ten_thousand_forwards_without_a_backward_leave_nothing(how: str) -> None:
    x = torch.randn(64, 64, requires_grad=True)

    with opened_by(how) as (memory, each):

        def forward(i: int) -> None:
            with each():
                FUNCTIONS[i % len(FUNCTIONS)](x * 1)

        assert_flat(memory, 10_000, forward, max_pending=4096)


@pytest.mark.parametrize("how", ["scope", "new scope", "enable"])
def test_a_thousand_training_steps_leave_nothing(how: str) -> None:
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4), nn.ReLU())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    batch = torch.randn(64, 16)

    with opened_by(how) as (memory, each):

        def step(i: int) -> None:
            optimizer.zero_grad()
            with each():
                loss = model(batch).square().mean()
            loss.backward()
            optimizer.step()

        assert_flat(memory, 1_000, step, max_pending=8)


@pytest.mark.parametrize(
    "settings", [{"bits": 3}, {"bits": 3, "recompute": True}, {"exact": True, "recompute": True}], ids=str
)
def test_a_thousand_steps_with_norms_masks_and_copies_leave_nothing(settings: dict[str, Any]) -> None:
    model = nn.Sequential(
        nn.Linear(16, 64),
        nn.LayerNorm(64),
        nn.SiLU(),
        nn.Dropout(0.2),
        nn.Linear(64, 64),
        nn.GELU(),
        nn.ReflectionPad1d(2),
        nn.Conv1d(1, 1, 5),
        nn.ReLU6(),
        nn.Linear(64, 4),
    )
    batch = torch.randn(64, 1, 16)

    with fewbit.enable(min_bytes=0, **settings) as handle:

        def step(i: int) -> None:
            model.zero_grad()
            model(batch).square().mean().backward()

        assert_flat(handle.scope, 1_000, step, max_pending=16)


def test_evaluation_under_enable_without_a_backward_leaves_nothing() -> None:
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 4))
    batch = torch.randn(64, 16)

    with fewbit.enable(bits=3, min_bytes=0) as handle:

        def evaluate(i: int) -> None:
            model(batch)  # the no_grad that was forgotten

        assert_flat(handle.scope, 2_000, evaluate, max_pending=4096)


def test_models_that_come_and_go_under_enable_leave_nothing() -> None:
    batch = torch.randn(64, 16)

    with fewbit.enable(bits=3, min_bytes=0) as handle:

        def build_and_train(i: int) -> None:
            model = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 4))
            model(batch).sum().backward()

        assert_flat(handle.scope, 1_000, build_and_train, max_pending=8)


def test_parameters_that_change_at_every_call_fill_no_cache_without_bound() -> None:
    from fewbit_hooks import _policy

    x = torch.randn(64, requires_grad=True)
    with fewbit.scope(bits=3, min_bytes=0):
        for i in range(_policy.MAX_PLANS + 100):
            torch.clamp(x, -1.0 - i / 1000, 1.0)
    assert len(_policy._plans) <= _policy.MAX_PLANS


def test_a_rollout_without_backward_keeps_no_output() -> None:
    policy = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8))
    outputs: list[StorageWeakRef] = []
    policy[1].register_forward_hook(lambda module, args, y: outputs.append(StorageWeakRef(y.untyped_storage())))
    with fewbit.scope(bits=3, min_bytes=0):
        policy(torch.randn(128, 64)).sum().backward()
        for _ in range(40):
            policy(torch.randn(128, 64))
    assert sum(not ref.expired() for ref in outputs) <= 1
