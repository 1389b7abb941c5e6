"""A node of our own for a call that is coded: what it keeps is what backward needs, and backward is one product.

NOTE [ A node of our own ]

Under the hooks, PyTorch's node computes `grad * f'(s)` from stand-ins s, which must first be written. The derivative is
known, though: `grad * level` is all that there is to compute. So under `engine="fused"` autograd has a node of ours;
and what is written in primitives is one under every engine.

1. The forward is the call itself, unrecorded: the result is bit for bit what it was, and no formula is copied. Only
   on CUDA another kernel may compute it, together with the codes (`_fused.py`).
2. The node keeps the codes of the input, or, where another node keeps the output, at most one bit beside that (NOTE
   [ Beside a kept output ] in `_inverse.py`): what the hooks keep, to the byte.
3. Backward decodes the derivative and multiplies by it. Less is moved than in stock's backward, which reads the input
   and computes exp or erf: (measured, CPU, 2 cores, gelu, 3 bits, float32, ns an element) 0.6, stock 1.15, of 3 * 2**20
   elements; 2.2, stock 7.7, of 2**24.
4. Of primitives more is gone: `gelu_new` saves four tensors of the activation's size, `F.gelu(approximate="tanh")` one.

The hooks serve what this cannot: calls in place, activations of two values (their gradient is stock's to the bit, by
stock's own node), nodes that save several tensors, DTensors; 16-bit floats on the CPU, where no kernel computes the
product in float32 and it would be rounded twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import _steep, ops
from ._errors import FewbitError
from ._hooked import Hooks, hooked, innermost_hooks
from ._hooks import Beside, HandedCodes, Kept, begin_backward, flagged, nbytes
from ._inverse import Inverse, Itself
from ._learning import Site, Verdict
from ._ledger import CODES, OUTPUT, Ledger, Row
from ._plan import Plan
from ._standins import Saves
from ._steep import Instead
from ._storages import StorageWeakRef
from ._watch import Watch


def serves(plan: Plan, x: Tensor, inverse: Inverse | Itself | None) -> bool:
    """Whether a call that is one node of PyTorch's can be one of ours; see the note above."""
    if plan.codebook is None or plan.inplace or plan.activation.saves == "several" or plan.is_cast(x.device):
        return False
    if type(x) is not Tensor or isinstance(inverse, Itself):
        return False
    if ops.multiplied_in(x.dtype, x.device) != ops.computed_in(x.dtype):
        return False
    bits = plan.bits if inverse is None else inverse.bits
    if ops.packed_bytes(x.numel(), bits) >= x.untyped_storage().nbytes():
        return False
    return inverse is not None or not plan.reason_to_keep(x)


_NOTHING = torch.empty(0, device="cpu")


class _Handover:
    """A pack hook that puts something of ours in the place of the first tensor that the node saves.

    So it is autograd's, which lets go of it when the backward is over, and not the node's, which a loss that is kept
    keeps alive.
    """

    __slots__ = ("packed",)

    def __init__(self) -> None:
        self.packed: Beside | HandedCodes | None = None

    def __call__(self, t: Tensor) -> Beside | HandedCodes | Tensor:
        packed, self.packed = self.packed, None
        return t if packed is None else packed


def _taken_back(packed: Beside | HandedCodes | Tensor) -> Tensor:
    """The unpack hook: the output that is relied on, or the codes."""
    if isinstance(packed, Beside):
        return packed.relied_on()
    return packed.unpack() if isinstance(packed, HandedCodes) else packed


@dataclass(slots=True)
class _Call:
    """What `run_coded` was given, and what is put in the place of what its node saves."""

    plan: Plan
    ledger: Ledger
    run: Callable[[], Tensor]
    site: Site | None
    inverse: Inverse | None
    fused: Callable[[], tuple[Tensor, Tensor, Tensor | None]] | None
    primitives: Saves | None
    around: Hooks | None
    handover: _Handover = field(default_factory=_Handover)
    instead: Instead = field(default_factory=Instead)
    row: Row | None = None


def run_coded(
    plan: Plan,
    ledger: Ledger,
    x: Tensor,
    run: Callable[[], Tensor],
    site: Site | None = None,
    inverse: Inverse | None = None,
    *,
    fused: Callable[[], tuple[Tensor, Tensor, Tensor | None]] | None = None,
    primitives: Saves | None = None,
) -> Tensor:
    """Make a call as one node that keeps the codes of its input, or the output and at most a bit.

    Args:
        plan: how the input is coded.
        run: the forward.
        site, inverse: as for `_hooks.PackHook`.
        fused: computes, in place of `run`, the result, the codes and a flag, see `Plan.encode`.
        primitives: what those of the forward would have saved; None: it is one node of PyTorch's.
    """
    call = _Call(plan, ledger, run, site, inverse, fused, primitives, innermost_hooks())
    hands_over = inverse is not None or call.around is not None
    hooks = hooked(call.handover, _taken_back)
    with hooks if hands_over else contextlib.nullcontext():
        y: Tensor = _Coded.apply(x, call)  # type: ignore[no-untyped-call]
    name = plan.activation.name
    if inverse is None and name in _steep.SATURATE and call.row is not None:
        call.instead.at_hand = Kept(x, name)
        _steep.remember(y, call.instead, ledger, call.row)
    return y


class _Coded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, call: _Call) -> Tensor:
        plan, ledger, inverse = call.plan, call.ledger, call.inverse
        name, layout = plan.activation.name, ops.Layout.of(x)
        codes: Tensor | None
        flag: Tensor | None = None
        if call.fused is not None:
            with ops.unnoticed():
                y, codes, flag = call.fused()
        else:
            y = _checked(name, x, call.run)
            if inverse is None:
                codes, flag = plan.encode(x)
            else:
                with ops.unnoticed():
                    codes = ops.encode(x, 1, inverse.side) if inverse.bits else None
        beside: list[Beside] = []
        if inverse is None:
            row = ledger.row(name, plan.bits, how=CODES, site=call.site)
            ctx.save_for_backward(codes)
            if call.around is not None and codes is not None:
                call.handover.packed = HandedCodes(codes, call.around)
        else:
            row = ledger.row(name, inverse.bits, how=OUTPUT, site=call.site)
            beside = [Beside(codes, inverse.slope, layout, layout, name, ledger.step)]
            beside[0].rely_on(y)
            ctx.save_for_backward(_NOTHING, codes)
            call.handover.packed = beside[0]
        call.row = row
        storage, never_kept = _count_original(row, call, x, y)
        ledger.stored(row, nbytes(codes) + nbytes(flag), never_kept=never_kept)
        if call.site is not None:
            treated = Verdict.CODES if inverse is None else Verdict.OUTPUT
            saved = [storage] if storage is not None else []
            ledger.watch(Watch(call.site, saved, y, treated, beside, row, node=ctx))
        ctx.plan, ctx.layout, ctx.inverse, ctx.step, ctx.flag = plan, layout, inverse, ledger.step, flag
        ctx.instead = call.instead
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return (_from_codes if ctx.inverse is None else _from_output)(ctx, grad), None


def _count_original(row: Row, call: _Call, x: Tensor, y: Tensor) -> tuple[StorageWeakRef | None, int]:
    """What stock would have kept: the storage by which is learned what others keep, and the bytes beside it."""
    primitives = call.primitives
    if primitives is None:
        return call.ledger.original(row, y if call.plan.activation.saves == "output" else x), 0
    if primitives.keeps_y:
        call.ledger.original(row, y)
    if not primitives.keeps_x:
        return StorageWeakRef(x.untyped_storage()), primitives.never_kept(x)
    return call.ledger.original(row, x), primitives.never_kept(x)


def _from_codes(ctx: Any, grad: Tensor) -> Tensor:
    plan, layout, flag = ctx.plan, ctx.layout, ctx.flag
    begin_backward(plan.activation.name, ctx.step)
    if ctx.instead.kept is not None:
        with torch._C.DisableTorchFunction(), torch.enable_grad():
            x = ctx.instead.kept.unpack().detach().requires_grad_()
            exact: Tensor = torch.autograd.grad(plan.function(x), x, grad)[0]
        return exact
    (codes,) = ctx.saved_tensors
    with torch._C.DisableTorchFunction():
        if _is_like(grad, layout):
            rows = plan.level_rows(ops.multiplied_in(layout.dtype, layout.device), layout.device)
            return flagged(ops.multiply(grad, codes, rows, plan.bits, layout), flag)
        rows = plan.level_rows(layout.dtype, layout.device)
        return _product(flagged(ops.decode(codes, rows, plan.bits, layout), flag), grad)


def _from_output(ctx: Any, grad: Tensor) -> Tensor:
    (output, packed), layout = ctx.saved_tensors, ctx.layout
    with torch._C.DisableTorchFunction():
        if _is_like(grad, layout):
            product: Tensor = ctx.inverse.product(grad, output, packed, layout)
            return product
        return _product(layout.like(ctx.inverse.slope(output, packed, layout)), grad)


def _is_like(grad: Tensor, layout: ops.Layout) -> bool:
    return grad.dtype == layout.dtype and not is_batched(grad)


def _product(slope: Tensor, grad: Tensor) -> Tensor:
    """In the input's dtype, whatever autocast made of the output."""
    return slope * grad if is_batched(grad) else slope.mul_(grad)


def is_batched(t: Tensor) -> bool:
    """Whether it stands for several, one of which a vmap is about to compute (`is_grads_batched=True`): no kernel of
    ours can read it, and nothing can be written in its place.
    """
    return bool(torch._C._functorch.is_batchedtensor(t) or torch._C._functorch.is_legacy_batchedtensor(t))


def _checked(name: str, x: Tensor, run: Callable[[], Tensor]) -> Tensor:
    """The result of a forward that must neither change its input nor return a part of it."""
    version = x._version
    y = run()  # grad mode is off inside a Function: nothing is recorded
    if x._version != version:
        raise FewbitError(f"{name} overwrites its input; what is run as one node must not.")
    if not isinstance(y, Tensor) or y.shape != x.shape:
        raise FewbitError(f"{name} must return one tensor of its input's shape to be run as one node.")
    if y.untyped_storage()._cdata == x.untyped_storage()._cdata:
        raise FewbitError(f"{name} returned its input, or a view of it; what is run as one node must return a new one.")
    return y.detach() if y._is_view() else y  # a view, made in a Function, could not be changed in place
