"""Which module a call came from, read off the Python stack.

Nothing is installed on the modules: the frames of `nn.Module._call_impl` name them. Only those frames' `f_locals` are
touched, because before Python 3.13 the dictionary so made lives as long as its frame, and would keep a user's tensors
alive.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from types import FrameType

from torch import nn

CALL_IMPL = nn.Module._call_impl.__code__
ModuleRef = weakref.ref[nn.Module]


def enclosing_modules() -> Iterator[nn.Module]:
    """The modules whose forward is running on this thread, innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is CALL_IMPL:
            yield frame.f_locals["self"]
        frame = frame.f_back


def innermost_module() -> nn.Module | None:
    """The module whose forward makes the call; None outside of any."""
    return next(enclosing_modules(), None)


def outermost_module() -> nn.Module | None:
    """The model: the module whose forward contains all the others."""
    frame: FrameType | None = sys._getframe(1)
    outermost: FrameType | None = None
    while frame is not None:
        if frame.f_code is CALL_IMPL:
            outermost = frame  # only its `f_locals` are asked for: a dictionary is made of them
        frame = frame.f_back
    return outermost.f_locals["self"] if outermost is not None else None


def model_of(module: nn.Module) -> nn.Module:
    """The outermost module whose forward is running; the given one outside of any."""
    model = outermost_module()
    return module if model is None else model  # `or` would ask for its length, which raises in what torch.compile made


def has_hooks(module: nn.Module) -> bool:
    """Whether something else than its forward runs when a module is called."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or nn.modules.module._has_any_global_hook()
    )


def parameters_of(module: nn.Module, *, recurse: bool = True) -> list[nn.Parameter]:
    """A module's parameters, whatever else a method of its own of that name may give an optimizer."""
    return list(nn.Module.parameters(module, recurse))


def path(module: ModuleRef | None, model: ModuleRef | None) -> str:
    """`encoder.layer.0.intermediate`, as `model.named_modules()` names it; empty where it does not, or not any more."""
    found, root = (module() if module else None), (model() if model else None)
    if found is None or root is None:
        return ""
    return next((name for name, candidate in root.named_modules() if candidate is found), "")
