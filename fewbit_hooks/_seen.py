"""What a scope would see in a call: asked of the parts of the scope, which decide it for the scope itself.

Whether a call is recognised, admitted, kept for a reason; what its result can be computed again from; what its node
keeps for certain. What a scope does with it depends on what others keep, too, and is played afterwards (`_play.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from . import _composites, _consumers, _copies, _policy, _recompute, _treatment, ops
from ._calls import RECOGNISED, Call, input_of
from ._composites import Composite
from ._mask_calls import MaskCall
from ._recompute_calls import RECOMPUTE, RecomputeCall
from ._recording import ACTIVATION, CAST, CHANGE, CONSUMER, COPY, EXPOSURE, MADE, MASK, NORM, SOFTMAX, Ref, Saved
from ._sites import Sites

What: TypeAlias = dict[str, Any]
"""Attributes of an `Operation`; empty where a scope sees nothing in it."""


class Seen:
    """What a scope sees in the calls of one step.

    Args:
        key: names the storage of a tensor.
        hooks: the recorder's pack hook, which is innermost where nobody else's is.
    """

    def __init__(self, key: Callable[[Tensor], int], hooks: object) -> None:
        self._key = key
        self._pack_hook = hooks
        self._sites = Sites()

    def call(
        self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor | None, kept: Sequence[Saved]
    ) -> What:
        """What it sees in a torch call that is over.

        Args:
            y: the result.
            kept: what the call keeps; it is noted which are masks.
        """
        call, again = RECOGNISED.get(function), RECOMPUTE.get(function)
        if isinstance(call, MaskCall):
            return self._mask_call(call, dict(zip(call.names, args, strict=False), **kwargs), y, kept)
        if call is _copies.COPY:
            copies = _copies.inside(args, kwargs, y) is not None
            return {"kind": COPY, "x": self.ref(input_of(args, kwargs))} if copies else {}
        if call is not None:
            return self._activation(call, function, args, kwargs, y)
        if again is not None:
            return self._again(again, function, args, kwargs, y, kept)
        return {"kind": CHANGE} if _changes(function) and args and y is args[0] else {}

    def ref(self, t: Tensor) -> Ref:
        """The tensor as it is now."""
        key = self._key(t)
        nbytes = t.untyped_storage().nbytes() if key else 0
        version, parameter = 0 if t.is_inference() else t._version, isinstance(t, nn.Parameter)
        place = (t.shape, t.stride(), int(t.storage_offset())) if key and not t.is_nested else None
        return Ref(key, nbytes, version, t.dtype, parameter, t.grad_fn is not None, place)

    def _activation(
        self, call: Call, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor | None
    ) -> What:
        x = input_of(args, kwargs)
        if not isinstance(x, Tensor) or not x.requires_grad or y is None:
            return {}
        what = self._input(ACTIVATION, call, x)
        if what.get("reason") in _treatment.NO_BYTES:
            return {}
        if not what["reason"]:
            what |= self._plan(call, function, args, kwargs, x)
        what["one_node"] = call.one_node is not None
        rest = {key: value for key, value in kwargs.items() if key not in ("input", "self")}
        if _recompute.takes_one_tensor(args, rest):
            what["sources"] = (what["x"],)
        return what

    def _input(self, kind: str, call: Call | RecomputeCall | Composite, x: Tensor) -> What:
        activation = call.activation if isinstance(call, Call) else None
        return {
            "kind": kind,
            "reason": _policy.obstacle(x, self._pack_hook),
            "site": self._sites.find(call.name, 0),
            "x": self.ref(x),
            "x_bytes": x.numel() * x.element_size(),
            "x_shape": x.shape,
            "exact": activation is not None and activation.exact,
            "saves_input": activation is not None and activation.saves == "input",
        }

    def _plan(self, call: Call, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor) -> What:
        try:
            plan = _policy.make_plan(_policy.Settings(), call, function, args, kwargs, x)
            if call.one_node is not None and plan.captures(x):
                raise _policy.Keep(_policy.CAPTURED)
        except _policy.Keep as keep:
            return {"reason": str(keep)}
        inverse, from_copy = plan.inverse(x), plan.inverse(x, copied=True)
        return {
            "beside": inverse.bits if inverse is not None else None,
            "beside_copy": from_copy.bits if from_copy is not None else None,
        }

    def composite(
        self, composite: Composite, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> What | None:
        """What a scope sees in a module that it would treat as a whole; None where it would look at its primitives."""
        x = args[0] if args else next(iter(kwargs.values()), None)
        if len(args) + len(kwargs) != 1 or not isinstance(x, Tensor) or not x.requires_grad or _policy.traced():
            return None
        call = composite.call
        what, one_node = self._input(NORM if call is None else ACTIVATION, call or composite, x), True
        if what["reason"] in _treatment.NO_BYTES:
            return None
        if not what["reason"]:
            facts = _composites.look_at(composite, module, x)
            what["reason"], one_node = facts.reason, facts.gains(composite, x)
            if not (facts.reason or one_node or (call is None and facts.anchors(x))):
                return None
        if call is None:
            if what["reason"] or (parameters := _composites.own(module)) is None:
                return None
            what["sources"] = (what["x"], *map(self.ref, parameters))
            what["keeps"] = what["sources"][:1]
        elif not what["reason"]:
            assert call.activation is not None
            what |= self._plan(call, call.activation.function, (x,), dict(composite.parameters), x)
            what["sources"] = (what["x"],)
        return {**what, "one_node": one_node}

    def _mask_call(self, call: MaskCall, given: dict[str, Any], y: Tensor | None, kept: Sequence[Saved]) -> What:
        tensors = [value for value in given.values() if isinstance(value, Tensor)]
        x = next((t for t in tensors if t.requires_grad), None)
        draws_nothing = call.draws_nothing(given)
        if x is None or (draws_nothing and call.name != "scaled_dot_product_attention"):
            return {}
        foreign = next((t for t in tensors if type(t) not in (Tensor, nn.Parameter)), x.detach())
        if _policy.obstacle(foreign, self._pack_hook):
            return {}
        others = []
        for saved in kept:
            held = saved.held()
            if held is not None and not draws_nothing:
                saved.mask = saved.dtype is torch.bool if call.mask else saved.role == MADE and _is_mask(held.tensor)
            if held is not None and not saved.mask:
                others.append(self.ref(held.tensor))
        what: dict[str, Any] = {"kind": MASK, "keeps": tuple(others), "waits": call.returns or bool(call.mask)}
        if call.plain and y is not None and not given.get("inplace"):
            what["sources"] = (self.ref(x),)
        return what

    def _again(
        self,
        call: RecomputeCall,
        function: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        y: Tensor | None,
        kept: Sequence[Saved],
    ) -> What:
        """With `recompute=True`."""
        if call.kind == "exposure":
            return {"kind": EXPOSURE, "x": self.ref(args[0])} if type(args[0]) is Tensor else {}
        admitted = _recompute.admits(args, kwargs, 1, self._pack_hook)
        if admitted is None or y is None:
            return {}
        x, tensors = admitted
        what: dict[str, Any] = {"x_bytes": x.numel() * x.element_size()}
        if call.kind == "norm":
            norm = _recompute.look_at_norm(call, function, args, kwargs)
            if norm is None:
                return {}
            x = args[0]
            sources = tuple(self.ref(t) for t in (x, *norm.parameters))
            what |= {"kind": NORM, "x": sources[0], "sources": sources, "one_node": norm.run_again}
            what["keeps"] = sources[:1] if norm.anchors_x else ()
        elif call.kind == "softmax":
            tensors = [held.tensor for saved in kept if (held := saved.held()) is not None]
            what |= {"kind": SOFTMAX, "keeps": tuple(self.ref(t) for t in tensors)}
        elif call.kind == "cast":
            if not _recompute.is_cast(x, y, args):
                return {}
            what |= {"kind": CAST, "sources": (self.ref(x),)}
        else:
            operands = _consumers.saved_operands(call, tensors)
            what |= {"kind": CONSUMER, "operands": tuple(self.ref(t) for t in operands)}
            what["site"] = self._sites.find(call.name, 0)
            what["keeps"] = tuple(
                self.ref(t) for t in operands if _consumers.is_saved_itself(call, t, tensors, args, kwargs)
            )
            if call.kind == "product" and _recompute.are_factors(tensors, kwargs):
                what["sources"] = tuple(self.ref(t) for t in tensors)
        return what


def _is_mask(t: Tensor) -> bool:
    if t.dtype is torch.bool:
        return True
    # on CUDA the host would have to wait to see it
    return not t.is_cuda and t.dtype in _policy.DTYPES and t.numel() > 0 and ops.second_value(t) is not None


def _changes(function: Any) -> bool:
    """By its name it changes its first argument."""
    name = getattr(function, "__name__", "")
    return name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
