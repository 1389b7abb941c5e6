"""Shared by the tests: what autograd really holds, and a small model whose activations are worth coding."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewbit_hooks as fewbit
from fewbit_hooks import _again, _hooks, _masks, _recipes, _recompute, _stack

# Thousands of small calls: on a busy machine a second thread makes them three times slower. test_ops.py uses all.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def nothing_is_left_open() -> Iterator[None]:
    """No test leaves a scope, a mode or a hook behind."""
    torch.manual_seed(0)
    modes = torch._C._len_torch_function_stack()
    yield
    assert fewbit.active() is None
    assert not _stack.entries()
    assert torch._C._len_torch_function_stack() == modes
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None


@pytest.fixture
def mlp() -> nn.Sequential:
    """GELU, the input of which nobody else keeps."""
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 8))


PACKED = (
    _hooks.Beside,
    _hooks.Kept,
    _hooks.Packed,
    _masks.PackedMask,
    _masks.WaitingMask,
    _recipes.Computed,
    _recipes.Leaf,
    _recipes.Recipe,
    _recipes._Other,
    _recompute.Recomputed,
)


def treatment(y: Tensor) -> str:
    """What a scope made of the module that returned `y`: "codes" of one node, run "again", or "stock"."""
    if y.grad_fn.name() == "_CodedBackward":
        return "codes"
    nodes = [y.grad_fn]
    for _ in range(4):
        for node in nodes:
            raw = [getattr(node, name) for name in dir(node) if name.startswith("_raw_saved_")]
            if any(isinstance(saved.data, _again.Numbered) for saved in raw):
                return "again"
        nodes = [following for node in nodes for following, _ in node.next_functions if following is not None]
    return "stock"


def held_for_backward(root: Tensor, parameters: Any = (), *, tables: bool = True) -> dict[int, int]:
    """Bytes by storage that the graph of `root` holds, counted from outside by walking it.

    `SavedTensor.data` is what a pack hook returned, or the tensor itself where no hook was at work.

    Args:
        tables: count the decoding tables, too. They are constants that all packed objects of a kind share, and larger
            than the tensors of a tiny model.
    """
    not_counted = {p.untyped_storage()._cdata for p in parameters}
    held: dict[int, int] = {}
    nodes, seen = [root.grad_fn], {None}
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        raw = [getattr(node, name) for name in dir(node) if name.startswith("_raw_saved_")]
        for saved in [s for r in raw for s in (r if isinstance(r, (list, tuple)) else [r])]:
            _count(saved.data, held, tables)
        for tensor in getattr(node, "saved_tensors", ()):  # of a custom Function
            _count(tensor, held, tables)
        _count(getattr(node, "beside", None), held, tables)  # of an activation that is run as one node
        nodes.extend(following for following, _ in node.next_functions)
    return {storage: nbytes for storage, nbytes in held.items() if storage not in not_counted}


def _count(data: Any, held: dict[int, int], tables: bool) -> None:
    if isinstance(data, Tensor):
        held[data.untyped_storage()._cdata] = data.untyped_storage().nbytes()
    elif data is not None:
        table = None if tables else getattr(data, "rows", None)
        for part in gc.get_referents(data):
            if isinstance(part, (Tensor, list, tuple, *PACKED)) and part is not table:
                _count(part, held, tables)
