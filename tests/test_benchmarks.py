"""The benchmarks run, in their quick forms, and write what they print. What they measure is nobody's business here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import bench_ops

from .conftest import rows_of

bench_step = pytest.importorskip("bench_step", reason="transformers is not installed", exc_type=ImportError)
bench_batch = pytest.importorskip("bench_batch", reason="transformers is not installed", exc_type=ImportError)

# of exact=True, where nothing is exact
pytestmark = pytest.mark.filterwarnings("ignore:fewbit_hooks.scope compressed nothing")


def test_of_each_op(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench_ops.main(["--quick", "--csv", str(tmp_path / "ops.csv")])
    table = rows_of(tmp_path / "ops.csv")
    found = {(row["op"], row["way"], row["bits"], row["dtype"]) for row in table}
    assert len(found) == len(table)
    for op in bench_ops.OPS:
        ways = {way for name, way, *_ in found if name == op}
        assert ("hooks" in ways) == (op != "gelu, kept")
        assert ("torch" in ways) == (op in ("gelu", "dropout", "gelu, kept"))
    assert {bits for op, _, bits, _ in found if op == "gelu"} == set("12345678")
    columns = ("forward", "backward", "stock", "ratio", "forward bytes", "backward bytes", "forward bw", "backward bw")
    assert all(float(row[column]) > 0 for row in table for column in columns)
    assert "fraction of the bandwidth of a copy" in capsys.readouterr().out


def test_of_some_ops_and_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench_ops.main(["--quick", "--bits", "2", "4", "--csv", str(tmp_path / "ops.csv"), "silu", "relu"])
    found = {(row["op"], row["bits"]) for row in rows_of(tmp_path / "ops.csv")}
    assert found == {("silu", "2"), ("silu", "4"), ("relu", "1")}
    with pytest.raises(SystemExit):
        bench_ops.main(["gelo"])
    assert "no operation 'gelo'; there are gelu, gelu tanh" in capsys.readouterr().err


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_budget_has_a_graph_of_its_own() -> None:
    for budget in (1.0, 0.5):
        model, around = bench_step.compiled(nn.Linear(4, 4), budget=budget)
        with around:
            model(torch.ones(2, 4))
    assert counters["stats"]["unique_graphs"] == 2


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 256), nn.GELU(), nn.Linear(256, 1))

    def forward(self, x: Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=self.layers(x).mean())


def test_what_is_held_is_what_is_held_where_nobody_measures() -> None:
    model, batch = Perceptron(), {"x": torch.randn(128, 8)}
    held = []
    for row in ("stock", "scope(bits=3)"):
        runner = bench_step.Runner(bench_step.ROWS[row], model, batch)
        for _ in range(bench_step.LEARN):
            runner.seconds()
        held.append(runner.held())
    stock, mine = held
    assert stock - mine == 128 * 256 * (32 - 1) // 8  # the input, but one bit beside the output


@pytest.mark.timeout(1200)  # four graphs are compiled, forward and backward
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_of_a_step(tmp_path: Path) -> None:
    bench_step.main(["--quick", "--csv", str(tmp_path / "step.csv")])
    table = {row["row"]: row for row in rows_of(tmp_path / "step.csv")}
    assert list(table) == list(bench_step.ROWS)
    held = {name: int(row["held_bytes"]) for name, row in table.items()}
    assert held["scope(exact=True)"] <= held["stock"] == held["stock again"]
    assert held["scope(exact=True, recompute=True)"] < held["stock"]
    assert held["compiled, scope(bits=3)"] < held["compiled"]
    # of so small a model a budget computes nothing again
    assert held["compiled, budget 0.5, scope(bits=3)"] < held["compiled, budget 0.5"] <= held["compiled"]
    gradients = {name: float(row["gradients"]) for name, row in table.items()}
    assert gradients["scope(exact=True, recompute=True)"] == 0 < gradients["scope(bits=3)"] < 0.1
    assert gradients["compiled"] < 1e-5  # it draws the random numbers that an eager step draws


def test_of_a_step_in_bfloat16(tmp_path: Path) -> None:
    arguments = ["--quick", "--eager", "--dtype", "bfloat16", "--rows", "exact=True"]
    bench_step.main([*arguments, "--csv", str(tmp_path / "step.csv")])
    table = {row["row"]: row for row in rows_of(tmp_path / "step.csv")}
    assert {row["dtype"] for row in table.values()} == {"bfloat16"}
    held = {name: int(row["held_bytes"]) for name, row in table.items()}
    assert held["scope(exact=True)"] <= held["stock"] < 0.7 * 2**20  # in float32 0.93 MiB
    assert all(float(row["gradients"]) == 0 for row in table.values())


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_of_the_largest_batch(tmp_path: Path) -> None:
    bench_batch.main(["--quick", "--csv", str(tmp_path / "batch.csv")])
    table = {row["row"]: row for row in rows_of(tmp_path / "batch.csv")}
    assert all(int(row["bytes"]) <= int(row["budget_bytes"]) for row in table.values())
    batch = {name: int(row["batch"]) for name, row in table.items()}
    assert 0 < batch["stock"] < batch["scope(bits=3)"] <= batch["scope(bits=3, recompute=True)"]


def test_the_search_finds_the_largest_that_fits() -> None:
    class Linear:
        def bytes(self, batch: int) -> int:
            return 10 * batch + 7

    for budget, found in ((16, 0), (17, 1), (26, 1), (27, 2), (137, 13), (1000, 99)):
        assert bench_batch.largest(Linear(), budget) == (found, 10 * found + 7 if found else 0)
