"""torch.func around whole models under a scope, and what autograd can be asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, vmap

import fewbit_hooks as fewbit

from .conftest import forget_what_was_learned, normed, quiet

SETTINGS: list[dict[str, Any]] = [{"bits": 1}, {"exact": True}, {"bits": 1, "recompute": True}]

Compositions = dict[str, Callable[[nn.Module, Tensor], Any]]
COMPOSITIONS: Compositions = {
    "per-sample gradients": lambda net, x: vmap(
        grad(lambda p, row: functional_call(net, p, (row[None],)).square().sum()),
        in_dims=(None, 0),
        randomness="different",
    )(dict(net.named_parameters()), x),
    "grad of vmap": lambda net, x: grad(lambda t: vmap(net, randomness="different")(t).square().sum())(x),
    "jacfwd of jacrev": lambda net, x: jacfwd(jacrev(lambda t: net(t).sum()))(x[0]),
    "jacrev of jacfwd": lambda net, x: jacrev(jacfwd(lambda t: net(t).sum()))(x[0]),
    "hessian of vmap": lambda net, x: hessian(lambda t: vmap(net, randomness="different")(t).square().sum())(x[:2]),
    "vmap of vmap": lambda net, x: vmap(vmap(net, randomness="same"), randomness="different")(x[None]),
}


def leaves(value: Any) -> list[Tensor]:
    return torch.utils._pytree.tree_leaves(value)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, in forward mode
@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_compositions_of_transforms_are_stocks(composition: str, settings: dict[str, Any], dropout: bool) -> None:
    net, x = normed(*([nn.Dropout(0.3)] if dropout else [])), torch.randn(5, 6)
    if dropout and composition.startswith(("jac", "hessian")):
        net.eval()  # a jacobian of random draws is none
    torch.manual_seed(1)
    expected = leaves(COMPOSITIONS[composition](net, x))
    torch.manual_seed(1)
    with quiet(**settings) as opened:
        result = leaves(COMPOSITIONS[composition](net, x))
    assert all(map(torch.equal, result, expected))
    coded = [row for row in opened.report().rows if row.bits]
    assert not coded
    assert "inside a torch.func transform" in {row.reason for row in opened.report().rows}


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("min_bytes", [0, 1 << 30])
def test_attention_in_a_transform_is_stocks(min_bytes: int, p: float) -> None:
    x = torch.randn(1, 2, 5, 4)

    def slope() -> Tensor:
        torch.manual_seed(1)
        return grad(lambda t: F.scaled_dot_product_attention(t, t, t, dropout_p=p).square().sum())(x)

    expected = slope()
    with quiet(exact=True, recompute=True, min_bytes=min_bytes):
        assert torch.equal(slope(), expected)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_gradients_of_several_outputs_for_a_subset_of_the_inputs(settings: dict[str, Any]) -> None:
    net, x = normed(nn.Dropout(0.3)), torch.randn(64, 6)
    first, last = net[0].weight, net[-2].weight

    def ask(around: Any) -> list[Tensor]:
        torch.manual_seed(1)
        with around:
            hidden = net[:3](x)
            y = net[3:](hidden)
        weights = [torch.ones_like(hidden), torch.linspace(0, 1, y.numel()).view_as(y)]
        some = torch.autograd.grad([hidden, y], [first], weights, retain_graph=True)
        others = torch.autograd.grad([y], [last, hidden, first], weights[1:], retain_graph=True)
        return [*some, *others, *torch.autograd.grad([hidden, y], [first, last], weights)]

    exact, opened = ask(contextlib.nullcontext()), quiet(**settings)
    for _ in range(3):
        result = ask(opened)
        assert torch.equal(result[0], result[-2])
        assert torch.equal(result[1], result[-1])  # the last layer's gradient comes before any code but tanh's
        if settings.get("exact"):
            assert all(map(torch.equal, result, exact))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_gradients_accumulate_over_microbatches_as_over_the_batch(settings: dict[str, Any]) -> None:
    net, x = normed(), torch.randn(64, 6)
    with quiet(**settings):
        net(x).sum().backward()
    whole = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    for part in x.chunk(4):
        forget_what_was_learned()
        with quiet(**settings):
            loss = net(part).sum()
        loss.backward()
    for p, expected in zip(net.parameters(), whole, strict=True):
        torch.testing.assert_close(p.grad, expected)


@pytest.mark.parametrize("arguments", [{"bits": 3}, {"exact": True, "recompute": True}], ids=str)
@pytest.mark.filterwarnings("ignore:fewbit_hooks.scope compressed nothing")
def test_in_a_transform_the_memory_of_a_wrapped_tensor_is_nobodys(arguments: dict[str, Any]) -> None:
    layer, x = nn.Linear(8, 8), torch.randn(4, 8)
    with fewbit.scope(min_bytes=0, **arguments):
        h = F.gelu(layer(x))
        with pytest.raises(RuntimeError, match="accessing `data` under vmap"):  # stock's error
            vmap(lambda row: row.data * 2)(h)
        assert grad(lambda t: (t.data * t).sum())(h.detach()).shape == h.shape
