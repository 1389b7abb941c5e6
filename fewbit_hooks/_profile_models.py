"""Models to profile by name: built from their configuration with random weights, and a random batch for each.

Nothing is downloaded: a name stands for a configuration class of transformers, whose defaults are the published
sizes, or these are set here. The tasks are those that people fine-tune for.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import os
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import psutil
import torch
from torch import nn

from ._errors import FewbitError
from ._profile_inputs import FROM_PYTHON, Sizes, make_batch
from ._tables import human

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
    "CTC",
    "AUDIO_CLASSIFICATION",
    "VIDEO_CLASSIFICATION",
    "IMAGE_TEXT_TO_TEXT",
    "",  # the model without a head
)
LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_decoder_layers")
LAYERS_TOO = ("encoder_layers", "decoder_layers")
ATTENTION_DROPOUT = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop", "attn_dropout")
"""Set to 0: with it, the CPU keeps float32 copies of all attention probabilities, which a GPU's fused kernels do not,
and they would dwarf the rest of the table."""
LAYER_DROPOUT = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")
"""Set to 0: with it, each run lacks other layers."""
VOCABULARY = 32
"""Where the configuration leaves it open: as many as wav2vec 2.0 has letters and signs."""
INSTALL = "pip install transformers"


def build(name: str, sizes: Sizes) -> tuple[Any, Any]:
    """The model, or a step, and its batch.

    Args:
        name: one of `PUBLISHED`, a model type of transformers (`bert`), a model of timm, or `package.module:function`,
            a function that takes nothing and returns the two.

    Raises:
        FewbitError: there is no such name, the library that knows it is not installed, or it does not build the model
            from a configuration of defaults.
    """
    if ":" in name:
        return _from_function(name)
    with _quiet():
        configuration_auto = _import("transformers.models.auto.configuration_auto")
    model_type, settings = PUBLISHED.get(name, (name, {}))
    if configuration_auto is not None and model_type in configuration_auto.CONFIG_MAPPING_NAMES:
        with _quiet():
            return _from_transformers(name, model_type, settings, sizes)
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
    except (ImportError, AttributeError, ValueError) as error:
        raise FewbitError(f"{name}: {error}. It must be package.module:function, importable from here.") from error
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise FewbitError(f"{name} must be a function that can be called without arguments: {error}") from error
    made = function()
    if not isinstance(made, tuple) or len(made) != 2 or not callable(made[0]):
        raise FewbitError(f"{name} must return a model (or a step) and a batch, got {type(made).__name__}")
    return made


def _from_transformers(
    name: str, model_type: str, settings: dict[str, Any], sizes: Sizes
) -> tuple[nn.Module, dict[str, Any]]:
    with explained(name, "transformers does not build it from a configuration of defaults", FROM_PYTHON):
        config = _config_class(model_type)(**settings)
        _set(config, sizes)
        model_class = _class(config)
        _check_memory(model_class, config)
        model = model_class(config).to(sizes.dtype).train()
    for module in model.modules():  # T5 has one rate for all its dropouts
        if type(module).__name__.endswith("Attention") and isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    with explained(name, f"no batch can be made for {type(model).__name__}", FROM_PYTHON):
        return model, make_batch(model, config, sizes)


def _config_class(model_type: str) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type]


@contextlib.contextmanager
def explained(name: str, what: str, now: str) -> Iterator[None]:
    """An error, in a line: of which model, what went wrong, and what now, which errors of our own say themselves."""
    try:
        yield
    except FewbitError as error:
        raise FewbitError(f"profile {name}: {error}") from error
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        said = f"{type(error).__name__}: {lines[0].rstrip('.:;')}"
        raise FewbitError(f"profile {name}: {what}: {said}; {now}") from error


def _set(config: Any, sizes: Sizes) -> None:
    """What of a configuration is not the model type's default."""
    if sizes.layers is not None:
        _set_layers(config, sizes.layers)
    for name in (*ATTENTION_DROPOUT, *LAYER_DROPOUT):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    if getattr(config, "vocab_size", 0) is None:  # as many as a tokenizer has; the model's is not fetched
        config.vocab_size = VOCABULARY
    if getattr(config, "pad_token_id", None) is None:  # some ask for it, though nothing is padded here
        config.pad_token_id = 0
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = config.pad_token_id
    vision = getattr(config, "vision_config", config)
    if sizes.image is not None and hasattr(vision, "image_size"):
        vision.image_size = sizes.image


def _check_memory(model_class: Any, config: Any) -> None:
    """Rather than be killed for it."""
    try:
        with torch.device("meta"):
            parameters = sum(p.numel() for p in model_class(copy.deepcopy(config)).parameters())
    except Exception:  # it reads a number from a tensor, say; anything else it says when it is built
        return
    needed, free = parameters * torch.float32.itemsize, psutil.virtual_memory().available
    if needed > free:
        raise FewbitError(
            f"to be built, its {parameters / 1e9:.1f} billion parameters need {human(needed)}, of which {human(free)} "
            f"are free; --layers 2 builds fewer layers; or {FROM_PYTHON}"
        )


def _class(config: Any) -> Any:
    from transformers.models.auto import modeling_auto as auto

    name = config.model_type
    if name in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and name in auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        return auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]  # encoders of text, T5 apart
    for task in (*TASKS, *_other_tasks(auto)):
        prefix = f"MODEL_FOR_{task}_" if task else "MODEL_"
        if name in getattr(auto, f"{prefix}MAPPING_NAMES", {}):
            found = getattr(auto, f"{prefix}MAPPING")[type(config)]
            return found[0] if isinstance(found, (tuple, list)) else found
    return _class_of_a_part(config)


def _class_of_a_part(config: Any) -> Any:
    """Of a type that is no task's, a part of other models': the class beside the configuration that goes by it."""
    package, _, file = type(config).__module__.rpartition(".")
    modeling = importlib.import_module(f"{package}.{file.replace('configuration', 'modeling', 1)}")
    classes = [c for c in vars(modeling).values() if _is_built_of(c, type(config))]
    if not classes:
        raise FewbitError(f"transformers has no class for it alone; {FROM_PYTHON}")
    return next((c for c in classes if c.__name__.endswith("Model")), classes[0])


def _is_built_of(value: Any, config_class: type) -> bool:
    return (
        inspect.isclass(value)
        and issubclass(value, nn.Module)
        and getattr(value, "config_class", None) is config_class
        and "forward" in vars(value)
    )


def _other_tasks(auto: Any) -> list[str]:
    """Those in which a model may be whose kind has nothing but a head: ZoeDepth's is DEPTH_ESTIMATION."""
    found = (re.fullmatch("MODEL_FOR_(.+)_MAPPING", name) for name in vars(auto))
    return [match[1] for match in found if match]


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
