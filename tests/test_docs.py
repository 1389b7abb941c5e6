"""The docs say what the program says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import page_coverage
import page_operations
import page_speed
from csv_rows import rows_of
from docs import make

DOCS = Path(__file__).parent.parent / "docs"
PAGES = [*sorted(DOCS.glob("*.md")), DOCS.parent / "README.md"]


def test_the_table_of_activations_is_the_registrys() -> None:
    assert (DOCS / "activations.md").read_text(encoding="utf-8") == make.activations_page()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_docs_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]*)(?:#[^)]*)?\)", text):
        if target and not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_headings_have_their_heading(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            other = (page.parent / target) if target else page
            headings = re.findall(r"^#+ (.+)$", other.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors


def test_the_quickstarts_first_example_prints_what_it_says() -> None:
    blocks = re.findall(r"```(\w+)\n(.*?)```", (DOCS / "quickstart.md").read_text(encoding="utf-8"), re.DOTALL)
    (_, code), (_, printed) = blocks[:2]
    lines: list[str] = []
    exec(code, {"print": lambda report: lines.append(str(report))})
    assert lines == [printed.rstrip("\n")]


def test_the_page_of_speed_is_the_csvs() -> None:
    assert (DOCS / "speed.md").read_text(encoding="utf-8") == page_speed.speed_page()


def test_the_page_of_operations_is_the_csvs() -> None:
    assert (DOCS / "operations.md").read_text(encoding="utf-8") == page_operations.operations_page()


def test_the_page_of_coverage_is_the_csvs_and_nothing_in_it_is_wrong() -> None:
    assert (DOCS / "coverage.md").read_text(encoding="utf-8") == page_coverage.coverage_page()
    assert all(row["wrong"] == "0" for row in rows_of(page_coverage.CASES))
    models = rows_of(page_coverage.ARCHITECTURES)
    assert all(row["loss_equal"] == "True" and float(row["held"]) <= 1 for row in models)
    assert all(float(row["gradients"]) == 0 for row in models if "exact=True" in row["setting"])


def test_the_tests_that_the_page_of_compatibility_names_exist() -> None:
    named = set(re.findall(r"`(test_\w+)`", (DOCS / "compatibility.md").read_text(encoding="utf-8")))
    found = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    assert len(named) > 30
    assert {name for name in named if f"def {name}(" not in found} == set()
