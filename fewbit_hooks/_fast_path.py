"""PyTorch's own fast paths, which a mode would close.

NOTE [ Fast paths ]

`nn.MultiheadAttention`, `nn.TransformerEncoderLayer` and `nn.TransformerEncoder` have a second forward, of fused
kernels, for evaluation without gradients. Its results are others (in the last places; at padded positions it returns
0), and it is not taken while a `TorchFunctionMode` is there. So where nothing that they are given requires grad, and
ours is the only mode, it is taken off while they run: there is nothing in them to be coded.
"""

from __future__ import annotations

import functools
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn

from . import _stack
from ._composites import in_place_of
from ._modules import parameters_of

CLASSES: tuple[type[nn.Module], ...] = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)


@functools.cache
def keep_open() -> None:
    """Replace the classes' forwards, once, by such as take our mode off."""
    for cls in CLASSES:
        cls.forward = in_place_of(cls.forward, _run_or_leave(cls.forward))


def _run_or_leave(forward: Any) -> FunctionType:
    thread, is_compiling, run = _stack.this_thread, torch.compiler.is_compiling, _run

    def run_or_leave(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if thread.acting is None or is_compiling():  # outside of any scope this is all that it costs
            return forward(self, *args, **kwargs)
        return run(forward, self, args, kwargs)

    return cast(FunctionType, run_or_leave)


def _run(forward: Any, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    alone = torch._C._len_torch_function_stack() == 1
    mode = torch._C._get_function_stack_at(0) if alone else None
    if mode is None or mode is not _stack.this_thread.mode or _records(module, args, kwargs):
        return forward(module, *args, **kwargs)
    torch._C._pop_torch_function_stack()
    try:
        return forward(module, *args, **kwargs)
    finally:
        torch._C._push_on_torch_function_stack(mode)


def _records(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether autograd records the call."""
    if not torch.is_grad_enabled():
        return False
    given = (t for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
    with torch._C.DisableTorchFunction():
        return any(t.requires_grad for t in (*given, *parameters_of(module)))
