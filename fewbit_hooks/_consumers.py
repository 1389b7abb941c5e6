"""Calls whose operands are saved: a Linear, a product, a convolution. What has a recipe is not kept, but its recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _recipes
from ._hooked import hooked
from ._hooks import Kept, unpack
from ._learning import Verdict
from ._ledger import RECOMPUTED, Ledger, Step
from ._recipes import Geometry, Recipe
from ._recompute_calls import RecomputeCall
from ._stack import Entry
from ._storages import StorageWeakRef
from ._watch import Watch


def consume(
    entry: Entry, call: RecomputeCall, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]
) -> Any:
    """Make a call whose operands are saved, by recipe where they have one."""
    saved = saved_operands(call, tensors)
    if not saved:
        return func(*args, **kwargs)
    ledger = entry.scope._ledger
    made = [(t, origin) for t in saved if (origin := _recipes.find(t)) is not None and not _recipes.is_anchor(t)]
    site = entry.scope._sites.find(call.name, ledger.coming_step) if made else None
    if site is not None and site.verdict is Verdict.LEAVE and not site.is_due:
        made = []  # nor is anything asked for
    recipes = {t.untyped_storage()._cdata: (t, recipe) for t, origin in made if (recipe := origin.recipe()) is not None}
    if not recipes:
        y = func(*args, **kwargs)
        for t in saved:
            if is_saved_itself(call, t, tensors, args, kwargs):
                _recipes.anchor_by_node(t, y)
        return y
    hook = ConsumerHook(call.name, recipes, ledger)
    try:
        with hooked(hook, unpack):
            y = func(*args, **kwargs)
        if site is not None and hook.replaced:
            ledger.watch(Watch(site, hook.replaced, y))
        return y
    finally:
        hook.release()


def saved_operands(call: RecomputeCall, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Those that the call saves: each for the gradient of the other."""
    operands = tensors[-2:] if call.name == "addmm" else tensors[:2]
    if len(operands) < 2:
        return []
    both = call.name == "conv"  # its node saves the input for the gradient of a frozen weight, too
    return [t for t, other in (operands, operands[::-1]) if other.requires_grad or both]


def is_saved_itself(
    call: RecomputeCall, operand: Tensor, tensors: Sequence[Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> bool:
    """Whether what is saved is this operand for certain, and no copy: autocast's, a contiguous, broadcast or padded
    one."""
    if torch.is_autocast_enabled(operand.device.type):
        return False
    if call.name == "mul":
        return True
    if call.name == "conv" and any(isinstance(value, str) for value in (*args, *kwargs.values())):
        return False  # padding="same" may pad more on one side
    if call.name == "matmul" and operand.dim() > 2:
        first, second = tensors[:2]
        alike = first.shape[:-2] == second.shape[:-2]
        if not alike and (operand is second or second.dim() > 2):
            return False
    return operand.is_contiguous()


class Recomputed:
    """A recipe in the place of a saved tensor."""

    __slots__ = ("_cast", "_geometry", "_recipe", "_step")

    def __init__(self, recipe: Recipe, geometry: Geometry, step: Step, cast: _Cast | None = None) -> None:
        recipe.add_user()
        self._recipe = recipe
        self._geometry = geometry
        self._cast = cast
        self._step = step

    def unpack(self) -> Tensor:
        """The saved tensor, bit for bit."""
        self._step.unpacked()
        with torch._C.DisableTorchFunction(), torch.no_grad():
            value = self._recipe.value()
            if self._cast is not None:
                value = self._cast(value)
            return self._geometry.of(value)


class _Cast:
    """The copy that autocast makes of an operand."""

    __slots__ = ("_dtype", "_geometry")

    def __init__(self, operand: Geometry, dtype: torch.dtype) -> None:
        self._geometry = operand
        self._dtype = dtype

    def __call__(self, value: Tensor) -> Tensor:
        return self._geometry.of(value).to(self._dtype)


def is_autocast_of(t: Tensor, operand: Tensor) -> bool:
    """Whether `t` is the copy that autocast made of an operand, or a view of it."""
    node = t.grad_fn
    while node is not None and node.name() in VIEWS:
        node = node.next_functions[0][0]
    if node is None or node.name() != "ToCopyBackward0":
        return False
    return bool(node.next_functions[0] == (operand.grad_fn, operand.output_nr))


VIEWS = frozenset(
    f"{name}Backward0" for name in ("View", "UnsafeView", "ReshapeAlias", "T", "Transpose", "Permute", "Unsqueeze")
)


class ConsumerHook:
    """The pack hook of a call whose operands have recipes.

    Attributes:
        replaced: the storages of the tensors in whose place a recipe was put.
    """

    def __init__(self, name: str, recipes: Mapping[int, tuple[Tensor, Recipe]], ledger: Ledger) -> None:
        self._name = name
        self._recipes = recipes
        self._ledger = ledger
        self.replaced: list[StorageWeakRef] = []

    def __call__(self, t: Tensor) -> Recomputed | Kept:
        _, recipe = self._recipes.get(t.untyped_storage()._cdata, (None, None))
        cast = None
        if _recipes.is_turned(t):
            recipe = None
        elif recipe is None:
            recipe, cast = self._cast_of(t)
        elif t.dtype != recipe.dtype:
            recipe = None
        if recipe is None:
            kept = Kept(t, self._name)
            if t.grad_fn is not None:
                _recipes.anchor(t, kept)
            return kept
        row = self._ledger.row(self._name, 0, how=RECOMPUTED)
        self._ledger.original(row, t)
        self.replaced.append(StorageWeakRef(t.untyped_storage()))
        return Recomputed(recipe, Geometry(t), self._ledger.step, cast)

    def _cast_of(self, t: Tensor) -> tuple[Recipe | None, _Cast | None]:
        """What `t` is autocast's copy of."""
        for operand, recipe in self._recipes.values():
            if is_autocast_of(t, operand):
                return recipe, _Cast(Geometry(operand), t.dtype)
        return None, None

    def release(self) -> None:
        """The call is over; the hook itself lives as long as the node."""
        del self._recipes, self._ledger, self.replaced
