"""PyTorch's fast paths for evaluation, which a mode would close."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewbit_hooks as fewbit

from .conftest import Names

pytestmark = [
    pytest.mark.filterwarnings("ignore:fewbit_hooks.scope compressed nothing"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),
]
PADDED = torch.tensor([[0, 0, 0, 0, 1, 1], [0] * 6, [0, 0, 1, 1, 1, 1]], dtype=torch.bool)


def layer() -> nn.TransformerEncoderLayer:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)


def encoder() -> nn.TransformerEncoder:
    return nn.TransformerEncoder(layer(), 2).eval()


def outputs(net: nn.TransformerEncoder, x: Tensor) -> list[Tensor]:
    attention = net.layers[0].self_attn
    return [net(x), net(x, src_key_padding_mask=PADDED), net.layers[0](x), attention(x, x, x)[0]]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 6, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("arguments", [{"bits": 3}, {"bits": None}, {"exact": True, "recompute": True}], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
def test_an_evaluation_is_what_it_was(arguments: dict[str, Any], frozen: bool, x: Tensor) -> None:
    net = encoder().requires_grad_(not frozen)
    with torch.set_grad_enabled(frozen):  # frozen weights need no `no_grad`
        stock = outputs(net, x)
        with fewbit.scope(min_bytes=0, **arguments):
            under = outputs(net, x)
            assert torch._C._len_torch_function_stack() == 1
    assert stock[1][0, 4:].eq(0).all()  # the fast path was taken
    assert all(map(torch.equal, stock, under))


def test_where_gradients_are_wanted_the_calls_inside_are_recognised(x: Tensor) -> None:
    net = layer().train()
    with fewbit.scope(min_bytes=0) as memory:
        net(x)
    assert {"dropout", "relu"} <= {row.activation for row in memory.report().rows}


def test_an_input_that_requires_grad_is_enough(x: Tensor) -> None:
    net = encoder().requires_grad_(False)
    with fewbit.scope(min_bytes=0) as memory:
        net(x.requires_grad_()).sum().backward()
    assert {row.activation for row in memory.report().rows} == {"relu"}
    assert x.grad is not None


def test_the_mode_is_back_after_an_error(x: Tensor) -> None:
    with torch.no_grad(), fewbit.scope(min_bytes=0):
        with pytest.raises(AssertionError, match="embedding dimension of 16"):
            encoder().layers[0].self_attn(x[..., :8], x[..., :8], x[..., :8])
        assert torch._C._len_torch_function_stack() == 1


def test_a_mode_of_the_users_sees_what_it_saw(x: Tensor) -> None:
    net = encoder()
    with torch.no_grad(), Names() as alone:
        stock = net(x)
    for outer in (True, False):
        names = Names()
        first, second = (names, fewbit.scope(min_bytes=0)) if outer else (fewbit.scope(min_bytes=0), names)
        with torch.no_grad(), first, second:
            assert torch.equal(net(x), stock)
        assert names.names >= alone.names


def test_the_classes_are_scripted_and_copied_as_before(x: Tensor) -> None:
    with fewbit.scope(min_bytes=0), torch.no_grad():
        encoder()(x)
    net = encoder()
    with torch.no_grad():
        scripted = torch.jit.script(net)
        assert torch.allclose(scripted(x), net(x), atol=1e-6)
        assert torch.equal(copy.deepcopy(net)(x), net(x))
