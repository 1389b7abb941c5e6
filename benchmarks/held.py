"""What autograd really holds for a backward, counted from outside: the graph is walked, the library is not asked."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

CONSTANTS = ("_activations", "_codebook", "_inverse", "_plan", "_policy")
"""Modules of the library whose objects hold tables, made once for an activation and a dtype: of no step, like a
parameter."""


def held_for_backward(root: Tensor, not_counted: Iterable[Tensor] = (), *, tables: bool = True) -> dict[int, int]:
    """Bytes by storage that the graph of `root` holds.

    >>> x = torch.randn(8, 4, requires_grad=True)
    >>> sum(held_for_backward((x * x).tanh().sum(), [x]).values())  # tanh keeps its output, 32 elements of 4 bytes
    128

    Every storage counts once, whole, however many nodes keep it, and whether a node keeps it as it is, as what a pack
    hook made of it, or as an attribute of a custom Function's `ctx`.

    Args:
        root: the loss.
        not_counted: tensors whose storages are somebody else's: parameters and buffers, which the model keeps.
        tables: count the decoding tables, too. They are constants that all packed objects of a kind share, and larger
            than the tensors of a tiny model.
    """
    others = {_part(t).untyped_storage()._cdata for t in not_counted}
    walk = _Walk(tables)
    nodes: list[Any] = [root.grad_fn]
    visited: set[Any] = {None}
    while nodes:
        node = nodes.pop()
        if node in visited:
            continue
        visited.add(node)
        for name in dir(node):
            if name.startswith("_raw_saved_"):
                raw = getattr(node, name)
                for saved in raw if isinstance(raw, (list, tuple)) else (raw,):
                    walk.count(saved.data)  # what a pack hook returned, or the tensor itself
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            walk.count(vars(node))
        nodes.extend(following for following, _ in node.next_functions)
    return {storage: nbytes for storage, nbytes in walk.held.items() if storage not in others}


class _Walk:
    """Adds up tensors, and all that containers and objects of the library refer to."""

    def __init__(self, tables: bool) -> None:
        self.held: dict[int, int] = {}
        self._tables = tables
        self._seen: set[int] = set()

    def count(self, value: Any) -> None:
        if isinstance(value, Tensor):
            storage = _part(value).untyped_storage()
            self.held[storage._cdata] = storage.nbytes()
        elif id(value) not in self._seen and (isinstance(value, (list, tuple, dict)) or _is_the_librarys(value)):
            self._seen.add(id(value))
            table = None if self._tables else getattr(value, "rows", None)
            for part in gc.get_referents(value):
                if part is not table:
                    self.count(part)


def _part(t: Any) -> Tensor:
    """What of a DTensor lies here: its own storage has the size of the whole, and no memory."""
    part: Tensor = getattr(t, "_local_tensor", t)
    return part


def _is_the_librarys(value: Any) -> bool:
    package, _, module = type(value).__module__.partition(".")
    return package == "fewbit_hooks" and module not in CONSTANTS
