"""Modules of transformers, timm, diffusers and others, written in primitives: NOTE [ Composites by module class ].

Activations by the module that defines them; norms, which each model of transformers defines anew, by the end of their
names. They are looked for among the modules already imported; nothing is imported for it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

from torch import nn

from . import _activations
from ._activations import Parameter
from ._composites import replace_forward
from ._imported import Imported

_ACTIVATIONS: dict[str, dict[str, tuple[str, dict[str, Parameter]]]] = {
    "transformers.activations": {
        "AccurateGELUActivation": ("gelu", {"approximate": "tanh"}),
        "FastGELUActivation": ("gelu", {"approximate": "tanh"}),
        "GELUActivation": ("gelu", {}),
        "GELUTanh": ("gelu", {"approximate": "tanh"}),
        "MishActivation": ("mish", {}),
        "NewGELUActivation": ("gelu", {"approximate": "tanh"}),
        "QuickGELUActivation": ("quick_gelu", {}),
    },
    "timm.layers.activations": {"QuickGELU": ("quick_gelu", {})},
    "efficientnet_pytorch.utils": {"MemoryEfficientSwish": ("silu", {})},
}
_NORMS: dict[str, tuple[str, ...]] = {
    "transformers.models.": (
        "RMSNorm",
        # those of T5's kind
        *(f"{model}LayerNorm" for model in ("T5", "LongT5", "SwitchTransformers", "Pix2Struct", "Pop2Piano", "Udop")),
    ),
    "timm.layers.norm": ("RmsNorm", "RmsNorm2d", "SimpleNorm", "SimpleNorm2d"),
    "diffusers.models.normalization": ("RMSNorm",),
    "x_transformers.x_transformers": ("RMSNorm",),
    "denoising_diffusion_pytorch.denoising_diffusion_pytorch": ("RMSNorm",),
}


def built_in() -> dict[str, list[str]]:
    """The built-in table, for the docs: what it is run as, and the classes."""
    table: dict[str, list[str]] = {}
    for module, classes in _ACTIVATIONS.items():
        for cls, (name, parameters) in classes.items():
            title = name + "".join(f" ({value})" for value in parameters.values())
            table.setdefault(title, []).append(f"{module}.{cls}")
    table["rms_norm"] = [f"{start}*{ending}" for start, endings in _NORMS.items() for ending in endings]
    return table


def _replace_in(name: str, module: ModuleType) -> None:
    """Replace the forward of the table's classes in a module."""
    for cls, activation, parameters in _classes(name, vars(module)):
        found = _activations.find(activation) if activation else None
        replace_forward(cls, "rms_norm", found, found.check(parameters) if found else {})


_PACKAGES = {f"{module.partition('.')[0]}." for module in (*_ACTIVATIONS, *_NORMS)}
find_built_in = Imported(tuple(sorted(_PACKAGES)), _replace_in)


def _classes(
    name: str, content: Mapping[str, Any]
) -> Iterator[tuple[type[nn.Module], str | None, dict[str, Parameter]]]:
    for class_name, (activation, parameters) in _ACTIVATIONS.get(name, {}).items():
        cls = content.get(class_name)
        if (
            inspect.isclass(cls)
            and issubclass(cls, nn.Module)
            and cls.__module__ == name  # what is only named there, nn.SiLU say, is not the package's
            and not hasattr(cls.forward, "_fewbit_original")
        ):
            yield cls, activation, parameters
    endings = next((endings for start, endings in _NORMS.items() if name.startswith(start)), ())
    if not endings or (name.startswith("transformers.") and ".modeling_" not in name):
        return
    for cls in list(content.values()):
        if (
            inspect.isclass(cls)
            and issubclass(cls, nn.Module)
            and cls.__module__ == name
            and cls.__name__.endswith(endings)
            and "forward" in vars(cls)
            and not hasattr(cls.forward, "_fewbit_original")
            and len(inspect.signature(cls.forward).parameters) == 2
        ):
            yield cls, None, {}
