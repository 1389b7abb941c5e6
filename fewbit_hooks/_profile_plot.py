"""The picture of a profile. Imports matplotlib, so only `Profile.plot` imports it."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from ._tables import human

if TYPE_CHECKING:
    from ._profile_table import Profile

SMALL_SHARE = 0.005

MIB = 2**20
ROWS, WIDTH = 14, 36
KEPT, FREED, CODES, INK, MUTED = "#9aa5b1", "#7cc4ae", "#d95f02", "#222b34", "#66727f"


def draw(profile: Profile, path: str | PathLike[str]) -> None:
    """Left, who keeps what, and what of it a scope would free; right, what each setting would leave."""
    rows = profile.merged()
    shown = [row for row in rows[:ROWS] if row.nbytes >= SMALL_SHARE * profile.nbytes]
    bars = [(f"{row.operation}   {_short(row.module)}", row.nbytes, row.freed_bytes, row.dtype) for row in shown]
    if rest := rows[len(shown) :]:
        sums = sum(row.nbytes for row in rest), sum(row.freed_bytes for row in rest)
        bars.append((f"{len(rest)} smaller", *sums, ""))
    figure = Figure(figsize=(13, 1.9 + 0.32 * max(len(bars), 6)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.7, 1.1])
    figure.suptitle(f"{human(profile.nbytes)} kept for backward", x=0.01, ha="left", color=INK, fontsize=15)

    places = range(len(bars))
    kept = [(nbytes - freed) / MIB for _, nbytes, freed, _ in bars]
    freed = [freed / MIB for _, _, freed, _ in bars]
    left.barh(places, kept, color=KEPT, label="stays as it is")
    left.barh(places, freed, left=kept, color=FREED, label="a scope frees it")
    for place, (_, nbytes, _, dtype) in zip(places, bars, strict=True):
        share = 100 * nbytes / profile.nbytes if profile.nbytes else 0
        left.text(nbytes / MIB, place, f"  {share:.0f} %  {dtype}", va="center", color=MUTED, fontsize=8.5)
    left.set_yticks(places, [name for name, *_ in bars])
    left.invert_yaxis()
    left.set_xlim(0, 1.2 * max((nbytes for _, nbytes, *_ in bars), default=MIB) / MIB or 1)
    left.set_xlabel("MiB, each storage once")
    left.set_title("who keeps it", loc="left", color=INK, fontsize=11)

    names = ["stock", *(prediction.setting for prediction in profile.predictions)]
    codes = [0.0, *(prediction.stored_bytes / MIB for prediction in profile.predictions)]
    held = [profile.nbytes / MIB, *(prediction.held_bytes / MIB for prediction in profile.predictions)]
    others = [h - c for h, c in zip(held, codes, strict=True)]
    right.barh(names, others, color=KEPT, height=0.65)
    stored = right.barh(names, codes, left=others, color=CODES, height=0.65, label="stored in its place")
    for place, width in enumerate(held):
        change = f"  {100 * (width / held[0] - 1):+.1f} %" if place and held[0] else ""
        right.text(width, place, change, va="center", color=MUTED, fontsize=8.5)
    right.invert_yaxis()
    right.set_xlim(0, 1.25 * max(held) or 1)
    right.margins(y=0.25)
    right.set_xlabel("MiB held for backward")
    right.set_title("what a scope would leave", loc="left", color=INK, fontsize=11)
    handles = [*left.get_legend_handles_labels()[0], stored]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, labelcolor=INK)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK, labelsize=9)
    figure.savefig(path, dpi=150)


def _short(module: str) -> str:
    """The end of a path, as many names as fit: `…attention.self.query`."""
    if len(module) <= WIDTH:
        return module
    _, dot, rest = module[-WIDTH:].partition(".")
    return "…" + (rest if dot else module[-WIDTH:])
