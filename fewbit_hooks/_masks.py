"""Masks: what dropout, `masked_fill` and `where` save is packed to one bit an element, exactly.

NOTE [ Which saved tensor is a mask ]

No formula of a dropout is copied here: a mask is known by what it is. (measured, torch 2.13)

    F.dropout on CUDA, native_dropout     a bool tensor
    dropout on the CPU                    noise: each element 0 or 1/(1-p), in the input's dtype, as it rounds there
    alpha dropout on the CPU              noise of 0 and another value; feature dropouts' is small, (N, C, 1, 1)
    attention with dropout on the CPU     query, key, value, the softmax, the noise, the noisy softmax
    masked_fill, where                    the condition

So inside a recognised call a saved tensor is a mask if it is bool, or if it carries no gradient, is no argument's, and
each of its elements is, bit for bit, 0 or one other value. The latter is looked at on the CPU alone: on CUDA the host
would have to wait. Everything else passes (NOTE [ What a packed object holds ] in `_hooks.py`).

A mask is constant and its code exact: unlike stand-ins it may be unpacked under `create_graph=True`.

NOTE [ Masks that somebody may hold ]

A causal mask that every layer is given stays where it is, whatever is packed: codes of it would come on top. One that
the model makes for a single call, as in `scores.masked_fill(mask == 0, -inf)`, has no other owner, but only once
the call is over and its caller has let go of it. So a mask that the caller has in its hands *waits*: it is kept, and
looked at when later calls of this kind are made, and when the scope is left. When nobody but autograd holds its storage
(torch counts its owners), it is packed then, in its place. The bytes held never exceed stock's.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import _policy, _recipes, _recompute, ops
from ._around import change_codes
from ._graph import latest_node, saved_since
from ._hooked import Hooks, hooked
from ._hooks import NO_GAIN, Handed, HandedCodes, Kept, keep
from ._ledger import CODES, Ledger, Row, Step
from ._mask_calls import MaskCall
from ._policy import Keep
from ._stack import Entry
from ._storages import owners

FLOATS = "a mask of floats on CUDA: the host would have to wait to see that it has two values"
CAPTURING = "a mask of the caller's, while a CUDA graph is captured"

LOOKS = 8
"""How often a waiting mask is looked at before it counts as held for good. A module that masks twice or thrice has
returned by then, and let go of its masks."""


def run(entry: Entry, call: MaskCall, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Make a call that saves a mask: packed, or as it is."""
    given = dict(zip(call.names, args, strict=False), **kwargs)
    if call.draws_nothing(given):
        return _run_without(entry, call, func, args, kwargs) if entry.recomputes else func(*args, **kwargs)
    settings, ledger = entry.scope._settings, entry.scope._ledger
    tensors = [value for value in given.values() if isinstance(value, Tensor)]
    foreign = next((t for t in tensors if type(t) not in (Tensor, nn.Parameter)), None)
    if foreign is not None:  # it decides what is saved
        with torch._C.DisableTorchFunctionSubclass():
            if any(t.requires_grad for t in tensors):
                reason = _policy.TRACING if _policy.traced() else _policy.obstacle(foreign, entry.hooks)
                ledger.passed(call.name, reason, 0)
        return func(*args, **kwargs)
    x = next((t for t in tensors if t.requires_grad), None)
    if x is None:
        return func(*args, **kwargs)
    if _policy.traced():  # before the size is asked for: that may be a symbol
        ledger.passed(call.name, _policy.TRACING, 0)
        return func(*args, **kwargs)
    nbytes = call.mask_bytes(given)
    if nbytes is not None and nbytes < max(settings.min_bytes, 1):  # in models of many small calls most are such
        ledger.passed(call.name, _policy.SMALL if nbytes else _policy.EMPTY, nbytes)
        return _run_without(entry, call, func, args, kwargs) if entry.recomputes else func(*args, **kwargs)
    if reason := _policy.obstacle(x.detach(), entry.hooks):  # a parameter may well have a mask
        ledger.passed(call.name, reason, 0)
        return func(*args, **kwargs)
    if change_codes(entry.around):
        ledger.passed(call.name, _policy.CHANGED, 0)
        return func(*args, **kwargs)
    look_again()
    try:
        if settings.bits is None:
            raise Keep(_policy.MEASURE)
        if settings.exclude.rules and settings.exclude.here():
            raise Keep(_policy.EXCLUDED)
        if settings.bits_for(call.name, x, exact=True) is None:
            raise Keep(f"no bits are given for {call.name}")
    except Keep as keep:
        return _keep(ledger, call, str(keep), tensors, functools.partial(func, *args, **kwargs))
    hook = MaskHook(call, tensors, ledger, settings.min_bytes, entry.around, anchors=entry.recomputes)
    try:
        with hooked(hook, _unpack):
            y = func(*args, **kwargs)
        if hook.kept:
            for made in _tensors_of(y):
                ledger.ends_at(made)
        plain = call.plain and not given.get("inplace")
        if entry.recomputes and plain and hook.packed is not None and isinstance(y, Tensor):
            _recompute.note_dropout(x, y, hook.packed, given.get("p", 0.5))
        return y
    finally:
        hook.release()


def _run_without(entry: Entry, call: MaskCall, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Make a call without a mask that could be packed, under `recompute=True`: what attention keeps serves to compute
    others again."""
    keeps = call.name == "scaled_dot_product_attention" and entry.hooks is None
    if keeps and _recompute.admits(args, kwargs, min_bytes=0) is not None:
        return _recompute.keeping(call.name, func, args, kwargs)
    return func(*args, **kwargs)


class PackedMask:
    """One bit an element in the place of a mask."""

    __slots__ = ("__weakref__", "codes", "layout", "nbytes", "rows", "step")

    def __init__(self, mask: Tensor, codes: Tensor, other: int, step: Step, around: Hooks | None = None) -> None:
        self.nbytes = codes.nbytes
        self.codes = codes if around is None else HandedCodes(codes, around)
        self.rows = ops.two_value_rows(other, mask.dtype, mask.device)
        self.layout = ops.Layout.of(mask)
        self.step = step

    def unpack(self) -> Tensor:
        """The mask, bit for bit."""
        self.step.unpacked()
        codes = self.codes.unpack() if isinstance(self.codes, Handed) else self.codes
        with ops.unnoticed():
            return ops.decode(codes, self.rows, 1, self.layout)


class WaitingMask:
    """A mask that somebody may hold: kept, until nobody does."""

    __slots__ = ("__weakref__", "_content", "_looks", "_row", "_step", "_stream")

    def __init__(self, mask: Tensor, name: str, row: Row, step: Step) -> None:
        self._content: Kept | PackedMask = Kept(mask, name)  # replaced at one stroke: a backward may run meanwhile
        self._row = row
        self._step = step
        self._looks = 0
        self._stream = ops.stream_of(mask)

    def unpack(self) -> Tensor:
        """The mask, packed or not."""
        self._step.unpacked()
        return self._content.unpack()

    def look(self) -> bool:
        """Pack the mask if nobody else holds it; whether to look again."""
        kept = self._content
        if not isinstance(kept, Kept):
            return False  # packed by a look inside this one: the garbage collector may leave a scope
        mask = kept.tensor
        if owners(mask) == 1 and mask._version == kept.version and self._may_work_on(mask):
            try:
                with ops.unnoticed():
                    packed = PackedMask(mask, ops.encode(mask, 1, ops.not_zero), 1, self._step)
            except ops.OUT_OF_MEMORY:
                return True  # it serves as it is
            with self._step.lock:
                self._row.stored_bytes += packed.nbytes
            self._content = packed
            return False
        self._looks += 1
        return self._looks < LOOKS

    def _may_work_on(self, mask: Tensor) -> bool:
        same: bool = ops.stream_of(mask) == self._stream
        return same and not ops.capturing(mask.device)


_ready: set[torch.device] = set()
"""Devices on which a mask was packed: what that takes is there."""


class _Waiting(threading.local):
    def __init__(self) -> None:
        self.masks: list[weakref.ref[WaitingMask]] = []  # weak: a graph that is dropped takes its masks along


_waiting = _Waiting()


def look_again() -> None:
    """Pack those waiting masks of this thread that nobody else holds any more."""
    if not _waiting.masks or _policy.traced():
        return
    masks, _waiting.masks = _waiting.masks, []
    try:
        while masks:
            waiting = masks[-1]()
            if waiting is not None and waiting.look():
                _waiting.masks.append(masks[-1])
            del masks[-1]
    finally:
        _waiting.masks += masks


def _unpack(packed: PackedMask | WaitingMask | Kept | Handed) -> Tensor:
    return packed.unpack()


class MaskHook:
    """The pack hook of one call that saves a mask.

    Args:
        around: others' hooks around the scope.
        anchors: what is no mask, and so kept, serves to compute others again.
    """

    __slots__ = ("_anchors", "_arguments", "_around", "_call", "_in_hand", "_ledger", "_min_bytes", "kept", "packed")

    def __init__(
        self,
        call: MaskCall,
        tensors: list[Tensor],
        ledger: Ledger,
        min_bytes: int,
        around: Hooks | None,
        *,
        anchors: bool = False,
    ) -> None:
        self._call = call
        self._around = around
        self._anchors = anchors
        self._in_hand = call.returns or bool(call.mask)
        self._arguments = _arguments(call, tensors)
        self._ledger = ledger
        self._min_bytes = min_bytes
        self.packed: PackedMask | None = None
        self.kept = False

    def __call__(self, t: Tensor) -> PackedMask | WaitingMask | Kept | Handed:
        call, ledger = self._call, self._ledger
        if not _may_be_a_mask(t, self._arguments):
            return self._pass(t)
        if t.is_cuda and t.dtype != torch.bool:
            # of attention's float tensors on CUDA nothing is known; dropout saves nothing but its noise
            return self._keep(t, FLOATS) if call.name == "dropout" else keep(t, call.name, self._around)
        if t.nbytes < max(self._min_bytes, 1):
            ledger.passed(call.name, _policy.SMALL, t.nbytes)
            return keep(t, call.name, self._around)
        if ops.packed_bytes(t.numel(), 1) >= t.untyped_storage().nbytes():
            return self._keep(t, NO_GAIN)
        waits = self._in_hand and t.dtype == torch.bool  # a look at each element would be for nothing
        waits &= self._around is None  # the hooks around the scope take what they are given now
        if ops.must_be_ready(t) and ops.capturing(t.device) and (waits or t.device not in _ready):
            return self._keep(t, CAPTURING if waits else _policy.CAPTURING)
        with ops.unnoticed():
            found = None if waits else ops.encode_two_values(t)
            if found is None and not waits:
                return self._pass(t)
            row = ledger.row(call.name, 1, how=CODES)
            ledger.original(row, t)
            if found is None:
                waiting = WaitingMask(t, call.name, row, ledger.step)
                _waiting.masks.append(weakref.ref(waiting))
                return waiting
            packed = self.packed = PackedMask(t, *found, ledger.step, self._around)
            if ops.must_be_ready(t):
                _ready.add(t.device)
        ledger.stored(row, packed.nbytes)
        return packed

    def release(self) -> None:
        """The call is over; the hook itself lives as long as the node."""
        del self._call, self._arguments, self._around, self._ledger, self.packed

    def _pass(self, t: Tensor) -> Kept | Handed:
        """What is no mask."""
        kept = keep(t, self._call.name, self._around)
        if self._anchors and isinstance(kept, Kept):
            _recipes.anchor(t, kept)
        return kept

    def _keep(self, t: Tensor, reason: str) -> Kept | Handed:
        self.kept = True
        self._ledger.original(self._ledger.row(self._call.name, None, reason), t)
        return keep(t, self._call.name, self._around)


def _arguments(call: MaskCall, tensors: list[Tensor]) -> set[int]:
    """The storages that are no mask although they may look like one."""
    return set() if call.mask else {t.untyped_storage()._cdata for t in tensors}


def _may_be_a_mask(t: Tensor, arguments: set[int]) -> bool:
    return (
        type(t) is Tensor
        and (t.dtype == torch.bool or t.dtype in _policy.DTYPES)
        and t.grad_fn is None
        and not t.requires_grad
        and t.layout is torch.strided
        and t.untyped_storage()._cdata not in arguments
    )


def _tensors_of(result: Any) -> list[Tensor]:
    return [y for y in (result if isinstance(result, tuple) else (result,)) if isinstance(y, Tensor)]


def _keep(ledger: Ledger, call: MaskCall, reason: str, tensors: list[Tensor], run_it: Callable[[], Any]) -> Any:
    """Make the call without hooks, and count the masks that its nodes saved."""
    arguments = _arguments(call, tensors)
    row, before = ledger.row(call.name, None, reason), latest_node(tensors)
    result = run_it()
    made = _tensors_of(result)
    for y in made:
        ledger.ends_at(y)
    for t in saved_since(before, made):
        if _may_be_a_mask(t, arguments) and (t.dtype == torch.bool or not t.is_cuda):
            with ops.unnoticed():
                if ops.second_value(t) is not None:
                    ledger.original(row, t)
    return result
