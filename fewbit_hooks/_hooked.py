"""Saved-tensor hooks: which there are, and ours around a call.

NOTE [ Who else asks for hooks ]

Selective checkpointing, a dispatch mode, keeps tensors of its own. From torch 2.14 on it looks which saved-tensor hooks
there are, to hand them these tensors, too, or to warn that it will. Ours are for what one node saves: it passes over
them, to those that were there before, as they say of themselves what the checkpoint's own say.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

import torch
from torch import Tensor

from . import ops

Pack: TypeAlias = Callable[[Tensor], Any]
Unpack: TypeAlias = Callable[[Any], Tensor]
Hooks: TypeAlias = tuple[Pack, Unpack]
"""A pack hook and its unpack hook."""


def innermost_hooks() -> Hooks | None:
    """The pack hook and the unpack hook that autograd would call now; None where there are none."""
    top = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return (top[0], top[1]) if top is not None else None


def hooked(pack: Pack, unpack: Unpack) -> AbstractContextManager[None]:
    """Our hooks, around a call."""
    if ops.seen_by_modes():
        return _passed_over(pack, unpack)
    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


@contextlib.contextmanager
def allowed() -> Iterator[None]:
    """Hooks of ours may be put here, where others must not: to ask a call what it saves changes nothing of theirs.

    A backward, which saves nothing, may run where `torch.autograd.graph.disable_saved_tensors_hooks` is on.
    """
    message = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message()
    if message is None:
        yield
        return
    torch._C._autograd._saved_tensors_hooks_enable()
    try:
        yield
    finally:
        torch._C._autograd._saved_tensors_hooks_disable(message)


class _PassedOver:
    """A pack hook as selective checkpointing knows its own; see the note above."""

    __slots__ = ("_pack", "_user_hooks")
    _checkpoint_internal = True

    def __init__(self, pack: Pack) -> None:
        self._pack = pack
        self._user_hooks = innermost_hooks()

    def __call__(self, t: Tensor) -> Any:
        return self._pack(t)

    def release(self) -> None:
        """The node keeps its hook, which is to keep nobody else's."""
        self._user_hooks = None


@contextlib.contextmanager
def _passed_over(pack: Pack, unpack: Unpack) -> Iterator[None]:
    hook = _PassedOver(pack)
    try:
        with torch.autograd.graph.saved_tensors_hooks(hook, unpack):
            yield
    finally:
        hook.release()
