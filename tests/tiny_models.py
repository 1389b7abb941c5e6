"""Tiny models of transformers, from configurations, with dropout and random weights, for the tests."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]
Made = tuple[nn.Module, Batch]

TOKENS = {"vocab_size": 64}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}


def _tokens(**more: Tensor) -> Batch:
    return {"input_ids": torch.randint(2, 64, (2, 12)), **more}


def _pixels() -> Batch:
    return {"pixel_values": torch.randn(2, 3, 16, 16)}


def llama(attention: str, **other: Any) -> Made:
    """RMSNorm from primitives, SwiGLU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    given = {"attention_dropout": 0.1, **TOKENS, **other}
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=attention,
        **given,
    )
    return LlamaForCausalLM(config), _tokens()


def roberta(attention: str) -> Made:
    """LayerNorm behind, GELU, dropout."""
    from transformers import RobertaConfig, RobertaForMaskedLM

    config = RobertaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=40,
        attn_implementation=attention,
        **TOKENS,
    )
    return RobertaForMaskedLM(config), _tokens(attention_mask=torch.tensor([[1] * 12, [1] * 9 + [0] * 3]))


def gpt2(attention: str) -> Made:
    """gelu_new, Conv1D, dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=32, attn_implementation=attention, **TOKENS)
    return GPT2LMHeadModel(config), _tokens()


def t5(attention: str) -> Made:
    """A norm from primitives, gated gelu_new, dropout, cross attention."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
        **TOKENS,
    )
    return T5ForConditionalGeneration(config), _tokens(decoder_input_ids=torch.randint(2, 64, (2, 7)))


def vit(attention: str) -> Made:
    """LayerNorm in front, GELU, a convolution."""
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_dropout_prob=0.1, attn_implementation=attention, **VISION)
    return ViTModel(config, add_pooling_layer=False), _pixels()


def clip(attention: str) -> Made:
    """quick_gelu."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(attention_dropout=0.1, attn_implementation=attention, **VISION)
    return CLIPVisionModel(config), _pixels()


def convnext(attention: str) -> Made:
    """Depthwise convolutions, LayerNorm with the channels last."""
    from transformers import ConvNextConfig, ConvNextModel

    return ConvNextModel(
        ConvNextConfig(hidden_sizes=[16, 32], depths=[1, 2], num_stages=2, patch_size=4, drop_path_rate=0.1)
    ), _pixels()


MODELS: dict[str, Callable[[str], Made]] = {f.__name__: f for f in (llama, roberta, gpt2, t5, vit, clip, convnext)}


@functools.cache
def tiny(name: str, attention: str = "eager", dtype: torch.dtype = torch.float32) -> Made:
    """The model in training mode, and a batch."""
    torch.manual_seed(0)
    model, batch = MODELS[name](attention)
    batch = {key: t.to(dtype) if t.is_floating_point() else t for key, t in batch.items()}
    return model.to(dtype).train(), batch


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """The same dropout at each call."""
    torch.manual_seed(1)
    return model(**batch)[0].float().square().mean()


def gradients(loss: Tensor, model: nn.Module) -> list[Tensor | None]:
    """Of the trainable parameters; None for those that are not used."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad(loss, trainable, allow_unused=True))


def same(a: list[Tensor | None], b: list[Tensor | None]) -> bool:
    """Bit for bit, and not all missing."""
    return (
        len(a) == len(b)
        and any(t is not None for t in a)
        and all(s is t if s is None or t is None else torch.equal(s, t) for s, t in zip(a, b, strict=True))
    )
