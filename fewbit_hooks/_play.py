"""A forward under a scope, played on a recording.

NOTE [ A scope, played ]

What a scope does with a call depends on what others keep, and that on what the scope does with these. No rule foretells
it; but a recording can be gone through as a scope goes through a forward, once for each step that it takes to learn.
The learning is the scope's own (`_learning.py`), and so is what it sees in each call (`_seen.py` asks it); what is
played is this:

| the call                                               | what is held for it                  |
| ------------------------------------------------------ | ------------------------------------ |
| an activation whose input another node keeps           | nothing: it is left alone            |
| whose output, or a copy of it, another node keeps      | 0 or 1 bit an element, see below     |
| the same, with `recompute=True`                        | its input; the output is not kept    |
| any other                                              | `bits` an element; 1 if two-valued   |
| a mask (dropout)                                       | 1 bit an element                     |
| an activation or norm that is run again                | its input                            |
| a consumer's operand that leads to what is kept        | nothing: it is computed again        |

The output and at most a bit determine the derivative: none where the function is monotone, the side of the minimum
where it has one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from . import _policy, ops
from ._copies import RECENT
from ._learning import FROM_OUTPUT, Site, Verdict
from ._policy import Settings
from ._recipes import DEPTH
from ._recording import ACTIVATION, CAST, CONSUMER, COPY, EXPOSURE, MASK, NORM, SOFTMAX, Operation, Ref, Saved
from ._treatment import SOURCE

SHARED = "kept: somebody else keeps it"
AGAIN, FROM_INPUT = "computed again", "computed again from its input"


@dataclass(slots=True)
class Watched:
    """A call of which a site learns: what is played of `Watch`."""

    site: Site
    storages: list[int]
    y: Ref
    treated: Verdict
    copies: list[Ref] = field(default_factory=list)


class Step:
    """A forward under a scope, played.

    Attributes:
        held: storage -> its bytes.
        code_bytes: of the codes.
        freed, kept: as in `Outlook`, said of storages that may be held by others all the same.
    """

    def __init__(
        self, kept_by: Mapping[Operation, Sequence[Saved]], settings: Settings, own: Collection[int], number: int
    ) -> None:
        self._kept_by = kept_by
        self._settings = settings
        self._min_bytes = max(settings.min_bytes, 1)
        self._own = own
        self._number = number
        self.held: dict[int, int] = {}
        self.code_bytes = 0
        self.freed: dict[int, str] = {}
        self.kept: dict[int, str] = {}
        self._keepers: Counter[int] = Counter()
        self._waiting: list[Saved] = []
        self._watches: list[Watched] = []
        self._origins: dict[int, tuple[Operation, Site | None]] = {}
        self._anchors: dict[int, Ref] = {}
        self._versions: dict[int, int] = {}

    def play(self, operation: Operation) -> None:
        """Make a call."""
        for ref in (operation.x, operation.y):
            if ref is not None:
                self._versions[ref.storage] = max(ref.version, self._versions.get(ref.storage, 0))
        large = operation.x_bytes >= self._min_bytes
        recompute = self._settings.recompute
        if operation.parts and not (large and operation.y and (operation.kind == ACTIVATION or recompute)):
            for part in operation.parts:
                self.play(part)
        elif operation.kind == ACTIVATION:
            self._activation(operation)
        elif operation.kind == COPY:
            self._copy(operation)
        elif operation.kind == MASK:
            self._mask(operation)
        elif operation.kind == EXPOSURE and operation.x is not None:
            self._expose(operation.x.storage)
        elif recompute and large and operation.kind == NORM:
            self._norm(operation)
        elif recompute and large and operation.kind == CONSUMER:
            self._consumer(operation)
        else:
            self.hold(self._tensors(operation))
            if recompute and large and operation.kind == SOFTMAX:
                self._anchor(*operation.keeps)
            elif recompute and large and operation.kind == CAST:
                self._note(operation)

    def end(self) -> None:
        """The forward is over: pack the masks that nobody holds, and let the sites learn."""
        for tensor in self._waiting:
            if self._keepers[tensor.storage] > 1 or tensor.storage in self._own:
                self.hold([tensor])
            else:
                self._code([tensor], 1, "1 bit, exact")
        alive = self.held.keys() | set(self._own)
        for watch in self._watches:
            site, relied = watch.site, watch.copies if watch.site.expected is Verdict.COPY else [watch.y]
            coded = watch.treated in (Verdict.CODES, Verdict.OUTPUT)
            if (
                coded
                and site.expected in FROM_OUTPUT
                and any(self._versions[ref.storage] != ref.version for ref in relied)
            ):
                site.distrust_output()
            input_kept = all(storage in alive for storage in watch.storages)
            copy_kept = bool(watch.copies) and all(copy.storage in alive for copy in watch.copies)
            site.see(input_kept, watch.y.storage in alive, copy_kept, watch.treated, self._number)

    # --- the calls ---

    def _activation(self, operation: Operation) -> None:
        saved, settings, x, y = self._tensors(operation), self._settings, operation.x, operation.y
        if x is None or y is None:
            self.hold(saved)
        elif not saved:
            return  # its graph was dropped
        elif operation.x_bytes < self._min_bytes:
            self.hold(saved, _policy.SMALL)
        elif operation.reason:
            self._leave(operation, f"kept: {operation.reason}")
        elif settings.exact and not operation.exact and operation.parts:
            self._again(operation)
        elif settings.exact and not operation.exact:
            self._leave(operation, "kept: not two-valued")
        else:
            self._treat(operation, saved, x, y)

    def _treat(self, operation: Operation, saved: list[Saved], x: Ref, y: Ref) -> None:
        site = operation.site
        recompute = self._settings.recompute and not (operation.exact and not operation.parts)
        verdict = Verdict.UNKNOWN
        if site is not None:
            site.visit(self._number)
            verdict = site.treatment(recompute)
        if verdict in (Verdict.LEAVE, Verdict.INPUT):
            reason = SHARED if verdict is Verdict.LEAVE else f"kept: {SOURCE}"
            if operation.one_node:
                self._again(operation, site)
                self.kept[x.storage] = reason
            else:
                self._leave(operation, reason, site)
            if verdict is Verdict.INPUT:
                self._watch(operation, [], verdict)
            return
        beside = {Verdict.OUTPUT: operation.beside, Verdict.COPY: operation.beside_copy}.get(verdict)
        bits = beside if beside is not None else 1 if operation.exact else self._bits
        if operation.one_node:
            coded = saved
        else:  # beside them some keep tensors of another shape
            coded = [tensor for tensor in saved if tensor.shape == operation.x_shape]
            self.hold([tensor for tensor in saved if tensor.shape != operation.x_shape])
            if not coded:
                return
            if ops.packed_bytes(coded[0].numel, bits) >= coded[0].nbytes:
                self.hold(coded)
                return
        text = _count(bits)
        text += " beside the output" if beside is not None else ""
        self._code(coded, bits, text + (", exact" if operation.exact else ""), operation.x_shape)
        if beside is not None:
            self.held[y.storage] = y.nbytes
        storages = [x.storage] if operation.one_node else [tensor.storage for tensor in coded]
        self._watch(operation, storages, Verdict.CODES if beside is None else Verdict.OUTPUT)
        if not operation.exact and (site is not None or not operation.one_node):
            self._note(operation, site)

    def _copy(self, operation: Operation) -> None:
        self.hold(self._tensors(operation))
        x, y = operation.x, operation.y
        watch = next((w for w in reversed(self._watches[-RECENT:]) if x is not None and w.y.storage == x.storage), None)
        if watch is None or x is None or y is None or (watch.y.version, watch.y.place) != (x.version, x.place):
            return  # none of an activation's output, or of what it was changed to, or of a transpose
        watch.copies.append(y)
        if watch.site.verdict is Verdict.COPY and watch.treated is Verdict.OUTPUT:
            self.held.pop(x.storage, None)
            self.held[y.storage] = y.nbytes

    def _expose(self, storage: int) -> None:
        self._origins.pop(storage, None)
        self._anchors.pop(storage, None)
        for watch in self._watches:
            if storage in (watch.y.storage, *(copy.storage for copy in watch.copies)):
                watch.site.distrust_output()

    def _leave(self, operation: Operation, reason: str, site: Site | None = None) -> None:
        self.hold(self._tensors(operation), reason)
        x, y = operation.x, operation.y
        if operation.saves_input and x is not None and y is not None and x.storage != y.storage:
            self._anchor(x)
            if not operation.parts:
                self._note(operation, site)

    def _again(self, operation: Operation, site: Site | None = None) -> None:
        """Run as one node that keeps its input."""
        assert operation.x is not None
        self.held[operation.x.storage] = operation.x.nbytes
        for tensor in self._tensors(operation):
            self.freed.setdefault(tensor.storage, FROM_INPUT)
        self._anchor(operation.x)
        self._note(operation, site)

    def _norm(self, operation: Operation) -> None:
        saved = self._tensors(operation)
        if operation.one_node and saved:
            self._again(operation)
        else:
            self.hold(saved)
            self._anchor(*operation.keeps)
            self._note(operation)

    def _mask(self, operation: Operation) -> None:
        packed = False
        for tensor in self._tensors(operation):
            if not tensor.mask or ops.packed_bytes(tensor.numel, 1) >= tensor.nbytes:
                self.hold([tensor])
            elif tensor.tensor_bytes < self._min_bytes:
                self.hold([tensor], _policy.SMALL)
            elif operation.waits:
                self._keepers[tensor.storage] += 1
                self._waiting.append(tensor)
            else:
                packed = True
                self._code([tensor], 1, "1 bit, exact")
        self._anchor(*operation.keeps)
        if packed:
            self._note(operation)

    def _consumer(self, operation: Operation) -> None:
        site, saved = operation.site, self._tensors(operation)
        recipes: dict[int, tuple[Ref, list[Ref]]] = {}
        left_alone = site is not None and site.verdict is Verdict.LEAVE
        for ref in operation.operands if not left_alone else ():
            leaves = self._leaves(ref, DEPTH) if not self._is_kept(ref.storage) else None
            if leaves is not None:
                recipes[ref.storage] = ref, leaves
        if not recipes:
            self.hold(saved)
            self._anchor(*operation.keeps)
        else:
            replaced = []
            for tensor in saved:
                recipe = recipes.get(tensor.copy_of or tensor.storage)
                if recipe is None or (not tensor.copy_of and recipe[0].dtype != tensor.dtype):
                    self.hold([tensor])
                    self._anchor(*(ref for ref in operation.operands if ref.storage == tensor.storage))
                else:
                    replaced.append(tensor.storage)
                    self.freed.setdefault(tensor.storage, AGAIN)
                    self.held.update((leaf.storage, leaf.nbytes) for leaf in recipe[1])
            if replaced:
                self._watch(operation, replaced, Verdict.UNKNOWN)
        self._note(operation)

    # --- what they do ---

    def _tensors(self, operation: Operation) -> list[Saved]:
        return [tensor for o in (operation, *operation.parts) for tensor in self._kept_by.get(o, ())]

    def hold(self, tensors: Iterable[Saved], reason: str = "") -> None:
        """They are kept as they are."""
        for tensor in tensors:
            self._keepers[tensor.storage] += 1
            self.held[tensor.storage] = tensor.nbytes
            if reason:
                self.kept[tensor.storage] = reason

    def _code(self, tensors: Sequence[Saved], bits: int, text: str, shape: torch.Size | None = None) -> None:
        if tensors:
            self.code_bytes += ops.packed_bytes((shape or tensors[0].shape).numel(), bits)
        for tensor in tensors:
            self.freed[tensor.storage] = text
            self.kept.setdefault(tensor.storage, SHARED)

    def _watch(self, operation: Operation, storages: list[int], treated: Verdict) -> None:
        if operation.site is not None and operation.y is not None:
            self._watches.append(Watched(operation.site, storages, operation.y, treated))

    # --- recipes ---

    def _anchor(self, *refs: Ref) -> None:
        if self._settings.recompute:
            self._anchors.update((ref.storage, ref) for ref in refs)

    def _note(self, operation: Operation, site: Site | None = None) -> None:
        y, sources = operation.y, operation.sources
        if y is not None and y.recorded and sources and all(ref.storage != y.storage for ref in sources):
            self._origins[y.storage] = operation, site

    def _is_kept(self, storage: int) -> bool:
        return storage in self._anchors and (storage in self.held or storage in self._own)

    def _leaves(self, ref: Ref, depth: int) -> list[Ref] | None:
        """The kept tensors from which one can be computed again; None where it cannot."""
        origin, site = self._origins.get(ref.storage, (None, None))
        if depth == 0 or origin is None or origin.y is None or origin.y.version != ref.version or not ref.recorded:
            return None
        found = [self._leaf(source, depth - 1) for source in origin.sources]
        if site is not None:
            site.asked_for(self._number, given=None not in found)
            self._origins[ref.storage] = origin, None  # a call is asked for once
        return None if None in found else [leaf for leaves in found if leaves for leaf in leaves]

    def _leaf(self, source: Ref, depth: int) -> list[Ref] | None:
        if source.parameter:
            return []
        kept = self._anchors.get(source.storage)
        changed = self._versions.get(source.storage, source.version) != source.version
        if kept is not None and self._is_kept(source.storage) and kept.dtype == source.dtype and not changed:
            return [source]
        origin, _ = self._origins.get(source.storage, (None, None))
        same = origin is not None and origin.y is not None and origin.y.dtype == source.dtype
        return self._leaves(source, depth) if same else None

    @property
    def _bits(self) -> int:
        assert isinstance(self._settings.bits, int)
        return self._settings.bits


def _count(bits: int) -> str:
    return f"{bits} bit" + ("" if bits == 1 else "s")
