"""`enable()` and `disable()`: a scope held open on the calling thread."""

from __future__ import annotations

import threading
from typing import Any

import torch

from . import _stack
from ._errors import FewbitError
from ._policy import Bits, Exclude
from ._report import Report
from ._scope import scope


class Handle:
    """What `enable()` returns. As a context manager it calls `remove()` at the end.

    Attributes:
        scope: the scope that is held open.
    """

    def __init__(self, opened: scope, entry: _stack.Entry) -> None:
        self.scope = opened
        self._entry: _stack.Entry | None = entry
        self._thread = threading.get_ident()

    def __repr__(self) -> str:
        return f"<Handle of {self.scope!r}>"

    def remove(self) -> None:
        """Close the scope. A second time does nothing.

        Raises:
            FewbitError: called on another thread than `enable()`.
        """
        if self._entry is None:
            return
        if threading.get_ident() != self._thread:
            raise FewbitError("remove() must be called on the thread that called enable(): scopes are per thread")
        if self._entry in _stack.entries():
            self.scope._leave(self._entry)

    def report(self) -> Report:
        """The scope's report."""
        return self.scope.report()

    # A copy holds nothing open: it has a copy of the scope, and its remove() does nothing.
    def __getstate__(self) -> dict[str, Any]:
        return {"scope": self.scope}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.scope = state["scope"]
        self._entry = None
        self._thread = threading.get_ident()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def enable(
    bits: Bits = 3,
    *,
    min_bytes: int = 65536,
    exclude: Exclude = (),
    exact: bool = False,
    recompute: bool = False,
    engine: str = "auto",
    codebooks: Any = (),
) -> Handle:
    """Open a scope on the calling thread, from here until `disable()`.

    >>> import fewbit_hooks as fewbit
    >>> handle = fewbit.enable(bits=3)
    >>> fewbit.active() is handle.scope
    True
    >>> fewbit.disable()

    The arguments are those of `scope`. It holds for *this thread* alone, as saved-tensor hooks do: threads that run
    already, threads started later, and the replicas of `nn.DataParallel` see nothing of it. Open a scope inside the
    function that such a thread runs (for DataParallel, inside the model's forward).

    Raises:
        FewbitError: already enabled on this thread, or inside a backward, or a wrong argument.
    """
    if any(entry.enabled for entry in _stack.entries()):
        raise FewbitError(
            "already enabled on this thread. Call fewbit_hooks.disable() first, or nest a fewbit_hooks.scope."
        )
    if torch._C._current_graph_task_id() != -1:
        raise FewbitError(
            "enable() inside a backward would not outlast it, because autograd gives the thread its modes back. "
            "Call it outside, or open a fewbit_hooks.scope."
        )
    opened = scope(
        bits,
        min_bytes=min_bytes,
        exclude=exclude,
        exact=exact,
        recompute=recompute,
        engine=engine,
        codebooks=codebooks,
    )
    return Handle(opened, opened._enter(enabled=True))


def disable() -> None:
    """Close what `enable()` opened on this thread.

    Raises:
        FewbitError: not enabled on this thread.
    """
    for entry in _stack.entries():
        if entry.enabled:
            entry.scope._leave(entry)
            return
    raise FewbitError("not enabled on this thread: fewbit_hooks.enable() comes first, on the same thread")


def active() -> scope | None:
    """The innermost scope open on this thread, or None."""
    entry = _stack.active()
    return entry.scope if entry is not None else None
