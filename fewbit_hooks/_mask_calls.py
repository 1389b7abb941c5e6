"""Recognition of the calls that save a mask for backward: which callables, and when they do anything.

They are no activations: there is nothing to approximate, and so no codebook. A mask takes 1 bit an element, always,
and the gradient is bit for bit stock's. How the mask is packed is the business of `_masks.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._calls import Call, _callables, register_call


@dataclass(frozen=True)
class MaskCall(Call):
    """A recognised callable that saves a mask.

    Attributes:
        mask: the argument that is the mask; empty where the call draws it itself.
        returns: the caller is given the mask, and may hold it.
        plain: it multiplies its input by the mask, element by element, and does nothing else.
    """

    mask: str = ""
    returns: bool = False
    plain: bool = False

    def draws_nothing(self, given: Mapping[str, Any]) -> bool:
        """This dropout does nothing (evaluation, p=0), or leaves nothing (p=1: the mask is a single 0).

        Args:
            given: the arguments by name.
        """
        if self.mask:
            return False
        default = 0.0 if self.name == "scaled_dot_product_attention" else 0.5
        p = given.get("p", given.get("dropout_p", default))
        training = given.get("training", given.get("train", True))  # native_dropout takes None for True
        return (isinstance(p, (int, float)) and not 0.0 < p < 1.0) or not (training is None or training)

    def mask_bytes(self, given: Mapping[str, Any]) -> int | None:
        """The bytes of the mask, or more; None where that is not known before the call.

        A dropout's mask is as large as its input, or smaller. That of attention is as the softmax: a number for each
        query, head and key; on a GPU there may be none.
        """
        if self.mask or self.name == "dropout":
            like = given.get(self.mask or "input")
            return like.nbytes if isinstance(like, Tensor) and like.layout is torch.strided else None
        query, key = given.get("query"), given.get("key")
        if not isinstance(query, Tensor) or not isinstance(key, Tensor) or "num_heads" in given:
            return None
        if not query.is_cpu or torch.is_autocast_enabled("cpu"):
            return None
        return query.shape[:-1].numel() * key.shape[-2] * query.element_size()


# What a user writes -> the names of its arguments, those that matter here by the names that they have above. As in
# `_calls.py`, what arrives is the outermost Python function: F.dropout, not the torch.dropout that it calls.
_DROPOUT = "input p train"
_PYTHON_DROPOUT = "input p training inplace"
_ATTENTION = "query key value attn_mask dropout_p is_causal"
_MULTI_HEAD_ATTENTION = (
    "query key value embed_dim_to_check num_heads in_proj_weight in_proj_bias bias_k bias_v add_zero_attn dropout_p "
    "out_proj_weight out_proj_bias training"
)
_MASK_CALLS: dict[str, dict[str, str]] = {
    "dropout": {
        "F.dropout": _PYTHON_DROPOUT,
        "F.dropout1d": _PYTHON_DROPOUT,
        "F.dropout2d": _PYTHON_DROPOUT,
        "F.dropout3d": _PYTHON_DROPOUT,
        "F.alpha_dropout": _PYTHON_DROPOUT,
        "F.feature_alpha_dropout": _PYTHON_DROPOUT,
        "torch.dropout": _DROPOUT,
        "torch.dropout_": _DROPOUT,
        "torch.alpha_dropout": _DROPOUT,
        "torch.alpha_dropout_": _DROPOUT,
        "torch.feature_dropout": _DROPOUT,
        "torch.feature_dropout_": _DROPOUT,
        "torch.feature_alpha_dropout": _DROPOUT,
        "torch.feature_alpha_dropout_": _DROPOUT,
        "torch.native_dropout": _DROPOUT,
        "torch.ops.aten.dropout": _DROPOUT,
        "torch.ops.aten.dropout_": _DROPOUT,
        "torch.ops.aten.alpha_dropout": _DROPOUT,
        "torch.ops.aten.alpha_dropout_": _DROPOUT,
        "torch.ops.aten.feature_dropout": _DROPOUT,
        "torch.ops.aten.feature_dropout_": _DROPOUT,
        "torch.ops.aten.feature_alpha_dropout": _DROPOUT,
        "torch.ops.aten.feature_alpha_dropout_": _DROPOUT,
        "torch.ops.aten.native_dropout": _DROPOUT,
    },
    "masked_fill": {
        "torch.masked_fill": "input mask value",
        "Tensor.masked_fill": "input mask value",
        "Tensor.masked_fill_": "input mask value",
        "torch.ops.aten.masked_fill": "input mask value",
        "torch.ops.aten.masked_fill_": "input mask value",
    },
    "scaled_dot_product_attention": {
        "F.scaled_dot_product_attention": _ATTENTION,
        "torch.ops.aten.scaled_dot_product_attention": _ATTENTION,
        # its inner calls are not seen
        "F.multi_head_attention_forward": _MULTI_HEAD_ATTENTION,
    },
    "where": {
        "torch.where": "condition input other",
        "Tensor.where": "input condition other",
        "torch.ops.aten.where": "condition input other",
    },
}

_MASK_ARGUMENT = {"masked_fill": "mask", "where": "condition"}
MASKS = frozenset(_MASK_CALLS)
"""The names that `bits={...}` takes beside those of the activations."""


def mask_calls() -> dict[str, tuple[str, ...]]:
    """The recognised calls by name, as a user writes them."""
    return {name: tuple(calls) for name, calls in _MASK_CALLS.items()}


def _fill() -> None:
    for name, calls in _MASK_CALLS.items():
        for path, names in calls.items():
            call = MaskCall(
                name,
                None,
                tuple(names.split()),
                mask=_MASK_ARGUMENT.get(name, ""),
                returns=path.endswith("native_dropout"),
                plain=path.endswith(".dropout"),
            )
            for function in _callables(path):
                register_call(function, call)


_fill()
