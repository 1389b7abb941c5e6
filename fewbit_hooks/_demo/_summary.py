"""What came out: a progress bar, a table, a picture."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from .._errors import FewbitError
from .._tables import human
from ._task import Settings, Task
from ._training import MEMORY_STEPS, Result

MIB = 2**20
COLOURS = ("#4d4d4d", "#1b9e77", "#d95f02", "#7570b3", "#e7298a", "#66a61e", "#e6ab02", "#a6761d", "#1f78b4")
TAIL = 10
"""Steps of which the final loss is the mean."""


@contextlib.contextmanager
def waiting(text: str) -> Iterator[None]:
    """A spinner."""
    with Console(stderr=True).status(text):
        yield


@contextlib.contextmanager
def progress(title: str, runs: int, steps: int) -> Iterator[Callable[[int | None], Callable[[float], None]]]:
    """Bars, one a run: `told = advance(bits)`, then `told(loss)` at every step."""
    console = Console(stderr=True)
    console.print(f"[bold]{title}[/bold], {runs} times {steps} steps, each time in a process of its own")
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(
        TextColumn("{task.description:>6}"), *columns, TextColumn("{task.fields[loss]}"), console=console
    ) as bar:

        def advance(bits: int | None) -> Callable[[float], None]:
            name = "stock" if bits is None else f"{bits} bit{'s' * (bits > 1)}"
            task = bar.add_task(name, total=steps, loss="")
            return lambda loss: bar.update(task, advance=1, loss=f"loss {loss:.3f}")

        yield advance


def show(task: Task, settings: Settings, results: Sequence[Result]) -> None:
    """Print the table, draw the picture."""
    console = Console()
    cuda = settings.device.startswith("cuda")
    console.print(_table(results, cuda))
    memory = (
        "allocated by torch on the device"
        if cuda
        else "resident (psutil), of a fresh process that gives back what it frees"
    )
    console.print(
        "original: what stock PyTorch keeps for activations and dropout, on one batch; stored: codes and masks; "
        f"freed: original bytes that are gone. Peak memory: {memory}, in the first {MEMORY_STEPS} steps. "
        "Gradient error: of all gradients together, on one batch, with the trained weights. Time: each in a process of "
        "its own, one after the other, so that whatever else the machine does hits one of them; and the smaller a "
        "model's operations are, the more it pays.",
        style="dim",
        highlight=False,
    )
    draw(task.title, results, settings.output, cuda)
    console.print(f"picture: {settings.output}", soft_wrap=True)


def _table(results: Sequence[Result], cuda: bool) -> Table:
    rows: list[tuple[str, Callable[[Result], str]]] = [
        ("test accuracy", lambda r: f"{100 * r.accuracy:.1f} %"),
        ("first loss", lambda r: f"{r.losses[0]:.6f}"),
        (f"final loss, mean of {TAIL} steps", lambda r: f"{final_loss(r):.4f}"),
        ("original", lambda r: human(r.original_bytes)),
        ("stored", lambda r: human(r.stored_bytes)),
        ("freed", lambda r: human(r.freed_bytes)),
        ("peak GPU memory" if cuda else "peak process memory", lambda r: human(r.peak_bytes)),
        ("time a step, median", lambda r: f"{1000 * r.step_seconds:.0f} ms"),
        ("gradient error", lambda r: f"{100 * r.relative_error:.2f} %"),
        ("cosine to stock's gradient", lambda r: f"{r.cosine:.5f}"),
    ]
    table = Table("", *(r.name for r in results))
    for column in table.columns[1:]:
        column.justify = "right"
    for name, cell in rows:
        table.add_row(name, *map(cell, results))
    return table


def final_loss(result: Result) -> float:
    tail = result.losses[-TAIL:]
    return sum(tail) / len(tail)


def draw(title: str, results: Sequence[Result], path: Path, cuda: bool = False) -> None:
    """The losses, what the activations hold for backward, and the peak."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.6), layout="constrained")
    losses, held, peak = figure.subplots(1, 3, width_ratios=[2.2, 1.1, 1.1])
    figure.suptitle(f"{title[0].upper()}{title[1:]}: stock PyTorch and few bits", x=0.01, ha="left", weight="bold")

    for result, colour in zip(results, COLOURS, strict=False):
        losses.plot(result.losses, color=colour, alpha=0.18, lw=1)
        label = f"{result.name}, test accuracy {100 * result.accuracy:.1f} %"
        above = {"ls": "--", "zorder": 3} if result.bits is None else {}  # where they coincide both are seen
        losses.plot(smooth(result.losses), color=colour, lw=2, label=label, **above)
    losses.set(title="Training loss", xlabel="step", ylim=(0, None))
    losses.margins(x=0.01)
    losses.legend(frameon=False)

    names = [result.name for result in results]
    original = [result.original_bytes / MIB for result in results]
    change = ["" if r.bits is None else f"{100 * (r.held_bytes / r.original_bytes - 1):+.0f} %" for r in results]
    held.bar_label(_bars(held, names, original, "#e4e4e4"), change, label_type="center", color="#555555")
    _label(held, _bars(held, names, [result.held_bytes / MIB for result in results]))
    held.set_title("Held for backward by\nactivations and dropout")
    _label(peak, _bars(peak, names, [result.peak_bytes / MIB for result in results]))
    peak.set_title("Peak GPU memory" if cuda else "Peak memory\nof the process")
    for axes in (held, peak):
        axes.set_ylabel("MiB")
        axes.margins(y=0.12)
    for axes in (losses, held, peak):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def check_picture(path: Path) -> None:
    """Say before the training, not after, that the picture cannot be drawn into `path`."""
    from matplotlib.figure import Figure

    formats = Figure().canvas.get_supported_filetypes()
    if not path.parent.is_dir():
        raise FewbitError(f"the picture cannot be drawn into {path}: there is no folder {path.parent}")
    if path.suffix[1:].lower() not in formats:
        raise FewbitError(f"the picture cannot be drawn into {path}: its ending must be one of {', '.join(formats)}")


def _bars(axes: Any, names: Sequence[str], heights: Sequence[float], colour: str | None = None) -> Any:
    colours = [colour] * len(names) if colour else [COLOURS[i % len(COLOURS)] for i in range(len(names))]
    return axes.bar(names, heights, color=colours, width=0.62)


def _label(axes: Any, bars: Any) -> None:
    axes.bar_label(bars, [f"{bar.get_height():.{int(bar.get_height() < 100)}f}" for bar in bars], padding=3)


def smooth(losses: Sequence[float]) -> list[float]:
    """A mean over the neighbouring steps, the nearer ones counting more; it does not lag behind.

    >>> smooth([1.0, 1.0, 1.0])
    [1.0, 1.0, 1.0]
    """
    reach = max(2, len(losses) // 30)
    smooth = []
    for i in range(len(losses)):
        near = range(max(0, i - reach), min(len(losses), i + reach + 1))
        weights = [reach + 1 - abs(i - j) for j in near]
        smooth.append(sum(w * losses[j] for w, j in zip(weights, near, strict=True)) / sum(weights))
    return smooth
