"""The profile as text, markdown, dict and picture."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from os import PathLike
from typing import Any

from ._errors import FewbitError
from ._predict import Prediction
from ._tables import align, human, markdown

SMALL_SHARE = 0.005
"""Rows of less than this share of the bytes are added up at the end of the text."""

_HEAD = ["operation", "module", "dtype", "tensors", "bytes", "share", "under a scope", "also kept by"]
_NUMBERS = range(3, 6)
"""The columns of numbers, which stand to the right."""


@dataclass(frozen=True)
class ProfileRow:
    """The storages that one operation in one module keeps, with the same sharers and the same treatment.

    Attributes:
        operation, module: of the first node that keeps them; the module's path is empty outside of any.
        dtype: of the saved tensors.
        storages, nbytes: how many, and their bytes.
        shared_with: the (operation, module) of the other nodes that keep them.
        few_bits: what a scope would do: "3 bits", "computed again", "kept: ..."; empty where it would not look.
        freed_bytes: what a scope would free of them.
    """

    operation: str
    module: str
    dtype: str
    storages: int
    nbytes: int
    shared_with: tuple[tuple[str, str], ...]
    few_bits: str
    freed_bytes: int


@dataclass(frozen=True)
class Profile:
    """What autograd keeps of a step. `str(profile)` is the table.

    Attributes:
        rows: by operation, module and dtype, largest first.
        predictions: what would be held at 1 to 4 bits, with `exact=True`, and with `recompute=True`.
        own_bytes: parameters and buffers that nodes keep: the model's own, not counted.
        opaque: custom autograd Functions: name -> (nodes, bytes seen). What else they keep cannot be looked into.
        notes: what else was not seen.
    """

    rows: tuple[ProfileRow, ...]
    predictions: tuple[Prediction, ...]
    own_bytes: int
    opaque: Mapping[str, tuple[int, int]]
    notes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """What autograd keeps, by storage."""
        return sum(row.nbytes for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings: what `json.dumps` takes."""
        return {
            "nbytes": self.nbytes,
            "own_bytes": self.own_bytes,
            "rows": [
                {**asdict(row), "shared_with": [{"operation": o, "module": m} for o, m in row.shared_with]}
                for row in self.rows
            ],
            "predictions": [asdict(prediction) for prediction in self.predictions],
            "opaque": [{"name": name, "nodes": n, "seen_bytes": b} for name, (n, b) in self.opaque.items()],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        table = [_HEAD, *self._cells(), self._total()]
        lines = align(table, right=_NUMBERS)
        lines += ["", *align([_PREDICTED, *self._predicted()], right=_PREDICTED_NUMBERS), *self._remarks()]
        return "\n".join(lines)

    def to_markdown(self) -> str:
        """The tables in markdown."""
        first = markdown([_HEAD, *self._cells(), self._total()], right=_NUMBERS)
        second = markdown([cells[:-1] for cells in (_PREDICTED, *self._predicted())], right=_PREDICTED_NUMBERS)
        return "\n\n".join([first, second, *self._remarks()])

    _repr_markdown_ = to_markdown  # what a notebook shows

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw what is kept, by operation, and what few bits would leave of it, into a file (PNG, SVG, PDF).

        Raises:
            FewbitError: matplotlib is not installed.
        """
        try:
            from ._profile_plot import draw
        except ImportError:
            raise FewbitError('plot() needs matplotlib: pip install "fewbit-hooks[plot]"') from None
        draw(self, path)

    def _remarks(self) -> list[str]:
        remarks = [
            f"cannot look into {name} ({nodes} nodes): {human(seen)} by save_for_backward are counted, what else it "
            "keeps is not"
            for name, (nodes, seen) in self.opaque.items()
        ]
        if self.own_bytes:
            remarks.append(f"not counted: {human(self.own_bytes)} of parameters and buffers, which the model keeps")
        return [*remarks, *self.notes]

    def merged(self) -> list[ProfileRow]:
        """The rows with those of like layers (`layer.0.mlp`, `layer.1.mlp`) added up, largest first."""
        merged: dict[tuple[Any, ...], ProfileRow] = {}
        for row in self.rows:
            row = replace(
                row,
                module=_like(row.module),
                shared_with=tuple(dict.fromkeys((operation, _like(module)) for operation, module in row.shared_with)),
            )
            key = row.operation, row.module, row.dtype, row.shared_with, row.few_bits
            if (other := merged.get(key)) is not None:
                row = replace(
                    row,
                    storages=row.storages + other.storages,
                    nbytes=row.nbytes + other.nbytes,
                    freed_bytes=row.freed_bytes + other.freed_bytes,
                )
            merged[key] = row
        return sorted(merged.values(), key=lambda row: -row.nbytes)

    def _cells(self) -> list[list[str]]:
        rows = self.merged()
        large = [row for row in rows if row.nbytes >= SMALL_SHARE * self.nbytes]
        cells = [
            [
                row.operation,
                row.module or "-",
                row.dtype,
                str(row.storages),
                human(row.nbytes),
                self._share(row.nbytes),
                row.few_bits,
                _sharers(row),
            ]
            for row in large
        ]
        if len(large) < len(rows):
            rest = rows[len(large) :]
            nbytes = sum(row.nbytes for row in rest)
            count = str(sum(row.storages for row in rest))
            cells.append([f"{len(rest)} smaller", "", "", count, human(nbytes), self._share(nbytes), "", ""])
        return cells

    def _total(self) -> list[str]:
        count = sum(row.storages for row in self.rows)
        return ["total", "", "", str(count), human(self.nbytes), self._share(self.nbytes), "", ""]

    def _predicted(self) -> list[list[str]]:
        return [
            [p.setting, human(p.freed_bytes), human(p.stored_bytes), human(p.held_bytes), self._change(p), ""]
            for p in self.predictions
        ]

    def _share(self, nbytes: int) -> str:
        return f"{100 * nbytes / self.nbytes:.1f} %" if self.nbytes else "-"

    def _change(self, prediction: Prediction) -> str:
        return f"{100 * (prediction.held_bytes / self.nbytes - 1):+.1f} %" if self.nbytes else "-"


_PREDICTED = ["a scope of", "frees", "stores", "leaves", "change", ""]
_PREDICTED_NUMBERS = range(1, 5)


def _like(module: str) -> str:
    return re.sub(r"\b\d+\b", "*", module)


def _sharers(row: ProfileRow) -> str:
    """`linear key, linear value`: the last name of each module, and no more than two of them."""
    names = list(dict.fromkeys(f"{operation} {_last(module)}".rstrip() for operation, module in row.shared_with))
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def _last(module: str) -> str:
    return next((part for part in reversed(module.split(".")) if part != "*"), "")
