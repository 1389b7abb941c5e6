"""Locks that a forked process finds open.

A worker of a DataLoader, say, is a copy of its process with one thread alone: what another held when it was forked
would be held in it for ever.
"""

from __future__ import annotations

import os
import threading
import weakref

_locks: weakref.WeakSet[threading.RLock] = weakref.WeakSet()


def lock() -> threading.RLock:
    """One that its holder may take again: what the garbage collector finds meanwhile runs on this very thread."""
    made = threading.RLock()
    _locks.add(made)
    return made


def _open() -> None:
    for held in _locks:
        held._at_fork_reinit()  # type: ignore[attr-defined]


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_open)
