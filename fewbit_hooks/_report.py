"""The report: what a step saved, stored and freed, as text, markdown, dict and picture."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any

from . import _modules
from ._errors import FewbitError
from ._ledger import CODES, HELD, OUTPUT, RECOMPUTED, Ledger
from ._policy import disabled
from ._tables import align, human, markdown


@dataclass(frozen=True)
class ReportRow:
    """One activation, in one module, treated in one way.

    Attributes:
        activation, module: the activation's name; the path of the module that called it, empty outside of any.
        calls: how often it was called.
        bits: bits an element; None where it was kept.
        original_bytes: storages that stock autograd would have kept for these calls, each counted once in a report.
        stored_bytes: codes.
        freed_bytes: original storages that are gone.
        reason: why it was kept, or why not all of it was freed.
        how: what backward is served from: "codes"; "output", which somebody else keeps, and at most a bit; "recomputed"
            from what is kept anyway; "kept".
    """

    activation: str
    module: str
    calls: int
    bits: int | None
    original_bytes: int
    stored_bytes: int
    freed_bytes: int
    reason: str
    how: str = CODES

    @property
    def beside_output(self) -> bool:
        """The derivative is taken from the output, which somebody else keeps, and from `bits` bits an element."""
        return self.how == OUTPUT


@dataclass(frozen=True)
class Report:
    """What the latest step of a scope saved, stored and freed. `str(report)` is the table.

    >>> import torch, fewbit_hooks as fewbit
    >>> lin = torch.nn.Linear(1024, 4096)
    >>> with fewbit.scope(bits=3) as memory:
    ...     y = torch.nn.functional.silu(lin(torch.randn(256, 1024)))
    >>> report = memory.report()
    >>> print(report)
    activation  module  calls  bits  original   stored    freed
    silu        -           1     3   4.0 MiB  384 KiB  4.0 MiB
    total                   1         4.0 MiB  384 KiB  4.0 MiB
    held for backward by these calls: 384 KiB instead of 4.0 MiB (-90.6 %)

    Attributes:
        rows: by activation and module.
        steps: training steps seen by the scope; the rows are about the latest.
    """

    rows: tuple[ReportRow, ...]
    steps: int = 0

    @property
    def original_bytes(self) -> int:
        """What stock autograd would have kept for these calls, by storage."""
        return sum(row.original_bytes for row in self.rows)

    @property
    def stored_bytes(self) -> int:
        """Codes."""
        return sum(row.stored_bytes for row in self.rows)

    @property
    def freed_bytes(self) -> int:
        """Original storages that are really gone."""
        return sum(row.freed_bytes for row in self.rows)

    @property
    def held_bytes(self) -> int:
        """What is held for these calls now: the original storages that are left, and the codes."""
        return self.original_bytes - self.freed_bytes + self.stored_bytes

    @classmethod
    def from_ledger(cls, ledger: Ledger, measure_only: bool = False) -> Report:
        """Read the books of a scope."""
        rows = []
        for row in ledger.rows():
            reason = row.reason
            if row.how in (CODES, OUTPUT) and row.freed_bytes < row.original_bytes:
                reason = HELD
            rows.append(
                ReportRow(
                    row.activation,
                    _modules.path(row.module, row.model) or row.module_class,
                    row.calls,
                    row.bits,
                    row.original_bytes,
                    row.stored_bytes,
                    row.freed_bytes,
                    reason,
                    row.how,
                )
            )
        return cls(tuple(rows), ledger.steps)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings: what `json.dumps` takes."""
        return {
            "original_bytes": self.original_bytes,
            "stored_bytes": self.stored_bytes,
            "freed_bytes": self.freed_bytes,
            "held_bytes": self.held_bytes,
            "steps": self.steps,
            "rows": [asdict(row) for row in self.rows],
        }

    def __str__(self) -> str:
        if not self.rows and disabled():
            return "FEWBIT_DISABLE is set in the environment: scopes do nothing"
        if not self.rows:
            return "no recognised activation has been called with an input that requires grad"
        table = [_HEAD, *self._cells(), self._total()]
        lines = align(table, right=_NUMBERS)
        if self.original_bytes:
            change = 100 * (self.held_bytes / self.original_bytes - 1)
            lines.append(
                f"held for backward by these calls: {human(self.held_bytes)} instead of {human(self.original_bytes)} "
                f"({change:+.1f} %)"
            )
        signs = {_bits(row) for row in self.rows}
        lines += [f"{sign}: {meaning}" for sign, meaning in _SIGNS.items() if sign in signs]
        return "\n".join(lines)

    def to_markdown(self) -> str:
        """The table in markdown."""
        return markdown([_HEAD, *self._cells(), self._total()], right=_NUMBERS)

    _repr_markdown_ = to_markdown  # what a notebook shows

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw original, held and freed bytes by activation and module into a file (PNG, SVG, PDF).

        Raises:
            FewbitError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise FewbitError('plot() needs matplotlib: pip install "fewbit-hooks[plot]"') from None
        rows = self._merged()
        names = [f"{row.activation}  {row.module}" + ("  (kept)" if row.bits is None else "") for row in rows]
        figure = Figure(figsize=(9, 1.6 + 0.3 * len(names)), layout="constrained")
        axes = figure.add_subplot()
        mib = 2**20
        left = [0.0] * len(names)
        for label, colour, values in (
            ("codes", "#d95f02", [row.stored_bytes / mib for row in rows]),
            ("still held", "#7f7f7f", [(row.original_bytes - row.freed_bytes) / mib for row in rows]),
            (
                "freed",
                "#a6d8c8",
                [(row.freed_bytes - min(row.stored_bytes, row.freed_bytes)) / mib for row in rows],
            ),
        ):
            axes.barh(names, values, left=left, label=label, color=colour)
            left = [a + b for a, b in zip(left, values, strict=True)]
        axes.invert_yaxis()
        axes.set_xlabel("MiB held for backward")
        axes.set_title(f"{human(self.original_bytes)} in stock PyTorch, {human(self.held_bytes)} now")
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, dpi=150)

    def _merged(self) -> list[ReportRow]:
        """The rows with those of like layers (`encoder.layer.0.mlp`, `encoder.layer.1.mlp`) added up, largest first."""
        merged: dict[tuple[object, ...], ReportRow] = {}
        for row in self.rows:
            module = re.sub(r"\b\d+\b", "*", row.module)
            key = row.activation, module, row.bits, row.how, row.reason
            other = merged.get(key)
            if other is not None:
                row = ReportRow(
                    row.activation,
                    module,
                    row.calls + other.calls,
                    row.bits,
                    row.original_bytes + other.original_bytes,
                    row.stored_bytes + other.stored_bytes,
                    row.freed_bytes + other.freed_bytes,
                    row.reason,
                    row.how,
                )
            merged[key] = row
        return sorted(merged.values(), key=lambda row: -row.original_bytes)

    def _cells(self) -> list[list[str]]:
        return [
            [
                row.activation,
                row.module or "-",
                str(row.calls),
                _bits(row),
                human(row.original_bytes),
                human(row.stored_bytes),
                human(row.freed_bytes),
                row.reason,
            ]
            for row in self._merged()
        ]

    def _total(self) -> list[str]:
        calls = sum(row.calls for row in self.rows)
        sizes = [human(n) for n in (self.original_bytes, self.stored_bytes, self.freed_bytes)]
        return ["total", "", str(calls), "", *sizes, ""]


def _bits(row: ReportRow) -> str:
    if row.bits is None:
        return "kept"
    return {OUTPUT: f"y+{row.bits}", RECOMPUTED: "again"}.get(row.how, str(row.bits))


_SIGNS = {
    "y+0": "the derivative is taken from the output, which something else keeps",
    "y+1": "the derivative is taken from the output, which something else keeps, and 1 bit an element",
    "again": "computed again in backward, bit for bit",
}
_HEAD = ["activation", "module", "calls", "bits", "original", "stored", "freed", "reason"]
_NUMBERS = range(2, 7)
"""The columns of numbers, which stand to the right, under their heads."""
