"""DTensors: the part that lies on this rank is coded, and what is decoded is a DTensor again.

NOTE [ Parts ]

Tensor parallelism hands an activation a DTensor: a tensor of which each rank has a part, `_local_tensor`, and a `_spec`
that says which. A pointwise function of it is that function of the parts, on each rank for itself, and its node saves a
DTensor. So all that is done with a saved tensor is done with its part, and nothing is communicated. Ranks need not
agree: each has its own codes, and may keep what another codes.

A *partial* DTensor, whose parts have yet to be summed, is none of that: DTensor sums it before the function is applied,
and what is saved is another tensor than the call's input. Such calls are kept exact.

NOTE [ Two counters ]

(measured, torch 2.13) A change in place is counted for the tensor through which it is made: `y.mul_(2)` for the
DTensor, `y.to_local().mul_(2)` for its part; neither sees the other's, although the memory is one. `y.detach()` shares
the DTensor's counter and has a part with a new one. So what is relied upon is held by `detached`, and its version is
`version_of`. What is kept, and no more, goes as the DTensor, whose counter is the one that autograd checks.

One change is counted nowhere, by autograd neither: of what `y.redistribute()` returns where nothing is to be moved, a
third DTensor on the same memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

KEPT = "wrapper subclasses are kept"


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
    if type(t) is Tensor or not is_dtensor(t):
        return t
    part: Tensor = t._local_tensor  # type: ignore[attr-defined]
    return part


def is_in_parts(t: Any) -> bool:
    """Whether this is a DTensor whose parts are those of the true tensor."""
    return is_dtensor(t) and type(t._local_tensor) is Tensor and not _is_partial(t)


def _is_partial(t: Any) -> bool:
    return any(placement.is_partial() for placement in t.placements)


def reason_to_keep(t: Any) -> str:
    """Why a tensor of another class than torch's own is kept."""
    if not is_dtensor(t):
        return f"a {type(t).__name__}: {KEPT}"
    if _is_partial(t):
        return "a partial DTensor: its parts are summed first"
    if not is_in_parts(t):
        return f"a DTensor whose part is a {type(t._local_tensor).__name__}: {KEPT}"
    return "a DTensor, of which only activations of one node are coded"


def detached(t: Tensor) -> Tensor:
    """The tensor detached; what is changed in place of either is counted for both."""
    result = t.detach()
    if type(t) is not Tensor and is_dtensor(t):
        result._local_tensor = local_part(t).detach()  # type: ignore[attr-defined]
    return result


def version_of(t: Tensor) -> int:
    """How often the tensor, or its part, was changed in place: NOTE [ Two counters ].

    >>> version_of(torch.zeros(3).add_(1))
    1
    """
    version: int = t._version
    return version if type(t) is Tensor or not is_dtensor(t) else version + local_part(t)._version


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
        kept: what `hook` returns for a part that it keeps: then the DTensor is, for the sake of its counter.
    """

    def __init__(self, hook: Callable[[Tensor], Any], x: Any, keep: Callable[[Tensor], Any], kept: type) -> None:
        self._hook = hook
        self._mesh, self._placements = x.device_mesh, x.placements
        self._keep = keep
        self._kept = kept

    def __call__(self, t: Any) -> Any:
        if not is_dtensor(t) or t.device_mesh != self._mesh or t.placements != self._placements:
            return self._keep(t)
        packed = self._hook(t._local_tensor)
        return self._keep(t) if isinstance(packed, self._kept) else Whole(packed, t)
