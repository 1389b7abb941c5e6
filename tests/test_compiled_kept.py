"""In a compiled graph nothing is approximated beside what the graph keeps anyway."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fewbit_hooks as fewbit

from .test_compiled import TanhGELU

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # Dynamo's and inductor's own
    pytest.mark.usefixtures("fresh_dynamo"),
]

ROWS, WIDTH = 6, 40
SIZE = 4 * ROWS * WIDTH
"""Bytes of a hidden activation, which has more than all else."""
CODES = 3 * SIZE // 32


class Net(nn.Module):
    """What is between two linear layers, of which the second may be frozen."""

    def __init__(self, between: Callable[[Tensor], Tensor], *, frozen: bool = False, wide: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(3, wide * WIDTH), nn.Linear(WIDTH, 2)
        self.second.weight.requires_grad_(not frozen)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))


def ran(net: nn.Module, scoped: bool, *, exact: bool = False, **options: Any) -> tuple[int, list[Tensor]]:
    """Bytes of hidden activations and codes that the compiled graph keeps, and the gradients."""
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, **{"backend": "inductor", **options})
    torch.manual_seed(1)
    x = torch.randn(ROWS, 3)
    net.zero_grad(set_to_none=True)
    with fewbit.scope(bits=3, min_bytes=SIZE, exact=exact) if scoped else contextlib.nullcontext():
        y = compiled(x)
    parameters = {p.data_ptr() for p in net.parameters()}
    kept = [t for t in y.grad_fn.saved_tensors if t.data_ptr() not in parameters]
    y.square().sum().backward()
    held = {t.data_ptr(): t.nbytes for t in kept if t.nbytes == SIZE or t.dtype == torch.uint8}
    return sum(held.values()), [p.grad for p in net.parameters() if p.grad is not None]


def error(found: list[Tensor], expected: list[Tensor]) -> float:
    pairs = list(zip(found, expected, strict=True))
    return float(sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)) ** 0.5


def as_it_is(module: Any, _: Any) -> Any:
    """A backend that runs what Dynamo traced."""
    return module.forward


ACTIVATIONS = [nn.GELU(), nn.SiLU(), nn.Mish(), nn.Tanh(), TanhGELU()]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    ("act", "backend"),
    [*[(act, "aot_eager") for act in ACTIVATIONS], (nn.GELU(), "inductor"), (TanhGELU(), "inductor")],
    ids=str,
)
def test_before_a_trainable_layer_the_input_alone_is_kept_and_the_gradient_is_exact(
    act: nn.Module, backend: str, exact: bool
) -> None:
    _, expected = ran(Net(act), scoped=False, backend=backend)
    held, found = ran(Net(act), scoped=True, backend=backend, exact=exact)
    assert held == SIZE  # stock keeps the output, too, which the matrix product reads
    assert error(found, expected) < 1e-6


@pytest.mark.parametrize(
    "between",
    [
        F.gelu,
        lambda x: F.gelu(x) + 1,
        lambda x: F.relu(F.gelu(x)),  # which compares
        lambda x: torch.sin(F.silu(x).to(torch.float64)).float(),
    ],
    ids=["alone", "sum", "comparison", "another dtype"],
)
def test_before_a_frozen_layer_codes_are_kept(between: Callable[[Tensor], Tensor]) -> None:
    _, expected = ran(Net(between, frozen=True), scoped=False, backend="aot_eager")
    _, found = ran(Net(between, frozen=True), scoped=True, backend="aot_eager")
    assert 1e-3 < error(found, expected) < 0.2


@pytest.mark.parametrize("backend", ["aot_eager", as_it_is])
@pytest.mark.parametrize("frozen", [False, True])
def test_with_exact_nothing_is_approximated_whoever_compiles(frozen: bool, backend: Any) -> None:
    before, expected = ran(Net(F.gelu, frozen=frozen), scoped=False, backend="aot_eager")
    net = Net(F.gelu, frozen=frozen)
    torch.manual_seed(1)
    with fewbit.scope(exact=True, min_bytes=0):
        y = torch.compile(net, backend=backend, fullgraph=True)(torch.randn(ROWS, 3))
    y.square().sum().backward()
    assert error([p.grad for p in net.parameters() if p.grad is not None], expected) < 1e-6
    assert before == (1 if frozen else 2) * SIZE


@pytest.mark.parametrize(("frozen", "backend"), [(False, "inductor"), (False, "aot_eager"), (True, "aot_eager")])
def test_a_gated_product_is_exact_and_keeps_what_it_kept(frozen: bool, backend: str) -> None:
    def gated(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    before, expected = ran(Net(gated, frozen=frozen, wide=2), scoped=False, backend=backend)
    held, found = ran(Net(gated, frozen=frozen, wide=2), scoped=True, backend=backend)
    assert held <= before
    assert error(found, expected) < 1e-6


@pytest.mark.parametrize(
    "between",
    [
        lambda x: F.gelu(x).view(2, -1, WIDTH).transpose(0, 1)[:, 0],
        lambda x: x * F.gelu(x),
        lambda x: F.gelu(x).mul_(x),
    ],
    ids=["views", "its input is read", "changed in place"],
)
@pytest.mark.parametrize("exact", [False, True])
def test_it_is_exact_whoever_reads_it_and_through_views(between: Callable[[Tensor], Tensor], exact: bool) -> None:
    _, expected = ran(Net(between), scoped=False, backend="aot_eager")
    _, found = ran(Net(between), scoped=True, backend="aot_eager", exact=exact)
    assert error(found, expected) < 1e-6


def test_where_the_output_is_what_an_activation_keeps_nothing_is_computed_again() -> None:
    net = Net(torch.tanh)
    with fewbit.scope(bits=3, min_bytes=0):
        y = torch.compile(net, backend="aot_eager")(torch.randn(ROWS, 3))
    kept = [t for t in y.grad_fn.saved_tensors if t.nbytes == SIZE]
    assert len(kept) == 1
    assert kept[0].abs().max() < 1  # what tanh gave


def test_one_graph_has_both() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nets = nn.Sequential(Net(F.gelu), nn.Linear(2, 3), Net(F.silu, frozen=True))

        def forward(self, x: Tensor) -> Tensor:
            return self.nets(x)

    held, _ = ran(Both(), scoped=True)
    assert held == SIZE + CODES


@pytest.mark.parametrize("frozen", [False, True])
def test_a_backend_that_traces_no_backward_has_codes(frozen: bool) -> None:
    _, expected = ran(Net(F.gelu, frozen=frozen), scoped=False, backend="aot_eager")
    net = Net(F.gelu, frozen=frozen)
    torch.manual_seed(1)
    with fewbit.scope(bits=3, min_bytes=0):
        y = torch.compile(net, backend=as_it_is, fullgraph=True)(torch.randn(ROWS, 3))
    y.square().sum().backward()
    assert 1e-3 < error([p.grad for p in net.parameters() if p.grad is not None], expected) < 0.2


def test_beside_a_budget_and_with_sizes_that_change() -> None:
    expected = [ran(Net(F.gelu), scoped=False)[1], ran(Net(F.gelu), scoped=False, dynamic=True)[1]]
    with torch._functorch.config.patch(activation_memory_budget=0.5):
        found = ran(Net(F.gelu), scoped=True)[1]
    assert error(found, expected[0]) < 1e-6
    assert error(ran(Net(F.gelu), scoped=True, dynamic=True)[1], expected[1]) < 1e-6


def test_what_a_checkpoint_says_of_an_output_stands() -> None:
    def around(x: Tensor) -> Tensor:
        return checkpoint(lambda t: F.gelu(t) * 2, x, use_reentrant=False)

    before, expected = ran(Net(around), scoped=False)
    held, found = ran(Net(around), scoped=True)
    assert held <= before
    assert error(found, expected) < 1e-6
