"""What is done with each module of a package, once it has been imported."""

from __future__ import annotations

import sys
import types

import pytest

from fewbit_hooks._imported import Imported


def test_a_visit_that_is_interrupted_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("made_here.first", "made_here.second"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    visited: list[str] = []

    def visit(name: str, module: types.ModuleType) -> None:
        visited.append(name)
        if len(visited) == 1:
            raise KeyboardInterrupt

    look = Imported(("made_here.",), visit)
    with pytest.raises(KeyboardInterrupt):
        look()
    look()
    look()
    assert visited == ["made_here.first", "made_here.first", "made_here.second"]
