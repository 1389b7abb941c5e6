"""The two hooks: what happens to a tensor that a recognised call saves.

NOTE [ What a packed object holds ]

1. Codes, the table that decodes them, and the layout of the tensor that they stand for. No tensor with a grad_fn:
   autograd owns the packed object, so that would be a cycle that is never collected (pytorch #115255).
2. What is kept goes as `detach()` with its version, checked when it is unpacked: a tensor that passes through a hook
   is no longer checked by autograd itself (pytorch #128545).
3. Where others' hooks lie around the scope (an offloader, a checkpoint), codes and what is kept are packed by theirs;
   codes only if they come back as they were (`_around.py`).
4. Nothing of the scope: unpacking works after it has ended, on any thread, twice, in any order.

The pack hook itself lives as long as the node (measured, torch 2.13: the saved variable keeps it), so it lets go of all
that it holds, the input above all, when its call is over.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from . import _steep, ops
from ._around import Receipt
from ._dtensor import PartHook, Whole, detached, is_dtensor, local_part, version_of
from ._errors import FewbitError, FewbitRuntimeError
from ._hooked import Hooks, hooked
from ._inverse import Inverse, Itself
from ._learning import Site, Verdict
from ._ledger import CODES, KEPT, OUTPUT, Ledger, Row, Step
from ._plan import Plan
from ._storages import StorageWeakRef, is_allocated, owners
from ._watch import Watch, distrust

Decoder: TypeAlias = Callable[[Tensor, Tensor | None, ops.Layout], Tensor]
"""From the output and the packed bits to a tensor of the layout."""

NO_GAIN = "codes would be no smaller than its storage"


class Handed:
    """What others' hooks made of a tensor."""

    __slots__ = ("__weakref__", "_packed", "_unpack")

    def __init__(self, tensor: Tensor, hooks: Hooks) -> None:
        pack, self._unpack = hooks
        self._packed = pack(tensor)

    def unpack(self) -> Tensor:
        """The tensor."""
        return self._unpack(self._packed)


class HandedCodes(Handed):
    """What others' hooks made of codes: NOTE [ Hooks that change codes ] in `_around.py`."""

    __slots__ = ("_receipt",)

    def __init__(self, codes: Tensor, hooks: Hooks) -> None:
        super().__init__(codes, hooks)
        self._receipt = Receipt(codes, hooks)

    def unpack(self) -> Tensor:
        """The codes."""
        return self._receipt.redeem(super().unpack())


class Packed(_steep.Instead):
    """Codes in the place of a saved tensor; and a flag, see `Plan.encode`. Or the tensor after all, see `_steep.py`."""

    __slots__ = ("bits", "codes", "flag", "layout", "name", "order", "rows", "step")

    def __init__(
        self,
        codes: Tensor | Handed | None,
        rows: Tensor,
        bits: int,
        layout: ops.Layout,
        order: ops.Layout,
        name: str,
        step: Step,
        flag: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.codes = codes
        self.rows = rows
        self.bits = bits
        self.layout = layout
        self.order = order
        self.name = name
        self.step = step
        self.flag = flag

    def keep(self) -> int:
        super().keep()
        self.codes = None
        return ops.packed_bytes(math.prod(self.layout.shape), self.bits)

    def unpack(self) -> Tensor:
        """The stand-ins: a tensor for which the node's own backward gives the few-bit derivative."""
        if self.kept is not None:
            self.step.unpacked()
            return self.kept.unpack()
        begin_backward(self.name, self.step)
        codes = self.codes.unpack() if isinstance(self.codes, Handed) else self.codes
        assert codes is not None
        with torch._C.DisableTorchFunction():
            return self.layout.like(flagged(ops.decode(codes, self.rows, self.bits, self.order), self.flag))


class Beside:
    """An output that somebody else keeps, and at most one bit an element, in the place of a saved tensor."""

    __slots__ = ("__weakref__", "decoder", "layout", "name", "order", "output", "packed", "step", "stream", "version")

    def __init__(
        self, packed: Tensor | None, decoder: Decoder, layout: ops.Layout, order: ops.Layout, name: str, step: Step
    ) -> None:
        self.packed = packed
        self.decoder = decoder
        self.layout = layout
        self.order = order
        self.name = name
        self.step = step
        self.output: Tensor | None = None
        self.version = 0
        self.stream: Any = None

    def rely_on(self, y: Tensor) -> None:
        """The call has its output; or that has been copied, and `y` is what it is in the copy."""
        self.stream = ops.stream_of(local_part(y))
        if type(y) is Tensor:
            self.output, self.version = y.detach(), y._version
        else:
            self.output, self.version = detached(y), version_of(y)

    def has_changed(self) -> bool:
        """Whether the output has been changed in place, or its memory freed."""
        output = self.output
        if output is None:
            return False
        return version_of(output) != self.version or not is_allocated(local_part(output))

    def lies_in(self, storage: int) -> bool:
        """Whether the output lies in the storage of that address."""
        return self.output is not None and local_part(self.output).untyped_storage()._cdata == storage

    def held_alone(self) -> int:
        """The bytes of the output's storage, if nobody else holds it."""
        output = self.output
        return output.untyped_storage().nbytes() if type(output) is Tensor and owners(output) == 1 else 0

    def rely_on_a_copy(self) -> None:
        """Somebody may change the output without a trace; the input, from which codes would be made, is gone.

        Where it has been changed already, that stays to be said.
        """
        if type(self.output) is Tensor and not self.has_changed():
            copy = self.output.clone()
            self.output, self.version = copy, copy._version
            now = ops.stream_of(copy)
            if now != self.stream:  # backward will read it on the stream of the forward
                self.stream.wait_stream(now)
                copy.record_stream(self.stream)

    def unpack(self) -> Tensor:
        """What follows from the output and the bits: the stand-ins."""
        output = self.relied_on()
        with torch._C.DisableTorchFunction():
            return self.layout.like(self.decoder(output, self.packed, self.order))

    def relied_on(self) -> Tensor:
        """The output, which is what it was; a backward asks for it."""
        begin_backward(self.name, self.step)
        assert self.output is not None
        if self.has_changed():
            distrust(self)
            version = version_of(self.output)
            how = (
                f"modified by an inplace operation: it is at version {version}, expected {self.version}"
                if version != self.version
                else "freed: its storage was resized"
            )
            raise FewbitRuntimeError(
                f"the output of {self.name}, of shape {list(self.output.shape)}, has been {how}. Its derivative is "
                "taken from the output, which another node was seen to keep. From the next step on it is not; for this "
                "one, let the output be, or run the module under `with fewbit_hooks.scope(bits=None):`."
            )
        return local_part(self.output)


class Kept:
    """A saved tensor as it is, and its version."""

    __slots__ = ("__weakref__", "name", "tensor", "version")

    def __init__(self, tensor: Tensor, name: str) -> None:
        self.tensor = tensor.detach()
        self.version = tensor._version
        self.name = name

    def held_alone(self) -> bool:
        """Whether nobody else holds its storage."""
        return owners(self.tensor) == 1

    def unpack(self) -> Tensor:
        if self.tensor._version != self.version:
            raise FewbitRuntimeError(
                f"a tensor that {self.name} needs for its gradient, of shape {list(self.tensor.shape)}, has been "
                f"modified by an inplace operation: it is at version {self.tensor._version}, expected {self.version}. "
                "Replace the inplace operation by its out-of-place form, or clone the tensor first."
            )
        return self.tensor


def keep(tensor: Tensor, name: str, around: Hooks | None) -> Kept | Handed:
    """A saved tensor as it is, or left to the hooks around the scope."""
    return Kept(tensor, name) if around is None else Handed(tensor, around)


def unpack(packed: Packed | Beside | Kept | Handed | Whole) -> Tensor:
    """The unpack hook."""
    return packed.unpack()


def run_kept(name: str, run: Callable[[], Any]) -> tuple[Any, list[weakref.ref[Kept]]]:
    """Make a call whose saved tensors are kept as they are, by us: so it is told who else holds them."""
    kept: list[weakref.ref[Kept]] = []  # weak: the hook lives as long as the node

    def pack(t: Tensor) -> Kept:
        found = Kept(t, name)
        kept.append(weakref.ref(found))
        return found

    with hooked(pack, unpack):
        return run(), kept


def nbytes(t: Tensor | None) -> int:
    """The bytes of what may be none."""
    return 0 if t is None else t.nbytes


def flagged(decoded: Tensor, flag: Tensor | None) -> Tensor:
    """What was decoded, its first element NaN if the flag is."""
    if flag is not None:
        decoded.as_strided((1,), (1,)).add_(flag)
    return decoded


def begin_backward(name: str, step: Step) -> None:
    """Refuse to be differentiated; settle the ledger."""
    if torch._C._current_graph_task_id() == -1:
        return  # somebody looks at `grad_fn._saved_self`; no backward is running
    if torch.is_grad_enabled():  # inside a backward, exactly under create_graph=True
        raise FewbitRuntimeError(
            f"double backward (create_graph=True) through {name}, whose saved tensor was replaced by few-bit codes: "
            "its second derivative cannot be had from them. Run the forward of that region under "
            "`with fewbit_hooks.scope(bits=None):` to keep it exact."
        )
    if not step.backward_began:
        step.begin_backward(late=True)


class PackHook:
    """The pack hook of one recognised call.

    Args:
        plan: how the call is coded.
        x: its input.
        ledger: the books.
        site: where the call was made; None if it was in no module.
        inverse: take the derivative from the output, and from at most one bit; None: from the plan's codes.
        around: others' hooks around the scope.
    """

    __slots__ = (
        "__weakref__",
        "_around",
        "_beside",
        "_bits",
        "_codes",
        "_count",
        "_flag",
        "_inverse",
        "_keep",
        "_latest",
        "_ledger",
        "_plan",
        "_row",
        "_saved",
        "_site",
        "_x",
    )

    def __init__(
        self,
        plan: Plan,
        x: Tensor,
        ledger: Ledger,
        site: Site | None,
        inverse: Inverse | Itself | None,
        around: Hooks | None,
    ) -> None:
        self._plan = plan
        self._x = x
        self._ledger = ledger
        self._site = site
        self._inverse = inverse
        self._bits = plan.bits if inverse is None else inverse.bits
        self._around = around
        self._count = 0
        self._keep = False
        self._row: Row | None = None
        self._flag: Tensor | None = None
        self._saved: list[StorageWeakRef] = []
        self._beside: list[Beside] = []
        self._latest: Packed | None = None
        # Smooth activations are coded from their input, where the boundaries are; that must be before it is
        # overwritten.
        self._codes = self._encode(x) if plan.inplace and plan.codebook is not None else None

    def __call__(self, t: Tensor) -> Packed | Beside | Kept | Handed:
        plan, name = self._plan, self._plan.activation.name
        k, self._count = self._count, self._count + 1
        rows = None if self._keep else plan.rows(k, t.dtype, t.device)
        if rows is None:  # kept, or an auxiliary tensor of another shape: nothing that codes could replace
            return keep(t, name, self._around)
        if t.shape != self._x.shape:
            raise FewbitError(
                f"{name} saved a tensor of shape {list(t.shape)}, its input has {list(self._x.shape)}. "
                f"Please report this; scope(bits={{{name!r}: None, ...}}) keeps it exact."
            )
        if self._row is None:
            reason = self._reason_to_keep(t)
            self._keep = bool(reason)
            bits = None if reason else self._bits
            how = KEPT if reason else CODES if self._inverse is None else OUTPUT
            self._row = self._ledger.row(name, bits, reason, how=how, site=self._site)
        storage = self._ledger.original(self._row, t)
        if self._keep:
            return keep(t, name, self._around)
        if self._site is not None and storage is not None:
            self._saved.append(storage)
        if self._codes is None and self._bits:
            self._codes = self._encode(t if plan.codebook is None else self._x)
        if k == 0 and self._codes is not None:
            self._ledger.stored(self._row, nbytes(self._codes) + nbytes(self._flag))
        layout, step = ops.Layout.of(t), self._ledger.step
        # log_sigmoid's buffer is contiguous, whatever its input is, in whose order the codes are
        same = plan.codebook is None or t.stride() == self._x.stride()
        order = layout if same else layout._replace(stride=ops.Layout.of(self._x).stride)
        if self._inverse is not None:
            decoder = functools.partial(self._inverse.standins, k)
            self._beside.append(Beside(self._codes, decoder, layout, order, name, step))
            return self._beside[-1]
        assert self._codes is not None
        # each is handed on by itself: an offloader gives back what it was handed once
        codes = HandedCodes(self._codes, self._around) if self._around is not None else self._codes
        packed = Packed(codes, rows, plan.bits, layout, order, name, step, self._flag)
        if name in _steep.SATURATE:
            packed.at_hand, self._latest = Kept(t, name), packed
        return packed

    def finish(self, y: Tensor) -> None:
        """The call has its output."""
        if self._latest is not None and self._row is not None:
            _steep.remember(y, self._latest, self._ledger, self._row)
        for packed in self._beside:
            packed.rely_on(y)
        if self._keep:
            self._ledger.ends_at(y)
        if self._site is not None and self._saved:
            treated = Verdict.OUTPUT if self._beside else Verdict.CODES
            self._ledger.watch(Watch(self._site, self._saved, y, treated, self._beside, self._row, node=self))

    def release(self) -> None:
        """The call is over; see the note above."""
        del self._plan, self._x, self._ledger, self._site, self._row, self._codes, self._saved, self._beside
        del self._around, self._flag, self._latest

    def _encode(self, t: Tensor) -> Tensor | None:
        if not self._bits:
            return None
        if isinstance(self._inverse, Inverse):
            with ops.unnoticed():
                return ops.encode(t, self._bits, self._inverse.side)
        codes, self._flag = self._plan.encode(t)
        return codes

    def _reason_to_keep(self, t: Tensor) -> str:
        if ops.packed_bytes(t.numel(), self._bits) >= t.untyped_storage().nbytes():
            return NO_GAIN
        return self._plan.reason_to_keep(t) if self._inverse is None else ""


def run_coded(
    plan: Plan,
    ledger: Ledger,
    x: Tensor,
    run: Callable[[], Any],
    site: Site | None = None,
    inverse: Inverse | Itself | None = None,
    around: Hooks | None = None,
) -> Any:
    """Make a recognised call with our hooks around it; see `PackHook`."""
    pack = PackHook(plan, local_part(x), ledger, site, inverse, around)
    hook: Callable[[Tensor], Any] = pack
    if is_dtensor(x):
        name = plan.activation.name
        hook = PartHook(pack, x, lambda t: keep(t, name, around), Kept)
    try:
        with hooked(hook, unpack):
            y = run()
        pack.finish(y)
        return y
    finally:
        pack.release()
