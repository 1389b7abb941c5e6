"""Storages: who else holds one, and weak references to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.multiprocessing import reductions

_expired: Callable[[int], bool] = cast(Any, torch.UntypedStorage)._expired
_let_go: Callable[[int], None] = cast(Any, torch.UntypedStorage)._free_weak_ref
_revived: Callable[[int], torch.UntypedStorage | None] = cast(Any, torch.UntypedStorage)._new_with_weak_ptr


class StorageWeakRef(reductions.StorageWeakRef):
    """Torch's, at fewer Python frames: a step makes and asks dozens of them.

    >>> t = torch.zeros(3)
    >>> ref = StorageWeakRef(t.untyped_storage())
    >>> found = ref.expired()
    >>> del t
    >>> found, ref.expired()
    (False, True)
    """

    __slots__ = ()

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.cdata = storage._weak_ref()
        self._free_weak_ref = _let_go

    def expired(self) -> bool:
        """Whether the storage is freed."""
        return _expired(self.cdata)

    def is_empty(self) -> bool:
        """The same, or its memory is: `storage.resize_(0)`."""
        storage = _revived(self.cdata)
        return storage is None or not storage.nbytes()


def is_allocated(t: Tensor) -> bool:
    """Whether its memory is there: FSDP frees a unit's parameters when its forward is over."""
    return t.numel() == 0 or t.untyped_storage().nbytes() > 0


def owners(t: Tensor) -> int:
    """How many tensors, the caller's included, lie on the storage of `t`."""
    count: int = torch._C._storage_Use_Count(t.untyped_storage()._cdata)
    return count - 1  # the Python object of the storage
