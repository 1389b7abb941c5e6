"""Calls that are watched until their forward is over, and outputs that are relied upon meanwhile."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from ._dtensor import detached, is_dtensor, local_part, version_of
from ._learning import Site, Verdict
from ._storages import StorageWeakRef

if TYPE_CHECKING:
    from ._ledger import Row


class Relying(Protocol):
    """A packed object that has the derivative from an output."""

    def rely_on(self, y: Tensor) -> None:
        """Have it from this one, from now on."""

    def has_changed(self) -> bool:
        """Whether what is relied on has been changed in place, or freed."""

    def lies_in(self, storage: int) -> bool:
        """Whether what is relied on lies in the storage of that address."""

    def rely_on_a_copy(self) -> None:
        """What is relied on may change unseen."""

    def held_alone(self) -> int:
        """The bytes of what is relied on, if nobody else holds it."""


class Keeping(Protocol):
    """A packed object that keeps a saved tensor as it is."""

    def held_alone(self) -> bool:
        """Whether nobody else holds its storage."""


_relying: dict[weakref.ref[Relying], tuple[Site, set[int]]] = {}
"""The packed objects that are alive, where their calls were made, and the addresses of the storages that they have
relied on: they outlive the look at their watches."""


def relied_on() -> bool:
    """Whether there are any."""
    return bool(_relying)


def expose(storage: int) -> None:
    """Somebody may change without a trace what lies in the storage of that address: it is not relied upon any more."""
    for ref, (site, storages) in list(_relying.items()):  # at one stroke: other threads may add to them
        if storage in storages and (packed := ref()) is not None and packed.lies_in(storage):
            site.distrust_output()
            packed.rely_on_a_copy()


def distrust(packed: Relying) -> None:
    """What it relies on is not what it was: where its call was made no output is relied upon from now on."""
    site, _ = _relying.get(weakref.ref(packed), (None, None))
    if site is not None:
        site.distrust_output()


def _gone(ref: weakref.ref[Relying]) -> None:
    _relying.pop(ref, None)


class Watch:
    """One call, whose storages are looked at when the forward is over.

    Attributes:
        site: where the call was made.
        saved: the storages that its node would have kept.
        output: the storage of its output.
        copies: those of copies of it.
        treated: as what the call was treated. OUTPUT: the derivative is taken from the output or a copy already, and
            its packed object holds it. INPUT: the input is kept so that the output need not be. LOOK: what its node
            keeps is kept by us. UNKNOWN: it is no activation, but a consumer.
        node: something that lives as long as the call's node. A call whose node is gone says nothing: its result was
            thrown away, as an adaptive solver of differential equations does with its last evaluation.
        kept: what is kept for a look.
        relying: the packed objects that hold the output, or a copy; weak, for a graph may be dropped before the look.
        held: what tells the version of the output or of copies, and that version, at a site that will soon rely on it.
        row: where the call's bytes are counted.
    """

    __slots__ = (
        "_followed",
        "_seen",
        "copies",
        "held",
        "kept",
        "node",
        "output",
        "relying",
        "row",
        "saved",
        "site",
        "thread",
        "treated",
    )

    def __init__(
        self,
        site: Site,
        saved: list[StorageWeakRef],
        output: Tensor,
        treated: Verdict = Verdict.UNKNOWN,
        relying: Iterable[Relying] = (),
        row: Row | None = None,
        *,
        node: Any = None,
        kept: Sequence[weakref.ref[Any]] = (),
    ) -> None:
        self.site = site
        self.row = row
        self.node = weakref.ref(node) if node is not None else None
        self.kept: Sequence[weakref.ref[Keeping]] = kept
        self.thread = threading.get_ident()
        self.saved = saved
        self.output = StorageWeakRef(local_part(output).untyped_storage())
        self.copies: list[StorageWeakRef] = []
        self.treated = treated
        self.relying = [weakref.ref(packed, _gone) for packed in relying]
        for ref in self.relying:
            _relying[ref] = site, {self.output.cdata}
        self.held: list[tuple[Tensor, int]] = []
        # a copy of a DTensor's part may be one of what the DTensor was changed to: its version does not tell
        self._followed = not is_dtensor(output)
        self._seen = output._version, output.shape, output.stride(), output.storage_offset()
        if site.expected is Verdict.OUTPUT and treated in (Verdict.CODES, Verdict.INPUT):
            self.held.append((_counter_of(output), version_of(output)))

    def follow(self, y: Tensor, copy: Tensor) -> None:
        """A copy was made of `y`, which is the output, or another tensor on its storage."""
        if not self._followed or (y._version, y.shape, y.stride(), y.storage_offset()) != self._seen:
            return  # changed, or another part of the storage
        self.copies.append(StorageWeakRef(copy.untyped_storage()))
        if self.treated is Verdict.CODES and self.site.expected is Verdict.COPY:
            self.held.append((_counter_of(copy), copy._version))
        if self.site.verdict is Verdict.COPY:
            for ref in self.relying:
                if (packed := ref()) is not None:
                    _relying[ref][1].add(self.copies[-1].cdata)
                    packed.rely_on(copy)

    def exposed(self, storage: int) -> None:
        """Somebody may change what lies in this storage: if it is the output's, that is never to be relied upon."""
        if self.output.cdata == storage or any(copy.cdata == storage for copy in self.copies):
            self.site.distrust_output()

    def _relies_on_what_was_saved(self) -> bool:
        """What its node would have kept is the output, which the packed object holds itself."""
        return self.treated is Verdict.OUTPUT and any(saved.cdata == self.output.cdata for saved in self.saved)

    def look(self, step: int, *, late: bool) -> None:
        """See which storages are alive, and learn of it.

        Args:
            late: a backward has begun, which may have released some.
        """
        if self.treated is Verdict.LOOK:
            kept = [found for ref in self.kept if (found := ref()) is not None]
            if kept and not late:  # else there is nothing to be told: another look will come
                self.site.looked_again(not any(packed.held_alone() for packed in kept), step)
            return
        changed, alone = False, 0
        for tensor, version in self.held:
            changed |= version_of(tensor) != version
        self.held.clear()  # or our own references would be what keeps them
        for ref in self.relying:
            if (packed := ref()) is not None:
                changed |= packed.has_changed()
                alone += packed.held_alone()
        if changed:
            self.site.distrust_output()
        elif alone and not late:  # those who kept the output in the steps before do not in this one
            self.site.found_alone()
        if alone and not late and self.row is not None:
            self.row.stored_bytes += alone
        if self.node is not None and self.node() is None:
            return
        input_kept = not any(map(StorageWeakRef.expired, self.saved)) and not self._relies_on_what_was_saved()
        copy_kept = bool(self.copies) and not any(map(StorageWeakRef.expired, self.copies))
        self.site.see(input_kept, not self.output.is_empty(), copy_kept, self.treated, step)


def _counter_of(t: Tensor) -> Tensor:
    """A tensor that shares the counter of changes in place, and holds no memory."""
    counter = detached(t)
    if type(t) is Tensor:
        counter.data = _nothing(t.dtype, t.device)
    return counter


@functools.cache
def _nothing(dtype: torch.dtype, device: torch.device) -> Tensor:
    with _disable_current_modes():  # it is kept: no mode of somebody's may make a tensor of another kind of it
        return torch.empty(0, dtype=dtype, device=device)


def look(watches: list[Watch], running: Collection[nn.Module], step: int, *, late: bool = False) -> list[Watch]:
    """Look at each call that is over; returns those whose module is still in its forward, here or on another thread."""
    mine, left = threading.get_ident(), []
    for watch in watches:
        if watch.thread != mine or watch.site.module() in running:
            left.append(watch)
        else:
            watch.look(step, late=late)
    return left


def drop(watches: list[Watch], step: int) -> list[Watch]:
    """A forward has failed on this thread: its calls are not looked at; returns those of other threads."""
    mine, left = threading.get_ident(), []
    for watch in watches:
        if watch.thread != mine:
            left.append(watch)
        else:
            watch.site.take_back(step)
    return left
