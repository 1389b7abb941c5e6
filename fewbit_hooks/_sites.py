"""Call sites, and what a scope has learned about them.

NOTE [ Learning what is kept ]

Whether somebody else keeps a call's input or output is only known when the forward is over. It is the same in the next
step, though, and so it is learned for each *site*: the module, and the place in a module's code from which the call
came (one ReLU module may serve at three places).

1. An unknown site is coded, and watched through weak references: of what its node saved, and of its output.
2. When the forward is over (a scope is left, or a backward begins) it is seen which of these storages are alive.
   Modules still in their forward are left out: their local variables are alive.
3. Two steps in a row that agree decide. *Input kept*: coding frees nothing, the call is left alone. *Output kept*: f'
   is had from the output, and the input goes (NOTE [ Beside a kept output ]), unless the output was seen to be changed
   in place. *A copy of the output kept*: the same, from the copy (NOTE [ Beside a copy ]). *Neither*: codes.
4. All this is known of a place in one *state*: the module's mode, and which of the model's parameters require a
   gradient (a frozen layer keeps no input). Steps that alternate between states, a GAN's say, each have sites of their
   own. Every `LOOK_AGAIN` steps a site is unknown again.

A module that is made anew in each forward (`ACT2FN["silu"](x)`, as some models of transformers have it) is none that
could be known: its place is that of the module around it, and the line there, from the second time on that one of its
class comes from there and the one before is gone.

Only sites inside a module are learned: a bare call with a variable that still holds its input says nothing about the
next one.

Scopes of equal settings learn together: `with fewbit.scope(bits=3):` in a training loop makes one for each step.
"""

from __future__ import annotations

import enum
import functools
import itertools
import sys
import threading
import weakref
from collections.abc import Collection, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from ._dtensor import detached, is_dtensor, local_part, version_of
from ._modules import CALL_IMPL, ModuleRef, model_of, parameters_of
from ._storages import StorageWeakRef

if TYPE_CHECKING:
    from ._ledger import Row

LOOK_AGAIN = 64
"""Steps after which a site is looked at again: a change that nothing announces costs memory for that long at most."""
AGREE = 2
STATES = 8
"""In so many states, the latest, a place is known."""
SETTINGS = 32
"""Of so many settings, the latest, what was learned is known."""

# frames of torch, and ours, are not the user's code
_NOT_THE_USERS = str(Path(torch.__file__).parent), str(Path(__file__).parent)


class Verdict(enum.Enum):
    """What is to be done at a site."""

    UNKNOWN = "unknown"
    CODES = "codes"
    LEAVE = "leave"
    OUTPUT = "output"
    COPY = "copy"  # a copy of the output
    INPUT = "input"  # never learned: OUTPUT where those that keep the output can compute it again from the input


FROM_OUTPUT = Verdict.OUTPUT, Verdict.COPY
"""Where the derivative is had from the output."""


@dataclass(slots=True)
class Calls:
    """The calls that came from a place in one step.

    Attributes:
        made: how many there were.
        missed, served: of so many the input was asked for in vain, or given.
    """

    step: int = -1
    made: int = 0
    missed: int = 0
    served: int = 0


class Site:
    """What is known of one place in one state.

    Attributes:
        module: whose forward makes the call.
        model: the outermost module around it, as seen when a model's first site was last found in a step.
        verdict: what is to be done there.
        output_changes: its output, or the copy, was seen to be changed in place, so that it is never relied upon.
        output_stays: its output was seen to be kept although all that is known to keep it can compute it again.

    What is kept may be the output, or something made of it, the output with dropout say. Whether it could be computed
    again, if only the input were kept, is told by those that would keep it (`asked_for`), and tried once (`serves`).
    All calls of a step must be asked for, as all are to keep their inputs then. What was tried in vain, as somebody
    else keeps the output too (a BatchNorm beside a Linear), is not tried again: input and output are held then.
    """

    __slots__ = (
        "_agreed",
        "_alone",
        "_before",
        "_found",
        "_now",
        "_step",
        "_tried",
        "model",
        "module",
        "output_changes",
        "output_stays",
        "verdict",
    )

    def __init__(self, module: ModuleRef, model: ModuleRef) -> None:
        self.module = module
        self.model = model
        self.begin_anew()

    def begin_anew(self) -> None:
        """As if no call had come from here."""
        self.output_changes = self.output_stays = False
        self._alone = 0
        self._before, self._now = Calls(), Calls()  # of the last two steps in which there were any
        self.forget()

    def visit(self, step: int) -> None:
        """A call comes from here; what was seen long ago is forgotten."""
        if step != self._now.step:
            self._before, self._now = self._now, Calls(step)
        self._now.made += 1
        if self._agreed > 0 and step - self._step > LOOK_AGAIN:
            self.forget()

    def forget(self) -> None:
        """Unknown again."""
        self.verdict = self._found = Verdict.UNKNOWN
        self._agreed = self._step = 0
        self._tried = -1  # the step in which it was
        for calls in (self._before, self._now):
            calls.missed = calls.served = 0

    def distrust_output(self) -> None:
        """The output, or the copy, was changed in place, or may be unseen: never rely upon it."""
        self.output_changes = True
        self.forget()

    def found_alone(self) -> None:
        """In a step, nobody else kept the output that was relied on; if it happens again, never rely upon it."""
        self._alone += 1
        self.output_changes |= self._alone >= AGREE
        self.forget()

    def asked_for(self, step: int, *, given: bool) -> None:
        """Somebody would compute again what was made of a call's output; he was, or was not, given the input."""
        if step == self._now.step:
            if given:
                self._now.served += 1
            else:
                self._now.missed += 1

    def serves(self) -> bool:
        """Whether the inputs are to be kept for those who asked in the step before."""
        before, now = self._before, self._now.step
        if self._tried == now or (before.served and before.served >= before.made):
            return True
        if self._tried >= 0 or not before.missed or before.missed + before.served < before.made:
            return False
        self._tried = now
        return True

    @property
    def expected(self) -> Verdict:
        """What the last look said, decided or not."""
        return self._found

    def learn(self, found: Verdict, step: int) -> None:
        """One more look; calls of one place that differ within a step leave it at codes."""
        if self._agreed and step == self._step:
            if found is not self._found:
                self._found, self._agreed = Verdict.CODES, 1
        else:
            self._agreed = self._agreed + 1 if found is self._found else 1
            self._found = found
        self._step = step
        self.verdict = self._found if self._agreed >= AGREE else Verdict.UNKNOWN

    def see(self, input_kept: bool, output_kept: bool, copy_kept: bool, treated: Verdict, step: int) -> None:
        """The forward is over: whether what a call's node would have kept, its output, and copies of that are kept by
        somebody else.

        Args:
            treated: as what the call was treated; see `Watch`.
        """
        if treated is Verdict.OUTPUT:
            return  # what the packed object holds tells nothing of what others do
        if treated is Verdict.INPUT:
            self.output_stays |= output_kept
        elif input_kept:
            self.learn(Verdict.LEAVE, step)
        elif self.output_changes or not (output_kept or copy_kept):
            self.learn(Verdict.CODES, step)
        else:
            self.learn(Verdict.OUTPUT if output_kept else Verdict.COPY, step)

    def treatment(self, recompute: bool) -> Verdict:
        """The verdict; INPUT where those that keep the output, or something made of it, can compute it again."""
        can_go = self.verdict is Verdict.CODES or (self.verdict is Verdict.OUTPUT and not self.output_stays)
        return Verdict.INPUT if recompute and can_go and self.serves() else self.verdict


class Relying(Protocol):
    """A packed object that has the derivative from an output."""

    def rely_on(self, y: Tensor) -> None:
        """Have it from this one, from now on."""

    def has_changed(self) -> bool:
        """Whether what is relied on has been changed in place."""

    def lies_in(self, storage: int) -> bool:
        """Whether what is relied on lies in the storage of that address."""

    def rely_on_a_copy(self) -> None:
        """What is relied on may change unseen."""

    def held_alone(self) -> int:
        """The bytes of what is relied on, if nobody else holds it."""


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
            its packed object holds it. INPUT: the input is kept so that the output need not be. UNKNOWN: it is no
            activation, but a consumer.
        relying: the packed objects that hold the output, or a copy; weak, for a graph may be dropped before the look.
        held: what tells the version of the output or of copies, and that version, at a site that will soon rely on it.
        row: where the call's bytes are counted.
    """

    __slots__ = (
        "_followed",
        "_seen",
        "copies",
        "held",
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
    ) -> None:
        self.site = site
        self.row = row
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

    def look(self, step: int, *, late: bool) -> None:
        """See which storages are alive, and learn of it.

        Args:
            late: a backward has begun, which may have released some.
        """
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
        input_kept = not any(map(StorageWeakRef.expired, self.saved))
        copy_kept = bool(self.copies) and not any(map(StorageWeakRef.expired, self.copies))
        self.site.see(input_kept, not self.output.expired(), copy_kept, self.treated, step)


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


@dataclass
class Trainable:
    """Which parameters of a model require a gradient.

    Attributes:
        parameters: weak, for some may be replaced.
        listed: the step in which they were listed; some may be added later.
        looked: the step in which their flags were last read.
        state: a number that stands for these flags.
    """

    parameters: list[weakref.ref[nn.Parameter]] = field(default_factory=list)
    listed: int = 0
    looked: int = -1
    state: int = -1
    _states: dict[tuple[bool | None, ...], int] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def renew(self, model: nn.Module, step: int) -> None:
        """List them anew."""
        self.parameters, self.listed = [weakref.ref(p) for p in parameters_of(model)], step

    def look(self, model: nn.Module, step: int) -> None:
        """Read the flags."""
        flags = self._flags()
        if step - self.listed > LOOK_AGAIN or None in flags:
            self.renew(model, step)
            flags = self._flags()
        self.looked, self.state = step, self._states.pop(flags, -1)
        if self.state < 0:
            self.state = next(self._numbers)
        self._states[flags] = self.state  # the latest last
        if len(self._states) > STATES:
            self._states.pop(next(iter(self._states)), None)  # another thread may have done it

    def _flags(self) -> tuple[bool | None, ...]:
        """None for one that is gone."""
        return tuple([p.requires_grad if (p := ref()) is not None else None for ref in self.parameters])


class _Place:
    """The sites of a place, one for each state that it was in.

    Attributes:
        trainable: which of the model's parameters require a gradient; weak, for it holds them.
    """

    __slots__ = ("_codes", "_sites", "model", "module", "trainable")

    def __init__(self, module: nn.Module, *codes: CodeType | None) -> None:
        self.module: ModuleRef = weakref.ref(module)
        self.model: ModuleRef = weakref.ref(model_of(module))
        self.trainable: weakref.ref[Trainable] | None = None
        self._codes = codes  # kept, so that their addresses, part of the key, are not used again
        self._sites: dict[tuple[bool, int], Site] = {}

    def site(self, training: bool, flags: int) -> Site:
        """That of a state."""
        state = training, flags
        site = self._sites.get(state)
        if site is None:
            if len(self._sites) >= 2 * STATES:
                self._sites.pop(next(iter(self._sites)), None)  # another thread may have done it
            site = self._sites[state] = Site(self.module, self.model)
        site.model = self.model
        return site


class _Came(NamedTuple):
    """The module that last came anew from a line of another."""

    module: ModuleRef
    around: ModuleRef  # an address may be another's by now


class Sites:
    """The sites of a scope, or of several, whose steps are numbered together."""

    def __init__(self) -> None:
        self._step, self._step_is_over = -1, True
        self._places: dict[tuple[Any, ...], _Place] = {}
        self._latest: dict[tuple[Any, ...], _Came] = {}
        self._purge_at = 1024
        self._models: weakref.WeakKeyDictionary[nn.Module, Trainable] = weakref.WeakKeyDictionary()

    def next_step(self, after: int) -> int:
        """The number of the step after one; several scopes may be entered in one step."""
        if self._step_is_over or self._step <= after:
            self._step, self._step_is_over = max(self._step, after) + 1, False
        return self._step

    def step_ends(self, step: int) -> None:
        """A backward begins."""
        self._step_is_over |= step == self._step

    def find(self, activation: str, step: int) -> Site | None:
        """The site from which the running call comes; None outside of any module."""
        module: nn.Module | None = None
        place: tuple[CodeType | None, int] = None, 0
        candidate: tuple[CodeType, int] | None = None
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            code = frame.f_code
            if code is CALL_IMPL:
                if module is None:
                    module = frame.f_locals["self"]
                if candidate is not None:  # a place inside a module's forward: the line that calls the model is none
                    place = candidate
                    break
            elif candidate is None and not code.co_filename.startswith(_NOT_THE_USERS):
                candidate = code, frame.f_lasti
            frame = frame.f_back
        if module is None:
            return None
        where, instruction = place
        key = id(module), id(where), instruction, activation
        found = self._places.get(key)
        if found is None or found.module() is not module:
            found = self._place_of_its_maker(module, where, instruction, activation)
            if found is None:
                found = self._places[key] = _Place(module, where)
                self._purge()
        trainable = found.trainable() if found.trainable is not None else None
        if trainable is None or trainable.looked != step:
            trainable = self._look_at(found, module, step)
        site = found.site(module.training, trainable.state)
        site.visit(step)
        return site

    def _place_of_its_maker(
        self, module: nn.Module, where: CodeType | None, instruction: int, activation: str
    ) -> _Place | None:
        """The place of a module that was made for this call; None where it may be there again."""
        around, line = _line_around(module)
        if around is None or line is None:
            return None
        key = id(around), id(line[0]), line[1], type(module), id(where), instruction, activation
        before, self._latest[key] = self._latest.get(key), _Came(weakref.ref(module), weakref.ref(around))
        if before is None or before.around() is not around or before.module() is not None:
            return None
        found = self._places.get(key)
        if found is None or found.module() is not around:
            found = self._places[key] = _Place(around, where, line[0])
            self._purge()
        return found

    def _look_at(self, place: _Place, module: nn.Module, step: int) -> Trainable:
        """See which model the place belongs to, and what of that is trained."""
        model = model_of(module)
        place.model = weakref.ref(model)
        trainable = self._models.get(model)
        if trainable is None:
            trainable = self._models[model] = Trainable()
            trainable.renew(model, step)
        place.trainable = weakref.ref(trainable)
        if trainable.looked != step:
            trainable.look(model, step)
        return trainable

    def _purge(self) -> None:
        """Drop the sites of modules that are gone."""
        if len(self._places) >= self._purge_at:
            self._places = {key: place for key, place in list(self._places.items()) if place.module() is not None}
            self._latest = {
                key: came
                for key, came in list(self._latest.items())
                if came.module() is not None or key in self._places
            }
            self._purge_at = max(1024, 2 * len(self._places))


_learned: dict[Any, Sites] = {}


def learned_under(settings: Hashable) -> Sites:
    """The sites of all scopes with these settings."""
    sites = _learned.pop(settings, None) or Sites()
    _learned[settings] = sites  # the latest last
    while len(_learned) > SETTINGS:
        _learned.pop(next(iter(_learned)), None)  # another thread may have done it
    return sites


def _line_around(module: nn.Module) -> tuple[nn.Module | None, tuple[CodeType, int] | None]:
    """The module around a module that runs, and the place in its code where that is called; None where there is
    none."""
    inside, line = False, None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code is CALL_IMPL:
            found = frame.f_locals["self"]
            if line is not None:
                return found, line
            inside |= found is module
        elif inside and not code.co_filename.startswith(_NOT_THE_USERS):
            line = line or (code, frame.f_lasti)
        frame = frame.f_back
    return None, None


def look(watches: list[Watch], running: Collection[nn.Module], step: int, *, late: bool = False) -> list[Watch]:
    """Look at each call that is over; returns those whose module is still in its forward, here or on another thread."""
    mine, left = threading.get_ident(), []
    for watch in watches:
        if watch.thread != mine or watch.site.module() in running:
            left.append(watch)
        else:
            watch.look(step, late=late)
    return left
