"""Call sites: the place that a running call comes from, in the state that its model is in.

What is learned of a site is told in NOTE [ Learning what is kept ] in `_learning.py`.

A module that is made anew in each forward (`ACT2FN["silu"](x)`, as some models of transformers have it) is none that
could be known: its place is that of the module around it, and the line there, from the second time on that one of its
class comes from there and the one before is gone.

Only sites inside a module are learned: a bare call with a variable that still holds its input says nothing about the
next one.

Scopes of equal settings learn together: `with fewbit.scope(bits=3):` in a training loop makes one for each step.
"""

from __future__ import annotations

import itertools
import sys
import weakref
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
from torch import nn

from . import _learning
from ._learning import Site
from ._locks import lock
from ._modules import CALL_IMPL, ModuleRef, model_of, parameters_of

STATES = 8
"""In so many states, the latest, a place is known."""
SETTINGS = 32
"""Of so many settings, the latest, what was learned is known."""

# frames of torch, and ours, are not the user's code
_NOT_THE_USERS = str(Path(torch.__file__).parent), str(Path(__file__).parent)


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
        if step - self.listed > _learning.LOOK_AGAIN or None in flags:
            self.renew(model, step)
            flags = self._flags()
        self.looked, self.state = step, self._states.pop(flags, -1)
        if self.state < 0:
            self.state = next(self._numbers)
        self._states[flags] = self.state  # the latest last
        if len(self._states) > STATES:
            _drop_the_oldest(self._states)

    def _flags(self) -> tuple[bool | None, ...]:
        """None for one that is gone."""
        with torch._C.DisableTorchFunctionSubclass():  # what a parameter's own class makes of it is not asked
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
                _drop_the_oldest(self._sites)
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
            elif (
                candidate is None
                and not code.co_filename.startswith(_NOT_THE_USERS)
                and code.co_name != "__torch_function__"  # nor is that of a mode of his
            ):
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
_lock = lock()


def learned_under(settings: Hashable) -> Sites:
    """The sites of all scopes with these settings."""
    with _lock:
        sites = _learned.pop(settings, None) or Sites()
        _learned[settings] = sites  # the latest last
        while len(_learned) > SETTINGS:
            _drop_the_oldest(_learned)
        return sites


def _drop_the_oldest(known: dict[Any, Any]) -> None:
    """Each line at one stroke: other threads may come, and do the same."""
    keys = list(known)
    known.pop(keys[0], None)


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
