"""Activations under torch.compile: the same codes, in the compiled graph.

NOTE [ Codes in a compiled graph ]

Saved-tensor hooks break a graph that Dynamo traces, and what a compiled graph saves is its partitioner's choice. So
while a function is compiled, a recognised call becomes a `torch.autograd.Function` of plain torch operations, whose
forward returns the activation and saves its packed codes: a compiler fuses the coding into the activation's kernel, and
the graph saves the codes in the activation's place.

1. All that depends on the codebook is a constant of the graph: asked for once, when the graph is traced.
2. What the graph depends on beside that is guarded by Dynamo: the mode on the stack, the number of bits. A new scope
   with the same bits uses the same graph; other bits, or no scope, another one.
3. Only what is traced can be known: no call sites, so nothing is learned and nothing is counted; two-valued
   activations are left to the compiler, and so is all inside of a transform of torch.func.
4. A dropout's mask, which no compiler computes again as it is random, is packed to one bit, exactly: AOTAutograd makes
   a `native_dropout` of `F.dropout`, whose mask is a bool, and so does `Dropped`. A backend that runs what Dynamo
   traced as it is has another dropout; only under those that are known to be AOTAutograd's is a mask packed. Other
   masks, an argument or part of an attention, are left to the compiler.
5. Codes beside what is kept anyway would approximate for nothing. Only when the backward has been traced as far as the
   activation is it known what that reads of it; so under AOTAutograd the activation and its codes are both in what
   Dynamo traces, and `choose` takes one of them (`CodedOrNot`). Other backends have the codes (`Coded`). With
   `exact=True` there are none, and an output that the backward reads is computed again (`again`).

The operations are those of `_in_graph.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _policy
from ._calls import Call
from ._in_graph import UNCODED, Coded, CodedOrNot, Constants, Dropped, again, choose
from ._mask_calls import MaskCall
from ._policy import Settings

# under names of ours: `plainly` must name no module of torch
callback: Callable[[], Any] = torch._C._dynamo.eval_frame.get_eval_frame_callback
_set_callback: Callable[[Any], Any] = torch._C._dynamo.eval_frame.set_eval_frame
Handler = TypeVar("Handler", bound=Callable[..., Any])

AOT = frozenset({"aot_eager", "aot_eager_decomp_partition", "cudagraphs", "inductor"})
"""Backends that hand what Dynamo traced to AOTAutograd."""

traced = False
"""Whether a call was ever traced under a scope: then a scope that counts nothing need not be one that does nothing."""


class Coding(NamedTuple):
    """What a scope's settings say about a compiled graph.

    Attributes:
        bits: of an activation that is not named.
        named: of those that are.
        exact: nothing is approximated, but what can be computed again is not kept.
        masks: those of dropouts are packed.
        min_bytes: as the scope's.
    """

    bits: int | None
    named: tuple[tuple[str, int | None], ...]
    exact: bool
    masks: bool
    min_bytes: int


def plainly(call: functools.partial[Any]) -> Any:
    """Make a call that is not to be compiled.

    In a part of a compiled function that Dynamo leaves to Python it tries each function that is called there, ours
    among them, and takes for constant what they ask of torch's state. This one it does not, as it sees neither a tensor
    nor a module of torch in it: hence the partial.
    """
    compiles = callback()
    if compiles is None:
        return call()
    _set_callback(None)
    try:
        return call()
    finally:
        _set_callback(compiles)


def never_by_itself(function: Handler) -> Handler:
    """A decorator: Dynamo traces a function where it is called in what it traces, and not where Python calls it.

    A mode's handler is given the getters of a tensor's attributes, `Tensor.dtype.__get__`, made anew for each call.
    Dynamo guards them by their address: compiled by itself, the handler returned the dtype for the device.
    """
    frames: Any = torch._C._dynamo.eval_frame
    as_it_is = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.DEFAULT)
    frames.set_code_exec_strategy(function.__code__, as_it_is)
    return function


def is_exporting() -> bool:
    """Runs in Python, where it is traced: up to torch 2.11 Dynamo takes torch's own for true in whatever it traces."""
    return torch.compiler.is_exporting()


def coding(settings: Settings) -> Coding | None:
    """None where nothing is coded in compiled graphs: what goes by modules or tensors is not known there."""
    if settings.bits is None or settings.exclude.rules or callable(settings.bits):
        return None
    masks = settings.bits_for("dropout", None, exact=True) is not None
    if settings.exact or settings.codebooks:
        return _coding(None, (), settings.exact, masks, settings.min_bytes)
    bits = settings.bits if isinstance(settings.bits, Mapping) else {"default": settings.bits}
    named = tuple(sorted((name, of_it) for name, of_it in bits.items() if name != "default"))
    return _coding(bits.get("default"), named, False, masks, settings.min_bytes)


_coding = functools.cache(Coding)
"""One object for equal settings: Dynamo guards what is handed to `_constants` by its identity."""


def run(
    coding: Coding | None,
    call: Call,
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    composite: bool | None = None,
) -> Any:
    """Make a recognised call while it is traced. Dynamo reads this function, too: it must be plain.

    Args:
        composite: it is written in primitives, of which none is coded where the whole is not: which is not where this
            is False.
    """
    if coding is None or not torch.is_grad_enabled():
        return func(*args, **kwargs)
    if is_exporting():  # what is exported is the model, without the scope that it happens to be in
        return func(*args, **kwargs)
    if isinstance(call, MaskCall):
        return _run_dropout(coding, call, func, args, kwargs)
    if call.activation is None or call.activation.exact:
        return func(*args, **kwargs)
    x: Any = args[0] if args else kwargs.get("input", kwargs.get("self"))
    rest = {key: value for key, value in kwargs.items() if key not in ("input", "self")}
    constants = None
    if composite is not False and call.one_node is None:
        constants = _asked(coding, call, x, args[1:], rest)
    if constants is not None and not _traces_backward():
        if not constants[0]:
            return func(*args, **kwargs)
        return Coded.apply(x, func, args[1:], rest, constants)  # type: ignore[no-untyped-call]
    if composite is None and call.one_node is None:
        y = func(*args, **kwargs)
    else:
        with torch._C.DisableTorchFunction():  # a sigmoid in it is not the user's, to be coded by itself
            y = func(*args, **kwargs)
    if constants is None:
        return y
    if not constants[0]:
        return again(x, y)
    return CodedOrNot.apply(x, y, call.activation.saves != "output", constants)  # type: ignore[no-untyped-call]


def _asked(coding: Coding, call: Call, x: Any, more: tuple[Any, ...], rest: dict[str, Any]) -> Constants | None:
    """How the call is coded; None keeps it. Dynamo reads it.

    Args:
        x: the input.
        more, rest: the arguments after it, by place and by name.
    """
    if type(x) is not Tensor or not x.requires_grad:
        return None
    if torch.fx.experimental.symbolic_shapes.guard_or_false(x.numel() * x.element_size() < coding.min_bytes):
        return None  # a size that depends on data may be large
    for value in (*more, *rest.values()):
        if isinstance(value, Tensor):
            return None
    given = tuple([_constant(value) for value in more])
    named = tuple([(key, _constant(value)) for key, value in rest.items()])
    return _constants(call.name, call.names, call.inplace, coding, given, (*named, *call.fixed), str(x.dtype))


def _constant(value: Any) -> Any:
    """A number that Dynamo may have taken for one that changes; as a part of the codebook's key it is guarded."""
    if isinstance(value, (int, float)):
        return torch.fx.experimental.symbolic_shapes.guard_scalar(value)
    return value


def _constants(
    name: str,
    names: tuple[str, ...],
    inplace: bool,
    coding: Coding,
    rest: tuple[Any, ...],
    named: tuple[tuple[str, Any], ...],
    dtype: str,
) -> Constants | None:
    """Runs in Python, when the graph is traced: how the call is coded; None keeps it."""
    from ._activations import find
    from ._catalog import codebook
    from ._errors import FewbitError

    if _is_left_alone():
        return None
    activation = find(name)
    bits = dict(coding.named).get(name, coding.bits)
    given = {**dict(zip(names, rest, strict=False)), **dict(named)}
    if inplace or given.pop("inplace", False) or dtype not in {str(d) for d in _policy.DTYPES}:
        return None
    if coding.exact:
        return UNCODED if activation.saves == "input" else None
    if bits is None:
        return None
    try:
        parameters = activation.check(given)
        book = codebook(name, bits, weight=activation.weight, interval=activation.interval, **parameters)
    except FewbitError:
        return None
    return bits, tuple(book.boundaries.tolist()), tuple(book.levels.tolist()), book.folded


def _run_dropout(coding: Coding, call: MaskCall, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Make a call that saves a mask while it is traced: a dropout whose mask is packed, or the call as it is. Dynamo
    reads it."""
    given = dict(zip(call.names, args, strict=False), **kwargs)
    x, p = given.get("input"), given.get("p", 0.5)
    if not (coding.masks and call.plain) or given.get("inplace") or call.draws_nothing(given):
        return func(*args, **kwargs)
    if type(x) is not Tensor or not x.requires_grad or not isinstance(p, float):
        return func(*args, **kwargs)
    if torch.fx.experimental.symbolic_shapes.guard_or_false(x.numel() < coding.min_bytes):
        return func(*args, **kwargs)  # a bool takes a byte
    if not _packs_masks(str(x.dtype)):
        return func(*args, **kwargs)
    return Dropped.apply(x, p)  # type: ignore[no-untyped-call]


def _packs_masks(dtype: str) -> bool:
    """Runs in Python, when the graph is traced: whether a dropout's mask is packed here."""
    return dtype in {str(d) for d in _policy.DTYPES} and not _is_left_alone() and _backend() in AOT


def _traces_backward() -> bool:
    """Runs in Python, when the graph is traced: whether AOTAutograd will trace the backward, and make the choice."""
    if _backend() not in AOT:
        return False
    torch._dynamo.allow_in_graph(choose)
    torch._dynamo.allow_in_graph(again)
    return True


def _backend() -> str:
    """Runs in Python, when a graph is traced: the name of what will compile it; empty where that is not known."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        compiler: Any = InstructionTranslator.current_tx().output.compiler_fn
    except AttributeError:
        return ""
    compiler = getattr(getattr(compiler, "__self__", None), "backend_compile_fn", compiler)  # DDP's, which splits it
    return str(getattr(compiler, "_compiler_name", ""))


def _is_left_alone() -> bool:
    """Runs in Python, when a graph is traced: whether nothing is coded here, whatever the settings."""
    global traced
    traced = True
    if _are_others_hooks():
        return True
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return True  # what it differentiates may be a derivative
    # the same of a `torch.autograd.grad` in the graph, where nothing would say so
    return bool(getattr(torch._dynamo.config, "trace_autograd_ops", False))


def _are_others_hooks() -> bool:
    """Runs in Python, when a graph is traced, which is guarded by the answer: whether saved-tensor hooks, a
    checkpoint's say, were put inside the scope, which leaves what they lie around to them."""
    from torch._dynamo.guards import install_guard
    from torch._dynamo.source import GlobalStateSource

    found = _are_others_innermost()

    def create(builder: Any, guard: Any) -> None:
        said = [f"saved-tensor hooks inside the fewbit_hooks.scope: {found}"]
        builder.guard_manager.root.add_lambda_guard(lambda _: _are_others_innermost() == found, said, guard.user_stack)

    install_guard(GlobalStateSource().make_guard(create))
    return found


def _are_others_innermost() -> bool:
    from ._stack import active

    top, entry = torch._C._autograd._top_saved_tensors_default_hooks(True), active()  # while it is traced, too
    return top is not None and (entry is None or top[0] is not entry.hooks)


# What torch.compiler.assume_constant_result does; itself it would import all of Dynamo.
is_exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]
_constants._dynamo_marked_constant = True  # type: ignore[attr-defined]
_traces_backward._dynamo_marked_constant = True  # type: ignore[attr-defined]
_packs_masks._dynamo_marked_constant = True  # type: ignore[attr-defined]
