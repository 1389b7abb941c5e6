"""docs/coverage.md: PyTorch's own cases and four dozen architectures, from the CSVs of two benchmarks."""

from __future__ import annotations

from pathlib import Path

from csv_rows import rows_of

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results"
CASES, ARCHITECTURES = RESULTS / "pytorch-cases-cpu.csv", RESULTS / "architectures-cpu.csv"

HEAD = """\
# Other people's cases

This page is written by `docs/make.py` from [pytorch-cases-cpu.csv](../benchmarks/results/pytorch-cases-cpu.csv) and
[architectures-cpu.csv](../benchmarks/results/architectures-cpu.csv), which

```sh
pip install -c constraints.txt -e ".[bench,test]"
python benchmarks/pytorch_cases.py --csv benchmarks/results/pytorch-cases-cpu.csv
python benchmarks/architectures.py --csv benchmarks/results/architectures-cpu.csv
```

made: {machine}; {versions}; {date}.

## PyTorch's own samples

Every operation of `torch.testing`'s `op_db` and every module of its `module_db` that has a backward in float32, forward
and backward, under `enable(min_bytes=0, ...)`. *Equal*: outputs and gradients are stock's, bit for bit. *Approximate*:
the outputs are, and the gradients of an activation coded to 8 bits are within 2 %. *Raises*: as it does in stock, with
the same type. *Noise*: stock differs from itself from run to run (`linalg.lstsq`). Nothing else came out.
"""

MODELS = """
## Architectures

One training step of tiny models of transformers, in training mode, dropout included, at the third step of a scope with
`min_bytes=0`: what the graph holds, as a share of stock's, and the relative distance of all gradients from stock's. The
loss is stock's bit for bit in every row, and so are all gradients with `exact=True`. No model holds more than stock.
"""


def coverage_page(cases: Path = CASES, architectures: Path = ARCHITECTURES) -> str:
    """The text of coverage.md."""
    samples, models = rows_of(cases), rows_of(architectures)
    first = models[0]
    lines = [HEAD.format(**{key: first[key] for key in ("machine", "versions", "date")})]
    outcomes = ("run", "equal", "approximate", "raises", "noise")
    lines += ["| | " + " | ".join(outcomes) + " |", "| --- " + "| ---: " * len(outcomes) + "|"]
    for row in samples:
        lines.append(f"| {row['suite']}, `{row['setting']}` | " + " | ".join(row[name] for name in outcomes) + " |")
    lines.append(MODELS)
    settings = list(dict.fromkeys(row["setting"] for row in models))
    cells = [cell for setting in settings for cell in (f"`{setting}`", "gradients")]
    lines += ["| | " + " | ".join(cells) + " |", "| --- " + "| ---: " * len(cells) + "|"]
    for name in dict.fromkeys(row["model"] for row in models):
        rows = {row["setting"]: row for row in models if row["model"] == name}
        lines.append(f"| {name} | " + " | ".join(_cells(rows[setting]) for setting in settings) + " |")
    return "\n".join(lines) + "\n"


def _cells(row: dict[str, str]) -> str:
    distance = float(row["gradients"])
    return f"{100 * float(row['held']):.0f} % | " + (f"{distance:.0e}" if distance else "0")
