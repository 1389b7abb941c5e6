"""Running again in backward what the forward ran, so that it gives the same bits.

What is run again is pointwise, a cast, a norm: it depends on its arguments and on autocast alone, never on a random
number. Autocast is that of the forward, as backward has none, or another.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch


class Autocast(NamedTuple):
    """The state of autocast on a device.

    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     Autocast.of("cpu")
    Autocast(device='cpu', enabled=True, dtype=torch.bfloat16)
    """

    device: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def of(cls, device: str) -> Autocast:
        """As it is now."""
        return cls(device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))


@contextlib.contextmanager
def replay(autocast: Autocast, *, grad: bool = False) -> Iterator[None]:
    """Run torch as in a forward under that autocast, out of sight of modes.

    Args:
        grad: record what is run, to differentiate it.
    """
    as_it_was: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if Autocast.of(autocast.device) != autocast:
        # without a cache: casts that the forward of another step would be given must not come from here
        as_it_was = torch.autocast(autocast.device, autocast.dtype, autocast.enabled, cache_enabled=False)
    normal = torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext()
    with torch._C.DisableTorchFunction(), normal, torch.set_grad_enabled(grad), as_it_was:
        yield


def untraced(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The function as it ran in the forward: a compiled backward would make another of it, which saves other tensors
    and may differ in the last places."""
    return torch.compiler.disable(function) if _is_compiled_autograd() else function


def when_backward_ends(call: Callable[[], None]) -> bool:
    """Call this when the backward that runs on this thread is over; False where none does, or none that would."""
    if _is_compiled_autograd() or torch._C._current_graph_task_id() == -1:
        return False
    torch.autograd.Variable._execution_engine.queue_callback(call)
    return True


def _is_compiled_autograd() -> bool:
    """Whether the backward is a compiled graph: (measured, torch 2.13) asked to call back, Dynamo fails where it traces
    the unpack hook, and the engine forgets it where the hook runs as it is."""
    module = sys.modules.get("torch._dynamo.compiled_autograd")
    return torch.compiler.is_compiling() or getattr(module, "in_compiled_autograd_region", False)
