"""The largest batch that fits into a number of bytes, stock and under a scope, by search.

    python benchmarks/bench_batch.py [--quick] [--mib N] [--device cuda] [--dtype bfloat16] [--csv PATH] [MODEL ...]
    python benchmarks/bench_batch.py --paper

The models and the ways to run a step are those of bench_step.py. What has to fit is what is held between forward and
backward, beside parameters, buffers and the batch; on a GPU, what a step allocates at most. A batch is doubled until it
does not fit, and the largest that does is found by halving the interval. A scope has learned before, with the batch of
bench_step.py.

`--paper` has the setting of arXiv:2202.00441, RoBERTa-base on batches of 128 x 128 tokens in float32, and prints what
is held beside what the paper's library reports. It takes some minutes and 12 GiB on a CPU.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from about import about
from bench_step import (
    DTYPES,
    LEARN,
    MODELS,
    ROWS,
    ROWS_ON_A_GPU,
    Case,
    Runner,
    Way,
    available,
    does_something,
    roberta,
    there,
)

COLUMNS = ("model", "dtype", "row", "budget_bytes", "batch", "of_stock", "bytes", "machine", "versions", "date")
PAPER = "11.30 GiB stock, 9.75 GiB at 3 bits (-13.8 %): peak memory on a GPU, optimizer and parameters included"
"""Novikov et al., "Few-Bit Backward", arXiv:2202.00441: RoBERTa-base, MRPC."""


class Sized:
    """A way to run a model's step, on batches of any size."""

    def __init__(self, way: Way, model: nn.Module, batch: dict[str, Tensor]) -> None:
        self._sample = {name: t[:1] for name, t in batch.items()}
        self.runner = Runner(way, model, batch)
        for _ in range(LEARN):
            self.runner.seconds()

    def bytes(self, batch: int) -> int:
        """What has to fit; more than anything where the device has no more."""
        runner = self.runner
        runner.batch = {name: t.repeat_interleave(batch, 0) for name, t in self._sample.items()}
        try:
            return runner.peak() or runner.held()
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            return 1 << 62


def largest(sized: Sized, budget: int) -> tuple[int, int]:
    """The largest batch within the budget, and its bytes; (0, 0) where a single sample does not fit."""
    fits, fits_bytes, beyond = 0, 0, 1
    while (needed := sized.bytes(beyond)) <= budget:
        fits, fits_bytes, beyond = beyond, needed, 2 * beyond
    while beyond - fits > 1:
        middle = (fits + beyond) // 2
        needed = sized.bytes(middle)
        if needed <= budget:
            fits, fits_bytes = middle, needed
        else:
            beyond = middle
    return fits, fits_bytes


def search(name: str, rows: dict[str, Way], budget: int, device: str, dtype: str) -> list[dict[str, Any]]:
    """The rows of a model."""
    torch.manual_seed(0)
    model, batch = there(MODELS[name], device, DTYPES[dtype])
    table: list[dict[str, Any]] = []
    for row, way in rows.items():
        sized = Sized(way, model, batch)
        if not does_something(row, sized.runner, model):
            continue
        found, needed = largest(sized, budget)
        of_stock = found / table[0]["batch"] if table and table[0]["batch"] else 1.0
        figures = {"budget_bytes": budget, "batch": found, "of_stock": round(of_stock, 3), "bytes": needed}
        table.append({"model": name, "dtype": dtype, "row": row} | figures)
        print(f"{name:<21} {row:<33} {found:>6}  {of_stock:>8.2f}  {needed / 2**20:>9.1f}", flush=True)
    return table


def paper(device: str) -> None:
    """RoBERTa-base, 128 x 128 tokens, beside the paper's figures."""
    model, batch = there(Case(lambda: roberta(12, 768, 2, 128), 1), device, torch.float32)
    print(f"the paper's library: {PAPER}")
    stock = 0
    for name in ("stock", "scope(bits=3)", "scope(exact=True, recompute=True)", "scope(bits=3, recompute=True)"):
        held = Sized(ROWS[name], model, batch).bytes(128)
        stock = stock or held
        print(f"{name:<33} {held / 2**30:6.2f} GiB  {held / stock - 1:+.1%}", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MODELS)}; all where none is given")
    parser.add_argument("--quick", action="store_true", help="launch-bound alone, and a budget of 16 MiB")
    parser.add_argument("--mib", type=int, default=256, metavar="N", help="the budget (default: 256)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of the parameters (default: float32)")
    parser.add_argument("--paper", action="store_true", help="the paper's setting, and nothing else")
    parser.add_argument("--csv", metavar="PATH", help="write the table there too")
    arguments = parser.parse_args(argv)
    known = about(("transformers", "peft"))
    print(f"machine  {known['machine']}\nversions {known['versions']}\n")
    if arguments.paper:
        paper(arguments.device)
        return
    for name in arguments.models:
        if name not in MODELS:
            parser.error(f"no model {name!r}; there are {', '.join(MODELS)}")
    names = ["launch-bound"] if arguments.quick else [name for name in available() if name != "launch-bound"]
    budget = (16 if arguments.quick else arguments.mib) * 2**20
    rows = {name: way for name, way in ROWS.items() if name != "stock again" and not name.startswith("compiled")}
    if arguments.device != "cpu":
        rows |= ROWS_ON_A_GPU
    print(f"{'model':<21} {'row':<33} {'batch':>6}  {'of stock':>8}  {'MiB':>9}")
    table = []
    for name in arguments.models or names:
        table += search(name, rows, budget, arguments.device, arguments.dtype)
        if arguments.csv:  # after each model: they take minutes
            with open(arguments.csv, "w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                writer.writeheader()
                writer.writerows(row | known for row in table)


if __name__ == "__main__":
    main()
