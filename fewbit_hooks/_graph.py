"""Autograd's graph: its nodes, and what they have saved."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor


def nodes(tensors: Iterable[Tensor], since: int = -1) -> Iterator[Any]:
    """The nodes that made the tensors and all that they were made of, each once, in an order that depends on the graph
    alone.

    >>> import torch
    >>> w = torch.ones(2, requires_grad=True)
    >>> [node.name() for node in nodes([w.exp().sum()])]
    ['SumBackward0', 'ExpBackward0', 'torch::autograd::AccumulateGrad']

    Args:
        since: the number of a node; it, and those made before it, are left out with all that leads to them.
    """
    stack: list[Any] = [t.grad_fn for t in tensors]
    seen: set[Any] = set()
    while stack:
        node = stack.pop()
        if node is None or node in seen or node._sequence_nr() <= since:
            continue
        seen.add(node)
        yield node
        stack.extend(following for following, _ in node.next_functions)


def latest_node(tensors: Iterable[Tensor]) -> int:
    """The number of the latest node that made one of them; -1 where none did."""
    return max((t.grad_fn._sequence_nr() for t in tensors if t.grad_fn is not None), default=-1)


def saved_since(before: int, results: Iterable[Tensor]) -> Iterator[Tensor]:
    """What a call's nodes have saved, which was made without hooks.

    Args:
        before: `latest_node` of its arguments, before the call: it may change them in place.
    """
    for node in nodes(results, before):
        for name in dir(node):
            if name.startswith("_saved_") and isinstance(t := getattr(node, name), Tensor):
                yield t
