"""What is made once for a device and stays there: tables."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


@contextlib.contextmanager
def waiting(device: torch.device) -> Iterator[None]:
    """The host may wait for the device here, and nothing is recognised or recorded.

    In the end it has waited: what was made here is there for every stream, and not only for the one that it was made
    on.

    >>> with waiting(torch.device("cpu")):
    ...     table = torch.arange(8) / 8

    Raises:
        RuntimeError: PyTorch's, while a CUDA graph is captured, see `capturing`.
    """
    cuda = device.type == "cuda"
    mode = torch.cuda.get_sync_debug_mode() if cuda else 0
    try:
        if mode:
            torch.cuda.set_sync_debug_mode(0)
        with torch._C.DisableTorchFunction(), torch.no_grad():
            yield
            if cuda:
                torch.cuda.current_stream(device).synchronize()
    finally:
        if mode:
            torch.cuda.set_sync_debug_mode(mode)


def put(table: Tensor, device: torch.device) -> Tensor:
    """The table on the device, there for every stream; itself where it lies there."""
    if table.device == device:
        return table
    with waiting(device):
        return table.to(device)


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured, so that the host cannot wait for the device."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
