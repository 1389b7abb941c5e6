"""One run: the task trained with stock PyTorch or with few bits, and what that took."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F
from torch import nn

from .._compare import compare
from .._scope import scope
from ._memory import PeakMemory
from ._task import QUICK_EXAMPLES, Data, Settings, Task

MEMORY_STEPS = 5
"""Steps over which the peak is taken: all of them need the same memory, and the first also allocates AdamW's state."""


@dataclass(frozen=True)
class Result:
    """What came out of one run; `bits` is None for stock PyTorch.

    Attributes:
        losses: of every step.
        accuracy: on the test examples.
        original_bytes, stored_bytes, freed_bytes: of the recognised activations, in a step on the first batch.
        peak_bytes: the most memory that the process took; on CUDA, that torch took on the device.
        step_seconds: the median.
        relative_error, cosine: of the gradients against the exact ones, on the first batch, with the trained weights.
    """

    bits: int | None
    losses: list[float]
    accuracy: float
    original_bytes: int
    stored_bytes: int
    freed_bytes: int
    peak_bytes: int
    step_seconds: float
    relative_error: float
    cosine: float

    @property
    def name(self) -> str:
        return "stock" if self.bits is None else f"{self.bits} bit{'s' * (self.bits > 1)}"

    @property
    def held_bytes(self) -> int:
        return self.original_bytes - self.freed_bytes + self.stored_bytes


def run(task: Task, bits: int | None, settings: Settings, told: Callable[[float], None] = lambda loss: None) -> Result:
    """Train from the seed; `told` hears of every loss."""
    torch.manual_seed(settings.seed)
    model = task.model().to(settings.device).train()
    few = scope(bits, min_bytes=0)
    recipe, steps = task.recipe, task.steps(settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=max(steps, 2), pct_start=recipe.warmup
    )
    losses, seconds = [], []
    with PeakMemory(settings.device) as peak:
        for step, batch in enumerate(task.step_batches(settings)):
            if step == MEMORY_STEPS:
                peak.stop()
            start = time.perf_counter()
            optimizer.zero_grad()
            with contextlib.nullcontext() if bits is None else few:
                loss = F.cross_entropy(model(batch.x), batch.y)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))  # waits for the device
            seconds.append(time.perf_counter() - start)
            schedule.step()
            del loss
            told(losses[-1])
    accuracy = _accuracy(model, task.test[:QUICK_EXAMPLES] if settings.quick else task.test, settings.device)
    original, stored, freed = _bytes(task, model, few, settings)
    error, cosine = (0.0, 1.0) if bits is None else _gradient_error(task, model, bits, settings)
    return Result(bits, losses, accuracy, original, stored, freed, peak.nbytes, median(seconds), error, cosine)


def _accuracy(model: nn.Module, test: Data, device: str) -> float:
    model.eval()
    with torch.no_grad():
        right = sum(int((model(b.x).argmax(1) == b.y).sum()) for b in test.to(device).batches(256))
    return right / len(test)


def _bytes(task: Task, model: nn.Module, few: scope, settings: Settings) -> tuple[int, int, int]:
    """Original, stored and freed bytes of one more forward, counted by the report of the scope, which has learned."""
    batch = next(task.step_batches(settings))
    model.train()
    with few:
        loss = F.cross_entropy(model(batch.x), batch.y)
    report = few.report()
    del loss
    return report.original_bytes, report.stored_bytes, report.freed_bytes


def _gradient_error(task: Task, model: nn.Module, bits: int, settings: Settings) -> tuple[float, float]:
    """Relative error and cosine, in training mode, in which other tensors are kept than in evaluation."""
    batch = next(task.step_batches(settings))
    model.train()
    (row,) = compare(lambda: F.cross_entropy(model(batch.x), batch.y), [bits], min_bytes=0).rows
    return row.relative_error, row.cosine
