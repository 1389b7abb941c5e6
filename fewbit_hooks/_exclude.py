"""Which modules a scope leaves alone."""

from __future__ import annotations

import fnmatch
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, TypeAlias

from torch import nn

from . import _modules
from ._errors import FewbitTypeError
from ._locks import lock

Rule: TypeAlias = str | type[nn.Module] | Callable[[nn.Module], bool]
Chain: TypeAlias = tuple[tuple[_modules.ModuleRef, bool], ...]

WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""What torch.compile, FSDP and checkpoint wrappers call the module that they wrap."""

CALLERS = 256
"""From so many places one module's calls are remembered: some models are built anew around parts that stay."""

_lock = lock()


class Exclusion:
    """Rules that name modules: glob patterns of `model.named_modules()`'s names, classes, predicates.

    A module that a rule names is left alone with all that is inside it. A name counts with those of torch's wrappers
    and without: `encoder.0` is that of `module.encoder.0`, too, where DistributedDataParallel is around the model. What
    was found for a module, called from the modules around it, is remembered as long as the module lives.

    Args:
        rules: one rule, or several.

    Raises:
        FewbitTypeError: a rule is none of the three.
    """

    def __init__(self, rules: Rule | Iterable[Rule] = ()) -> None:
        single = isinstance(rules, (str, type, nn.Module)) or not isinstance(rules, Iterable)
        self.rules: tuple[Any, ...] = (rules,) if single else tuple(rules)  # type: ignore[arg-type]
        for rule in self.rules:
            if isinstance(rule, nn.Module) or not (isinstance(rule, str) or callable(rule)):
                raise FewbitTypeError(
                    f"exclude takes names of modules (glob patterns), nn.Module classes and predicates, got {rule!r}"
                )
        self._found: weakref.WeakKeyDictionary[nn.Module, dict[Chain, bool]] = weakref.WeakKeyDictionary()
        self._models: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # from which names were told

    def here(self) -> bool:
        """Whether a rule names a module whose forward is running."""
        chain = list(_modules.enclosing_modules())
        if not chain:
            return False
        found = self._found.setdefault(chain[0], {})
        # one module may be called from several; and a predicate may go by the mode
        key = tuple([(weakref.ref(module), module.training) for module in chain])
        excluded = found.get(key)
        if excluded is None:
            if len(found) >= CALLERS:
                found.clear()
            names = _names(chain, self.rules)
            with _lock:
                self._models.add(chain[-1])
            excluded = found[key] = any(_matches(rule, chain, names) for rule in self.rules)
        return excluded

    def misses(self) -> list[str]:
        """The names of modules that no model has that was seen so far."""
        names = {name for model in self._seen() for name, _ in _named(model)}
        return [rule for rule in self.rules if isinstance(rule, str) and not _matches(rule, [], names)]

    def models(self) -> list[str]:
        """The classes of those models."""
        return sorted({type(model).__name__ for model in self._seen()})

    def _seen(self) -> list[nn.Module]:
        with _lock:
            return list(self._models)

    def __getstate__(self) -> dict[str, Any]:
        return {"rules": self.rules}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["rules"])  # type: ignore[misc]


def _names(chain: list[nn.Module], rules: Collection[Any]) -> set[str]:
    """The names of modules, each inside the next, as the last one gives them, and of what they lie in.

    Of several names of one module those count that lie inside the name of a module around it; and those that are rules
    themselves: such a rule means that module, whoever calls it.
    """
    names: dict[int, list[str]] = {}
    for name, module in _named(chain[-1]):
        names.setdefault(id(module), []).append(name)
    found: set[str] = set()
    around = [""]
    for module in reversed(chain):
        mine = names.get(id(module), [])
        around = [n for n in mine if any(f"{n}.".startswith(f"{a}." if a else "") for a in around)] or mine or around
        # a container that is never called itself, an nn.ModuleList say, is named by its contents' names
        found.update(parent for name in around for parent in _parents(name))
        found.update(name for name in mine if name in rules)
    return found


def _named(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a model with each of their names, those that they have without wrappers among them."""
    wrapped: set[str] = set()
    for name, module in model.named_modules(remove_duplicate=False):  # a wrapper comes before what it wraps
        yield name, module
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            wrapped.add(f"{name}.module".lstrip("."))
        if name.rpartition(".")[2] in WRAPPERS:
            wrapped.add(name)
        if wrapped:
            bare = ".".join(path.rpartition(".")[2] for path in _parents(name) if path not in wrapped)
            if bare != name:
                yield bare, module


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
