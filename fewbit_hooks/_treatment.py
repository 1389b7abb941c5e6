"""What is done with a recognised call: coded, run again in backward, or left as it is, and why."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from . import _fused, _graph, _hooks, _one_node, _policy, _recipes, _recompute, _stack, ops
from ._again import run_again
from ._around import change_codes
from ._calls import Call, input_of
from ._dtensor import local_part
from ._inverse import Itself
from ._learning import FROM_OUTPUT, Site, Verdict
from ._ledger import HELD, Ledger
from ._plan import Plan
from ._policy import Keep
from ._stack import Entry
from ._standins import Saves
from ._watch import Watch

NO_BYTES = frozenset({_policy.CHECKPOINT, _policy.HOOKS, _policy.TRANSFORM, _policy.FORWARD_AD})
"""Reasons that say that others, and not this call's node, decide what is kept."""

SOURCE = "its output is computed again from it"

_ASKED = contextlib.nullcontext()


def _unasked(t: Tensor) -> AbstractContextManager[object]:
    """What is asked of a tensor goes by no `__torch_function__` of its class, which may refuse it."""
    return _ASKED if type(t) is Tensor else torch._C.DisableTorchFunctionSubclass()


def run(entry: Entry, call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Make a call of a recognised activation."""
    x = input_of(args, kwargs)
    if not isinstance(x, Tensor):
        return func(*args, **kwargs)
    function = call.one_node or func
    run_it = functools.partial(function, *args, **kwargs)
    try:
        if not admits(entry, call.name, x, in_parts=call.one_node is None):
            return run_it()
        plan = _policy.make_plan(entry.scope._settings, call, function, args, kwargs, x)
        if call.one_node is not None and plan.captures(x):
            raise Keep(_policy.CAPTURED)
    except Keep as keep:
        site, _ = _site(entry, call.name, recomputes=False)  # which knows the module, and the model around it
        return leave(entry, call, str(keep), x, run_it, site)
    if call.one_node is not None:
        return as_one_node(entry, plan, x, run_it, plan.function, plan.primitives(x))
    return _as_it_is(entry, call, plan, x, run_it)


def admits(entry: Entry, name: str, x: Tensor, *, in_parts: bool = False) -> bool:
    """Whether a call with this input is worth a second look; counts those that are not.

    Args:
        in_parts: a DTensor is coded by its part.

    Raises:
        Keep: it is, and it is kept.
    """
    settings, ledger = entry.scope._settings, entry.scope._ledger
    plain = type(x) is Tensor
    with _unasked(x):
        nbytes = x.numel() * x.element_size()  # nbytes raises if it is sparse
        if plain and nbytes < settings.min_bytes:  # in models of many small calls most are such
            if x.requires_grad:
                ledger.passed(name, _policy.SMALL if nbytes else _policy.EMPTY, nbytes)
            return False
        reason = _policy.obstacle(x, entry.hooks, in_parts=in_parts)
        if reason in NO_BYTES:
            ledger.passed(name, reason, 0)
            return False
        if not x.requires_grad:
            return False
        if reason and _policy.traced():
            ledger.passed(name, reason, 0)  # a fake tensor has no memory, and its size may be a symbol
            return False
        if reason:
            raise Keep(reason)
        if not plain:
            nbytes = local_part(x).nbytes
        if nbytes < settings.min_bytes or not nbytes:
            ledger.passed(name, _policy.SMALL if nbytes else _policy.EMPTY, nbytes)
            return False
        if settings.bits is None:
            raise Keep(_policy.MEASURE)
        if settings.exclude.rules and settings.exclude.here():
            raise Keep(_policy.EXCLUDED)
        if change_codes(entry.around):
            ledger.passed(name, _policy.CHANGED, 0)
            return False
        return True


def leave(
    entry: Entry,
    call: Call,
    reason: str,
    x: Tensor,
    run_it: functools.partial[Any],
    site: Site | None = None,
    *,
    look: bool = False,
) -> Any:
    """Make the call as it is, and count what its node keeps.

    Args:
        look: it is to be seen whether somebody else keeps that.
    """
    saves = call.activation.saves if call.activation is not None else "several"
    with _unasked(x):
        before = _graph.latest_node([x]) if saves == "several" else -1
    y, kept = _hooks.run_kept(call.name, run_it) if look else (run_it(), [])
    if not isinstance(y, Tensor):
        return y
    with _unasked(y):
        if not y.requires_grad:
            return y
        ledger = entry.scope._ledger
        row = ledger.row(call.name, None, reason, site=site)
        if saves != "several" or entry.around is not None:  # whose hooks would take a look for the backward
            ledger.original(row, local_part(y if saves == "output" else x))
        else:
            for t in _graph.saved_since(before, [y]):
                if t.shape == x.shape:  # prelu's weight is the model's
                    ledger.original(row, local_part(t))
        ledger.ends_at(y)
        if look and site is not None:
            ledger.watch(Watch(site, [], y, Verdict.LOOK, kept=kept))
        if entry.recomputes and saves == "input" and _has_its_own(x, y):
            if kept and (packed := kept[0]()) is not None:
                _recipes.anchor(x, packed)
            else:
                _recipes.anchor_by_node(x, y)
            _recompute.note_activation(run_it, x, y, (site, ledger.coming_step) if site is not None else None)
    return y


def _has_its_own(x: Tensor, y: Tensor) -> bool:
    """Whether the result lies beside its input; where it was made in place, its node keeps a copy."""
    if type(x) is not Tensor or _policy.unfit(x) or y.layout is not torch.strided:
        return False  # no storage, or not the one that is kept
    return bool(y.untyped_storage()._cdata != x.untyped_storage()._cdata)


def again(
    entry: Entry, name: str, forward: Callable[..., Tensor], x: Tensor, primitives: Saves, site: Site | None = None
) -> Tensor:
    """Run an activation that is written in primitives so that it keeps its input and is run again: exact."""
    ledger = entry.scope._ledger
    run = functools.partial(_stack.with_modes, forward, x)
    y: Tensor = run_again(name, ledger, run, forward, [x], primitives)
    if entry.recomputes:
        _recipes.note(y, forward, [x], site=(site, ledger.coming_step) if site is not None else None)
    return y


def as_one_node(
    entry: Entry,
    plan: Plan,
    x: Tensor,
    run_it: functools.partial[Tensor],
    forward: Callable[..., Tensor],
    primitives: Saves,
) -> Tensor:
    """Run an activation that is written in primitives as one node: from codes, from its output, or again.

    Args:
        run_it: the call.
        forward: the same of its input alone.
    """
    ledger, name = entry.scope._ledger, plan.activation.name
    site, verdict = _site(entry, name, recomputes=entry.recomputes, can_look=False)
    if verdict in (Verdict.LEAVE, Verdict.INPUT):
        y = again(entry, name, forward, x, primitives, site)
        _watch_input(ledger, site, verdict, y)
        return y
    inverse = plan.inverse(x) if verdict in FROM_OUTPUT else None
    if inverse is None and plan.reason_to_keep(x):
        return again(entry, name, forward, x, primitives, site)
    assert not isinstance(inverse, Itself)  # that is for activations of two values
    y = _one_node.run_coded(plan, ledger, x, run_it, site, inverse, primitives=primitives)
    if entry.recomputes and site is not None:
        _recipes.note(y, forward, [x], site=(site, ledger.coming_step))
    return y


def _as_it_is(entry: Entry, call: Call, plan: Plan, x: Tensor, run_it: functools.partial[Any]) -> Any:
    """Make the call of one node with our hooks around it, or without."""
    ledger = entry.scope._ledger
    recomputes = entry.recomputes and type(x) is Tensor
    site, verdict = _site(entry, call.name, recomputes=recomputes, can_look=type(x) is Tensor)
    if verdict is Verdict.INPUT and plan.codebook is None:
        verdict = site.verdict if site is not None else verdict  # a bit is less than the input, none less than that
    if verdict in (Verdict.LEAVE, Verdict.INPUT, Verdict.LOOK):
        reason = SOURCE if verdict is Verdict.INPUT else HELD
        y = leave(entry, call, reason, x, run_it, site, look=verdict is Verdict.LOOK)
        _watch_input(ledger, site, verdict, y)
        return y
    inverse = plan.inverse(local_part(x), copied=verdict is Verdict.COPY) if verdict in FROM_OUTPUT else None
    if entry.fuses and _one_node.serves(plan, x, inverse):
        assert not isinstance(inverse, Itself)
        fused = _fused.forward_of(plan, x) if entry.by_kernels and inverse is None else None
        y = _one_node.run_coded(plan, ledger, x, run_it, site, inverse, fused=fused)
    else:
        y = _hooks.run_coded(plan, ledger, x, run_it, site, inverse, entry.around)
    if recomputes and not plan.inplace and plan.codebook is not None and isinstance(y, Tensor):
        _recompute.note_activation(run_it, x, y, site=(site, ledger.coming_step) if site is not None else None)
    return y


def _site(entry: Entry, name: str, *, recomputes: bool, can_look: bool = True) -> tuple[Site | None, Verdict]:
    """The place that the call comes from, and what is to be done there.

    Args:
        can_look: who else holds what the call keeps can be told; else it is coded for a look.
    """
    if entry.hooks is not None:
        # Under hooks of others nothing is learned: a checkpoint must see the same saved tensors when it runs again.
        return None, Verdict.UNKNOWN
    scope = entry.scope
    step = scope._ledger.coming_step
    site = scope._sites.find(name, step)
    if site is None:
        return None, Verdict.UNKNOWN
    verdict = site.treatment(recomputes)
    if verdict is Verdict.LOOK and not can_look:
        site.forget()
        return site, Verdict.UNKNOWN
    if verdict in FROM_OUTPUT and ops.results_may_change():
        return site, Verdict.CODES  # it may be another function's
    return site, verdict


def _watch_input(ledger: Ledger, site: Site | None, verdict: Verdict, y: Any) -> None:
    if site is not None and verdict is Verdict.INPUT and isinstance(y, Tensor):
        ledger.watch(Watch(site, [], y, verdict))
