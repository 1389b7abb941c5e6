"""docs/speed.md and its picture: memory against time, from the CSV that `benchmarks/bench_step.py` writes."""

from __future__ import annotations

from pathlib import Path

from csv_rows import rows_of

DOCS = Path(__file__).parent
CSV = DOCS.parent / "benchmarks" / "results" / "step-cpu.csv"
COMPILED = CSV.with_name("compiled-cpu.csv")
BATCHES = CSV.with_name("batch-cpu.csv")
PICTURE = DOCS / "images" / "memory-against-time.png"

HEAD = """\
# Memory against time

This page is written by `docs/make.py` from [step-cpu.csv](../benchmarks/results/step-cpu.csv), which

```sh
pip install -c constraints.txt -e ".[bench]"
python benchmarks/bench_step.py --eager --csv benchmarks/results/step-cpu.csv
```

made: {machine}; {versions}; {date}. Not yet measured on a GPU.

A step is forward and backward, in float32 and training mode; the ways to run it take turns, and each step is compared
with the stock step of its own round. *Time* is the median of these ratios, with the quartiles, and *stock again* says
what 1.00 looks like on that machine; *held* is what lives between forward and backward beside parameters, buffers and
batch, as a share of stock's; *gradients* is the relative distance from stock's. *Checkpoint per block* is
`torch.utils.checkpoint` around every block, *selective checkpoint* the same with matrix products and attention kept.
Compiled models are [further down](#compiled).

![Time of a step against memory held, by model](images/memory-against-time.png)
"""

TABLE = "| | ms | time | held, MiB | held | gradients |\n| --- " + "| ---: " * 5 + "|"

WITH_A_COMPILER = """\
## Compiled

Torch.compile with Inductor, from [compiled-cpu.csv](../benchmarks/results/compiled-cpu.csv), which

```sh
python benchmarks/bench_step.py --rows compiled --csv benchmarks/results/compiled-cpu.csv
```

made: {machine}; {versions}; {date}.
The ratios are to stock, uncompiled, in the same run, on a machine whose noise *stock again* tells. *Held* is what the
compiled graph keeps; *budget 0.5* is `torch._functorch.config.activation_memory_budget` at a half, which computes again
what it does not keep. Torch 2.13 then draws dropouts anew in backward
([pytorch #190758](https://github.com/pytorch/pytorch/issues/190758)), with a scope and without: where *gradients* says
0.6 or more, it is this.
"""

LESSONS = """\

## When each wins

- **Recomputation from what is kept** holds less than selective checkpointing in most of these models and takes less
  time, or about the same: only pointwise work is done again, and no block has to be run as a whole. It is exact, and
  needs no change to the model.
- **Checkpointing a whole block** holds far less and costs a second forward, a quarter to a half of the step. Use it
  where the rest does not suffice; what it keeps is not a scope's to shrink.
- **Few bits** cost least where the output is kept anyway (one bit), and are what helps under frozen layers without
  adapters. Where something behind the activation can be computed again, keeping the input is smaller, and exact.
- **Compiled**, a scope costs what cannot be told from the noise there, and the graph keeps a fifth less (RoBERTa,
  ViT), a quarter less (GPT-2), or as much (Llama, whose SwiGLU computes its activations again anyway), with few bits as
  with `exact=True`: where an output is read in backward nothing is approximated, and
  [the input alone is kept](how-it-works.md#in-a-compiled-graph). The masks of LoRA's dropouts, 8 % of what is kept,
  take a bit.
- **`recompute=True` changes nothing in a compiled graph**: what is computed again there is the compiler's choice. It
  makes it more freely with `torch._functorch.config.aggressive_recomputation = True`, an option of PyTorch's: Llama
  keeps 64.0 MiB then, in place of 101.1, and RoBERTa 94.1 in place of 130.0, and 90.8 with a scope.
- **A memory budget** for the compiler holds far less than a scope, for up to a quarter more time; beside it few bits
  free as large a share as without (but the launch-bound model holds more with both).
- **Where nothing helps** (ResNet) a learned scope costs 1 to 3 % of the time.
- **Cheap models pay most**: a coded call costs some tenths of a millisecond of Python, forward and backward.
  MobileNetV2, which makes 35 of them in a step of 0.12 s at 160 x 160 pixels, takes 10 % longer on the CPU; at its own
  size, 224 x 224, no more than the noise there. The launch-bound model makes six in 22 ms, and pays a sixth.
  `min_bytes` leaves them out.
- **Dropout's masks** are floats on the CPU, and the host looks at each element: 1 to 3 % of the steps of RoBERTa and of
  LoRA's adapters, each of which has one, and 4 % of GPT-2's.
- **The fused engine** takes as long as the hooks on the CPU, or 1 % less: that its backward is faster than stock's
  shows in no step, whose time goes into matrix products. It is made for GPUs.
- **Another machine**: on an Intel Xeon, 2 threads, an earlier version took 1.07 of stock's time for RoBERTa at 3 bits,
  where the table has 1.02; memory is the same everywhere.

{batches}
## The paper's setting

RoBERTa-base, all of it trained in float32 on batches of 128 x 128 tokens, on the CPU: stock holds 13.60 GiB for
backward, a scope of 3 bits 9.19 GiB (-32 %), `exact=True, recompute=True` 8.00 GiB (-41 %), exactly. The scopes were
measured with 16 x 128 tokens, an eighth. The paper's library reports 11.30 GiB and 9.75 GiB at 3 bits (-13.8 %): the
peak on a GPU, parameters and optimizer included. The two compare with care: on the CPU dropout's masks are floats, on a
GPU one byte an element, and they are packed to one bit here and not there. `benchmarks/bench_batch.py --paper` measures
it.
"""

BATCH = """\
## The largest batch

That fits {mib} MiB, held between forward and backward beside parameters, buffers and the batch: found by search, by
`benchmarks/bench_batch.py` ([batch-cpu.csv](../benchmarks/results/batch-cpu.csv)). Stock's is a number of samples, the
others are times that.
"""

MARKERS = {
    "stock": ("#000000", "o"),
    "scope(bits=3)": ("#1b9e77", "o"),
    "scope(bits=3, engine='fused')": ("#a6d854", "D"),
    "scope(exact=True)": ("#66c2a5", "s"),
    "scope(bits=3, recompute=True)": ("#d95f02", "o"),
    "scope(exact=True, recompute=True)": ("#fc8d62", "s"),
    "checkpoint per block": ("#7570b3", "^"),
    "selective checkpoint": ("#8da0cb", "v"),
    "compiled": ("#666666", "P"),
    "compiled, scope(bits=3)": ("#e7298a", "P"),
    "compiled, budget 0.5": ("#666666", "<"),
    "compiled, budget 0.5, scope(bits=3)": ("#e7298a", "<"),
}


def read(path: Path) -> dict[str, list[dict[str, str]]]:
    """The rows by model."""
    models: dict[str, list[dict[str, str]]] = {}
    for row in rows_of(path):
        models.setdefault(row["model"], []).append(row)
    return models


def speed_page(path: Path = CSV, compiled: Path = COMPILED, batches: Path = BATCHES) -> str:
    """The text of speed.md."""
    models = read(path)
    first = next(iter(models.values()))[0]
    lines = [HEAD.format(**{key: first[key] for key in ("machine", "versions", "date")})]
    for model, rows in models.items():
        lines += [f"## {model}", "", TABLE, *map(_line, rows), ""]
    models = read(compiled)
    first = next(iter(models.values()))[0]
    lines.append(WITH_A_COMPILER.format(**{key: first[key] for key in ("machine", "versions", "date")}))
    for model, rows in models.items():
        lines += [f"### {model}", "", TABLE, *map(_line, rows), ""]
    return "\n".join(lines).rstrip("\n") + "\n" + LESSONS.format(batches=_largest_batches(batches))


def _largest_batches(path: Path) -> str:
    models = read(path)
    first, *others = models.values()
    every = dict.fromkeys(row["row"] for rows in (first, *others) for row in rows)  # some are not of every model
    ways = [way for way in every if way != "scope(bits=3, engine='fused')"]  # holds what the hooks hold
    lines = [
        BATCH.format(mib=int(first[0]["budget_bytes"]) >> 20),
        "| | " + " | ".join(ways) + " |",
        "| --- |" + " ---: |" * len(ways),
    ]
    for model, rows in models.items():
        of_stock = {row["row"]: f"{float(row['of_stock']):.2f}" for row in rows} | {"stock": rows[0]["batch"]}
        lines.append("| ".join([f"| {model} ", *(f"{of_stock.get(way, '')} " for way in ways)]) + "|")
    return "\n".join(lines) + "\n"


def _line(row: dict[str, str]) -> str:
    time, low, high = (float(row[name]) for name in ("time", "lower", "upper"))
    distance = float(row["gradients"])
    cells = [
        row["row"],
        f"{1e3 * float(row['seconds']):.0f}",
        f"{time:.2f} ({low:.2f} to {high:.2f})",
        f"{int(row['held_bytes']) / 2**20:.1f}",
        f"{100 * float(row['held']):.0f} %",
        f"{distance:.0e}" if distance else "0",
    ]
    return "| " + " | ".join(cells) + " |"


def draw(path: Path = CSV, compiled: Path = COMPILED, picture: Path = PICTURE) -> None:
    """The picture: one panel a model, one point a way."""
    from matplotlib.figure import Figure

    models, others = read(path), read(compiled)
    for model, rows in models.items():
        rows += [row for row in others.get(model, []) if row["row"].startswith("compiled")]
    columns = 3
    lines = -(-len(models) // columns)
    figure = Figure(figsize=(4 * columns, 3.2 * lines + 0.6), layout="constrained")
    panels = iter(figure.subplots(lines, columns, squeeze=False, sharey=True).flat)
    for (model, rows), panel in zip(models.items(), panels, strict=False):
        for row in rows:
            if row["row"] in MARKERS:
                colour, marker = MARKERS[row["row"]]
                time, low, high = (float(row[name]) for name in ("time", "lower", "upper"))
                spread = [[max(0.0, time - low)], [max(0.0, high - time)]]
                held = 100 * float(row["held"])
                panel.errorbar(held, time, spread, color=colour, marker=marker, label=row["row"], capsize=2)
        panel.set_title(model, fontsize=10)
        panel.set_xlim(0, 112)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels:  # those left over
        panel.set_visible(False)
    figure.supxlabel("held for backward, % of stock")
    figure.supylabel("time of a step, ratio to stock")
    most = max(figure.axes, key=lambda panel: len(panel.get_legend_handles_labels()[0]))
    figure.legend(*most.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(picture, dpi=110)
