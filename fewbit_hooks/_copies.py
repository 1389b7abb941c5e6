"""Outputs that live on in a copy: what a convolution keeps is its padded input.

NOTE [ Beside a copy ]

A model that pads by itself, as those that came from TensorFlow do and whatever has another `padding_mode` than zeros,
hands a convolution a padded copy of the activation's output. Nobody keeps the output then; but the copy is kept, and
what lies inside its margins is the output, element for element. So the derivative is had from there, as it is from an
output that is kept itself (NOTE [ Beside a kept output ] in `_inverse.py`).

The copy is made after the call. Until then the packed object has the output itself; at the copy it lets go of it. That
somebody keeps the copy is learned as all else is (NOTE [ Learning what is kept ] in `_learning.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ._calls import Call, _callables, input_of, register_call
from ._stack import Entry

RECENT = 8
"""Calls among which the one is sought whose output is copied: an output is copied soon, by the next layer."""


COPY = Call("pad", None)
"""Not an activation: its result contains its input."""

for _path in ("F.pad", "torch.constant_pad_nd", "torch.ops.aten.pad", "torch.ops.aten.constant_pad_nd"):
    for _function in _callables(_path):
        register_call(_function, COPY)


def run(entry: Entry, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Make a call that pads a tensor; tell the watch of the activation whose output that is."""
    padded = func(*args, **kwargs)
    watches = entry.scope._ledger.step.watches
    if not watches or entry.hooks is not None:
        return padded
    copy = inside(args, kwargs, padded)
    if copy is not None:
        y = input_of(args, kwargs)
        storage = y.untyped_storage()._cdata
        for watch in reversed(watches[-RECENT:]):
            if watch.output.cdata == storage:
                watch.follow(y, copy)
                break
    return padded


def inside(args: tuple[Any, ...], kwargs: Mapping[str, Any], padded: Any) -> Tensor | None:
    """What the padded tensor is within its margins; None where that is not a copy of a whole, recorded tensor.

    >>> import torch.nn.functional as F
    >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    >>> inside((x, (1, 0, 0, 2)), {}, F.pad(x, (1, 0, 0, 2)))
    tensor([[1., 2.],
            [3., 4.]])
    """
    x, pad = input_of(args, kwargs), args[1] if len(args) > 1 else kwargs.get("pad")
    if type(x) is not Tensor or type(padded) is not Tensor or not x.requires_grad or x.layout is not torch.strided:
        return None
    if torch._C._functorch.peek_interpreter_stack() is not None or not isinstance(pad, (tuple, list)):
        return None
    if min(pad, default=0) < 0 or padded.untyped_storage()._cdata == x.untyped_storage()._cdata:
        return None
    copy = padded.detach()
    for i, before in enumerate(pad[::2]):  # the last dimension comes first
        dim = x.dim() - 1 - i
        copy = copy.narrow(dim, before, x.shape[dim])
    return copy
