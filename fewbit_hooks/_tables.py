"""Tables as text: columns of equal width, or markdown; and bytes for human readers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def human(nbytes: float) -> str:
    """Bytes in KiB, MiB or GiB, three digits.

    >>> human(0), human(1023), human(1536), human(384 * 1024), human(3.25 * 2**30)
    ('0 B', '1023 B', '1.5 KiB', '384 KiB', '3.2 GiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024 or unit == "GiB":
            break
        nbytes /= 1024
    return f"{nbytes:.0f} {unit}" if unit == "B" or abs(nbytes) >= 100 else f"{nbytes:.1f} {unit}"


def align(table: Sequence[Sequence[str]], right: Iterable[int] = ()) -> list[str]:
    """The lines of a table with columns of equal width; empty last columns are left out."""
    right = frozenset(right)
    widths = [max(len(cells[i]) for cells in table) for i in range(len(table[0]))]
    if not any(cells[-1] for cells in table[1:]):
        widths.pop()
    return [
        "  ".join(
            c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=False))
        ).rstrip()
        for cells in table
    ]


def markdown(table: Sequence[Sequence[str]], right: Iterable[int] = ()) -> str:
    """A table in markdown, whose first line is its head.

    >>> print(markdown([["bits", "error"], ["3", "0.1"]], right=[1]))
    | bits | error |
    | --- | ---: |
    | 3 | 0.1 |
    """
    right = frozenset(right)
    rule = ["---:" if i in right else "---" for i in range(len(table[0]))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (table[0], rule, *table[1:]))
