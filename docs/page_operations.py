"""docs/operations.md: what single operations take, from the CSV that `benchmarks/bench_ops.py` writes."""

from __future__ import annotations

from pathlib import Path

from csv_rows import rows_of

DOCS = Path(__file__).parent
CSV = DOCS.parent / "benchmarks" / "results" / "ops-cpu.csv"

HEAD = """\
# What an operation takes

This page is written by `docs/make.py` from [ops-cpu.csv](../benchmarks/results/ops-cpu.csv), which

```sh
python benchmarks/bench_ops.py --csv benchmarks/results/ops-cpu.csv
```

made: {machine}; {versions}; {date}. Not yet measured on a GPU.

All ways to make an operation take turns in one process; figures are medians, ns an element, of tensors of {elements}
elements. In a training step these operations are a few percent of the time: [memory against time](speed.md) says what a
whole step pays.
"""

CODING = """\

## The coding alone

Encoding and decoding in turn, by each backend, beside gelu's own forward and backward in PyTorch on the same tensor.
*Ratio* is of encoding and decoding together to these.
"""

CALLS = """\

## The operation under a scope

Forward and backward, as a user makes them, beside PyTorch's own; 3 bits, or 1 where the operation takes 1. *Ratio* is
of both together. The hooks leave the node's own forward and backward as they are, and code beside them. A call inside a
model, whose output another node keeps, pays less: one bit.
"""


def operations_page(path: Path = CSV) -> str:
    """The text of operations.md."""
    rows = rows_of(path)
    most = max((row["elements"] for row in rows), key=int)
    rows = [row for row in rows if row["elements"] == most]
    known = {key: rows[0][key] for key in ("machine", "versions", "date")}
    lines = [HEAD.format(elements=f"2^{int(most).bit_length() - 1}", **known), CODING]
    lines += _table("bits", [r for r in rows if r["op"] == "gelu" and r["way"] not in ("hooks", "fused")], "bits")
    others = [r for r in rows if r["op"] != "gelu" and r["way"] not in ("hooks", "fused")]
    lines += ["", "The same of a mask, and of gelu with the derivative from a kept output and one bit:", ""]
    lines += _table("", others, "op")
    lines.append(CALLS)
    calls = [r for r in rows if r["way"] in ("hooks", "fused") and (r["op"] != "gelu" or r["bits"] == "3")]
    lines += _table("", calls, "op")
    return "\n".join(lines) + "\n"


def _table(head: str, rows: list[dict[str, str]], by: str) -> list[str]:
    there, back = ("forward", "backward") if rows[0]["way"] in ("hooks", "fused") else ("encode", "decode")
    lines = [f"| {head} | dtype | by | {there} | {back} | stock | ratio |", "| --- | --- | --- " + "| ---: " * 4 + "|"]
    for row in rows:
        figures = [f"{float(row[name]):.2f}" for name in ("forward", "backward", "stock", "ratio")]
        lines.append("| " + " | ".join([row[by], row["dtype"], row["way"], *figures]) + " |")
    return lines
