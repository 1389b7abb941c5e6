"""The report's text, markdown, dict and picture."""

from __future__ import annotations

import builtins
import json

import pytest
import torch
from torch import nn

import fewbit_hooks as fewbit
from fewbit_hooks._ledger import HELD
from fewbit_hooks._report import Report, ReportRow
from fewbit_hooks._tables import human

MIB = 2**20
REPORT = Report(
    (
        ReportRow("gelu", "encoder.layer.0.act", 1, 3, 8 * MIB, MIB * 3 // 4, 8 * MIB, ""),
        ReportRow("gelu", "encoder.layer.1.act", 1, 3, 8 * MIB, MIB * 3 // 4, 8 * MIB, ""),
        ReportRow("relu", "head", 2, 1, 100 * MIB, MIB * 25 // 8, 0, HELD),
        ReportRow("prelu", "", 1, None, 1000, 0, 0, "the gradient of prelu's weight needs the true input"),
    ),
    steps=7,
)


def test_the_text_is_an_aligned_table_largest_first_with_like_layers_added_up() -> None:
    held = "its storage is still held: another saved tensor, or a reference of yours"
    assert str(REPORT).splitlines() == [
        "activation  module               calls  bits  original   stored     freed  reason",
        f"relu        head                     2     1   100 MiB  3.1 MiB       0 B  {held}",
        "gelu        encoder.layer.*.act      2     3  16.0 MiB  1.5 MiB  16.0 MiB",
        "prelu       -                        1  kept    1000 B      0 B       0 B  "
        "the gradient of prelu's weight needs the true input",
        "total                                5         116 MiB  4.6 MiB  16.0 MiB",
        "held for backward by these calls: 105 MiB instead of 116 MiB (-9.8 %)",
    ]


def test_the_sums_are_those_of_the_rows() -> None:
    assert REPORT.original_bytes == 116 * MIB + 1000
    assert REPORT.freed_bytes == 16 * MIB
    assert REPORT.held_bytes == REPORT.original_bytes - REPORT.freed_bytes + REPORT.stored_bytes


def test_the_markdown_has_as_many_cells_in_every_line() -> None:
    lines = REPORT.to_markdown().splitlines()
    assert len(lines) == 6
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| relu | head | 2 | 1 | 100 MiB |")


def test_the_dict_is_plain_and_whole() -> None:
    content = json.loads(json.dumps(REPORT.to_dict()))
    assert (content["steps"], len(content["rows"])) == (7, 4)
    assert content["rows"][2] == {
        "activation": "relu",
        "module": "head",
        "calls": 2,
        "bits": 1,
        "original_bytes": 100 * MIB,
        "stored_bytes": MIB * 25 // 8,
        "freed_bytes": 0,
        "reason": HELD,
        "how": "codes",
    }
    assert content["original_bytes"] == REPORT.original_bytes


def test_an_empty_report_says_so() -> None:
    assert str(Report(())) == "no recognised activation has been called with an input that requires grad"


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot_draws_a_picture(tmp_path, suffix: str) -> None:
    REPORT.plot(tmp_path / f"report.{suffix}")
    assert (tmp_path / f"report.{suffix}").stat().st_size > 3000


def test_plot_without_matplotlib_names_the_extra(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(fewbit.FewbitError, match=r"fewbit-hooks\[plot\]"):
        REPORT.plot(tmp_path / "report.png")


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (99.94 * 1024, "99.9 KiB"), (2**30 * 5000, "5000 GiB")],
)
def test_bytes_are_printed_in_binary_units(nbytes: float, text: str) -> None:
    assert human(nbytes) == text


def test_a_row_of_a_model_that_is_gone_has_its_modules_class() -> None:
    with fewbit.scope(min_bytes=0) as memory:
        y = nn.Sequential(nn.Linear(64, 64), nn.GELU())(torch.randn(8, 64))
    assert memory.report().rows[0].module == "GELU"
    assert y.requires_grad


def test_the_signs_of_what_was_learned_are_explained() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.Softplus(), nn.Linear(64, 64))
    scope = fewbit.scope(min_bytes=0)
    for step in range(3):
        with scope:
            loss = model(torch.randn(64, 64)).square().mean()
        loss.backward()
        text = str(scope.report())
        assert [f"\n{sign}: the derivative is taken from the output" in text for sign in ("y+0", "y+1")] == [
            step == 2
        ] * 2
    assert scope.report()._repr_markdown_() == scope.report().to_markdown()


def test_a_report_of_scopes_that_are_disabled_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWBIT_DISABLE", "1")
    with fewbit.scope() as memory:
        torch.nn.functional.gelu(torch.randn(4, requires_grad=True))
    assert "FEWBIT_DISABLE" in str(memory.report())
