"""Which modules a scope leaves alone."""

from __future__ import annotations

import fnmatch
import weakref
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from torch import nn

from . import _modules
from ._errors import FewbitTypeError

Rule: TypeAlias = str | type[nn.Module] | Callable[[nn.Module], bool]


class Exclusion:
    """Rules that name modules: glob patterns of `model.named_modules()`'s names, classes, predicates.

    A module that a rule names is left alone with all that is inside it. What was found for a module is remembered as
    long as the module lives.

    Args:
        rules: one rule, or several.

    Raises:
        FewbitTypeError: a rule is none of the three.
    """

    def __init__(self, rules: Rule | Iterable[Rule] = ()) -> None:
        single = isinstance(rules, (str, type)) or not isinstance(rules, Iterable)
        self.rules: tuple[Any, ...] = (rules,) if single else tuple(rules)  # type: ignore[arg-type]
        for rule in self.rules:
            if not (isinstance(rule, str) or callable(rule)):
                raise FewbitTypeError(
                    f"exclude takes names of modules (glob patterns), nn.Module classes and predicates, got {rule!r}"
                )
        self._found: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()

    def here(self) -> bool:
        """Whether a rule names a module whose forward is running."""
        inner = _modules.innermost_module()
        if inner is None:
            return False
        if inner not in self._found:
            chain = list(_modules.enclosing_modules())
            names = {id(module): name for name, module in chain[-1].named_modules()}
            # a container that is never called itself, an nn.ModuleList say, is named by its contents' names
            parents = {parent for module in chain for parent in _parents(names.get(id(module), ""))}
            self._found[inner] = any(_matches(rule, chain, parents) for rule in self.rules)
        return self._found[inner]

    def __getstate__(self) -> dict[str, Any]:
        return {"rules": self.rules}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["rules"])  # type: ignore[misc]


def _parents(name: str) -> list[str]:
    """`a.b.c` -> `a`, `a.b`, `a.b.c`"""
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts) + 1)]


def _matches(rule: Any, chain: list[nn.Module], names: set[str]) -> bool:
    if isinstance(rule, str):
        return any(fnmatch.fnmatchcase(name, rule) for name in names)
    if isinstance(rule, type):
        return any(isinstance(module, rule) for module in chain)
    return any(rule(module) for module in chain)
