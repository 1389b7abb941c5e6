"""Recipes: what is cheap to compute again from tensors that are kept anyway is not kept itself.

NOTE [ Recipes ]

What a Linear saves of its input is often the result of cheap pointwise work on a tensor that another node keeps: the
activation's output, whose input the activation's node keeps; a norm's output; the product of a gated unit. Such a
tensor is replaced by a *recipe*: what to run again, and on which kept tensors.

1. An *origin* says how a tensor came to be. It is noted when the tensor is made, by its storage, so that views are
   known too, and holds no tensor: only weak references, versions, and the origins of its own sources.
2. An *anchor* is a tensor that a node of the graph is known to keep, because it always does (layer_norm its input), or
   because a hook of ours was just handed it. It is one as long as that node lives: where the graph of a branch is
   dropped (a statistic that is logged), nobody keeps the tensor any more, and its owner may change it. It is held
   weakly.
3. A recipe is made when a node saves a tensor whose origin leads, in at most `DEPTH` steps, to anchors alone. So a
   recipe keeps nothing alive that autograd would not keep without it, and what it replaces is gone.
4. The sources are held detached, with their versions, which are checked before they are used: as autograd would do.
   A tensor of which others may have got hold of the memory itself (`.data`, `.numpy()`) has no origin any more.
5. What is detached has no origin, nor has a view of that: what is made of it may outlive the graph that keeps the
   sources. So a tensor with an origin leads back to the node that made it.
6. What is computed for one of several consumers (query, key and value) is held until the last of them has had it, or
   the backward is over.

Origins and anchors are the thread's, and dropped when its last scope is left, and when a backward begins.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from . import ops
from ._errors import FewbitError, FewbitRuntimeError
from ._graph import latest_node, nodes
from ._hooks import Kept
from ._learning import Site
from ._modules import ModuleRef
from ._replay import Autocast, replay, untraced, when_backward_ends
from ._storages import StorageWeakRef, is_allocated

DEPTH = 8
"""Steps from a recipe to what is kept. LoRA's chain of norm, cast and dropout has three."""
KNOWN = 4096
"""Origins and anchors noted before those of tensors that are gone are dropped."""

Run = Callable[..., Tensor]


class Geometry:
    """Where a tensor lies in its storage."""

    __slots__ = ("dtype", "offset", "size", "stride")

    def __init__(self, t: Tensor) -> None:
        self.size, self.stride, self.offset, self.dtype = t.size(), t.stride(), t.storage_offset(), t.dtype

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Geometry) and (self.size, self.stride, self.offset, self.dtype) == (
            other.size,
            other.stride,
            other.offset,
            other.dtype,
        )

    def of(self, t: Tensor) -> Tensor:
        """The tensor that lies so in the storage of `t`."""
        return t if Geometry(t) == self else t.as_strided(self.size, self.stride, self.offset)


def is_turned(t: Tensor) -> bool:
    """Whether its elements are not what lies in memory, but that with the other sign, or conjugate: which is no part of
    its `Geometry`."""
    return t.is_neg() or t.is_conj()


class Part(Protocol):
    """Something that a recipe is made of."""

    def value(self) -> Tensor:
        """The tensor; computed, where it must be."""


changed: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Modules that were to be run again on a tensor that had been changed, or that computed what was."""


class Leaf:
    """A kept tensor, and its version.

    Args:
        module: that is run again on it, for whose sake it is kept; None where PyTorch keeps it.
    """

    __slots__ = ("__weakref__", "module", "tensor", "version")

    def __init__(self, tensor: Tensor, version: int, module: ModuleRef | None = None) -> None:
        self.tensor = tensor.detach()
        self.version = version
        self.module = module

    def value(self) -> Tensor:
        """The tensor, unless it has been changed."""
        if self.tensor._version != self.version:
            raise FewbitRuntimeError(
                f"a tensor of shape {list(self.tensor.shape)}, from which others are computed again for backward, has "
                f"been modified by an inplace operation: it is at version {self.tensor._version}, expected "
                f"{self.version}. {self._from_now_on()}Replace the inplace operation by its out-of-place form, or run "
                "the module under `with fewbit_hooks.scope(bits=None):`."
            )
        if not is_allocated(self.tensor):
            raise FewbitRuntimeError(
                f"a parameter of shape {list(self.tensor.shape)}, from which others are computed again for backward, "
                "is not there: its memory was freed after the forward (FSDP does that). Gather it together with the "
                "layer that follows its module, or run the module under `with fewbit_hooks.scope(bits=None):`."
            )
        return self.tensor

    def _from_now_on(self) -> str:
        module = self.module() if self.module is not None else None
        if module is None:
            return ""
        changed.add(module)
        return f"From the next step on this {type(module).__name__} is not run again; for this one: "


class Recipe:
    """What to run again, and on what. `value()` may be called on any thread, and again."""

    __slots__ = (
        "__weakref__",
        "_autocast",
        "_geometry",
        "_left",
        "_lock",
        "_parts",
        "_result",
        "_run",
        "_stream",
        "_users",
    )

    def __init__(self, run: Run, parts: Sequence[Part], autocast: Autocast, geometry: Geometry) -> None:
        self._run = run
        self._parts = parts
        self._autocast = autocast
        self._geometry = geometry
        self._lock = threading.RLock()
        self._users = self._left = 0
        self._result: Tensor | None = None
        self._stream: Any = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the value."""
        return self._geometry.dtype

    def add_user(self) -> None:
        """One more that will ask for the value."""
        self._users += 1
        self._left = self._users

    def value(self) -> Tensor:
        """What the forward computed, bit for bit."""
        with self._lock:
            result = self._result
            if result is None or self._stream != ops.stream_of(result):
                parts = [part.value() for part in self._parts]
                with replay(self._autocast):
                    result = untraced(self._run)(*parts)
                if Geometry(result) != self._geometry:
                    raise FewbitError(
                        f"what was computed again has strides {result.stride()}, it had {self._geometry.stride}. "
                        "Please report this; scope(recompute=False) does without."
                    )
            if self._users > 1:
                self._hold(result)
            return result

    def _hold(self, result: Tensor) -> None:
        """One user of several has had it: hold it for the others, until the backward is over at the latest."""
        if self._result is None:
            if not when_backward_ends(self._forget):
                return
            self._result, self._stream = result, ops.stream_of(result)
        self._left -= 1
        if self._left <= 0:
            self._forget()

    def _forget(self) -> None:
        with self._lock:
            self._result, self._left = None, self._users


class Computed:
    """What a recipe gives, as a source lies in it."""

    __slots__ = ("_geometry", "recipe")

    def __init__(self, recipe: Recipe, geometry: Geometry) -> None:
        self.recipe = recipe
        self._geometry = geometry

    def value(self) -> Tensor:
        """The source, computed again."""
        return self._geometry.of(self.recipe.value())


class Source:
    """A tensor that another was computed from; held by what is its own, not by its content."""

    __slots__ = ("_geometry", "_own", "_storage", "_version", "origin")

    def __init__(self, t: Tensor) -> None:
        self._geometry = Geometry(t)
        self._storage = StorageWeakRef(t.untyped_storage())  # as long as it is held its address names no other
        self._version: int = t._version
        self._own = weakref.ref(t) if isinstance(t, torch.nn.Parameter) else None
        self.origin = find(t)

    def part(self, depth: int) -> Part | None:
        """An anchor, or else what a recipe gives; None where there is neither."""
        module: ModuleRef | None = None
        if self._own is not None:
            kept: Any = self._own()
        else:
            kept, module = _known.anchor(self._storage.cdata)
        if self._own is not None and not self._is_there(kept):
            return None  # it will be there again for its own module's backward, later than it is needed here
        if kept is not None and kept.dtype == self._geometry.dtype and kept._version == self._version:
            return Leaf(self._geometry.of(kept.detach()), self._version, module)
        if self.origin is None or self.origin.geometry.dtype != self._geometry.dtype:
            return None
        recipe = self.origin.recipe(depth)
        return Computed(recipe, self._geometry) if recipe is not None else None

    def _is_there(self, parameter: Tensor | None) -> bool:
        """Whether a parameter lies where it did: its `.data` may have been set to a placeholder, which no version
        tells."""
        if parameter is None or not is_allocated(parameter):
            return False
        return bool(parameter.untyped_storage()._cdata == self._storage.cdata)


class Origin:
    """How a tensor came to be.

    Args:
        y: the tensor.
        run: `run(*sources)` computes it again, in the same layout.
        sources: the tensors that it was computed from.
        others: further parts, weakly held: a dropout's mask.
        site: where an activation was called that may keep its input, or not; and the step.
    """

    __slots__ = (
        "_autocast",
        "_geometry",
        "_others",
        "_recipe",
        "_run",
        "_site",
        "_sources",
        "_storage",
        "node",
        "version",
    )

    def __init__(
        self,
        y: Tensor,
        run: Run,
        sources: Sequence[Tensor],
        others: Sequence[Any] = (),
        site: tuple[Site, int] | None = None,
    ) -> None:
        self._geometry = Geometry(y)
        self._storage = StorageWeakRef(y.untyped_storage())  # as long as it is held its address names no other
        self.version: int = y._version
        self.node = latest_node([y])
        self._run = run
        self._sources = [Source(t) for t in sources]
        self._others = [weakref.ref(other) for other in others]
        self._autocast = Autocast.of(y.device.type)
        self._recipe: weakref.ref[Recipe] | None = None
        self._site = site

    @property
    def gone(self) -> bool:
        """The tensor's storage is freed."""
        return bool(self._storage.expired())

    @property
    def geometry(self) -> Geometry:
        """Where the tensor lies in its storage."""
        return self._geometry

    def recipe(self, depth: int = DEPTH) -> Recipe | None:
        """The recipe, shared by all who ask; None where it leads to something that is not kept."""
        recipe = self._recipe() if self._recipe is not None else None
        if recipe is None and depth > 0:
            parts: list[Part | None] = [source.part(depth - 1) for source in self._sources]
            parts += [_Other(kept) if (kept := ref()) is not None else None for ref in self._others]
            if self._site is not None:
                site, step = self._site
                site.asked_for(step, given=None not in parts)
                self._site = None  # a call is asked for once
            if None in parts:
                return None
            recipe = Recipe(self._run, [p for p in parts if p is not None], self._autocast, self._geometry)
            for part in parts:
                if isinstance(part, Computed):
                    part.recipe.add_user()
            self._recipe = weakref.ref(recipe)
        return recipe


class _Other:
    """What a hook of ours packed, as a part."""

    __slots__ = ("_packed",)

    def __init__(self, packed: Any) -> None:
        self._packed = packed

    def value(self) -> Tensor:
        value: Tensor = self._packed.unpack()
        return value


class _Known(threading.local):
    """The origins and anchors of a thread, by the address of the storage."""

    def __init__(self) -> None:
        self.origins: dict[int, Origin] = {}
        self.anchors: dict[int, weakref.ref[Any]] = {}
        self.exposed: dict[int, StorageWeakRef] = {}  # as long as one is held its address names no other
        self.purge_at = KNOWN

    def anchor(self, storage: int) -> tuple[Tensor | None, ModuleRef | None]:
        """What is kept there, and the module for whose sake it is."""
        ref = self.anchors.get(storage)
        keeper = ref() if ref is not None else None
        kept: Tensor | None = keeper.tensor if keeper is not None else None
        if kept is None or kept.untyped_storage()._cdata != storage:  # the address may name another storage by now
            return None, None
        return kept, keeper.module if isinstance(keeper, Leaf) else None

    def purge(self) -> None:
        if self.count() >= self.purge_at:
            self.exposed = {key: ref for key, ref in self.exposed.items() if not ref.expired()}
            self.origins = {key: origin for key, origin in self.origins.items() if not origin.gone}
            self.anchors = {key: ref for key, ref in self.anchors.items() if ref() is not None}
            self.purge_at = max(KNOWN, 2 * self.count())

    def count(self) -> int:
        return len(self.origins) + len(self.anchors) + len(self.exposed)


_known = _Known()


def note(
    y: Tensor,
    run: Run,
    sources: Sequence[Tensor],
    others: Sequence[Any] = (),
    site: tuple[Site, int] | None = None,
) -> None:
    """`y` was computed from these; it must lie in a storage of its own."""
    key = y.untyped_storage()._cdata
    if any(map(is_turned, (y, *sources))):
        return
    if y.grad_fn is not None and all(t.untyped_storage()._cdata != key for t in sources):
        _known.origins[key] = Origin(y, run, sources, others, site)
        _known.purge()


class _ByNode:
    """A tensor that a node keeps by itself. It lives as long as the node, which holds it among what it is annotated
    with; the tensor it holds weakly, for the node may let go of that before."""

    __slots__ = ("__weakref__", "_tensor")

    def __init__(self, t: Tensor, node: Any) -> None:
        self._tensor = weakref.ref(t)
        node.metadata[self] = None

    @property
    def tensor(self) -> Tensor | None:
        return self._tensor()


def anchor(t: Tensor, keeper: Kept | Leaf | _ByNode) -> None:
    """A node keeps `t`, in what it was given."""
    key = t.untyped_storage()._cdata
    if not is_turned(t) and key not in _known.exposed:
        _known.anchors[key] = weakref.ref(keeper)
        _known.purge()


def anchor_by_node(t: Tensor, y: Any) -> None:
    """The node of `y`, or one that it leads to, keeps `t` by itself."""
    if isinstance(y, Tensor) and y.grad_fn is not None:
        anchor(t, _ByNode(t, y.grad_fn))


def is_anchor(t: Tensor) -> bool:
    """Whether a node is known to keep the storage of `t`."""
    return _known.anchor(t.untyped_storage()._cdata)[0] is not None


def find(t: Tensor) -> Origin | None:
    """How `t`, or what it is a view of, came to be; None where that is not known, or `t` was changed or detached."""
    origin = _known.origins.get(t.untyped_storage()._cdata) if t.grad_fn is not None and not is_turned(t) else None
    if origin is None or t._version != origin.version:
        return None
    return origin if any(node._sequence_nr() == origin.node for node in nodes([t], origin.node - 1)) else None


def expose(storage: torch.UntypedStorage) -> None:
    """Somebody may change what lies there unseen: nothing is known of it from now on."""
    key = storage._cdata
    _known.origins.pop(key, None)
    _known.anchors.pop(key, None)
    if key not in _known.exposed:
        _known.exposed[key] = StorageWeakRef(storage)
        _known.purge()


def any_known() -> bool:
    """Whether the thread has origins or anchors."""
    return bool(_known.origins or _known.anchors)


def forget() -> None:
    """Drop the thread's origins and anchors."""
    _known.origins.clear()
    _known.anchors.clear()
    _known.exposed.clear()
