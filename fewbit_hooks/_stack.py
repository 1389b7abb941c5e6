"""The scopes that are open on each thread, and the one mode that serves them.

NOTE [ One mode a thread ]

Were every scope a mode of its own, a call would be handed from the inner mode to the outer one, whose hooks would
then be nearest to the operation: the outer scope would win. So at most one mode of ours is on a thread's stack of
modes; entering a scope makes it the active one, leaving restores the one before. What belongs to one entry lives here
and never on the scope, which can thus be entered again, and by several threads at once.

Leaving takes away the scope's own entry even when it is not the last one (generators and asyncio tasks interleave),
and the mode when no entry needs it any more, even when other modes have been pushed on top of it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext

from ._around import give_back_codes
from ._compiled import Coding, coding
from ._hooked import innermost_hooks

if TYPE_CHECKING:
    from ._scope import scope


class Entry:
    """One entry of a scope on one thread.

    Attributes:
        around: the innermost saved-tensor hooks when the scope was entered: what ours make goes through these.
        hooks: their pack hook: others that come later go before ours.
        coding: what is coded in compiled graphs; None where nothing is.
        recomputes: the scope has `recompute=True`, and measures not only.
        fuses: the scope has `engine="fused"`: see NOTE [ A node of our own ] in `_one_node.py`.
        by_kernels: and computes nothing again: see NOTE [ What is fused ] in `_fused.py`.
        inside: it does not, but a scope around it does.
        inert: FEWBIT_DISABLE was set.
        enabled: it was `enable()` that entered.
        pushed: this entry put the mode on the thread's stack of modes.
    """

    __slots__ = (
        "around",
        "by_kernels",
        "coding",
        "enabled",
        "fuses",
        "hooks",
        "inert",
        "inside",
        "pushed",
        "recomputes",
        "scope",
    )

    def __init__(self, scope: scope, *, inert: bool, enabled: bool) -> None:
        self.scope = scope
        self.around = None if inert else innermost_hooks()
        self.hooks = self.around[0] if self.around is not None else None
        self.coding = coding(scope._settings) if give_back_codes(self.around) else None
        self.recomputes = scope._settings.recompute and scope._settings.bits is not None
        self.fuses = scope._settings.engine == "fused"
        self.by_kernels = self.fuses and not self.recomputes
        self.inside = not self.recomputes and any(e.recomputes for e in _thread.entries)
        self.inert = inert
        self.enabled = enabled
        self.pushed = False


class _Thread(threading.local):
    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.mode: Any = None
        self.acting: Any = None
        self.recorder: Any = None
        self.below = 0  # entries that were there before the recorder


_thread = this_thread = _Thread()


def entries() -> list[Entry]:
    """The open entries of this thread, outermost first."""
    return _thread.entries


def active() -> Entry | None:
    """The innermost entry of this thread that does anything."""
    return next((e for e in reversed(_thread.entries) if not e.inert), None)


def acting() -> Any:
    """The same at the cost of a look, for what is asked at every call; or a profile's recorder, if there is no entry
    above it. None where torch's modes are off, too."""
    found = _thread.acting
    if found is None or torch._C._is_torch_function_all_disabled():
        return None
    # inside a call that is being dispatched, a backward say, the mode is off, and what is recognised by it is not
    return found if not isinstance(found, Entry) or _on_stack(_thread.mode) else None


@contextlib.contextmanager
def hidden() -> Iterator[None]:
    """Recognise nothing on this thread: for the primitives of what was recognised as a whole."""
    _act(None)
    try:
        yield
    finally:
        _act(active())


def with_modes(function: Callable[..., Any], *args: Any) -> Any:
    """Call what is the user's, inside of what is ours, where torch's modes are off."""
    with torch._C._EnableTorchFunction():
        return function(*args)


@contextlib.contextmanager
def recording(recorder: Any) -> Iterator[None]:
    """Hand what is run as one node on this thread to the recorder of a profile, unless a scope is entered later."""
    outer = _thread.recorder, _thread.below
    _thread.recorder, _thread.below = recorder, len(_thread.entries)
    _act(active())
    try:
        yield
    finally:
        _thread.recorder, _thread.below = outer
        _act(active())


def _act(entry: Entry | None) -> None:
    if _thread.mode is not None:
        _thread.mode.entry = entry
    recorded = _thread.recorder is not None and len(_thread.entries) <= _thread.below
    _thread.acting = _thread.recorder if recorded else entry


def coding_here() -> Coding | None:
    """What is coded in a graph that is compiled on this thread. Dynamo reads it: it must be plain."""
    mode = _thread.mode
    if mode is None or mode.entry is None:
        return None
    found: Coding | None = mode.entry.coding
    return found


def push(entry: Entry, mode_class: type[TorchFunctionMode]) -> None:
    """Make `entry` the active one of this thread."""
    if _thread.mode is None:
        _thread.mode = mode_class()
    _thread.entries.append(entry)
    # Inside a call that is being dispatched (a backward, say) torch has taken the mode off for its duration.
    if not entry.inert and not _on_stack(_thread.mode):
        _thread.mode.__enter__()
        entry.pushed = True
    elif not entry.inert and not any(e.pushed for e in _thread.entries):
        entry.pushed = True  # the mode is left over from an entry removed while torch had taken it off
    _act(active())


def remove(entry: Entry) -> None:
    """Take away one entry; the one below becomes active if it was the last."""
    later = _thread.entries[_thread.entries.index(entry) + 1 :]
    # the list may be another by now: what the garbage collector finds, a generator say, may leave a scope of its own
    _thread.entries.remove(entry)
    if entry.pushed:
        heir = next((e for e in later if not e.inert and e in _thread.entries), None)
        if heir is not None and not heir.pushed:
            heir.pushed = True  # it relies on the mode that this entry put there
        else:
            _take_off(_thread.mode)
    _act(active())


def beneath(mode: TorchFunctionMode, function: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
    """Make a call that ours has been handed with our mode beneath those of others around it, which see it first.

    What they make of it, another function perhaps, or a second one beside it, is recognised for what it is: hooks and
    nodes of ours lie around no call but the one that they are for.
    """
    others = _take_all_off()
    torch._C._push_on_torch_function_stack(mode)
    _put_on(others)
    try:
        return function(*args, **kwargs)
    finally:
        _take_all_off()
        _put_on(others)


def _take_all_off() -> list[TorchFunctionMode]:
    """The modes that were on the stack, the innermost first."""
    return [torch._C._pop_torch_function_stack() for _ in range(torch._C._len_torch_function_stack())]


def _put_on(modes: list[TorchFunctionMode]) -> None:
    for mode in reversed(modes):
        torch._C._push_on_torch_function_stack(mode)


def others_see() -> bool:
    """Whether modes of others, inside or around, see each call that is made here; all that torch's own for
    `torch.set_default_device` does is to give new tensors a device. Dynamo reads it: it must be plain."""
    for i in range(torch._C._len_torch_function_stack()):
        mode = torch._C._get_function_stack_at(i)
        if mode is not _thread.mode and type(mode) is not DeviceContext:
            return True
    return False


def _on_stack(mode: TorchFunctionMode) -> bool:
    return any(torch._C._get_function_stack_at(i) is mode for i in range(torch._C._len_torch_function_stack()))


def _take_off(mode: TorchFunctionMode) -> None:
    above = []
    while torch._C._len_torch_function_stack():
        top = torch._C._pop_torch_function_stack()
        if top is mode:
            break
        above.append(top)
    _put_on(above)
