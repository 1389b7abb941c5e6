"""`engine="fused"` on the CPU, a node of our own in PyTorch's place: the same result, the same bytes, one product."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fewbit_hooks as fewbit
from fewbit_hooks import _learning, _plan, ops

from .conftest import held_for_backward, quiet

CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "celu": lambda x: F.celu(x, alpha=0.7),
    "elu": lambda x: F.elu(x, alpha=1.3),
    "gelu": F.gelu,
    "hardswish": F.hardswish,
    "mish": F.mish,
    "selu": F.selu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "softplus": lambda x: F.softplus(x, beta=2.0, threshold=3.0),
    "tanh": torch.tanh,
}
PARAMETERS: dict[str, dict[str, float]] = {
    "celu": {"alpha": 0.7},
    "elu": {"alpha": 1.3},
    "softplus": {"beta": 2.0, "threshold": 3.0},
}
OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "two values": F.relu6,
    "several saved tensors": F.logsigmoid,
    "in place": lambda x: F.silu(x, inplace=True),
    "a mask": F.dropout,
    "16 bits": lambda x: F.gelu(x.bfloat16()),
    "float32 under autocast": lambda x: F.softplus(x.bfloat16()),
    "more than its storage": lambda x: F.gelu((x[:1, :1] * 1).expand(64, 64)),
}
OURS = "_CodedBackward"
FLOATS = [torch.float32, torch.float64]


class Called(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Kept(nn.Module):
    """The activation's output is a factor, which the product keeps."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.function(x) * weight


@pytest.mark.parametrize("bits", [1, 3, 8])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_the_result_is_stocks_and_the_gradient_is_grad_times_the_level(
    name: str, dtype: torch.dtype, bits: int
) -> None:
    x, grad = 3 * torch.randn(33, 31, dtype=dtype), torch.randn(33, 31, dtype=dtype)
    leaf = x.clone().requires_grad_()
    with fewbit.scope(bits, min_bytes=0, engine="fused"):
        y = CALLS[name](leaf * 1)
    assert y.grad_fn.name() == OURS
    assert torch.equal(y, CALLS[name](x))
    (result,) = torch.autograd.grad(y, leaf, grad)
    level = fewbit.codebook(name, bits, **PARAMETERS.get(name, {})).derivative(x)
    assert torch.equal(result, grad * level.to(dtype))


@pytest.mark.parametrize("view", [lambda t: t.t(), lambda t: t[:, ::2], lambda t: t.chunk(2, 1)[1], lambda t: t[0, 0]])
def test_any_strides(view: Callable[[Tensor], Tensor]) -> None:
    leaf = torch.randn(24, 40).requires_grad_()
    x = view(leaf * 1)
    with quiet(engine="fused"):
        y = F.gelu(x)
    assert (y.grad_fn.name(), y.stride()) == (OURS, F.gelu(x).stride())
    grad = torch.randn(y.shape[::-1]).t() if y.dim() == 2 else torch.randn(y.shape)
    (result,) = torch.autograd.grad(y, x, grad)
    assert torch.equal(result, grad * fewbit.codebook("gelu", 3).derivative(x.detach()))


@pytest.mark.parametrize("name", OTHERS)
def test_what_it_cannot_do_is_left_to_the_hooks(name: str) -> None:
    leaf = torch.randn(64, 64).requires_grad_()

    def gradient(engine: str) -> Tensor:
        torch.manual_seed(1)
        around = torch.autocast("cpu", torch.bfloat16) if "autocast" in name else contextlib.nullcontext()
        with quiet(engine=engine), around:
            y = OTHERS[name](leaf * 1)
        assert y.grad_fn.name() != OURS
        return torch.autograd.grad(y.sum(), leaf)[0]

    assert torch.equal(gradient("fused"), gradient("hooks"))


@pytest.mark.parametrize("engine", ["auto", "hooks"])
def test_other_engines_leave_the_node_to_pytorch(engine: str) -> None:
    x = torch.randn(64, 64).requires_grad_()
    with fewbit.scope(engine=engine, min_bytes=0):
        assert F.gelu(x * 1).grad_fn.name() == "GeluBackward0"


def test_it_needs_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "is_installed", lambda package: False)
    with fewbit.scope(engine="fused", min_bytes=0):
        assert F.gelu(torch.randn(64, 64).requires_grad_() * 1).grad_fn.name() == OURS


@pytest.mark.parametrize("exact", [False, True])
def test_what_is_computed_again_is_bit_for_bit_what_it_was(exact: bool) -> None:
    model = nn.Sequential(
        nn.Linear(32, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 8)
    )
    x = torch.randn(16, 32)

    def learned(engine: str) -> tuple[float, list[Tensor]]:
        opened = fewbit.scope(3, exact=exact, recompute=True, min_bytes=0, engine=engine)
        for _ in range(4):
            model.zero_grad()
            with opened:
                loss = model(x).square().sum()
            held = sum(held_for_backward(loss, [*model.parameters(), x], tables=False).values())
            loss.backward()
        return held, [p.grad for p in model.parameters() if p.grad is not None]

    held, gradients = learned("fused")
    held_by_hooks, others = learned("hooks")
    assert held == held_by_hooks
    for mine, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def steps(engine: str, module: nn.Module, *inputs: Tensor, backward: bool = True) -> list[Any]:
    """What the books say of three steps, what is held, and the last gradients."""
    opened, found = fewbit.scope(3, min_bytes=0, engine=engine), []
    for _ in range(3):
        leaves = [t.clone().requires_grad_() for t in inputs]
        with opened:
            y = module(*(leaf * 1 for leaf in leaves))
        gc.collect()
        report = opened.report()
        rows = [(row.activation, row.bits, row.module, row.original_bytes, row.freed_bytes) for row in report.rows]
        held = sum(held_for_backward(y, tables=False).values())
        found.append((rows, report.stored_bytes, held))
        gradients = torch.autograd.grad(y.sum(), leaves)
    return [found, *gradients]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kept", [True, False], ids=["output kept", "output not kept"])
@pytest.mark.parametrize("name", CALLS)
def test_what_is_kept_and_counted_is_what_the_hooks_keep_and_count(name: str, kept: bool, dtype: torch.dtype) -> None:
    x, weight = torch.randn(64, 32, dtype=dtype), torch.randn(64, 32, dtype=dtype)
    module = Kept(CALLS[name]) if kept else nn.Sequential(Called(CALLS[name]), nn.Flatten(0))
    inputs = (x, weight) if kept else (x,)
    books, *gradients = steps("fused", module, *inputs)
    same_books, *others = steps("hooks", module, *inputs)
    assert books == same_books
    for mine, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_an_output_that_nobody_else_keeps_any_more_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_learning, "LOOK_AGAIN", 3)
    model = nn.Sequential(nn.Linear(32, 64), Called(F.gelu), nn.Linear(64, 8))
    opened, found = fewbit.scope(3, min_bytes=0, engine="fused"), []
    for step in range(12):
        if step == 4:
            model[2] = nn.Flatten(0)  # which keeps nothing
        with opened:
            y = model(torch.randn(16, 32))
        found.append(opened.report().rows[0].bits)
        y.sum().backward()
    assert (found[0], found[3], found[5]) == (3, 1, 3)


def test_what_holds_no_finite_numbers_is_kept() -> None:
    x = torch.randn(64, 64)
    x[3, 4] = float("inf")
    leaf = x.requires_grad_()
    with quiet(engine="fused") as memory:
        y = F.silu(leaf * 1)
    assert y.grad_fn.name() != OURS
    assert [(row.bits, row.reason) for row in memory.report().rows] == [(None, _plan.NOT_FINITE)]
    (grad,) = torch.autograd.grad(y.sum(), leaf)
    assert grad.isnan().sum() == 1


@pytest.mark.parametrize("kept", [True, False])
def test_gradients_by_the_batch(kept: bool) -> None:
    module, x, weight = Kept(F.silu), torch.randn(8, 16), torch.randn(8, 16)
    if not kept:
        module = Called(F.silu)
    opened = fewbit.scope(3, min_bytes=0, engine="fused")
    for _ in range(3):
        leaf = x.clone().requires_grad_()
        with opened:
            y = module(leaf * 1, *([weight.requires_grad_()] if kept else []))
        y.sum().backward(retain_graph=True)
    grads = torch.randn(5, 8, 16)
    (batched,) = torch.autograd.grad(y, leaf, grads, is_grads_batched=True, retain_graph=True)
    for grad, mine in zip(grads, batched, strict=True):
        torch.testing.assert_close(mine, torch.autograd.grad(y, leaf, grad, retain_graph=True)[0])


def test_a_call_that_raises_is_not_counted() -> None:
    x = torch.randn(64, 64).requires_grad_()
    with quiet(engine="fused") as memory:
        with pytest.raises(RuntimeError):
            F.gelu(x * 1, approximate="none of these")
        F.silu(x * 1)
    assert [(row.activation, row.calls) for row in memory.report().rows if row.bits] == [("silu", 1)]


def test_the_result_may_be_changed_in_place() -> None:
    leaf = torch.randn(64, 64).requires_grad_()
    with fewbit.scope(3, min_bytes=0, engine="fused"):
        y = F.gelu(leaf * 1)
        y += 1
        y.view(-1)[:7].mul_(2)
    (result,) = torch.autograd.grad(y.sum(), leaf)
    grad = torch.ones(64 * 64)
    grad[:7] = 2
    assert torch.equal(result, grad.view(64, 64) * fewbit.codebook("gelu", 3).derivative(leaf.detach()))


def test_it_is_no_leaf_and_has_no_other_inputs() -> None:
    leaf = torch.randn(64, 64).requires_grad_()
    with fewbit.scope(3, min_bytes=0, engine="fused"):
        y = F.gelu(leaf)
    ((accumulate, _),) = [edge for edge in y.grad_fn.next_functions if edge[0] is not None]
    assert accumulate.variable is leaf


def test_nothing_of_it_is_left_when_the_graph_is_gone() -> None:
    x = torch.randn(64, 64).requires_grad_()
    gc.collect()
    gc.disable()
    try:
        with fewbit.scope(3, min_bytes=0, engine="fused"):
            y = F.gelu(x * 1)
        node = weakref.ref(y.grad_fn)
        y.sum().backward()
        del y
        assert node() is None
    finally:
        gc.enable()
