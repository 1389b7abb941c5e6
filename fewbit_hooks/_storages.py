"""Storages: who else holds one, and weak references to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.multiprocessing import reductions

_expired: Callable[[int], bool] = cast(Any, torch.UntypedStorage)._expired
_let_go: Callable[[int], None] = cast(Any, torch.UntypedStorage)._free_weak_ref


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


def owners(t: Tensor) -> int:
    """How many tensors, the caller's included, lie on the storage of `t`."""
    count: int = torch._C._storage_Use_Count(t.untyped_storage()._cdata)
    return count - 1  # the Python object of the storage
