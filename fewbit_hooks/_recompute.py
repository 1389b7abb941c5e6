"""What a scope does with the calls that matter under `recompute=True` (`_recompute_calls.py`), and what comes of them.

What they return gets an origin, what their nodes keep is an anchor: NOTE [ Recipes ] in `_recipes.py`. What they would
save is the business of `_consumers.py`; `note_activation` and `note_dropout` are for calls that any scope recognises.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import _policy, _recipes, _stack, _watch, ops
from ._again import run_again
from ._consumers import consume
from ._dtensor import local_part
from ._hooked import hooked
from ._hooks import Kept, unpack
from ._learning import Site
from ._ledger import Ledger
from ._modules import innermost_module
from ._recompute_calls import RecomputeCall
from ._replay import Autocast
from ._stack import Entry
from ._standins import Saves, saves

GAIN = 0.25
"""Bytes, for each byte of its input, that a norm must keep less if it is run again: more than a kernel's statistics."""


def run(entry: Entry, call: RecomputeCall, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Any:
    """Make such a call under a scope with `recompute=True`, or in one inside it; an exposure in any."""
    kwargs = kwargs or {}
    if call.kind == "exposure":
        for given in (*args, *kwargs.values()):
            for t in given if isinstance(given, (list, tuple)) else (given,):
                if isinstance(t, Tensor):
                    _expose(t)
        return func(*args, **kwargs)
    settings = entry.scope._settings
    if (
        not entry.recomputes
        or entry.hooks is not None  # innermost hooks win: those that were there before ours keep what is kept
        or (admitted := admits(args, kwargs, settings.min_bytes)) is None
        or (settings.exclude.rules and settings.exclude.here())
    ):
        return func(*args, **kwargs)
    x, tensors = admitted
    if call.kind == "norm":
        return _norm(entry, call, func, args, kwargs)
    if call.kind == "softmax":
        return keeping(call.name, func, args, kwargs)
    if call.kind == "cast":
        y = func(*args, **kwargs)
        if is_cast(x, y, args):
            _note_cast(x, y, args, kwargs)
        return y
    y = consume(entry, call, func, args, kwargs, tensors)
    if call.kind == "product" and isinstance(y, Tensor) and are_factors(tensors, kwargs):
        _recipes.note(y, torch.mul, tensors)
    return y


def _expose(given: Tensor) -> None:
    """Somebody gets hold of the memory of a tensor, each launch of a Triton kernel of those of all its arguments."""
    entries = _stack.entries()
    recomputes = any(entry.recomputes for entry in entries) or _recipes.any_known()
    steps = [step for entry in entries if (step := entry.scope._ledger.step).watches]
    if not recomputes and not steps and not _watch.relied_on():
        return
    t: Any = local_part(given)
    if (
        torch._C._functorch.peek_interpreter_stack() is not None  # vmap's tensors tell no storage
        or _policy.traced()
        or is_traceable_wrapper_subclass(t)
    ):
        return
    with torch._C.DisableTorchFunction():  # it may be of a class that has its own
        if t.layout is not torch.strided:
            return
        storage = t.untyped_storage()
        if recomputes:
            _recipes.expose(storage)
        _watch.expose(storage._cdata)
        for step in steps:
            step.exposed(storage._cdata)


def admits(
    args: tuple[Any, ...], kwargs: dict[str, Any], min_bytes: int, hooks: object = None
) -> tuple[Tensor, list[Tensor]] | None:
    """The first plain tensor and all tensors of a call that is worth a second look; None of one that is not.

    Args:
        hooks: as `_policy.obstacle` takes them.
    """
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    x = next((t for t in tensors if type(t) is Tensor), None)
    if (
        x is None
        or not torch.is_grad_enabled()
        or not all(type(t) in (Tensor, nn.Parameter) and t.layout is torch.strided for t in tensors)
        or not any(t.requires_grad for t in tensors)
        or _policy.traced()  # before the size is asked for: that would be traced, too
        or x.numel() * x.element_size() < max(min_bytes, 1)
        or _policy.obstacle(x, hooks)
    ):
        return None
    return x, tensors


def are_factors(tensors: Sequence[Tensor], kwargs: Mapping[str, Any]) -> bool:
    """Whether a product can be computed again: of two tensors of one shape.

    A parameter is always there, but the product's node keeps it only where the other factor requires a gradient. Where
    it does not (a mask that prunes it), stock lets an optimizer change the parameter before a second backward.
    """
    if len(tensors) != 2 or kwargs or tensors[0].shape != tensors[1].shape:
        return False
    a, b = tensors
    return (type(a) is Tensor or b.requires_grad) and (type(b) is Tensor or a.requires_grad)


def is_cast(x: Tensor, y: Any, args: tuple[Any, ...]) -> bool:
    """Whether `y` is `x` in another dtype, and nothing else."""
    plain = isinstance(y, Tensor) and y.dtype in _policy.DTYPES and y.device == x.device
    return plain and bool(args) and args[0] is x


@dataclass(frozen=True)
class Norm:
    """A call of a norm.

    Attributes:
        forward: the call, of the input and the parameters.
        parameters: the tensors beside the input.
        primitives: what it saves, beside the parameters.
        anchors_x: the input itself, no copy of it.
        run_again: it is run again in backward.
    """

    forward: Callable[..., Tensor]
    parameters: list[Tensor]
    primitives: Saves
    anchors_x: bool
    run_again: bool


def look_at_norm(call: RecomputeCall, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Norm | None:
    """layer_norm(input, normalized_shape, weight, bias, eps) and its like; None where the input is not the first."""
    if not args or not isinstance(args[0], Tensor):
        return None
    if call.name == "rms_norm" and not args[0].requires_grad:
        return None  # it is not kept, as the others' is, but what was made of it for the gradient of the weight
    x, given = args[0], (*args, *kwargs.values())
    where = [i for i, value in enumerate(given) if isinstance(value, Tensor)]
    names, positional = tuple(kwargs), len(args)
    given_without = [None if i in where else value for i, value in enumerate(given)]

    def forward(*tensors: Tensor) -> Tensor:  # it is kept: it must refer to no tensor, and so not to `args`
        values = list(given_without)
        for i, t in zip(where, tensors, strict=True):
            values[i] = t
        y: Tensor = func(*values[:positional], **dict(zip(names, values[positional:], strict=True)))
        return y

    parameters = [given[i] for i in where[1:]]
    try:
        primitives = _facts(call.name, forward, x, parameters, given_without)
    except (RuntimeError, ValueError, IndexError):
        return None  # what torch says of a small input it says of the call, too, which is made as it is
    # others than layer_norm keep a contiguous copy of what is not
    itself = call.name == "layer_norm" or x.is_contiguous() or x.is_contiguous(memory_format=_LAST[x.dim()])
    return Norm(forward, parameters, primitives, primitives.keeps_x and itself, primitives.gain(x) >= GAIN)


def _norm(entry: Entry, call: RecomputeCall, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    norm = look_at_norm(call, func, args, kwargs)
    if norm is None:
        return func(*args, **kwargs)
    x: Tensor = args[0]
    if norm.run_again and not (_recipes.changed and innermost_module() in _recipes.changed):
        run_it, ledger = functools.partial(func, *args, **kwargs), entry.scope._ledger
        return again(ledger, call.name, run_it, norm.forward, x, norm.parameters, norm.primitives)
    y = func(*args, **kwargs)
    if norm.anchors_x:
        _recipes.anchor_by_node(x, y)
    _recipes.note(y, norm.forward, [x, *norm.parameters])
    return y


_LAST = defaultdict(lambda: torch.contiguous_format, {4: torch.channels_last, 5: torch.channels_last_3d})


def keeping(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Make a call whose node keeps what serves to compute others again, its output too: that only a hook can name."""

    def pack(t: Tensor) -> Kept:
        kept = Kept(t, name)
        _recipes.anchor(t, kept)
        return kept

    with hooked(pack, unpack):
        return func(*args, **kwargs)


def again(
    ledger: Ledger,
    name: str,
    run_it: Callable[[], Any],
    forward: Callable[..., Tensor],
    x: Tensor,
    parameters: list[Tensor],
    primitives: Saves,
) -> Any:
    """Run a norm that is run again in backward, and note what came of it."""
    y = run_again(name, ledger, run_it, forward, [x, *parameters], primitives)
    _recipes.note(y, forward, [x, *parameters])
    return y


_known_facts: dict[Any, Saves] = {}


def _facts(
    name: str, forward: Callable[..., Tensor], x: Tensor, parameters: Sequence[Tensor], others: list[Any]
) -> Saves:
    """What a norm saves, beside the parameters."""
    normalized = next((value for value in others if isinstance(value, (tuple, list))), ())
    shape = probe_shape(x, channels=name == "group_norm", last=max(1, len(normalized)))
    trainable = x.requires_grad, *(p.requires_grad for p in parameters)
    dtypes = tuple(p.dtype for p in parameters)
    whole = tuple(x.shape[1:]) if name == "group_norm" else ()
    key = name, x.dtype, x.device, shape, whole, trainable, dtypes, str(others), Autocast.of(x.device.type)
    found = _known_facts.get(key)
    if found is None:
        found = _ask(forward, shape, x, parameters)
        if name == "group_norm" and found.gain(x) >= GAIN:  # its statistics are those of a whole image
            found = _ask(forward, (1, *x.shape[1:]), x, parameters)
        if len(_known_facts) >= _policy.MAX_PLANS:
            _known_facts.clear()
        _known_facts[key] = found
    return found


def _ask(forward: Callable[..., Tensor], shape: tuple[int, ...], x: Tensor, parameters: Sequence[Tensor]) -> Saves:
    with ops.unseen():
        probe = torch.zeros(shape, dtype=x.dtype, device=x.device)
        return saves(lambda t: forward(t, *parameters), probe, parameters, autocast=True)


def probe_shape(x: Tensor, *, channels: bool = False, last: int = 1) -> tuple[int, ...]:
    """The shape of a small input on which a norm saves, for each byte, what it saves of `x`.

    Args:
        channels: those of the second dimension must be there, as they are if there are four.
        last: dimensions at the end over which it is normalised.
    """
    ones = [1] * x.dim()
    ones[x.dim() - last :] = x.shape[x.dim() - last :]
    if x.dim() > 1 and (channels or x.dim() == 4):
        ones[1] = x.shape[1]
    return tuple(ones)


def _note_cast(x: Tensor, y: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    formats = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.memory_format)]
    memory_format = formats[0] if formats else torch.preserve_format
    run = functools.partial(torch.Tensor.to, dtype=y.dtype, copy=True, memory_format=memory_format)
    _recipes.note(y, run, [x])


def note_activation(run_it: functools.partial[Any], x: Tensor, y: Tensor, site: tuple[Site, int] | None = None) -> None:
    """An activation ran as `run_it()`; whether its node keeps its input is told by an anchor, or not."""
    rest = {key: value for key, value in run_it.keywords.items() if key not in ("input", "self")}
    if takes_one_tensor(run_it.args, rest):
        _recipes.note(y, _With(run_it.func, run_it.args[1:], rest), [x], site=site)


def takes_one_tensor(args: tuple[Any, ...], rest: Mapping[str, Any]) -> bool:
    """Whether an activation depends on its input alone."""
    return not any(isinstance(value, Tensor) for value in (*args[1:], *rest.values()))


def note_dropout(x: Tensor, y: Tensor, mask: Any, p: float) -> None:
    """A dropout ran, whose node keeps its mask alone."""
    replay: Callable[..., Tensor] = torch.mul
    if x.is_cuda:
        # its forward divides in the dtype that it computes in: 1 / (1 - p), rounded once, is another number at p=0.15
        dtype = np.float64 if x.dtype == torch.float64 else np.float32
        replay = functools.partial(_masked_on_cuda, scale=float(dtype(1) / dtype(1 - p)))
    _recipes.note(y, replay, [x], [mask])


def _masked_on_cuda(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    """In the strides of the forward's result: those that the backward's has are others where `x` is not contiguous."""
    y: Tensor = torch.ops.aten.native_dropout_backward.out(x, mask, scale, out=torch.empty_like(x))
    return y


class _With:
    """A function of a tensor, with its other arguments."""

    __slots__ = ("_args", "_func", "_kwargs")

    def __init__(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._func, self._args, self._kwargs = func, args, kwargs

    def __call__(self, t: Tensor) -> Tensor:
        y: Tensor = self._func(t, *self._args, **self._kwargs)
        return y
