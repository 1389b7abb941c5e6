"""DTensors: the part that lies on this rank is coded, and what is decoded is a DTensor again.

NOTE [ Parts ]

Tensor parallelism hands an activation a DTensor: a tensor of which each rank has a part, `_local_tensor`, and a `_spec`
that says which. A pointwise function of it is that function of the parts, on each rank for itself, and its node saves a
DTensor. So all that is done with a saved tensor is done with its part, and nothing is communicated. Ranks need not
agree: each has its own codes, and may keep what another codes.

A *partial* DTensor, whose parts have yet to be summed, is none of that: DTensor sums it before the function is applied,
and what is saved is another tensor than the call's input. Such calls are kept exact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def is_dtensor(t: object) -> bool:
    """Whether this is a DTensor; nothing of torch.distributed is imported to tell."""
    kind = type(t)
    return kind is not Tensor and kind.__name__ == "DTensor" and kind.__module__.startswith("torch.distributed.")


def local_part(t: Tensor) -> Tensor:
    """The part of a DTensor that lies on this rank; any other tensor itself.

    >>> x = torch.zeros(3)
    >>> local_part(x) is x
    True
    """
    part: Tensor = t._local_tensor if is_dtensor(t) else t  # type: ignore[attr-defined]
    return part


def is_in_parts(t: Any) -> bool:
    """Whether this is a DTensor whose parts are those of the true tensor."""
    return is_dtensor(t) and type(t._local_tensor) is Tensor and not any(p.is_partial() for p in t.placements)


class Whole:
    """A packed object of a part, and what makes a DTensor of the part."""

    __slots__ = ("__weakref__", "_kind", "_packed", "_spec")

    def __init__(self, packed: Any, t: Any) -> None:
        self._packed = packed
        self._kind = type(t)
        self._spec = t._spec

    def unpack(self) -> Tensor:
        """The DTensor."""
        part = self._packed.unpack()
        with torch._C.DisableTorchFunction():
            whole: Tensor = self._kind(part, self._spec, requires_grad=False)
            return whole


class PartHook:
    """A pack hook that hands another one the parts of what a call with a DTensor saves.

    Args:
        hook: the pack hook of the part.
        x: the call's input.
        keep: the pack hook of what is saved in other parts than the input.
    """

    def __init__(self, hook: Callable[[Tensor], Any], x: Any, keep: Callable[[Tensor], Any]) -> None:
        self._hook = hook
        self._mesh, self._placements = x.device_mesh, x.placements
        self._keep = keep

    def __call__(self, t: Any) -> Any:
        if not is_dtensor(t) or t.device_mesh != self._mesh or t.placements != self._placements:
            return self._keep(t)
        return Whole(self._hook(t._local_tensor), t)
