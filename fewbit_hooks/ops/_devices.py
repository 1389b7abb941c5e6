"""What is made once for a device and stays there: tables; and how nobody notices."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

seen_by_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
"""How many `TorchDispatchMode`s see each call."""


OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)
"""What says nothing of that which was tried when it was raised."""


@contextlib.contextmanager
def unseen() -> Iterator[None]:
    """No mode of anybody's sees the calls of torch that are made here.

    What is asked once of a kernel is not of the step, and is not there when the step is run again: selective
    checkpointing, a mode that hands out in a second forward what it saw in the first, would hand it to another.
    """
    with contextlib.ExitStack() as without:
        without.enter_context(torch._C.DisableTorchFunction())
        if seen_by_modes():
            from torch.utils._python_dispatch import _disable_current_modes  # it imports much

            without.enter_context(_disable_current_modes())
        yield


def unnoticed() -> AbstractContextManager[Any]:
    """Nothing is recognised in what codes a tensor here, and selective checkpointing keeps none of it.

    It would hand out the codes' memory a second time, and takes what is written there for a change in place. Any other
    `TorchDispatchMode`, which may count what is allocated, sees it.
    """
    if seen_by_modes() and _selectively_checkpointed():
        return unseen()
    return torch._C.DisableTorchFunction()


def must_be_ready(x: Tensor) -> bool:
    """Whether all tables that a tensor's codes take must be made before it is coded: while it is, the host cannot wait
    for its device, or modes look on."""
    # (measured) in a step that has cooled the caches it takes 26 us to ask for a device and its hash: not on the CPU
    return not x.is_cpu or seen_by_modes() > 0


def results_may_change() -> bool:
    """Whether a `TorchDispatchMode` may give other results than torch: somebody's own, as those of torch look on."""
    return seen_by_modes() > 0 and not all(name.startswith("torch.") for name in _modules_of_modes())


def _selectively_checkpointed() -> bool:
    return "torch.utils.checkpoint" in _modules_of_modes()


def _modules_of_modes() -> set[str]:
    modes = map(torch._C._get_dispatch_stack_at, range(torch._C._len_torch_dispatch_stack()))
    return {type(mode).__module__ for mode in modes}


@contextlib.contextmanager
def waiting(device: torch.device) -> Iterator[None]:
    """The host may wait for the device here, and nothing is recognised, recorded or seen; what is made is kept, and so
    an ordinary tensor under `torch.inference_mode()`, too.

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
        with unseen(), torch.inference_mode(False), torch.no_grad():
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


def stream_of(t: Tensor) -> Any:
    """What work on `t` is ordered by now."""
    return torch.cuda.current_stream(t.device) if t.is_cuda else None


def is_captured(t: Tensor) -> bool:
    """Whether what is done with `t` becomes a part of a CUDA graph; at less cost than to ask `capturing`."""
    return t.is_cuda and torch.cuda.is_current_stream_capturing()


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured, so that the host cannot wait for the device."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()
