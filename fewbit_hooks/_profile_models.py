"""Models to profile by name: built from their configuration with random weights, and a random batch for each.

Nothing is downloaded: a name stands for a configuration class of transformers, whose defaults are the published
sizes, or these are set here. The tasks are those that people fine-tune for.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ._errors import FewbitError

PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "roberta-base": ("roberta", {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}),
    "bert-base-uncased": ("bert", {}),
    "distilbert-base-uncased": ("distilbert", {}),
    "gpt2": ("gpt2", {}),
    "llama": ("llama", {}),
    "tinyllama-1.1b": (
        "llama",
        {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_key_value_heads": 4},
    ),
    "t5-small": ("t5", {}),
    "vit-base": ("vit", {}),
    "convnext-tiny": ("convnext", {}),
    "resnet-50": ("resnet", {}),
    "efficientnet-b0": (
        "efficientnet",
        {
            "image_size": 224,
            "width_coefficient": 1.0,
            "depth_coefficient": 1.0,
            "hidden_dim": 1280,
            "dropout_rate": 0.2,
        },
    ),
    "mobilenet-v2": ("mobilenet_v2", {}),
    "clip-vit-base-patch32": ("clip", {}),
    "whisper-tiny": ("whisper", {}),
}
"""Name -> transformers' model type, and what of its configuration is not the default."""

TASKS = (
    "IMAGE_CLASSIFICATION",
    "SPEECH_SEQ_2_SEQ",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "CAUSAL_LM",
    "MASKED_LM",
    "",  # the model without a head
)
LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_decoder_layers")
LAYERS_TOO = ("encoder_layers", "decoder_layers")
ATTENTION_DROPOUT = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop", "attn_dropout")
"""Set to 0: with it, the CPU keeps float32 copies of all attention probabilities, which a GPU's fused kernels do not,
and they would dwarf the rest of the table."""
INSTALL = "pip install transformers"


@dataclass(frozen=True)
class Sizes:
    """Of the batch and the model; None where the model's own is taken."""

    batch: int = 2
    length: int = 512
    image: int | None = None
    layers: int | None = None
    dtype: torch.dtype = torch.bfloat16


def build(name: str, sizes: Sizes) -> tuple[Any, Any]:
    """The model, or a step, and its batch.

    Args:
        name: one of `PUBLISHED`, a model type of transformers (`bert`), a model of timm, or `package.module:function`,
            a function that takes nothing and returns the two.

    Raises:
        FewbitError: there is no such name, or the library that knows it is not installed.
    """
    if ":" in name:
        return _from_function(name)
    with _quiet():
        configuration_auto = _import("transformers.models.auto.configuration_auto")
    model_type, settings = PUBLISHED.get(name, (name, {}))
    if configuration_auto is not None and model_type in configuration_auto.CONFIG_MAPPING_NAMES:
        with _quiet():
            return _from_transformers(configuration_auto.CONFIG_MAPPING[model_type], settings, sizes)
    if name not in PUBLISHED and (timm := _import("timm")) is not None and timm.is_model(name):
        return _from_timm(timm, name, sizes)
    if configuration_auto is None:
        raise FewbitError(f"profile {name} needs transformers: {INSTALL}")
    raise FewbitError(
        f"no model {name!r}. Known: {', '.join(PUBLISHED)}; any model type of transformers, such as bert; any model of "
        "timm where it is installed; or package.module:function, which returns a model and a batch."
    )


def _from_function(name: str) -> tuple[Any, Any]:
    path, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(path), attribute)
    except (ImportError, AttributeError) as error:
        raise FewbitError(f"{name}: {error}. It must be package.module:function, importable from here.") from error
    made = function()
    if not isinstance(made, tuple) or len(made) != 2 or not callable(made[0]):
        raise FewbitError(f"{name} must return a model (or a step) and a batch, got {type(made).__name__}")
    return made


def _from_transformers(config_class: Any, settings: dict[str, Any], sizes: Sizes) -> tuple[nn.Module, dict[str, Any]]:
    config = config_class(**settings)
    if sizes.layers is not None:
        _set_layers(config, sizes.layers)
    for name in ATTENTION_DROPOUT:
        if hasattr(config, name):
            setattr(config, name, 0.0)
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = config.pad_token_id or 0
    vision = getattr(config, "vision_config", config)
    if sizes.image is not None and hasattr(vision, "image_size"):
        vision.image_size = sizes.image
    model = _class(config)(config).to(sizes.dtype).train()
    for module in model.modules():  # T5 has one rate for all its dropouts
        if type(module).__name__.endswith("Attention") and isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return model, _batch(model, config, sizes)


def _class(config: Any) -> Any:
    from transformers.models.auto import modeling_auto as auto

    name = config.model_type
    if name in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and name in auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        return auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]  # encoders of text, T5 apart
    for task in TASKS:
        names = getattr(auto, f"MODEL_FOR_{task}_MAPPING_NAMES" if task else "MODEL_MAPPING_NAMES", {})
        if name in names:
            found = getattr(auto, f"MODEL_FOR_{task}_MAPPING" if task else "MODEL_MAPPING")[type(config)]
            return found[0] if isinstance(found, (tuple, list)) else found
    raise FewbitError(f"transformers has no model class for {name}")


def _set_layers(config: Any, layers: int) -> None:
    configs = [config, *(getattr(config, f"{part}_config", None) for part in ("text", "vision", "audio"))]
    found = False
    for part in configs:
        for name in (*LAYERS, *LAYERS_TOO):
            if isinstance(getattr(part, name, None), int) and not hasattr(part, "depths"):
                setattr(part, name, layers)
                found = True
    if not found:
        raise FewbitError(f"--layers: {type(config).__name__} has stages of layers, not a number of them; leave it out")


def _batch(model: Any, config: Any, sizes: Sizes) -> dict[str, Any]:
    text = getattr(config, "text_config", config)
    vision = getattr(config, "vision_config", config)
    longest = min(getattr(text, "max_position_embeddings", None) or sizes.length, sizes.length)
    ids = torch.randint(4, int(getattr(text, "vocab_size", None) or 5), (sizes.batch, longest))
    image = sizes.image or getattr(vision, "image_size", None) or 224
    size = (image, image) if isinstance(image, int) else tuple(image)
    pixels = torch.randn(sizes.batch, getattr(vision, "num_channels", 3), *size, dtype=sizes.dtype)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": pixels, "labels": torch.zeros(sizes.batch, dtype=torch.long)}
    if model.main_input_name == "input_features":
        frames = 2 * config.max_source_positions
        features = torch.randn(sizes.batch, config.num_mel_bins, frames, dtype=sizes.dtype)
        return {"input_features": features, "labels": ids[:, : getattr(config, "max_target_positions", longest)]}
    if "Classification" in type(model).__name__:
        return {"input_ids": ids, "labels": torch.zeros(sizes.batch, dtype=torch.long)}
    return {"input_ids": ids} if model.get_output_embeddings() is None else {"input_ids": ids, "labels": ids}


def _import(module: str) -> Any:
    """None where it is not installed, or lacks something (timm without torchvision)."""
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def _from_timm(timm: Any, name: str, sizes: Sizes) -> tuple[nn.Module, torch.Tensor]:
    model = timm.create_model(name, pretrained=False, **({"img_size": sizes.image} if _takes_size(name, sizes) else {}))
    channels, *own = model.default_cfg.get("input_size", (3, 224, 224))
    size = (sizes.image, sizes.image) if sizes.image else own
    return model.to(sizes.dtype).train(), torch.randn(sizes.batch, channels, *size, dtype=sizes.dtype)


def _takes_size(name: str, sizes: Sizes) -> bool:
    return sizes.image is not None and name.startswith(("vit", "deit", "swin", "beit", "eva"))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers warns of optional packages that it lacks, on import and on first use; no table needs that."""
    from logging import ERROR, getLogger

    logger = getLogger("transformers")
    before = logger.level
    logger.setLevel(ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
