"""docs/memory.md, and the table of the README and the FAQ, from the CSV that `benchmarks/bench_memory.py` writes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from csv_rows import rows_of

DOCS = Path(__file__).parent
CSV = DOCS.parent / "benchmarks" / "results" / "memory-cpu.csv"

HEAD = """\
# What a step keeps, model by model

This page is written by `docs/make.py` from [memory-cpu.csv](../benchmarks/results/memory-cpu.csv), which

```sh
pip install -c constraints.txt -e ".[bench]"
python benchmarks/bench_memory.py --csv benchmarks/results/memory-cpu.csv
```

made: {machine}; {versions}; {date}.

What is counted is what autograd holds between forward and backward: the storages that the graph of the loss holds,
found by walking it, without parameters and buffers; stock PyTorch's, and those under a scope at its third step, when it
has learned what others keep. Models have their published widths, random weights, and as many layers as the row says
(all, where it says nothing); the batch is 2 x 512 tokens, 4 images of 224 x 224, or 2 x 30 s of sound; training mode,
dropout as published, but none of attention's probabilities. LoRA: peft, rank 8, dropout 0.05, adapters in the model's
dtype on every linear layer and convolution but the depthwise ones; all else is frozen, except a classifier's new head.

*Error*: of all gradients together, relative, against stock's with the same dropout masks. *bf16*: for comparison, of
stock's bfloat16 gradients against its float32 ones. `exact=True` has an error of 0 {everywhere}.
"""

RECOMPUTED = """
With `recompute=True`. *Recomputed*: what of it is computed again, with `exact=True`; the rest are masks, relu's kind,
and what an activation written in primitives would have kept in between.
"""

OF_THREE_BITS = """
Whose that is at 3 bits, in percent of what stock holds, the codes taken off. *Native op*: what an activation written in
primitives would have kept in between. *Masks*: of dropout, 1 bit, exact. *Output bit*: the next layer keeps the
output, and from it and at most a bit comes the derivative. *1 bit, exact*: relu's kind. *Codes*: 3 bits an element.
*Other*: the tables that decode.
"""

SETTINGS = ("exact", "1 bit", "2 bits", "3 bits", "4 bits")
AGAIN = ("3 bits, recompute", "exact, recompute")
PARTS = {
    "native op": "native_op_bytes",
    "masks": "masks_bytes",
    "output bit": "output_bit_bytes",
    "1 bit, exact": "exact_bit_bytes",
    "codes": "codes_bytes",
    "other": "other_bytes",
}

Settings = dict[str, dict[str, str]]
"""The rows of one model, training and dtype in the CSV, by setting."""


def memory_page(path: Path = CSV) -> str:
    """The text of memory.md."""
    cases = _read(path)
    first = next(iter(cases.values()))["stock"]
    errors = [float(settings["exact"]["gradient_error"]) for settings in cases.values()]
    everywhere = "everywhere" if not any(errors) else f"but for {_percent(max(errors))} at most"
    about = {key: first[key] for key in ("machine", "versions", "date")}
    lines = [HEAD.format(everywhere=everywhere, **about)]
    for training, title in (("full", "Full training"), ("LoRA", "LoRA")):
        chosen = [settings for (_, each, _), settings in cases.items() if each == training]
        lines += [f"## {title}\n", *_freed_table(chosen), RECOMPUTED, *_again_table(chosen)]
        lines += [OF_THREE_BITS, *_parts_table(chosen), ""]
    return "\n".join([*lines, *_lessons(cases)]) + "\n"


SHORT_MARKS = "<!-- docs/make.py writes this table -->\n", "<!-- end -->"
SHORT_ROWS = (
    ("roberta-base", "full"),
    ("roberta-base", "LoRA"),
    ("vit-base", "full"),
    ("gpt2", "full"),
    ("tinyllama-1.1b", "full"),
    ("mobilenet-v2", "full"),
    ("resnet-50", "full"),
)
SHORT_SETTINGS = ("exact", "3 bits", "exact, recompute")


def with_short_table(page: Path) -> str:
    """The text of a page, its table of memory made anew."""
    cases, rows = _read(CSV), []
    for model, training in SHORT_ROWS:
        case = cases[model, training, "bfloat16"]
        name, _ = _names(case)
        rows.append([name, training, *(_percent(_share(case[setting])) for setting in SHORT_SETTINGS)])
    table = _table(["model", "training", *SHORT_SETTINGS], rows)
    before, rest = page.read_text(encoding="utf-8").split(SHORT_MARKS[0])
    _, after = rest.split(SHORT_MARKS[1])
    return before + SHORT_MARKS[0] + "\n".join(table) + "\n" + SHORT_MARKS[1] + after


def _read(path: Path) -> dict[tuple[str, str, str], Settings]:
    cases: dict[tuple[str, str, str], Settings] = {}
    for row in rows_of(path):
        cases.setdefault((row["model"], row["training"], row["dtype"]), {})[row["setting"]] = row
    return cases


def _freed_table(cases: list[Settings]) -> list[str]:
    head = ["model", "dtype", "stock, MiB", *(f"freed: {setting}" for setting in SETTINGS)]
    head += [*(f"error: {setting}" for setting in SETTINGS[1:]), "bf16", ""]
    rows = []
    for case in cases:
        stock = case["stock"]
        shares = [_percent(_share(case[setting])) for setting in SETTINGS]
        errors = [_percent(float(case[setting]["gradient_error"])) for setting in SETTINGS[1:]]
        own = _percent(float(stock["gradient_error"])) if stock["gradient_error"] else ""
        rows.append([*_names(case), f"{int(stock['held_bytes']) / 2**20:.0f}", *shares, *errors, own, _note(case)])
    return _table(head, rows)


def _again_table(cases: list[Settings]) -> list[str]:
    rows = []
    for case in cases:
        shares = [_percent(_share(case[setting])) for setting in AGAIN]
        recomputed = int(case[AGAIN[1]]["recomputed_bytes"]) / int(case["stock"]["held_bytes"])
        errors = [_percent(float(case[setting]["gradient_error"])) for setting in AGAIN]
        rows.append([*_names(case), *shares, _percent(recomputed), *errors])
    head = [*(f"freed: {setting}" for setting in AGAIN), "recomputed", *(f"error: {setting}" for setting in AGAIN)]
    return _table(["model", "dtype", *head], rows)


def _parts_table(cases: list[Settings]) -> list[str]:
    rows = []
    for case in cases:
        row = case["3 bits"]
        shares = [int(row[column]) / int(case["stock"]["held_bytes"]) for column in PARTS.values()]
        rows.append([*_names(case), *(_percent(share) if abs(share) >= 5e-5 else "" for share in shares)])
        rows[-1].append(_percent(_share(row)))
    return _table(["model", "dtype", *PARTS, "all"], rows)


def _table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    rule = ["---", "---", *["---:"] * (len(head) - 2)]
    return ["| " + " | ".join(cells) + " |" for cells in (head, rule, *rows)]


def _names(case: Settings) -> list[str]:
    row = case["stock"]
    layers = "" if row["layers"] == "all" else f", {row['layers']} layers"
    return [row["model"] + layers, row["dtype"]]


def _note(case: Settings) -> str:
    little = [setting for setting in SETTINGS if case[setting]["note"]]
    if len(little) == len(SETTINGS):
        return "little gain here"
    return f"little gain here: {', '.join(little)}" if little else ""


def _share(row: dict[str, str]) -> float:
    return float(row["freed_share"])


def _percent(share: float) -> str:
    percent = 100 * share
    if not percent:
        return "0"
    digits = 0 if abs(percent) >= 9.95 else 1 if abs(percent) >= 0.095 else 2
    return f"{percent:.{digits}f} %"


def _lessons(cases: dict[tuple[str, str, str], Settings]) -> list[str]:
    rows = [row for case in cases.values() for setting, row in case.items() if setting != "stock"]

    def of_stock(row: dict[str, str], nbytes: int) -> float:
        return nbytes / int(cases[row["model"], row["training"], row["dtype"]]["stock"]["held_bytes"])

    def shares(training: str, column: str = "freed_bytes", setting: str = "3 bits") -> dict[str, float]:
        """By model, in bfloat16; largest first."""
        wanted = {"training": training, "dtype": "bfloat16", "setting": setting}
        chosen = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
        found = {row["model"]: of_stock(row, int(row[column])) for row in chosen}
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def listed(found: dict[str, float], low: float = 0.005, high: float = 1.0) -> str:
        return ", ".join(f"{model} {_percent(v)}" for model, v in found.items() if low <= v < high) or "none"

    def off(row: dict[str, str]) -> float:
        return of_stock(row, abs(int(row["predicted_held_bytes"]) - int(row["held_bytes"])))

    def where(row: dict[str, str]) -> str:
        return ", ".join(row[key] for key in ("model", "training", "dtype", "setting"))

    full, lora = shares("full"), shares("LoRA")
    furthest, least = max(rows, key=off), min(rows, key=_share)
    more = "No setting holds more than stock does"
    if _share(least) < 0:
        more = f"{where(least)} holds {_percent(-_share(least))} more than stock does"
    lessons = [
        f"At 3 bits in bfloat16, full training frees {listed(full, -1)}; LoRA {listed(lora, -1)}.",
        f"Little gain here, under 5 %: {listed(full, -1, 0.05)} in full training, {listed(lora, -1, 0.05)} under LoRA. "
        "relu keeps its output, which is what the next convolution or linear layer keeps as well: of ResNet only the "
        "last relu, before the pooling, has anything to free.",
        "The number of bits matters only where *codes* has something. In full training the next layer keeps the output "
        "of a GELU or SiLU, and the bit beside it is enough, whatever `bits` says "
        f"({listed(shares('full', 'output_bit_bytes'))}). Under LoRA the next layer is frozen, and its adapter's "
        "dropout stands between: nobody keeps the output, and the codes are all that is left of the activation.",
        "Computed again, exactly: "
        + listed(shares("full", "recomputed_bytes", AGAIN[1]))
        + " in full training, "
        + listed(shares("LoRA", "recomputed_bytes", AGAIN[1]))
        + " under LoRA.",
        "Activations written in primitives run as one node, and what they kept in between never comes to be: "
        f"{listed(shares('full', 'native_op_bytes'))}.",
        f"Masks are exact, and under LoRA much of the gain ({listed(shares('LoRA', 'masks_bytes'))}): each adapter has "
        "a dropout of its own. On the CPU, as here, stock PyTorch keeps a mask in the model's dtype; on CUDA in one "
        "byte an element, a half of that in bfloat16, a quarter in float32.",
        "A language model's loss keeps the log-probabilities of the whole vocabulary, mostly in float32. They weigh "
        "more beside these few layers than beside all of them: whole, gpt2, tinyllama-1.1b and t5-small gain more than "
        "the table says.",
        "The error of all gradients together is that of the largest ones. In ConvNeXt, whose layer scale starts at "
        "1e-6, and in EfficientNet they lie behind every activation, so that an error near 0 says little of the rest: "
        "by single parameters it was up to 14 % (ConvNeXt, LoRA) and 25 % in the median (EfficientNet, full training) "
        "at 3 bits, in float32, with 2 images of 96 x 96.",
        "In deep convolutional networks with random weights and a batch of 4, BatchNorm passes every rounding on, and "
        "bfloat16's own error is of the gradients' size. A setting's error is against the gradients of its own dtype.",
        f"`fewbit.profile` had predicted the held bytes within {_percent(off(furthest))} of stock's (furthest: "
        f"{where(furthest)}). {more}.",
    ]
    return ["## What it teaches", "", *(f"- {lesson}" for lesson in lessons)]
