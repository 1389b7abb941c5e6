"""What a trial run changes, given back: the random number generators, and the buffers of the modules that ran."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@contextlib.contextmanager
def generators_restored() -> Iterator[None]:
    """Give the random number generators back as they were: torch's (every device), numpy's and Python's."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the state that the user's code shares
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


@contextlib.contextmanager
def buffers_restored() -> Iterator[None]:
    """Give the buffers of every module that runs back as they were before it ran."""
    saved: dict[int, tuple[Tensor, Tensor]] = {}

    def remember(module: nn.Module, _: Any) -> None:
        for buffer in _new_buffers(module.buffers(), saved):
            saved[id(buffer)] = buffer, buffer.detach().clone()

    hook = nn.modules.module.register_module_forward_pre_hook(remember)
    try:
        yield
    finally:
        hook.remove()
        with torch.no_grad():
            for buffer, before in saved.values():
                if not torch.equal(buffer, before):  # a write would spoil graphs that keep the buffer for backward
                    buffer.copy_(before)


def _new_buffers(buffers: Iterable[Tensor], saved: dict[int, Any]) -> list[Tensor]:
    return [buffer for buffer in buffers if id(buffer) not in saved]
