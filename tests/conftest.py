"""Shared by the tests: nothing is left open, what autograd really holds, and a small model worth coding."""

from __future__ import annotations

import contextlib
import gc
import os
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import fewbit_hooks as fewbit
from csv_rows import rows_of as rows_of
from fewbit_hooks import _activations, _again, _calls, _compiled, _register, _sites, _stack
from held import held_for_backward as held_for_backward

if not torch.cuda.is_available():
    # Triton reads it when a kernel is defined: set here, nothing in this process has imported triton before
    os.environ["TRITON_INTERPRET"] = "1"

# What Inductor compiled it finds again by the code of a graph alone. In a process that could not try out the vectors
# of its processor, as happens on a busy machine, that is code without, whose last places are others.
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:  # of the first process of a run; its workers find it there
    _inductors_cache = tempfile.TemporaryDirectory(prefix="fewbit-hooks-", ignore_cleanup_errors=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = _inductors_cache.name

# Thousands of small calls: on a busy machine a second thread makes them three times slower. test_ops.py uses all.
torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def collections_are_quick() -> Iterator[None]:
    """What was there before a module's tests, two million objects once the compiler is imported, is not looked through
    each time that a test collects its garbage."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def nothing_is_left_open() -> Iterator[None]:
    """No test leaves a scope, a mode or a hook behind."""
    torch.manual_seed(0)
    _compiled.traced = False  # as in a process in which nothing was compiled
    forget_what_was_learned()
    modes = torch._C._len_torch_function_stack()
    yield
    assert fewbit.active() is None
    assert not _stack.entries()
    assert torch._C._len_torch_function_stack() == modes
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Nothing was compiled before, or counted, and nothing that is compiled is left."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def forget_what_was_learned() -> None:
    """A scope that is made now learns from the beginning, and not on from others of its settings."""
    _sites._learned.clear()


@pytest.fixture
def registered_for_one_test_only() -> Iterator[None]:
    """What the test registers is forgotten."""
    registries: list[Any] = [_activations._registry, _calls.RECOGNISED, _register._registered]
    before = [r.copy() for r in registries]
    yield
    for registry, content in zip(registries, before, strict=True):
        registry.clear()
        registry.update(content)


@pytest.fixture
def mlp() -> nn.Sequential:
    """GELU, the input of which nobody else keeps."""
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 8))


class Names(TorchFunctionMode):
    """Another library's mode: the names of the calls that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


def normed(*more: nn.Module) -> nn.Sequential:
    """The same with a norm and a tanh, and with further layers between."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.GELU(), *more, nn.Linear(16, 3), nn.Tanh())


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Torch works with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def quiet(**settings: Any) -> fewbit.scope:
    """A scope that may turn out to have compressed nothing."""
    made = fewbit.scope(**{"min_bytes": 0, **settings})
    made._warned = True
    return made


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
