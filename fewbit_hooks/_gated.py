"""Gated units in one kernel: NOTE [ Gated units ]. Serves `engine="fused"` alone.

NOTE [ Gated units ]

In `down(act(gate(x)) * up(x))` the product is a call of its own. To a mode it comes too late: the activation has
returned by then, and its result could have gone anywhere. But where the source of a module's forward is this and
nothing else, nobody but the product sees it. So `forward` of such classes is replaced, once, by a function that inside
a scope with `engine="fused"` makes the calls itself, the product by one kernel of `ops/_triton_gated.py`; outside, and
wherever anything is unlike what is expected, the original runs.

1. The classes are those of transformers, among the modules already imported. It is their source that is compared, as a
   syntax tree, with `FORMS`; what its attributes and variables are called does not matter, nor what the class is. One
   that another version writes in another way is left alone.
2. Which activation it is, is seen when the module that computes it is called on one number. So that must be one of
   torch's or transformers' own, which have no memory and draw nothing; and without hooks or a `forward` of its own.
3. One node keeps the gate and `up`, as they are. The activation's result, which PyTorch's product keeps beside them, is
   never kept; it is computed again by the backward kernel. Gradients are exact but for the kernels' last places.
4. Gate and `up` may be the halves of one projection's result. The kernels read them where they lie, and write one
   gradient, so that it need not be put together of two.
"""

from __future__ import annotations

import ast
import functools
import inspect
import operator
import textwrap
import weakref
from collections.abc import Callable
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import _fused, _one_node, _policy, _stack, ops
from ._calls import RECOGNISED, Call
from ._composites import in_place_of
from ._imported import Imported
from ._ledger import RECOMPUTED, Step
from ._modules import has_hooks
from ._plan import Plan
from ._policy import Keep


class Unit(NamedTuple):
    """A gated unit: the names of its modules.

    Attributes:
        act: the activation.
        down: what takes the product, one after the other.
        gate, up: what make the two factors, of the input; or
        both: what makes them as the halves of one tensor.
        gate_first: the gate is the first half.
    """

    act: str
    down: tuple[str, ...]
    gate: str = ""
    up: str = ""
    both: str = ""
    gate_first: bool = True


class Form(NamedTuple):
    """A forward that is a gated unit, but for the names. Those of modules are `Unit`'s; `drop` is one before `down`."""

    source: str
    gate_first: bool = True


FORMS = (
    Form("return self.down(self.act(self.gate(x)) * self.up(x))"),  # Qwen2.5-VL
    Form("""
        y = self.down(self.act(self.gate(x)) * self.up(x))
        return y
    """),  # Llama, and most others
    Form("""
        y = self.act(self.gate(x)) * self.up(x)
        y = self.drop(y)
        z = self.down(y)
        return z
    """),  # T5Gemma
    Form("""
        y = self.both(x)
        gate, y = y.chunk(2, dim=-1)
        y = y * self.act(gate)
        return self.down(y)
    """),  # Phi-3, GLM
    Form("""
        x = self.both(x)
        y = x.chunk(2, dim=-1)
        x = self.act(y[0]) * y[1]
        x = self.down(x)
        return x
    """),  # the experts of Granite's mixtures
    Form("""
        gate, up = self.both(x).chunk(2, dim=-1)
        return self.down(self.drop(self.act(gate) * up))
    """),  # ModernBERT
    Form(
        """
        x = self.both(x)
        x, gate = x.chunk(2, dim=-1)
        x = self.act(gate) * x
        x = self.down(x)
        return x
        """,
        gate_first=False,
    ),  # Moonshine
)


def unit_of(forward: Callable[..., Any]) -> Unit | None:
    """The names in a forward that is a gated unit and nothing else; None where it is not, or its source is not there.

    >>> from transformers.models.llama.modeling_llama import LlamaMLP
    >>> unit = unit_of(inspect.unwrap(LlamaMLP.forward))  # as it is in the source: it may have been replaced by now
    >>> unit.gate, unit.act, unit.up, unit.down
    ('gate_proj', 'act_fn', 'up_proj', ('down_proj',))
    """
    code = getattr(forward, "__code__", None)
    if code is None or code.co_argcount != 2 or code.co_freevars or len(code.co_names) not in (4, 5):
        return None  # reading the source takes longer than all else
    try:
        tree = _function(inspect.getsource(forward))
    except (OSError, TypeError, SyntaxError):
        return None
    for form, known in _trees():
        names: dict[str, str] = {}
        if tree is not None and _is(tree, known, names):
            found = {name[1:]: mine[1:] for name, mine in names.items() if name[0] == "."}
            down = tuple(found.pop(name) for name in ("drop", "down") if name in found)
            return Unit(down=down, gate_first=form.gate_first, **found)
    return None


@functools.cache
def _trees() -> list[tuple[Form, ast.FunctionDef | None]]:
    forward = "def forward(self, x):\n"
    return [(form, _function(forward + textwrap.indent(textwrap.dedent(form.source).strip(), " "))) for form in FORMS]


def _function(source: str) -> ast.FunctionDef | None:
    """A function of two arguments, without its docstring and annotations."""
    match ast.parse(textwrap.dedent(source)).body:  # Python 3.13 may give another source for what exec made
        case [
            ast.FunctionDef(
                args=ast.arguments(
                    posonlyargs=[], args=[ast.arg(), ast.arg()], vararg=None, kwonlyargs=[], kwarg=None, defaults=[]
                ),
                decorator_list=[],
            ) as function
        ]:
            if ast.get_docstring(function, clean=False) is not None:
                del function.body[0]
            function.returns, function.name = None, "forward"
            for arg in function.args.args:
                arg.annotation = None
            return function
    return None


def _is(node: Any, form: Any, names: dict[str, str]) -> bool:
    """Whether a tree is a form's, but for the names.

    Args:
        names: what the form's names are here, to be filled in: those of variables, and, with a dot, those of `self`'s
            attributes. Two of the form's are two here.
    """
    if type(node) is not type(form):
        return False
    if isinstance(form, list):
        return len(node) == len(form) and all(_is(n, f, names) for n, f in zip(node, form, strict=True))
    match form:
        case ast.Name(id=its) | ast.arg(arg=its):
            return _stands_for(getattr(node, "id", getattr(node, "arg", "")), its, names)
        case ast.Attribute(value=ast.Name(id="self"), attr=its):
            return _is(node.value, form.value, names) and _stands_for(f".{node.attr}", f".{its}", names)
        case ast.AST():
            return all(_is(getattr(node, field), getattr(form, field), names) for field in form._fields)
    return bool(node == form)


def _stands_for(mine: str, its: str, names: dict[str, str]) -> bool:
    if its not in names and mine not in names.values():
        names[its] = mine
    return names.get(its) == mine


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

    return in_place_of(forward, cast(FunctionType, run_or_leave))


def _fuses(entry: Any) -> bool:
    """Whether products are made in one kernel."""
    if not isinstance(entry, _stack.Entry) or not entry.by_kernels or not torch.is_grad_enabled():
        return False
    settings = entry.scope._settings
    return settings.bits is not None and not settings.exact


def _run(entry: _stack.Entry, unit: Unit, forward: Any, module: nn.Module, x: Any) -> Any:
    exclude = entry.scope._settings.exclude
    # a checkpoint, say, must see the same saved tensors in the same order when it runs again: look before any is made
    if (
        not isinstance(x, Tensor)
        or _policy.obstacle(x, entry.hooks)
        or (exclude.rules and exclude.here())
        or _stack.others_see()
        or ops.results_may_change()
        or ops.gated_backend(x.device).kernels is None
    ):
        return forward(module, x)
    act = getattr(module, unit.act)
    seen = _seen_in(act)
    if seen is None:
        return forward(module, x)
    first = getattr(module, unit.both or unit.gate)(x)
    plan, kernels = _plan_and_kernels(entry, *seen, first, unit)
    if plan is None or kernels is None:  # in the original's order
        y = _two_calls(act, first, unit) if unit.both else act(first) * getattr(module, unit.up)(x)
    elif unit.both:
        y = _product(entry, plan, kernels, unit.gate_first, first)
    else:
        up = getattr(module, unit.up)(x)
        y = _product(entry, plan, kernels, True, first, up) if _are_alike(first, up) else act(first) * up
    for name in unit.down:
        y = getattr(module, name)(y)
    return y


def _two_calls(act: Any, both: Any, unit: Unit) -> Any:
    gate, up = _factors((both,), unit.gate_first)
    return act(gate) * up


def _factors(parts: tuple[Tensor, ...], gate_first: bool) -> tuple[Tensor, Tensor]:
    """Gate and up, of themselves or of the tensor of which they are the halves."""
    first, second = parts if len(parts) == 2 else parts[0].chunk(2, dim=-1)
    return (first, second) if gate_first else (second, first)


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


Seen: TypeAlias = tuple[Call, Any, tuple[Any, ...], dict[str, Any]]
"""A recognised call, the function and its arguments."""

_seen: weakref.WeakKeyDictionary[nn.Module, tuple[list[Any], Seen | None]] = weakref.WeakKeyDictionary()
_PLAIN = (int, float, str, type(None), FunctionType, BuiltinFunctionType)  # what does not refer to the module


def _seen_in(act: Any) -> Seen | None:
    """The one call that an activation's module makes, and its arguments; None where more happens."""
    if not isinstance(act, nn.Module) or type(act).__module__ not in _KNOWN or isinstance(act, nn.RReLU):
        return None
    if "forward" in act.__dict__ or has_hooks(act):
        return None
    state = [value for name, value in act.__dict__.items() if not name.startswith("_")]
    known = _seen.get(act)
    if known is not None and len(state) == len(known[0]) and all(map(operator.is_, state, known[0])):
        return known[1]
    seen = _look_into(act)
    inside = (*act._modules, *act._parameters, *act._buffers)
    if not inside and all(isinstance(value, _PLAIN) for value in state):  # until one is set it computes what it did
        _seen[act] = state, seen
    return seen


def _look_into(act: nn.Module) -> Seen | None:
    number, watching = torch.zeros(1, device="cpu"), _Watching()
    try:
        with _stack.hidden(), ops.unseen(), torch._C._EnableTorchFunction(), torch.no_grad(), watching:
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
    entry: _stack.Entry, call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], first: Any, unit: Unit
) -> tuple[Plan | None, ModuleType | None]:
    """What act(gate) * up is made with, of the gate or of both; None where it must be made another way."""
    settings = entry.scope._settings
    if type(first) is not Tensor or not first.requires_grad or first.is_neg() or _policy.unfit(first):
        return None, None
    with torch._C.DisableTorchFunction():
        gate = first
        if unit.both:
            if not first.dim() or not first.is_contiguous() or first.shape[-1] % 16:  # rows of whole groups
                return None, None
            if first.numel() >= 1 << 36:  # whose groups the kernels do not count in 32 bits
                return None, None
            gate, _ = _factors((first,), unit.gate_first)
        if gate.numel() * gate.element_size() < max(settings.min_bytes, 1):
            return None, None
    try:
        plan = _policy.make_plan(settings, call, func, args, kwargs, gate)
    except Keep:
        return None, None
    return plan, _fused.kernels_for(plan, first) and ops.gated_backend(first.device).kernels


def _are_alike(gate: Tensor, up: Any) -> bool:
    return (
        type(up) is Tensor
        and not up.is_neg()
        and (gate.shape, gate.stride(), gate.dtype, gate.device) == (up.shape, up.stride(), up.dtype, up.device)
    )  # fmt: skip


def _product(entry: _stack.Entry, plan: Plan, kernels: ModuleType, gate_first: bool, *parts: Tensor) -> Tensor:
    """act(gate) * up as one node."""
    ledger, first = entry.scope._ledger, parts[0]
    row = ledger.row(plan.activation.name, 0, how=RECOMPUTED)
    # PyTorch's activation keeps its input, or its output, and the product keeps the output, and up
    keeps_first = plan.activation.saves != "output" or len(parts) == 1
    if keeps_first:
        ledger.original(row, first)
    never_kept = first.nbytes * len(parts) // 2
    ledger.stored(row, 0 if keeps_first else first.nbytes, never_kept=never_kept)
    with ops.unnoticed():  # or the modes would see each attribute that is read, and each buffer made
        y: Tensor = _Gated.apply(plan, kernels, ledger.step, gate_first, *parts)  # type: ignore[no-untyped-call]
    return y


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, kernels: ModuleType, step: Step, gate_first: bool, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(*parts)
        ctx.plan, ctx.kernels, ctx.step, ctx.gate_first = plan, kernels, step, gate_first
        ctx.layout = ops.Layout.of(parts[0])
        gate, up = _factors(parts, gate_first)
        y: Tensor = kernels.forward(*_fused.formula_on(plan, gate), gate, up)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.step.unpacked()
        parts = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: all that it takes is there
            return (None,) * 4 + _with_graph(ctx, parts, grad)
        with torch._C.DisableTorchFunction():
            parts = tuple(ctx.layout.like(part) for part in parts)  # others' hooks may have laid them otherwise
            if not _one_node.is_batched(grad):
                return (None,) * 4 + _gradients(ctx, parts, grad)
            one = torch.ones_like(_factors(parts, ctx.gate_first)[0])  # no kernel of ours can read several
            slopes = _gradients(ctx, parts, one)
            grads = (torch.cat((grad, grad), -1),) if len(parts) == 1 else (grad, grad)
            return (None,) * 4 + tuple(g * slope for g, slope in zip(grads, slopes, strict=True))


def _gradients(ctx: Any, parts: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, ...]:
    gate, up = _factors(parts, ctx.gate_first)
    gradients = tuple(ctx.layout.empty() for _ in parts)
    ctx.kernels.backward(*_fused.formula_on(ctx.plan, gate), grad, gate, up, _factors(gradients, ctx.gate_first))
    return gradients


def _with_graph(ctx: Any, parts: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients that can be differentiated again, by PyTorch's own nodes."""
    needed = ctx.needs_input_grad[4:]
    with _stack.hidden():
        gate, up = _factors(parts, ctx.gate_first)
        y = ctx.plan.function(gate) * up
        inputs = [part for part, n in zip(parts, needed, strict=True) if n]
        found = iter(torch.autograd.grad(y, inputs, grad, create_graph=True))
    return tuple(next(found) if n else None for n in needed)
