"""The modules of packages that may not be there, among those already imported. Nothing is imported."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType

from ._locks import lock


class Imported:
    """Does something with each module of some packages, once, when it has been imported.

    >>> names = []
    >>> look = Imported(("json.",), lambda name, module: names.append(name))
    >>> import json.decoder
    >>> look(), look(), "json.decoder" in names, len(names) == len(set(names))
    (None, None, True, True)

    Args:
        prefixes: the beginnings of the modules' names.
        visit: given its name and the module.
    """

    def __init__(self, prefixes: tuple[str, ...], visit: Callable[[str, ModuleType], None]) -> None:
        self._prefixes = prefixes
        self._visit = visit
        self._lock = lock()
        self._visited: set[str] = set()
        self._count = 0

    def __call__(self) -> None:
        """Visit what has been imported since the last time."""
        if len(sys.modules) == self._count:
            return
        with self._lock:
            count = len(sys.modules)
            for name, module in list(sys.modules.items()):
                if name in self._visited or not name.startswith(self._prefixes):
                    continue
                if getattr(getattr(module, "__spec__", None), "_initializing", False):
                    count = 0  # half imported, on another thread or around us: look again
                    continue
                self._visit(name, module)
                self._visited.add(name)
            self._count = count
