"""Run again in backward: a forward of primitives that keeps its arguments alone.

NOTE [ Run again ]

An RMSNorm in primitives saves two and a half times its input, or six times that in bfloat16. Run again, it saves its
input. Its forward runs as it is and is recorded as it is, so result and gradient are bit for bit what they were, down
to the order in which gradients are added. Only what its nodes save is replaced: the arguments are kept, with their
versions; any other tensor becomes a number, the how-manieth it was. When one is asked for, the forward runs once more,
on the kept arguments, and all that it saves is handed out by number, each to be dropped when it has been taken.

Stock may keep no argument, but copies, in float32 say: there `x += f(norm(x))` is allowed. Here it makes backward
raise, once: a module whose arguments were found changed is left as it is from then on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _stack
from ._errors import FewbitError
from ._hooked import allowed, hooked
from ._hooks import Kept, unpack
from ._ledger import RECOMPUTED, Ledger, Step
from ._modules import ModuleRef
from ._recipes import Geometry, Leaf, anchor
from ._replay import Autocast, replay, untraced, when_backward_ends
from ._standins import Saves

Forward = Callable[..., Tensor]


def run_again(
    name: str,
    ledger: Ledger,
    run: Callable[[], Any],
    forward: Forward,
    arguments: Sequence[Tensor],
    primitives: Saves,
) -> Any:
    """Make a call whose forward is run again in backward.

    Args:
        run: the call.
        forward: computes the same from `arguments`: the input, and parameters.
        primitives: what it would have saved, beside the parameters.
    """
    x = arguments[0]
    row = ledger.row(name, 0, how=RECOMPUTED)
    if primitives.keeps_x:
        ledger.original(row, x)
    ledger.stored(row, 0 if primitives.keeps_x else ledger.newly_held(x), never_kept=primitives.never_kept(x))
    saves = _Saves(name, forward, arguments, row.module)
    hook = _PackHook(name, saves, ledger.step)
    try:
        with _stack.hidden(), hooked(hook, unpack):
            y = run()
    finally:
        hook.release()
    if primitives.keeps_y:  # freed, unless somebody else keeps it
        ledger.original(row, y)
    anchor(x, saves.leaves[0])
    return y


class _PackHook:
    """The pack hook of one such call."""

    __slots__ = ("_count", "_kept", "_name", "_saves", "_step")

    def __init__(self, name: str, saves: _Saves, step: Step) -> None:
        self._name = name
        self._saves = saves
        self._step = step
        self._kept = saves.storages()
        self._count = 0

    def __call__(self, t: Tensor) -> Kept | Numbered:
        number, self._count = self._count, self._count + 1
        if t.untyped_storage()._cdata in self._kept:
            return Kept(t, self._name)
        return Numbered(self._saves, number, Geometry(t), self._step)

    def release(self) -> None:
        """The call is over; the hook itself lives as long as its nodes."""
        del self._saves, self._step, self._kept


class Numbered:
    """A number in the place of a saved tensor."""

    __slots__ = ("_geometry", "_number", "_saves", "_step")

    def __init__(self, saves: _Saves, number: int, geometry: Geometry, step: Step) -> None:
        self._saves = saves
        self._number = number
        self._geometry = geometry
        self._step = step

    def unpack(self) -> Tensor:
        """The saved tensor, bit for bit."""
        self._step.unpacked()
        t = self._saves.take(self._number)
        if Geometry(t) != self._geometry:
            raise FewbitError(
                f"{self._saves.name} saved a tensor of shape {list(self._geometry.size)}, and one of {list(t.shape)} "
                "when it was run again. Please report this; scope(recompute=False) does without."
            )
        return t


class _Saves:
    """All that a forward saves, computed when the first of it is asked for."""

    __slots__ = ("_autocast", "_forward", "_lock", "_needed", "_saved", "leaves", "name")

    def __init__(self, name: str, forward: Forward, arguments: Sequence[Tensor], module: ModuleRef | None) -> None:
        self.name = name
        self._forward = forward
        self.leaves = [Leaf(t, t._version, module) for t in arguments]
        self._needed = [t.requires_grad for t in arguments]
        self._autocast = Autocast.of(arguments[0].device.type)
        self._lock = threading.Lock()
        self._saved: dict[int, Tensor] = {}

    def storages(self) -> frozenset[int]:
        """Those of the arguments, which are kept."""
        return frozenset(leaf.value().untyped_storage()._cdata for leaf in self.leaves)

    def take(self, number: int) -> Tensor:
        """A tensor by its number; a second time it is computed anew."""
        with self._lock:
            if number not in self._saved:
                self._saved = self._run()
                when_backward_ends(self._forget)  # what this one does not ask for is not kept for another
            try:
                return self._saved.pop(number)
            except KeyError:
                raise FewbitError(
                    f"{self.name} saved fewer tensors when it was run again. Please report this; "
                    "scope(recompute=False) does without."
                ) from None

    def _forget(self) -> None:
        with self._lock:
            self._saved = {}

    def _run(self) -> dict[int, Tensor]:
        saved: dict[int, Tensor] = {}
        kept = self.storages()
        count = 0

        def pack(t: Tensor) -> int:
            nonlocal count
            if t.untyped_storage()._cdata not in kept:
                saved[count] = t.detach()
            count += 1
            return count

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, saved.__getitem__)  # nothing is ever unpacked
        with replay(self._autocast, grad=True), allowed(), hooks:
            untraced(self._forward)(
                *(leaf.value().detach().requires_grad_(n) for leaf, n in zip(self.leaves, self._needed, strict=True))
            )
        return saved
