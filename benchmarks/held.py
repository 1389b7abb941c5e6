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


def held_for_backward(root: Tensor, not_counted: Iterable[Tensor] = ()) -> dict[int, int]:
    """Bytes by storage that the graph of `root` holds.

    >>> x = torch.randn(8, 4, requires_grad=True)
    >>> sum(held_for_backward((x * x).tanh().sum(), [x]).values())  # tanh keeps its output, 32 elements of 4 bytes
    128

    Every storage counts once, whole, however many nodes keep it, and whether a node keeps it as it is, as what a pack
    hook made of it, or as an attribute of a custom Function's `ctx`.

    Args:
        root: the loss.
        not_counted: tensors whose storages are somebody else's: parameters and buffers, which the model keeps.
    """
    others = {t.untyped_storage()._cdata for t in not_counted}
    held: dict[int, int] = {}
    seen: set[int] = set()
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
                    _count(saved.data, held, seen)  # what a pack hook returned, or the tensor itself
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            _count(vars(node), held, seen)
        nodes.extend(following for following, _ in node.next_functions)
    return {storage: nbytes for storage, nbytes in held.items() if storage not in others}


def _count(value: Any, held: dict[int, int], seen: set[int]) -> None:
    """A tensor, or all that a container or an object of the library refers to."""
    if isinstance(value, Tensor):
        held[value.untyped_storage()._cdata] = value.untyped_storage().nbytes()
    elif id(value) not in seen and (isinstance(value, (list, tuple, dict)) or _is_the_librarys(value)):
        seen.add(id(value))
        for part in gc.get_referents(value):
            _count(part, held, seen)


def _is_the_librarys(value: Any) -> bool:
    package, _, module = type(value).__module__.partition(".")
    return package == "fewbit_hooks" and module not in CONSTANTS
