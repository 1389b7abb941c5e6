"""`compare()`: the gradient error of few bits against exact, on the user's own step."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ._errors import FewbitError, FewbitTypeError, FewbitWarning
from ._graph import nodes
from ._learning import AGREE
from ._restore import buffers_restored, generators_restored
from ._scope import scope
from ._tables import align, human, markdown

_NUMBERS = range(1, 6)
"""The columns of the table that hold numbers, which stand to the right."""


@dataclass(frozen=True)
class ComparisonRow:
    """The gradients of all parameters together under `bits`, beside the exact ones.

    Attributes:
        bits: as given to the scope.
        cosine: of the angle between the two gradients.
        relative_error: the norm of their difference over that of the exact one.
        loss: the loss; equal to the exact one's, as the forward is.
        original_bytes, held_bytes: what stock autograd keeps for the recognised calls, and what the scope holds.
    """

    bits: Any
    cosine: float
    relative_error: float
    loss: float
    original_bytes: int
    held_bytes: int


@dataclass(frozen=True)
class Comparison:
    """The result of `compare()`. `str(comparison)` is the table.

    Attributes:
        rows: one for each number of bits.
        exact_loss: the loss of the exact step.
        repeat_error: relative error of the exact step's gradients against a repetition of itself; not 0 where the step
            is not deterministic, and then the floor of what can be told.
    """

    rows: tuple[ComparisonRow, ...]
    exact_loss: float
    repeat_error: float

    def __str__(self) -> str:
        return "\n".join(align(self._table(), right=_NUMBERS))

    def to_markdown(self) -> str:
        """The table in markdown."""
        return markdown(self._table(), right=_NUMBERS)

    _repr_markdown_ = to_markdown  # what a notebook shows

    def _table(self) -> list[list[str]]:
        head = ["bits", "cosine", "relative error", "loss", "original", "held"]
        cells = [
            [
                str(row.bits),
                f"{row.cosine:.6f}",
                f"{100 * row.relative_error:.2f} %",
                f"{row.loss:.6g}",
                human(row.original_bytes),
                human(row.held_bytes),
            ]
            for row in self.rows
        ]
        exact = ["exact", "1", f"{100 * self.repeat_error:.2f} %", f"{self.exact_loss:.6g}", "", ""]
        return [head, *cells, exact]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings."""
        return {**asdict(self), "rows": [asdict(row) for row in self.rows]}


def compare(step: Callable[[], Tensor], bits: Any = (1, 2, 3, 4), **options: Any) -> Comparison:
    """How far the gradients of few bits are from the exact ones, on a step of yours.

    >>> import torch, fewbit_hooks as fewbit
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 1))
    >>> x = torch.randn(128, 64)
    >>> result = fewbit.compare(lambda: model(x).square().mean(), bits=[2, 4], min_bytes=0)
    >>> [row.cosine > 0.99 for row in result.rows]
    [True, True]

    The step runs exactly, exactly again (to see whether it repeats itself), and three times for each number of bits
    (the last, when the scope has learned what is kept, counts), each time from the same state of the random number
    generators. All norms are of all leaves that require grad together, in float64.

    Args:
        step: makes the forward and returns the loss, a scalar tensor; it must not call `backward()` or an optimizer.
        bits: what `scope(bits=...)` takes, or a list of such.
        options: the other arguments of `scope`.

    Returns:
        A `Comparison`.

    Raises:
        FewbitTypeError: the step is no function, or did not return a scalar tensor with a graph.
        FewbitError: the step's graph has no leaf that requires grad.

    Restored afterwards: the random number generators of torch (every device), numpy and Python, and the buffers of
    every module that ran (BatchNorm's statistics). Gradients are not accumulated: `.grad` is not touched.
    """
    if not callable(step):
        raise FewbitTypeError(f"compare() takes a function without arguments that returns the loss, got {step!r}")
    settings = list(bits) if isinstance(bits, (list, tuple, range)) else [bits]
    opened = [scope(b, **options) for b in settings]  # a wrong argument is told before anything runs
    with generators_restored(), buffers_restored(), scope(bits=None):
        exact_loss, exact = _gradients(step)
    with generators_restored(), buffers_restored(), scope(bits=None):
        _, again = _gradients(step)
    repeat_error = _compare(exact, again)[1]
    if repeat_error:
        warnings.warn(
            f"fewbit_hooks.compare: the step does not repeat itself: two exact runs differ by {100 * repeat_error:.3g} "
            "%. Give every run the same batch; errors below that cannot be told.",
            FewbitWarning,
            stacklevel=2,
        )
    rows = []
    for b, few in zip(settings, opened, strict=True):
        for _ in range(AGREE + 1):  # the scope first learns what is kept; the last run counts
            with generators_restored(), buffers_restored(), few:
                loss, gradients = _gradients(step)
        cosine, error = _compare(exact, gradients)
        report = few.report()
        rows.append(ComparisonRow(b, cosine, error, loss, report.original_bytes, report.held_bytes))
    return Comparison(tuple(rows), exact_loss, repeat_error)


def _gradients(step: Callable[[], Tensor]) -> tuple[float, list[Tensor | None]]:
    with torch.enable_grad():
        loss = step()
    if not isinstance(loss, Tensor) or loss.numel() != 1 or loss.grad_fn is None:
        raise FewbitTypeError(
            f"the step must return its loss, a scalar tensor with a graph, and not call backward(); got {_what(loss)}"
        )
    leaves = _leaves(loss)
    if not leaves:
        raise FewbitError("the loss depends on no leaf that requires grad")
    return float(loss.detach()), list(torch.autograd.grad(loss.sum(), leaves, allow_unused=True))


def _what(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}" + ("" if value.grad_fn else " without a graph")
    return repr(value)


def _leaves(loss: Tensor) -> list[Tensor]:
    """The leaves of the loss's graph, in an order that depends on the graph alone."""
    variables = (getattr(node, "variable", None) for node in nodes([loss]))
    return [variable for variable in variables if isinstance(variable, Tensor)]


def _compare(exact: list[Tensor | None], other: list[Tensor | None]) -> tuple[float, float]:
    """Cosine and relative error of all gradients together, in float64."""
    dot = exact_square = other_square = difference = 0.0
    for a, b in zip(exact, other, strict=True):
        if a is None or b is None:
            continue
        a, b = a.double(), b.double()
        dot += float((a * b).sum())
        exact_square += float(a.square().sum())
        other_square += float(b.square().sum())
        difference += float((a - b).square().sum())
    if not exact_square or not other_square:
        return (1.0, 0.0) if exact_square == other_square else (0.0, math.inf if other_square else 1.0)
    return dot / math.sqrt(exact_square * other_square), math.sqrt(difference / exact_square)
