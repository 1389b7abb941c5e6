"""The benchmark of memory: its columns add up, and its page says what its CSV says."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bench_memory
import fewbit_hooks as fewbit
import page_memory
from held import held_for_backward

from .conftest import rows_of

Table = list[dict[str, Any]]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("peft", reason="peft is not installed")
    path = tmp_path_factory.mktemp("results") / "memory.csv"
    bench_memory.main(["--quick", "--csv", str(path)])
    return rows_of(path)


def figures(row: dict[str, str], *columns: str) -> int:
    return sum(int(row[column]) for column in columns)


def only(table: Table, model: str, training: str, dtype: str, setting: str) -> dict[str, str]:
    key = model, training, dtype, setting
    (found,) = [r for r in table if (r["model"], r["training"], r["dtype"], r["setting"]) == key]
    return found


def stock_of(table: Table, row: dict[str, str]) -> int:
    return int(only(table, row["model"], row["training"], row["dtype"], "stock")["held_bytes"])


def test_every_case_has_a_row_of_stock_and_one_for_each_setting(table: Table) -> None:
    assert [row["setting"] for row in table] == ["stock", *bench_memory.SETTINGS] * 8
    assert {row["training"] for row in table} == {"full", "LoRA"}
    assert {row["dtype"] for row in table} == {"float32", "bfloat16"}


def test_the_bytes_add_up(table: Table) -> None:
    for row in (row for row in table if row["setting"] != "stock"):
        stock = stock_of(table, row)
        assert figures(row, "held_bytes", "freed_bytes") == stock
        assert figures(row, *bench_memory.PARTS, "other_bytes") == figures(row, "freed_bytes")
        # the report, which the parts are of, agrees with the walk through the graph but for the tables that decode
        assert abs(figures(row, "other_bytes")) < 0.02 * stock
        assert abs(figures(row, "predicted_held_bytes") - figures(row, "held_bytes")) < 0.02 * stock


def test_no_setting_holds_more_than_stock_and_little_gain_is_said(table: Table) -> None:
    for row in (row for row in table if row["setting"] != "stock"):
        assert figures(row, "freed_bytes") >= 0
        assert (row["note"] == "little gain here") == (figures(row, "freed_bytes") < 0.05 * stock_of(table, row))


def test_exact_has_the_gradients_of_stock_and_more_bits_have_less_error(table: Table) -> None:
    assert all(float(row["gradient_error"]) == 0 for row in table if row["setting"] == "exact")
    errors = [float(only(table, "vit-base", "LoRA", "float32", f"{k} bits")["gradient_error"]) for k in (2, 4)]
    assert 0 < errors[1] < errors[0] < 0.5


def test_the_parts_are_whose_they_are(table: Table) -> None:
    def parts(model: str, training: str) -> set[str]:
        row = only(table, model, training, "float32", "3 bits")
        return {part for part in bench_memory.PARTS if int(row[part])}

    assert parts("vit-base", "full") == {"output_bit_bytes"}
    assert parts("vit-base", "LoRA") == {"masks_bytes", "codes_bytes"}
    assert parts("mobilenet-v2", "full") == {"exact_bit_bytes", "output_bit_bytes"}
    assert parts("mobilenet-v2", "LoRA") == {"masks_bytes", "exact_bit_bytes", "output_bit_bytes"}


class GELU(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("setting", ["exact", "3 bits"])
def test_what_never_comes_to_be_is_the_native_ops(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GELU, "forward", GELU.forward)  # given back afterwards
    fewbit.register_module(GELU, "gelu", approximate="tanh")
    model = nn.Sequential(nn.Linear(64, 256), GELU(), nn.Linear(256, 8).requires_grad_(False))
    x, tensor = torch.randn(512, 64), 512 * 256 * 4
    case = bench_memory.Case("", None, "full", torch.float32, model, {"input": x})
    stock = case.held(model(x).sum())
    with fewbit.scope(**bench_memory.SETTINGS[setting]) as memory:
        loss = model(x).sum()
    parts = bench_memory.contributions(memory.report(), case)
    freed, codes = stock - case.held(loss), parts["codes_bytes"]
    assert sum(parts.values()) == pytest.approx(freed, rel=0.01)
    assert parts["native_op_bytes"] == pytest.approx(freed - codes, rel=0.001) == pytest.approx(3 * tensor, rel=0.01)
    assert codes == (0 if setting == "exact" else tensor - tensor * 3 // 32)


def test_lora_trains_the_adapters_and_the_head_alone() -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    case = bench_memory.make_case("vit-base", 1, "LoRA", torch.float32, quick=True)
    trained = [name for name, p in case.model.named_parameters() if p.requires_grad]
    assert all("lora_" in name or ".classifier." in name for name in trained)
    adapted = [name for name, module in case.model.named_modules() if hasattr(module, "base_layer")]
    assert len(adapted) == 1 + 4 + 2  # the patches' convolution, attention, MLP


def test_the_walk_counts_what_hooks_keep_and_what_a_function_keeps_as_an_attribute() -> None:
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.square = x * x
            return x**3

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return 3 * ctx.square * grad

    lin = nn.Linear(64, 256)
    x = torch.randn(128, 64)
    own = [*lin.parameters(), x]
    assert sum(held_for_backward(Cube.apply(lin(x)).sum(), own).values()) == 128 * 256 * 4
    with fewbit.scope(bits=1, min_bytes=0):
        coded = sum(held_for_backward(F.gelu(lin(x)).sum(), own).values())
    assert 128 * 256 // 8 <= coded < 128 * 256  # the codes, and the table that decodes them


def test_the_page_says_what_the_csv_says() -> None:
    page = page_memory.memory_page()
    assert (page_memory.DOCS / "memory.md").read_text(encoding="utf-8") == page
    rows = rows_of(page_memory.CSV)
    assert set(rows[0]) == set(bench_memory.COLUMNS)
    assert {row["model"] for row in rows} == set(bench_memory.MODELS)
    assert all(f"| {row['model']}" in page for row in rows)


@pytest.mark.parametrize(
    "page", [page_memory.DOCS / "faq.md", page_memory.DOCS.parent / "README.md"], ids=lambda p: p.name
)
def test_the_short_table_is_of_the_same_csv(page: Path) -> None:
    assert page.read_text(encoding="utf-8") == page_memory.with_short_table(page)


def test_the_page_can_be_made_of_a_quick_run(table: Table, tmp_path: Path) -> None:
    path = tmp_path / "memory.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, bench_memory.COLUMNS)
        writer.writeheader()
        writer.writerows(table)
    page = page_memory.memory_page(path)
    assert "| vit-base, 1 layers | float32 | 4 | 0 |" in page
    assert "little gain here: exact" in page
