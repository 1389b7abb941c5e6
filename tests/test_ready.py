"""Tables are made before anything is coded, on devices where that makes the host wait; or the call stays exact."""

from __future__ import annotations

import contextlib
import functools
import gc
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fewbit_hooks as fewbit
from fewbit_hooks import _hooks, _masks, _policy, ops
from fewbit_hooks._calls import RECOGNISED
from fewbit_hooks._plan import Plan

CPU = torch.device("cpu")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "tanh": torch.tanh,
    "logsigmoid": F.logsigmoid,
    "relu": F.relu,
    "hardtanh": functools.partial(F.hardtanh, min_val=-0.1, max_val=0.3),
}


@pytest.fixture
def plan(name: str, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """One for which nothing is made yet."""
    monkeypatch.setattr(_policy, "_plans", {})
    function, kwargs = CALLS[name], {}
    if isinstance(function, functools.partial):
        function, kwargs = function.func, function.keywords
    x = torch.zeros(8)
    return _policy.make_plan(_policy.Settings(), RECOGNISED[function], function, (x,), kwargs, x)


@contextlib.contextmanager
def _never(device: torch.device) -> Iterator[None]:
    raise AssertionError("a table is made")
    yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_of_what_is_ready_no_table_is_made_later(
    plan: Plan, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert plan.is_ready(dtype, CPU)
    monkeypatch.setattr(ops, "waiting", _never)
    x = torch.linspace(-3, 3, 100).to(dtype)
    codes, _ = plan.encode(x)
    rows = plan.rows(0, dtype, CPU)
    assert rows is not None
    ops.decode(codes, rows, plan.bits, ops.Layout.of(x))
    if plan.codebook is not None:
        plan.level_rows(dtype, CPU)


@pytest.mark.parametrize("name", ["gelu"])
def test_the_tables_beside_an_output_too(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.linspace(-3, 3, 100)
    inverse = plan.inverse(x)
    assert inverse is not None
    assert inverse.is_ready(x.dtype, CPU)
    monkeypatch.setattr(ops, "waiting", _never)
    layout = ops.Layout.of(x)
    inverse.standins(0, F.gelu(x), ops.encode(x, 1, inverse.side), layout)


@pytest.mark.parametrize("name", ["gelu", "relu"])
def test_while_a_graph_is_captured_nothing_becomes_ready(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.linspace(-3, 3, 100)
    inverse = plan.inverse(x)
    monkeypatch.setattr(ops, "capturing", lambda device: True)
    assert not plan.is_ready(x.dtype, CPU)
    assert plan.codebook is None or not inverse.is_ready(x.dtype, CPU)
    monkeypatch.undo()
    assert plan.is_ready(x.dtype, CPU)
    monkeypatch.setattr(ops, "capturing", lambda device: True)
    assert plan.is_ready(x.dtype, CPU)
    assert not plan.is_ready(torch.bfloat16, CPU)


def test_a_mask_is_kept_while_a_graph_is_captured_unless_one_was_packed_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_masks, "_ready", set())
    monkeypatch.setattr(ops, "must_be_ready", lambda x: True)
    x = torch.randn(64, 64, requires_grad=True)

    def reasons(captured: bool) -> set[str]:
        monkeypatch.setattr(ops, "capturing", lambda device: captured)
        with fewbit.scope(min_bytes=0) as memory:
            memory._warned = True
            F.dropout(x * 1, 0.3)
        return {row.reason for row in memory.report().rows}

    assert [reasons(captured) for captured in (True, False, True)] == [{_policy.CAPTURING}, {""}, {""}]


@pytest.mark.parametrize("name", ["gelu"])
def test_what_is_not_ready_on_its_device_stays_exact(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Plan, "is_ready", lambda *_: False)
    x = torch.zeros(8, device="meta")  # no device that can be looked at without waiting for it
    with pytest.raises(_policy.Keep, match="CUDA graph"):
        _policy.make_plan(_policy.Settings(), RECOGNISED[F.gelu], F.gelu, (x,), {}, x)


def test_what_a_captured_graph_reads_outlives_the_plans_that_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_policy, "MAX_PLANS", 8)
    monkeypatch.setattr(_policy, "_plans", {})
    monkeypatch.setattr(_policy, "_captured", set())
    monkeypatch.setattr(ops, "must_be_ready", lambda x: True)

    def plan_of(slope: float) -> weakref.ref[Plan]:
        x = torch.zeros(8)
        return weakref.ref(
            _policy.make_plan(_policy.Settings(), RECOGNISED[F.leaky_relu], F.leaky_relu, (x, slope), {}, x)
        )

    before = plan_of(0.25)
    monkeypatch.setattr(ops, "is_captured", lambda x: True)
    captured = plan_of(0.5)
    monkeypatch.setattr(ops, "is_captured", lambda x: False)
    later = [plan_of(2.0 + i) for i in range(20)]
    gc.collect()
    assert before() is None
    assert later[0]() is None
    assert captured() is not None


class Stream:
    """Stands for one of CUDA's."""

    def __init__(self) -> None:
        self.waited_for: list[Stream] = []

    def wait_stream(self, other: Stream) -> None:
        self.waited_for.append(other)


def test_a_copy_of_an_output_that_another_stream_makes_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    main, side = Stream(), Stream()
    now, recorded = [main], []
    monkeypatch.setattr(ops, "stream_of", lambda t: now[0])
    monkeypatch.setattr(Tensor, "record_stream", lambda t, stream: recorded.append((t, stream)))
    for i, expected in enumerate([[], [side]]):
        now[0] = main
        beside = _hooks.Beside(None, lambda *_: torch.empty(0), *[ops.Layout.of(torch.zeros(3))] * 2, "relu6", None)
        beside.rely_on(torch.arange(3.0))
        now[0] = (main, side)[i]
        beside.rely_on_a_copy()
        assert beside.output is not None
        assert beside.output.tolist() == [0.0, 1.0, 2.0]
        assert main.waited_for == expected
        assert [stream for _, stream in recorded] == [main] * i
