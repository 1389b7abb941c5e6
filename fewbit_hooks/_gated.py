"""Gated units in one kernel: NOTE [ Gated units ]. Serves `engine="fused"` alone.

NOTE [ Gated units ]

In `down(act(gate(x)) * up(x))` the product is a call of its own. To a mode it comes too late: the activation has
returned by then, and its result could have gone anywhere. But where the source of a module's forward is this one
expression, nobody but the product sees it. So `forward` of such classes is replaced, once, by a function that inside a
scope with `engine="fused"` makes the four calls itself, the product by one kernel of `ops/_triton_gated.py`; outside,
and wherever anything is unlike what is expected, the original runs.

1. The classes are those of transformers, among the modules already imported. It is their source that is compared, as a
   syntax tree, not their names: one that another version writes in another way is left alone.
2. Which activation it is, is seen when the module that computes it is called on one number. So that must be one of
   torch's or transformers' own, which have no memory and draw nothing; and without hooks or a `forward` of its own.
3. One node keeps the gate and `up`, as they are. The activation's result, which PyTorch's product keeps beside them, is
   never kept; it is computed again by the backward kernel. Gradients are exact but for the kernels' last places.
4. The gate must be dense: halves of one projection, as `chunk` makes them, are not.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import _fused, _one_node, _policy, _stack, ops
from ._calls import RECOGNISED, Call
from ._composites import in_globals_of
from ._imported import Imported
from ._ledger import RECOMPUTED, Step
from ._plan import Plan
from ._policy import Keep


class Unit(NamedTuple):
    """The names of a gated unit's four modules."""

    gate: str
    act: str
    up: str
    down: str


def unit_of(forward: Callable[..., Any]) -> Unit | None:
    """The names in a forward that is a gated unit and nothing else; None where it is not, or its source is not there.

    >>> from transformers.models.llama.modeling_llama import LlamaMLP
    >>> unit_of(inspect.unwrap(LlamaMLP.forward))  # as it is in the source: it may have been replaced by now
    Unit(gate='gate_proj', act='act_fn', up='up_proj', down='down_proj')
    """
    code = getattr(forward, "__code__", None)
    if code is None or len(code.co_names) != 4 or code.co_argcount != 2 or code.co_freevars:
        return None  # reading the source takes longer than all else
    try:
        (function,) = ast.parse(textwrap.dedent(inspect.getsource(forward))).body
    except (OSError, TypeError, SyntaxError):
        return None
    match function:
        case ast.FunctionDef(args=ast.arguments(args=[ast.arg(me), ast.arg(x)]), body=body, decorator_list=[]):
            pass
        case _:
            return None
    match [statement for statement in body if not _is_docstring(statement)]:
        case [ast.Return(value=value)]:
            pass
        case [ast.Assign(targets=[ast.Name(name)], value=value), ast.Return(value=ast.Name(returned))]:
            if name != returned:
                return None
        case _:
            return None
    match value:
        case ast.Call(
            func=ast.Attribute(ast.Name(me_1), down),
            args=[
                ast.BinOp(
                    left=ast.Call(
                        func=ast.Attribute(ast.Name(me_2), act),
                        args=[ast.Call(func=ast.Attribute(ast.Name(me_3), gate), args=[ast.Name(x_1)], keywords=[])],
                        keywords=[],
                    ),
                    op=ast.Mult(),
                    right=ast.Call(func=ast.Attribute(ast.Name(me_4), up), args=[ast.Name(x_2)], keywords=[]),
                )
            ],
            keywords=[],
        ) if {me_1, me_2, me_3, me_4} == {me} and {x_1, x_2} == {x}:
            return Unit(gate, act, up, down)
    return None


def _is_docstring(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _replace_in(name: str, module: ModuleType) -> None:
    if ".modeling_" not in name:
        return
    for cls in list(vars(module).values()):
        if inspect.isclass(cls) and issubclass(cls, nn.Module) and cls.__module__ == name and "forward" in vars(cls):
            unit = unit_of(cls.forward)
            if unit is not None:
                cls.forward = _run_or_leave(cls.forward, unit)


find_gated = Imported(("transformers.models.",), _replace_in)


def _run_or_leave(forward: Any, unit: Unit) -> FunctionType:
    """What takes the place of a class's forward."""
    thread, acting, run, fuses = _stack.this_thread, _stack.acting, _run, _fuses
    is_compiling = torch.compiler.is_compiling

    def run_or_leave(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # outside of any scope the first is all that it costs
        if thread.acting is None or is_compiling() or kwargs or len(args) != 1 or not fuses(acting()):
            return forward(self, *args, **kwargs)
        return run(acting(), unit, forward, self, args[0])

    return cast(FunctionType, functools.wraps(forward)(in_globals_of(forward, cast(FunctionType, run_or_leave))))


def _fuses(entry: Any) -> bool:
    """Whether products are made in one kernel."""
    if not isinstance(entry, _stack.Entry) or not entry.by_kernels or not torch.is_grad_enabled():
        return False
    settings = entry.scope._settings
    return settings.bits is not None and not settings.exact


def _run(entry: _stack.Entry, unit: Unit, forward: Any, module: nn.Module, x: Any) -> Any:
    exclude = entry.scope._settings.exclude
    # a checkpoint, say, must see the same saved tensors in the same order when it runs again: look before any is made
    if not isinstance(x, Tensor) or _policy.obstacle(x, entry.hooks) or (exclude and exclude.here()):
        return forward(module, x)
    act = getattr(module, unit.act)
    seen = _seen_in(act)
    if seen is None:
        return forward(module, x)
    gate = getattr(module, unit.gate)(x)
    plan, kernels = _plan_and_kernels(entry, *seen, gate)
    if plan is None or kernels is None:  # in the original's order
        return getattr(module, unit.down)(act(gate) * getattr(module, unit.up)(x))
    up = getattr(module, unit.up)(x)
    product = _product(entry, plan, kernels, gate, up) if _are_alike(gate, up) else act(gate) * up
    return getattr(module, unit.down)(product)


_KNOWN = ("torch.nn.modules.activation", "transformers.activations")


class _Watching(TorchFunctionMode):
    """Remembers the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = func(*args, **(kwargs or {}))
        self.seen.append((func, args, kwargs or {}, y))
        return y


def _seen_in(act: Any) -> tuple[Call, Any, tuple[Any, ...], dict[str, Any]] | None:
    """The one call that an activation's module makes, and its arguments; None where more happens."""
    if not isinstance(act, nn.Module) or type(act).__module__ not in _KNOWN or isinstance(act, nn.RReLU):
        return None
    if (
        "forward" in act.__dict__
        or act._forward_hooks
        or act._forward_pre_hooks
        or act._backward_hooks
        or act._backward_pre_hooks
        or nn.modules.module._has_any_global_hook()
    ):
        return None
    number, watching = torch.zeros(1, device="cpu"), _Watching()
    try:
        with _stack.hidden(), torch.no_grad(), watching:
            y = act(number)
    except Exception:  # the original raises it, with a better message
        return None
    if len(watching.seen) != 1:
        return None
    func, args, kwargs, result = watching.seen[0]
    call = RECOGNISED.get(func)
    if result is not y or call is None or call.activation is None:  # the latter of a mask's calls
        return None
    return call, func, args, kwargs


def _plan_and_kernels(
    entry: _stack.Entry, call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], gate: Any
) -> tuple[Plan | None, ModuleType | None]:
    """What act(gate) * up is made with; None where it must be made another way."""
    settings = entry.scope._settings
    if type(gate) is not Tensor or not gate.requires_grad or _policy.unfit(gate):
        return None, None
    if gate.nbytes < max(settings.min_bytes, 1):
        return None, None
    try:
        plan = _policy.make_plan(settings, call, func, args, kwargs, gate)
    except Keep:
        return None, None
    return plan, _fused.kernels_for(plan, gate) and ops.gated_backend(gate.device).kernels


def _are_alike(gate: Tensor, up: Any) -> bool:
    return (
        type(up) is Tensor
        and (gate.shape, gate.stride(), gate.dtype, gate.device) == (up.shape, up.stride(), up.dtype, up.device)
    )  # fmt: skip


def _product(entry: _stack.Entry, plan: Plan, kernels: ModuleType, gate: Tensor, up: Tensor) -> Tensor:
    """act(gate) * up as one node."""
    ledger = entry.scope._ledger
    row = ledger.row(plan.activation.name, 0, how=RECOMPUTED)
    # PyTorch's activation keeps its input, or its output, and the product keeps the output
    keeps_gate = plan.activation.saves != "output"
    if keeps_gate:
        ledger.original(row, gate)
    ledger.stored(row, 0 if keeps_gate else gate.nbytes, never_kept=gate.nbytes)
    y: Tensor = _Gated.apply(gate, up, plan, kernels, ledger.step)  # type: ignore[no-untyped-call]
    return y


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, plan: Plan, kernels: ModuleType, step: Step) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.plan, ctx.kernels, ctx.step = plan, kernels, step
        y: Tensor = kernels.forward(*_fused.formula_on(plan, gate), gate, up)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        plan, kernels = ctx.plan, ctx.kernels
        ctx.step.unpacked()
        gate, up = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: all that it takes is there
            d_gate, d_up = _with_graph(plan, gate, up, grad, ctx.needs_input_grad)
            return d_gate, d_up, None, None, None
        with torch._C.DisableTorchFunction():
            formula = _fused.formula_on(plan, gate)
            if _one_node.is_batched(grad):  # is_grads_batched=True: no kernel of ours can read it
                one = torch.ones_like(gate)
                slope, y = kernels.backward(*formula, one, gate, one)
                return grad * up * slope, grad * y, None, None, None
            d_gate, d_up = kernels.backward(*formula, grad, gate, up)
            return d_gate, d_up, None, None, None


def _with_graph(
    plan: Plan, gate: Tensor, up: Tensor, grad: Tensor, needed: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients that can be differentiated again, by PyTorch's own nodes."""
    with _stack.hidden():
        y = plan.function(gate) * up
        inputs = [t for t, n in zip((gate, up), needed, strict=False) if n]
        found = iter(torch.autograd.grad(y, inputs, grad, create_graph=True))
    return next(found) if needed[0] else None, next(found) if needed[1] else None
