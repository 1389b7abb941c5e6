"""One training step of four dozen architectures of transformers under a scope, tiny and with random weights.

    python benchmarks/architectures.py [--csv PATH] [NAME ...]

Each model is in training mode, dropout included, in float32, with `min_bytes=0`, and the same seed at each step. Loss
and gradients are those of the third step of a scope, when it has learned what is kept anyway; bytes are counted from
outside, by walking the graph (`held.py`), as a share of what stock's graph holds. `docs/make.py` makes the table in
docs/coverage.md of the CSV.
"""

from __future__ import annotations

import argparse
import csv
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers as hf
from torch import Tensor, nn

import fewbit_hooks as fewbit
from about import about
from held import held_for_backward

SETTINGS: dict[str, dict[str, Any]] = {
    "bits=3": {"bits": 3},
    "exact=True": {"exact": True},
    "exact=True, recompute=True": {"exact": True, "recompute": True},
}
COLUMNS = ("model", "setting", "held", "gradients", "loss_equal", "machine", "versions", "date")

Batch = dict[str, Tensor]


class Architecture(NamedTuple):
    """How to make a tiny model and a batch for it."""

    config: dict[str, Any]
    batch: Callable[[], Batch]
    auto: str = "AutoModel"


class Outcome(NamedTuple):
    """What a setting makes of a step.

    Attributes:
        held: bytes, as a share of stock's.
        gradients: relative distance from stock's.
        loss_equal: bit for bit.
    """

    held: float
    gradients: float
    loss_equal: bool


def tokens() -> Batch:
    return {"input_ids": torch.randint(3, 64, (2, 12))}


def pair() -> Batch:
    return {**tokens(), "decoder_input_ids": torch.randint(3, 64, (2, 7))}


def speech() -> Batch:
    return {"input_features": torch.randn(2, 8, 32), "decoder_input_ids": torch.randint(3, 64, (2, 7))}


def wave() -> Batch:
    return {"input_values": torch.randn(2, 400)}


def pixels() -> Batch:
    return {"pixel_values": torch.randn(2, 3, 16, 16)}


def larger_pixels() -> Batch:
    return {"pixel_values": torch.randn(2, 3, 32, 32)}


ENDS = {"bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SIZES, **ENDS, "vocab_size": 64, "max_position_embeddings": 64, "pad_token_id": 0}
IMAGE = {**SIZES, "image_size": 16, "patch_size": 8, "hidden_dropout_prob": 0.1}
DECODER = {**TEXT, "num_key_value_heads": 2, "head_dim": 8, "attention_dropout": 0.1}
OLD_DECODER = {**ENDS, "vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
BOTH = {
    **ENDS,
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "pad_token_id": 0,
    "decoder_start_token_id": 2,
}
STAGES = {"hidden_sizes": [16, 32], "depths": [1, 2], "num_stages": 2, "patch_size": 4}
CAUSAL = "AutoModelForCausalLM"
ENCODERS = ("bert", "roberta", "xlm-roberta", "electra", "camembert", "ernie", "layoutlm", "roformer", "mpnet")
DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi", "phi3", "stablelm", "starcoder2", "cohere")
VISION = ("vit", "deit", "beit", "dinov2", "vit_mae", "clip_vision_model", "siglip_vision_model")

ARCHITECTURES: dict[str, Architecture] = {
    **{name: Architecture(TEXT, tokens) for name in ENCODERS},
    "distilbert": Architecture({**TEXT, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}, tokens),
    "albert": Architecture({**TEXT, "embedding_size": 16}, tokens),
    "deberta-v2": Architecture(
        {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}, tokens
    ),
    "gpt2": Architecture(OLD_DECODER, tokens, CAUSAL),
    "gptj": Architecture({**OLD_DECODER, "rotary_dim": 4, "resid_pdrop": 0.1}, tokens, CAUSAL),
    "gpt_neo": Architecture(
        {
            **TEXT,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 8,
            "resid_dropout": 0.1,
        },
        tokens,
        CAUSAL,
    ),
    "gpt_neox": Architecture({**TEXT, "hidden_dropout": 0.1}, tokens, CAUSAL),
    "opt": Architecture({**TEXT, "ffn_dim": 64, "word_embed_proj_dim": 32}, tokens, CAUSAL),
    "bloom": Architecture({**TEXT, "n_layer": 2, "n_head": 4, "hidden_dropout": 0.1}, tokens, CAUSAL),
    "falcon": Architecture({**TEXT, "hidden_dropout": 0.1}, tokens, CAUSAL),
    **{name: Architecture(DECODER, tokens, CAUSAL) for name in (*DECODERS, "olmo", "granite", "glm")},
    "mixtral": Architecture({**DECODER, "num_local_experts": 4}, tokens, CAUSAL),
    "qwen2_moe": Architecture(
        {
            **DECODER,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 32,
        },
        tokens,
        CAUSAL,
    ),
    "mamba": Architecture({**TEXT, "state_size": 4}, tokens, CAUSAL),
    "t5": Architecture({**BOTH, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}, pair),
    "bart": Architecture({**BOTH, "max_position_embeddings": 64}, pair),
    "whisper": Architecture(
        {**BOTH, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16}, speech
    ),
    "wav2vec2": Architecture(
        {
            **TEXT,
            "conv_dim": [8, 8],
            "conv_kernel": [4, 2],
            "conv_stride": [4, 2],
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2,
            "mask_time_prob": 0.0,
        },
        wave,
    ),
    **{name: Architecture(IMAGE, pixels) for name in VISION},
    "convnext": Architecture(STAGES, pixels),
    "convnextv2": Architecture(STAGES, pixels),
    "swin": Architecture(
        {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
        pixels,
    ),
    "segformer": Architecture(
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [16, 32],
            "patch_sizes": [3, 3],
            "strides": [2, 2],
            "num_attention_heads": [2, 4],
            "mlp_ratios": [2, 2],
        },
        pixels,
    ),
    "poolformer": Architecture({"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]}, larger_pixels),
    "mobilenet_v2": Architecture({"depth_multiplier": 0.25, "image_size": 32}, larger_pixels),
    "resnet": Architecture({"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2]}, larger_pixels),
    "regnet": Architecture(
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "groups_width": 4}, larger_pixels
    ),
}


def build(name: str) -> tuple[nn.Module, Batch]:
    """The model in training mode, and a batch."""
    torch.manual_seed(0)
    made = ARCHITECTURES[name]
    config = hf.AutoConfig.for_model(name, **made.config)
    if hasattr(config, "use_cache"):
        config.use_cache = False
    return getattr(hf, made.auto).from_config(config).train(), made.batch()


def measure(name: str) -> dict[str, Outcome]:
    """The outcome of each setting."""
    model, batch = build(name)
    trainable = [p for p in model.parameters() if p.requires_grad]
    weights = torch.cos(torch.arange(1 << 16))
    known = [*model.parameters(), *model.buffers(), *batch.values(), weights]

    def step() -> tuple[Tensor, int, list[Tensor]]:
        torch.manual_seed(1)
        out = model(**batch)[0].float().flatten()
        loss = out @ weights[: len(out)]  # a mean square of what a LayerNorm gives would be 1, and have no gradient
        held = sum(held_for_backward(loss, known, tables=False).values())
        gradients = torch.autograd.grad(loss, trainable, allow_unused=True)
        return loss.detach(), held, [g for g in gradients if g is not None]

    loss, stock, exact = step()
    size = sum(float(g.square().sum()) for g in exact)
    outcomes = {}
    for setting, arguments in SETTINGS.items():
        opened = fewbit.scope(min_bytes=0, **arguments)
        for _ in range(3):
            with opened:
                mine, held, gradients = step()
        error = sum(float((a - b).square().sum()) for a, b in zip(gradients, exact, strict=True))
        outcomes[setting] = Outcome(held / stock, (error / size) ** 0.5, torch.equal(mine, loss))
    return outcomes


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="all where none is given")
    parser.add_argument("--csv", metavar="PATH", help="write the table there too")
    arguments = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    known = about(("transformers",))
    table = []
    for name in arguments.names or ARCHITECTURES:
        for setting, outcome in measure(name).items():
            print(f"{name:<20} {setting:<26} held {outcome.held:6.1%}  gradients {outcome.gradients:.1e}", flush=True)
            held, gradients = f"{outcome.held:.4f}", f"{outcome.gradients:.2e}"
            row = {"held": held, "gradients": gradients, "loss_equal": outcome.loss_equal}
            table.append({"model": name, "setting": setting, **row, **known})
    if arguments.csv:
        with open(arguments.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)


if __name__ == "__main__":
    main()
