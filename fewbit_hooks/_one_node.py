"""One node in the place of many: what computes an activation or a norm from primitives, run as a whole.

Written in primitives, `gelu_new` saves four tensors of the activation's size, and an RMSNorm two and a half. Run as one
node it saves its input, or the codes of it. Its own forward runs, unrecorded, so the result is bit for bit what it was
and no formula is copied. In backward there are three ways to the gradient:

    codes           the level of each input's code, times the gradient
    the output      which another node keeps, and at most one bit: NOTE [ Beside a kept output ] in `_inverse.py`
    run again       the input is kept; the forward runs once more, recorded, and is differentiated: exact

An input that another node keeps anyway costs nothing; where it is run again from that, what is freed is all that the
primitives would have saved.

NOTE [ Each use of the input by itself ]

An input that has other consumers, the residual stream of a transformer, gets the gradients of all of them, added up as
the nodes are run: ((g + a) + b), where the primitives of a norm use it twice. One node that returned a + b would give
g + (a + b), which differs in the last bit. So the node has several edges to its input, and what each use contributes is
returned by itself, in the order in which stock autograd would have it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.hooks import RemovableHandle

from . import ops
from ._errors import FewbitError
from ._hooks import Beside, begin_backward
from ._inverse import Inverse
from ._ledger import CODES, OUTPUT, RECOMPUTED, Ledger, Step
from ._plan import Plan
from ._replay import Autocast, replay
from ._sites import Site, Verdict, Watch

Forward = Callable[..., Tensor]

EDGES = 8
"""To the input of a node that is run again. FastGELU uses its input four times; what more uses give is added up."""


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
        treated = Verdict.CODES if inverse is None else Verdict.OUTPUT
        ledger.watch(Watch(site, [StorageWeakRef(x.untyped_storage())], y, treated))
    return y


def run_again(
    name: str,
    ledger: Ledger,
    forward: Forward,
    x: Tensor,
    parameters: list[Tensor],
    never_kept: int,
    keeps_x: bool = True,
) -> Tensor:
    """Run `forward(x, *parameters)` as one node that keeps its arguments, and runs it again to differentiate it.

    Args:
        never_kept: bytes that its primitives would have saved beside the input and the parameters.
        keeps_x: they would have saved the input, too.
    """
    row = ledger.row(name, 0, how=RECOMPUTED)
    if keeps_x:
        ledger.original(row, x)
    ledger.stored(row, 0 if keeps_x else x.nbytes, never_kept=never_kept)
    y: Tensor = _Again.apply(name, forward, ledger.step, *[x] * EDGES, *parameters)  # type: ignore[no-untyped-call]
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
            ctx.beside = None
        else:
            row = ledger.row(name, inverse.bits, how=OUTPUT)
            codes = ops.encode(x, 1, inverse.side) if inverse.bits else None
            ctx.beside = Beside(codes, inverse.slopes, layout, name, ledger.step)
            ctx.beside.rely_on(y)
        ledger.original(row, x)
        ledger.stored(row, codes.nbytes if codes is not None else 0, never_kept=never_kept)
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
                slope = ops.decode(codes, plan.level_rows(layout.dtype, layout.device), plan.bits, layout)
        with torch._C.DisableTorchFunction():  # in the input's dtype, whatever autocast made of the output
            return slope.mul_(grad), None, None, None, None, None


class _Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, forward: Forward, step: Step, x: Tensor, *others: Tensor) -> Tensor:
        parameters = others[EDGES - 1 :]
        y = _checked(name, x, lambda: forward(x, *parameters))
        ctx.save_for_backward(x, *parameters)  # autograd checks their versions, and hands them to others' hooks
        ctx.rerun, ctx.step, ctx.autocast = forward, step, Autocast.of(x.device.type)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        twice = torch.is_grad_enabled()  # create_graph=True: what is computed here is differentiated in its turn
        if not ctx.step.backward_began:
            ctx.step.begin_backward()
        needed = ctx.needs_input_grad[2 + EDGES :]
        with replay(ctx.autocast, grad=True):
            if twice:
                tensors = [t.view_as(t) for t in ctx.saved_tensors]
            else:
                tensors = [t.detach().requires_grad_(n) for t, n in zip(ctx.saved_tensors, needed, strict=True)]
            y: Tensor = ctx.rerun(*tensors)
            inputs = [t for t, n in zip(tensors, needed, strict=True) if n]
            with _each_use(y, tensors) as uses:
                found = list(torch.autograd.grad(y, inputs, grad, create_graph=twice, allow_unused=True))
        whole = found.pop(0) if needed[0] else None
        rest = iter(found)
        of_x = uses if whole is not None and len(uses) <= EDGES else [whole]
        of_x = of_x + [None] * (EDGES - len(of_x))
        return None, None, None, *of_x, *(next(rest) if n else None for n in needed[1:])


@contextlib.contextmanager
def _each_use(y: Tensor, tensors: list[Tensor]) -> Iterator[list[Tensor | None]]:
    """What each use of the first of the tensors contributes to its gradient, when `y` is differentiated."""
    uses: list[Tensor | None] = []
    ends = [get_gradient_edge(t) for t in tensors if t.requires_grad]
    x = ends[0] if tensors[0].requires_grad else None
    handles: list[RemovableHandle] = []
    nodes, seen = [y.grad_fn], {None, *(end.node for end in ends)}
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        following = node.next_functions
        where = [i for i, (other, _) in enumerate(following) if x is not None and other is x.node]
        if where:

            def listen(grads: Any, _: Any, where: list[int] = where) -> None:
                uses.extend(grads[i] for i in where if grads[i] is not None)

            handles.append(node.register_hook(listen))
        nodes.extend(other for other, _ in following)
    try:
        yield uses
    finally:
        for handle in handles:
            handle.remove()


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
