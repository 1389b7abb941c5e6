"""Tensors of unusual kinds and layouts: coded, or kept with the reason, and then with stock's result."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fewbit_hooks as fewbit


def quiet(**settings: Any) -> fewbit.scope:
    made = fewbit.scope(min_bytes=0, **settings)
    made._warned = True
    return made


def run(make: Callable[[], Tensor], around: Any) -> tuple[Tensor, Tensor | None]:
    """gelu, and the gradient of what it was made from."""
    leaf = torch.linspace(-4, 4, 96).requires_grad_()
    with around:
        y = F.gelu(make(leaf))
    y.backward(torch.ones_like(y))
    return y.detach(), leaf.grad


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "zero stride": lambda t: t[:8, None].expand(8, 100),
    "zero stride in front": lambda t: t[:8].expand(100, 8),
    "overlapping": lambda t: t.as_strided((20, 30), (2, 1)),
    "overlapping windows": lambda t: t.unfold(0, 9, 3),
    "very large strides": lambda t: (t.new_zeros(1 << 22) + t.sum()).as_strided((4, 3), (1 << 20, 1 << 18)),
    "a slice of a large storage": lambda t: (t.new_zeros(1 << 16) + t.sum())[::4096],
    "one element of many": lambda t: (t * 1)[5:6],
    "steps of two dimensions": lambda t: (t * 1).view(8, 12)[::2, ::3],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_tensor_of_any_strides_has_the_gradient_of_its_levels(layout: Callable[[Tensor], Tensor]) -> None:
    opened = quiet(bits=8)
    y, gradient = run(layout, opened)
    stock, exact = run(layout, contextlib.nullcontext())
    assert torch.equal(y, stock)
    (row,) = opened.report().rows
    if row.bits is None:  # its codes would be no smaller than its storage
        assert row.reason == "codes would be no smaller than its storage"
        assert torch.equal(gradient, exact)
    else:
        assert row.bits == 8
        _, contiguous = run(lambda t: layout(t).contiguous(), quiet(bits=8))
        torch.testing.assert_close(gradient, contiguous)
        assert (gradient - exact).abs().max() <= 0.1 * max(1.0, float(exact.abs().max()))


def test_a_tensor_in_shared_memory_is_coded() -> None:
    def shared(t: Tensor) -> Tensor:
        return (t * 1).detach().share_memory_().requires_grad_()

    x, same = shared(torch.linspace(-4, 4, 96)), torch.linspace(-4, 4, 96).requires_grad_()
    for leaf in (x, same):
        with quiet(bits=3) as opened:
            y = F.gelu(leaf)
        assert opened.report().rows[0].bits == 3
        y.sum().backward()
    assert x.is_shared()
    assert torch.equal(x.grad, same.grad)


@pytest.mark.filterwarnings("ignore:.*quantize.*", "ignore:.*quantization.*")
def test_quantised_tensors_pass() -> None:
    q = torch.quantize_per_tensor(torch.linspace(-4, 4, 96), 0.1, 0, torch.qint8)
    expected = F.relu(q)
    with quiet(bits=3) as opened:
        F.gelu(torch.ones(8, requires_grad=True))
        assert torch.equal(F.relu(q).int_repr(), expected.int_repr())
    assert [row.activation for row in opened.report().rows] == ["gelu"]


@pytest.mark.filterwarnings("ignore:Sparse.*:UserWarning")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc], ids=str)
def test_sparse_tensors_of_each_layout_have_stocks_gradient(layout: torch.layout) -> None:
    values = torch.tensor([[0.0, 2.0, 0.0], [-3.0, 0.0, 1.0]])

    def gradient(around: Any) -> Tensor:
        leaf = values.clone().requires_grad_()
        with around:
            y = torch.relu(leaf.to_sparse(layout=layout))
        y.to_dense().sum().backward()
        return leaf.grad

    opened = quiet(bits=3)
    assert torch.equal(gradient(opened), gradient(contextlib.nullcontext()))
    assert {row.reason for row in opened.report().rows} == {f"layout {str(layout).removeprefix('torch.')}"}


def test_models_of_several_dtypes_are_coded_in_each() -> None:
    def gradients(around: Any) -> list[Tensor]:
        leaf = torch.linspace(-4, 4, 96).requires_grad_()
        with around:
            y = F.gelu(leaf * 1)
            y = F.silu(y.bfloat16() * 2)
            y = torch.tanh(y.double() * 0.5)
            y = F.relu(y.half() - 0.1)
        return list(torch.autograd.grad(y.float().sum(), leaf))

    opened = quiet(bits=8)
    (coded,), (exact,) = gradients(opened), gradients(contextlib.nullcontext())
    assert {row.activation: row.bits for row in opened.report().rows} == {"gelu": 8, "silu": 8, "tanh": 8, "relu": 1}
    assert (coded - exact).abs().max() < 0.05
