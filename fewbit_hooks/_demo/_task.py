"""What the two tasks have in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

QUICK_STEPS = 4
QUICK_EXAMPLES = 64
"""`--quick` shows that everything runs, not what it is good for."""


@dataclass(frozen=True)
class Settings:
    """The options of the demo, as the command line has them."""

    task: str = "digits"
    bits: tuple[int, ...] = (3, 2)
    epochs: int | None = None
    seed: int = 0
    device: str = "cpu"
    quick: bool = False
    cache: Path | None = None
    output: Path = Path("fewbit-demo.png")


@dataclass(frozen=True)
class Recipe:
    """How a task is trained: AdamW, one cycle of the learning rate."""

    epochs: int
    batch: int
    learning_rate: float
    weight_decay: float
    warmup: float = 0.2


@dataclass(frozen=True)
class Data:
    """Inputs and their labels, one row an example."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, rows: Tensor | slice) -> Data:
        return Data(self.x[rows], self.y[rows])

    def to(self, device: str) -> Data:
        return Data(self.x.to(device), self.y.to(device))

    def batches(self, size: int, order: Tensor | None = None) -> Iterator[Data]:
        """In that order, without the last incomplete one; or as they stand, all of them."""
        if order is None:
            yield from (self[start : start + size] for start in range(0, len(self), size))
        else:
            yield from (self[rows] for rows in order.split(size) if len(rows) == size)


@dataclass(frozen=True)
class Task:
    """A model, data and a recipe; `model()` makes it anew, as the global seed has it."""

    title: str
    model: Callable[[], nn.Module]
    train: Data
    test: Data
    recipe: Recipe

    def steps(self, settings: Settings) -> int:
        epochs = self.recipe.epochs if settings.epochs is None else settings.epochs
        return QUICK_STEPS if settings.quick else epochs * (len(self.train) // self.recipe.batch)

    def step_batches(self, settings: Settings) -> Iterator[Data]:
        """The batch of every step: the same in every run with this seed."""
        generator = torch.Generator().manual_seed(settings.seed)
        size, steps = self.recipe.batch, self.steps(settings)
        for _ in range(math.ceil(steps / (len(self.train) // size))):
            for batch in self.train.batches(size, torch.randperm(len(self.train), generator=generator)):
                if steps > 0:
                    yield batch.to(settings.device)
                steps -= 1


def load(settings: Settings) -> Task:
    """The task by its name."""
    if settings.task == "digits":
        from ._digits import digits

        return digits()
    from ._reviews import reviews

    return reviews(settings.cache)
