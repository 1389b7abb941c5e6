"""Running again in backward what the forward ran, so that it gives the same bits.

What is run again is pointwise, a cast, a norm: it depends on its arguments and on autocast alone, never on a random
number. Autocast is that of the forward, as backward has none, or another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
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
    with torch._C.DisableTorchFunction(), torch.set_grad_enabled(grad), as_it_was:
        yield
