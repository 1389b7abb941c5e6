"""Checkpoints of whole, deep models, with norms, dropout and gates, under every kind of scope."""

from __future__ import annotations

import contextlib
import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential, create_selective_checkpoint_contexts

import fewbit_hooks as fewbit

from . import tiny_models
from .conftest import quiet

SETTINGS: list[dict[str, Any]] = [{"bits": 3}, {"exact": True}, {"exact": True, "recompute": True}]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gate, self.up, self.down = nn.LayerNorm(16), *(nn.Linear(16, 16) for _ in range(3))
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Dropout(0.2), nn.Linear(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        x = x + self.down(F.silu(self.gate(h)) * self.up(h))
        return x + self.mlp(x)


@functools.cache
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(5)))


def run(how: str, h: Tensor, **options: Any) -> Tensor:
    """A forward, checkpointed as a whole, block by block, or but for every second block."""
    net = model()
    if how == "whole":
        return checkpoint(net, h, **options)
    if how == "sequential":
        return checkpoint_sequential(net, 2, h, **options)
    for i, block in enumerate(net):
        h = checkpoint(block, h, **options) if how == "blocks" or i % 2 else block(h)
    return h


def gradients(how: str, around: Any, **options: Any) -> list[Tensor]:
    net = model()
    net.zero_grad()
    torch.manual_seed(1)
    x = torch.linspace(-2, 2, 128).view(8, 16).requires_grad_()
    with around:
        loss = run(how, x, **options).square().mean()
    loss.backward()
    return [x.grad, *(p.grad for p in net.parameters())]


HOWS = ["whole", "blocks", "sequential", "every second"]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("how", HOWS)
def test_a_scope_around_leaves_checkpoints_their_gradients(how: str, reentrant: bool, settings: dict[str, Any]) -> None:
    stock = gradients(how, contextlib.nullcontext(), use_reentrant=reentrant)
    opened = quiet(**settings)
    for _ in range(4):  # what is learned of the blocks outside must not matter inside
        result = gradients(how, opened, use_reentrant=reentrant)
        if settings.get("exact") or how in ("whole", "blocks"):
            assert all(map(torch.equal, result, stock))
        else:  # the blocks that are not checkpointed are coded
            error = sum((a - b).square().sum() for a, b in zip(result, stock, strict=True))
            assert 0 < error <= 0.1**2 * sum(b.square().sum() for b in stock)
    if not reentrant:
        assert "inside checkpoint" in {row.reason for row in opened.report().rows}


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(
    "keep", [[torch.ops.aten.addmm.default], [torch.ops.aten.gelu.default]], ids=["linear", "gelu"]
)
def test_a_scope_around_leaves_selective_checkpoints_their_gradients(keep: list[Any], settings: dict[str, Any]) -> None:
    options = {"use_reentrant": False, "context_fn": functools.partial(create_selective_checkpoint_contexts, keep)}
    stock = gradients("blocks", contextlib.nullcontext(), **options)
    opened = quiet(**settings)
    for _ in range(3):
        assert all(map(torch.equal, gradients("blocks", opened, **options), stock))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_a_scope_inside_each_checkpoint_has_the_gradients_it_has_without(
    reentrant: bool, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = Block.forward

    def coded(self: Block, x: Tensor) -> Tensor:
        with quiet(**settings):
            return forward(self, x)

    monkeypatch.setattr(Block, "forward", coded)
    net = model()
    net.zero_grad()
    torch.manual_seed(1)
    x = torch.linspace(-2, 2, 128).view(8, 16).requires_grad_()
    net(x).square().mean().backward()
    alone = [x.grad, *(p.grad.clone() for p in net.parameters())]
    result = gradients("blocks", contextlib.nullcontext(), use_reentrant=reentrant)
    assert all(map(torch.equal, result, alone))


@pytest.mark.parametrize("min_bytes", [0, 1 << 30])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_attention_inside_a_checkpoint_is_left_to_the_checkpoint(
    settings: dict[str, Any], p: float, min_bytes: int
) -> None:
    layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 48), nn.Linear(16, 16)) for _ in range(3))

    def attend(layer: nn.Sequential, h: Tensor) -> Tensor:
        q, k, v = layer[0](F.layer_norm(h, (16,))).view(2, 8, 4, 12).transpose(1, 2).chunk(3, -1)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p)
        return h + layer[1](y.transpose(1, 2).reshape(2, 8, 16))  # saves a tensor, whose place in the row is checked

    def run_all(around: Any) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        x = h = torch.linspace(-2, 2, 256).view(2, 8, 16).requires_grad_()
        with around:
            for layer in layers:
                h = checkpoint(attend, layer, h, use_reentrant=False)
        return torch.autograd.grad(h.square().sum(), [x, *layers.parameters()])

    stock = run_all(contextlib.nullcontext())
    opened = quiet(**{**settings, "min_bytes": min_bytes})
    for _ in range(3):
        assert all(map(torch.equal, run_all(opened), stock))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # transformers' own
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "roberta", "gpt2", "t5", "vit", "clip"])
def test_models_of_transformers_that_checkpoint_their_blocks_have_their_gradients(
    name: str, attention: str, exact: bool, recompute: bool
) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    model, batch = copy.deepcopy(tiny_models.tiny(name, attention))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    stock = tiny_models.gradients(tiny_models.loss_of(model, batch), model)
    head = "lm_head" if name == "roberta" else ()  # which is in no block
    opened = quiet(exclude=head, exact=exact, recompute=recompute)
    for _ in range(3):
        with opened:
            loss = tiny_models.loss_of(model, batch)
        assert tiny_models.same(tiny_models.gradients(loss, model), stock)
    assert "inside checkpoint" in {row.reason for row in opened.report().rows}


def test_what_a_composite_computes_again_in_a_backward_inside_is_no_step_of_its_own() -> None:
    activations = pytest.importorskip("transformers.activations", reason="transformers is not installed")
    x = torch.randn(64, 64)
    block = nn.Sequential(nn.Linear(64, 256), activations.NewGELUActivation(), nn.Linear(256, 64))
    head = nn.Sequential(nn.Linear(64, 256), nn.SiLU(), nn.Linear(256, 8))
    with fewbit.scope(bits=3, min_bytes=0) as memory:
        for step in range(1, 4):
            loss = head(checkpoint(block, x, use_reentrant=False)).sum()
            before = memory.report()
            loss.backward()
            assert memory.report().steps == before.steps == step
            assert memory.report().original_bytes == before.original_bytes > 0
