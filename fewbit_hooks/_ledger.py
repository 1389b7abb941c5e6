"""The ledger: what was packed and what was kept, by storage.

NOTE [ Freed means freed ]

Packing a tensor frees nothing while somebody else holds its storage: another node, a view, a variable of the user's. So
the ledger counts storages, each once, and holds a *weak* reference to each. A storage is freed when that reference is
found expired. It looks

1. when a scope is left, and whenever a report is asked for, and
2. when the backward begins (the mode sees `Tensor.backward`, `torch.autograd.backward` and `torch.autograd.grad`);

from then on a storage still there counts as held, because later nodes release theirs as they run, and a shared tensor
would look freed. Where nothing is seen of the beginning of a backward, its latest sign is the first unpack, or that it
comes to the node of a call that is left as it is. That is too late for a look, if there was one since the forward.

A *step* is all that is recorded from then until something is saved again: the report is about the latest one.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ._learning import Site
from ._locks import lock
from ._modules import ModuleRef, enclosing_modules, innermost_module, model_of
from ._sites import Sites
from ._storages import StorageWeakRef
from ._watch import Watch, drop, look

SWEEP = 4096
"""Storages pending before those already gone are struck off, and calls that passed before they are added up: bounds the
ledger of a loop that never runs backward."""

WATCHES = 1024
"""Calls that are watched at most: those of one forward, which has a hundred of them or so."""

CODES, OUTPUT, RECOMPUTED, KEPT = "codes", "output", "recomputed", "kept"
"""What a row's backward is served from: codes; a kept output and at most a bit; kept sources; the tensor itself."""

HELD = "its storage is still held: another saved tensor, or a reference of yours"


@dataclass(slots=True, eq=False)
class Row:
    """One activation, in one module, treated in one way: the sums of a step."""

    activation: str
    module: ModuleRef | None
    model: ModuleRef | None
    bits: int | None
    reason: str
    how: str
    calls: int = 0
    original_bytes: int = 0
    stored_bytes: int = 0
    freed_bytes: int = 0
    module_class: str = ""

    @property
    def key(self) -> RowKey:
        """What a step knows it by."""
        return self.activation, self.module, self.bits, self.reason, self.how


RowKey = tuple[str, ModuleRef | None, int | None, str, str]


@dataclass(slots=True)
class Pending:
    """A storage not yet known to be gone."""

    storage: StorageWeakRef
    nbytes: int
    row: Row


@dataclass(eq=False)
class Step:
    """What one training step saved. A packed object may refer to it: it holds no tensor, and nothing of the scope but
    what that has learned."""

    lock: threading.RLock
    sites: Sites
    number: int
    rows: dict[RowKey, Row] = field(default_factory=dict)
    pending: dict[int, Pending] = field(default_factory=dict)
    held: dict[int, StorageWeakRef] = field(default_factory=dict)
    watches: list[Watch] = field(default_factory=list)
    passed: deque[tuple[str, str, int]] = field(default_factory=deque)
    backward_began: bool = False
    swept: bool = False  # since the latest storage was added
    sweep_at: int = SWEEP

    def begin_backward(self, *, late: bool = False) -> None:
        """The last moment at which what is held can be told from what is freed.

        Args:
            late: nodes nearer the loss may have released what they held: a look since the forward ended is better.
        """
        with self.lock:
            if not self.backward_began and (self.rows or self.passed):
                if not (late and self.swept):
                    self.sweep()
                self.look_at_watches(late=late)
                self.backward_began = True
                self.sites.step_ends(self.number)
            else:  # another began inside the forward, whose calls are still to be looked at
                self.look_at_watches()

    def unpacked(self) -> None:
        """What was packed is asked for: by a backward, whose latest sign this is, or by somebody who looks on."""
        if not self.backward_began and torch._C._current_graph_task_id() != -1:
            self.begin_backward(late=True)

    def reached(self, _: object) -> None:
        """A backward has come to the node of a call that is left as it is, and so has nothing to unpack."""
        self.unpacked()

    def exposed(self, storage: int) -> None:
        """Somebody may change without a trace what lies in the storage of that address."""
        for watch in list(self.watches):
            watch.exposed(storage)

    def look(self) -> None:
        """See which storages are gone, and learn of it what is kept."""
        self.sweep()
        self.look_at_watches()

    def look_at_watches(self, *, late: bool = False) -> None:
        """Learn of the calls whose modules have returned."""
        if self.watches:
            self.watches = look(self.watches, set(enclosing_modules()), self.number, late=late)

    def tally(self) -> None:
        """Put the calls that passed among the rows."""
        with self.lock:
            while self.passed:
                activation, reason, nbytes = self.passed.popleft()
                row = self.row(activation, None, None, reason)
                row.calls += 1
                row.original_bytes += nbytes

    def row(self, activation: str, module: ModuleRef | None, bits: int | None, reason: str, how: str = KEPT) -> Row:
        """The row of such calls."""
        key = activation, module, bits, reason, how
        row = self.rows.get(key)
        if row is None:
            row = self.rows[key] = Row(activation, module, None, bits, reason, how)
        return row

    def bound(self) -> None:
        """Sweep where many storages have come together."""
        if len(self.pending) + len(self.held) >= self.sweep_at:
            self.sweep()
            self.sweep_at = max(SWEEP, 2 * (len(self.pending) + len(self.held)))

    def sweep(self) -> None:
        """Strike off the storages that are gone."""
        self.swept = True
        self.held = {key: ref for key, ref in self.held.items() if not ref.expired()}
        for key, pending in list(self.pending.items()):
            # a kept tensor's storage may end too (its graph was dropped): only what was coded counts as freed
            gone = pending.storage.expired() and self.pending.pop(key, None) is not None
            if gone and pending.row.bits is not None:
                pending.row.freed_bytes += pending.nbytes


class Ledger:
    """The books of one scope; shared by the threads that use it.

    Args:
        sites: where is learned, and steps are numbered.

    Attributes:
        steps: steps that saved something.
    """

    def __init__(self, sites: Sites) -> None:
        # what the garbage collector finds while it is held, a generator say, may leave a scope on this very thread
        self._lock = lock()
        self._sites = sites
        self.step = Step(self._lock, sites, -1, backward_began=True)  # the one before the first
        self._coming = -1
        self.steps = 0

    def row(
        self,
        activation: str,
        bits: int | None,
        reason: str = "",
        *,
        how: str = KEPT,
        site: Site | None = None,
    ) -> Row:
        """Count a call; `bits` None says that it is kept, and `reason` why. A site knows the module already."""
        if site is not None:
            ref: ModuleRef | None = site.module
        else:
            module = innermost_module()
            ref = weakref.ref(module) if module is not None else None
        with self._lock:
            row = self._open().row(activation, ref, bits, reason, how)
            if row.calls == 0 and ref is not None and (module := ref()) is not None:
                row.model = site.model if site is not None else weakref.ref(model_of(module))
                row.module_class = type(module).__name__
            row.calls += 1
            return row

    def passed(self, activation: str, reason: str, nbytes: int) -> None:
        """Count a call that passes at the cost of the look-up: no module, no storage, no lock."""
        passed = (self._open() if self.step.backward_began else self.step).passed
        passed.append((activation, reason, nbytes))  # at one stroke
        if len(passed) >= SWEEP:
            self.step.tally()

    def _open(self) -> Step:
        """The step that is being recorded."""
        with self._lock:
            if self.step.backward_began:
                # a forward that goes on after a backward inside it, or on another thread, is still to be looked at
                self.step = Step(self._lock, self._sites, self.coming_step, watches=self.step.watches)
                self.steps += 1
            return self.step

    @property
    def coming_step(self) -> int:
        """The number of the step to which a call made now belongs."""
        step = self.step
        if not step.backward_began:
            return step.number
        if self._coming <= step.number:
            self._coming = self._sites.next_step(step.number)
        return self._coming

    def watch(self, watch: Watch) -> None:
        """Look at a call's storages when the forward is over."""
        with self._lock:
            self.step.watches.append(watch)
            if len(self.step.watches) > WATCHES:  # a loop that never runs backward
                del self.step.watches[: WATCHES // 2]

    def original(self, row: Row, tensor: Tensor) -> StorageWeakRef | None:
        """Stock autograd would have kept this tensor's storage for `row`. None: it has none, being sparse."""
        if tensor.layout is not torch.strided:
            return None
        storage = tensor.untyped_storage()
        with self._lock:
            pending = self.step.pending
            if (known := pending.get(storage._cdata)) is not None:  # another call saves it too: it is counted once
                return known.storage
            nbytes = storage.nbytes()
            row.original_bytes += nbytes
            # The weak reference keeps the (empty) StorageImpl, so its address names it as long as the entry lasts.
            ref = StorageWeakRef(storage)
            pending[storage._cdata] = Pending(ref, nbytes, row)
            self.step.swept = False
            self.step.bound()
            return ref

    def kept_after_all(self, row: Row, storage: int, stored: int, reason: str) -> None:
        """One of a row's calls is kept in the end, what lies in the storage of that address, and the codes let go of.

        Args:
            stored: their bytes.
        """
        with self._lock:
            step, pending = self.step, self.step.pending.get(storage)
            if step.rows.get(row.key) is not row:
                return  # of a step that is over
            kept = step.row(row.activation, row.module, None, reason)
            kept.model, kept.module_class = row.model, row.module_class
            row.calls, kept.calls = row.calls - 1, kept.calls + 1
            row.stored_bytes -= stored
            if pending is not None and pending.row is row:
                row.original_bytes -= pending.nbytes
                kept.original_bytes += pending.nbytes
                pending.row = kept
            if not row.calls:
                del step.rows[row.key]

    def newly_held(self, tensor: Tensor) -> int:
        """The bytes of a storage that is held for backward and that stock autograd would not have kept; 0 where it is
        held already."""
        storage = tensor.untyped_storage()
        with self._lock:
            if storage._cdata in self.step.pending or storage._cdata in self.step.held:
                return 0
            self.step.held[storage._cdata] = StorageWeakRef(storage)
            self.step.bound()
            return storage.nbytes()

    def ends_at(self, y: Tensor) -> None:
        """The step is over when a backward comes to the node of `y`."""
        if y.grad_fn is not None:
            y.grad_fn.register_prehook(self.step.reached)

    def stored(self, row: Row, nbytes: int, *, never_kept: int = 0) -> None:
        """Codes were stored for `row`, and `never_kept` bytes that stock autograd would have kept never came to be."""
        with self._lock:
            row.stored_bytes += nbytes
            row.original_bytes += never_kept
            row.freed_bytes += never_kept

    def settle(self, *, failed: bool = False) -> None:
        """Look which storages are gone, unless the backward has begun.

        Args:
            failed: an exception ended the forward, and its traceback holds what that had in its hands: of the calls
                nothing is learned.
        """
        with self._lock:
            if failed:
                self.step.watches = drop(self.step.watches, self.step.number)
            if not self.step.backward_began:
                self.step.look()
            else:
                self.step.look_at_watches()

    def rows(self) -> list[Row]:
        """The rows of the latest step."""
        with self._lock:
            self.step.tally()
            if not self.step.backward_began:
                self.step.sweep()
            return list(self.step.rows.values())
