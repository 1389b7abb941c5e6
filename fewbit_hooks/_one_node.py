"""One node in the place of many: what computes an activation from primitives, run as a whole.

Written in primitives, `gelu_new` saves four tensors of the activation's size. Run as one node it saves the codes of its
input, or, where another node keeps the output, at most one bit: NOTE [ Beside a kept output ] in `_inverse.py`. Its own
forward runs, unrecorded, so the result is bit for bit what it was and no formula is copied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from . import ops
from ._errors import FewbitError
from ._hooks import Beside, begin_backward, flagged, nbytes
from ._inverse import Inverse
from ._ledger import CODES, OUTPUT, Ledger
from ._plan import Plan
from ._sites import Site, Verdict, Watch


def run_coded(
    plan: Plan,
    ledger: Ledger,
    x: Tensor,
    run: Callable[[], Tensor],
    never_kept: int,
    site: Site | None = None,
    inverse: Inverse | None = None,
) -> Tensor:
    """Run an activation as one node that keeps the codes of its input, or the output and at most a bit.

    Args:
        plan: how the input is coded.
        run: the forward.
        never_kept: bytes that its primitives would have saved beside the input.
        site, inverse: as for `_hooks.PackHook`.
    """
    y: Tensor = _Coded.apply(x, plan, ledger, run, never_kept, inverse)  # type: ignore[no-untyped-call]
    if site is not None:
        beside = [] if inverse is None else [y.grad_fn.beside]  # type: ignore[union-attr]
        treated = Verdict.OUTPUT if beside else Verdict.CODES
        ledger.watch(Watch(site, [StorageWeakRef(x.untyped_storage())], y, treated, beside))
    return y


class _Coded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        plan: Plan,
        ledger: Ledger,
        run: Callable[[], Tensor],
        never_kept: int,
        inverse: Inverse | None,
    ) -> Tensor:
        name, layout = plan.activation.name, ops.Layout.of(x)
        y = _checked(name, x, run)
        codes: Tensor | None
        if inverse is None:
            row = ledger.row(name, plan.bits, how=CODES)
            codes = ops.encode(x, plan.bits, plan.coder(x.dtype, x.device))
            ctx.save_for_backward(codes)  # others' hooks are handed them
            ctx.beside, ctx.flag = None, plan.flag(x)
        else:
            row = ledger.row(name, inverse.bits, how=OUTPUT)
            codes = ops.encode(x, 1, inverse.side) if inverse.bits else None
            ctx.flag = None
            ctx.beside = Beside(codes, inverse.slope, layout, name, ledger.step)
            ctx.beside.rely_on(y)
        ledger.original(row, x)
        ledger.stored(row, nbytes(codes) + nbytes(ctx.flag), never_kept=never_kept)
        ctx.plan, ctx.layout, ctx.step = plan, layout, ledger.step
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        plan, layout = ctx.plan, ctx.layout
        if ctx.beside is not None:
            slope = ctx.beside.unpack()
        else:
            begin_backward(plan.activation.name, ctx.step)
            (codes,) = ctx.saved_tensors
            with torch._C.DisableTorchFunction():
                rows = plan.level_rows(layout.dtype, layout.device)
                slope = flagged(ops.decode(codes, rows, plan.bits, layout), ctx.flag)
        with torch._C.DisableTorchFunction():  # in the input's dtype, whatever autocast made of the output
            return slope.mul_(grad), None, None, None, None, None


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
