"""Activations under torch.compile: the same codes, in the compiled graph.

NOTE [ Codes in a compiled graph ]

Saved-tensor hooks break a graph that Dynamo traces, and what a compiled graph saves is its partitioner's choice. So
while a function is compiled, a recognised call becomes a `torch.autograd.Function` of plain torch operations, whose
forward returns the activation and saves its packed codes: a compiler fuses the coding into the activation's kernel, and
the graph saves the codes in the activation's place (or, where it keeps that anyway, computes them again).

1. All that depends on the codebook is a constant of the graph: asked for once, when the graph is traced.
2. What the graph depends on beside that is guarded by Dynamo: the mode on the stack, the number of bits. A new scope
   with the same bits uses the same graph; other bits, or no scope, another one.
3. Only what is traced can be known: no call sites, so nothing is learned and nothing is counted; two-valued
   activations and masks are left to the compiler, and so is all inside of a transform of torch.func.

NOTE [ Eighths ]

A compiler makes a loop over each tensor that it writes, and its loops are vectors where they read neighbours and write
neighbours. Eight neighbouring codes in a word, the layout of `ops/_torch.py`, are not that. So here the eight codes
that share bytes are those at one place of each eighth of the tensor, and each byte of a word is a tensor of its own:

    element            i  of n/8   n/8 + i    2n/8 + i   ..  7n/8 + i
    bits of a word     0 .. b-1    b .. 2b-1  2b .. 3b-1     7b .. 8b-1
    packed[k, i]       bits 8k .. 8k+7 of word i

Nothing but the bytes is written in forward, and nothing but the gradient in backward: codes are computed where they are
used, one in four of them twice.

(measured, CPU, one thread, Inductor, gelu, forward and backward, ratio to stock compiled, float32 and bfloat16) 2**24
elements, 3 bits: 0.93 and 1.10. 2**20 elements, 3 bits: 0.98 and 1.03; 4 bits: 1.36 and 1.26; 8 bits: 1.39 and 2.11.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from . import _policy
from ._calls import Call
from ._policy import Settings
from .ops import Thresholds

COMPARED = 3
"""Bits up to which an input's code is found by comparisons in the kernel; with more it is looked up (NOTE [ Sixteen
bits decide the code ] in `_float16.py`), which Inductor does for one element after the other."""
COMPARED_AT_MOST = 6
"""The same where it cannot be looked up, in float64; with more it is bucketized, which takes longest."""
SELECTED = 4
"""Bits up to which a code's level is selected by comparisons; with more it is looked up."""

# under names of ours: `plainly` must name no module of torch
callback: Callable[[], Any] = torch._C._dynamo.eval_frame.get_eval_frame_callback
_set_callback: Callable[[Any], Any] = torch._C._dynamo.eval_frame.set_eval_frame
Handler = TypeVar("Handler", bound=Callable[..., Any])
Constants = tuple[int, tuple[float, ...], tuple[float, ...], bool]
"""Bits, boundaries, levels, folded."""

traced = False
"""Whether a call was ever traced under a scope: then a scope that counts nothing need not be one that does nothing."""


class Coding(NamedTuple):
    """What a scope's settings say about a compiled graph.

    Attributes:
        bits: of an activation that is not named.
        named: of those that are.
        min_bytes: as the scope's.
    """

    bits: int | None
    named: tuple[tuple[str, int | None], ...]
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
    """None where nothing is coded in compiled graphs: exact, or what goes by modules, tensors or given codebooks."""
    by_module_or_tensor = settings.exclude.rules or callable(settings.bits)
    if settings.exact or by_module_or_tensor or settings.codebooks or settings.bits is None:
        return None
    if isinstance(settings.bits, Mapping):
        named = tuple(sorted((name, bits) for name, bits in settings.bits.items() if name != "default"))
        return _coding(settings.bits.get("default"), named, settings.min_bytes)
    return _coding(settings.bits, (), settings.min_bytes)


@functools.cache
def _coding(bits: int | None, named: tuple[tuple[str, int | None], ...], min_bytes: int) -> Coding:
    """One object for equal settings: Dynamo guards what is handed to `_constants` by its identity."""
    return Coding(bits, named, min_bytes)


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
    if coding is None or call.activation is None or call.activation.exact or not torch.is_grad_enabled():
        return func(*args, **kwargs)
    if is_exporting():  # what is exported is the model, without the scope that it happens to be in
        return func(*args, **kwargs)
    x = args[0] if args else kwargs.get("input", kwargs.get("self"))
    rest = {key: value for key, value in kwargs.items() if key not in ("input", "self")}
    constants = None
    if composite is not False and call.one_node is None:
        constants = _asked(coding, call, x, args[1:], rest)
    if constants is not None:
        return _Coded.apply(x, func, args[1:], rest, constants)  # type: ignore[no-untyped-call]
    if composite is None and call.one_node is None:
        return func(*args, **kwargs)
    with torch._C.DisableTorchFunction():  # a sigmoid in it is not the user's, to be coded by itself
        return func(*args, **kwargs)


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
    global traced
    from ._activations import find
    from ._catalog import codebook
    from ._errors import FewbitError

    traced = True
    if _are_others_hooks():
        return None
    activation = find(name)
    bits = dict(coding.named).get(name, coding.bits)
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return None  # what it differentiates may be a derivative
    if getattr(torch._dynamo.config, "trace_autograd_ops", False):
        return None  # the same of a `torch.autograd.grad` in the graph, where nothing would say so
    given = {**dict(zip(names, rest, strict=False)), **dict(named)}
    if bits is None or inplace or given.pop("inplace", False):
        return None
    if dtype not in {str(d) for d in _policy.DTYPES}:
        return None
    try:
        parameters = activation.check(given)
        book = codebook(name, bits, weight=activation.weight, interval=activation.interval, **parameters)
    except FewbitError:
        return None
    return bits, tuple(book.boundaries.tolist()), tuple(book.levels.tolist()), book.folded


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


class _Coded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, func: Any, rest: tuple[Any, ...], named: dict[str, Any], constants: Constants
    ) -> Tensor:
        y: Tensor = func(x, *rest, **named)
        bits, boundaries, _, folded = constants
        ctx.save_for_backward(*pack_bits(encode(x, boundaries, folded), bits))
        ctx.constants = constants
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        bits, _, levels, _ = ctx.constants
        return multiply(grad, ctx.saved_tensors, bits, levels), None, None, None, None


def encode(x: Tensor, boundaries: tuple[float, ...], folded: bool) -> Tensor:
    """Code i where boundaries[i-1] < x <= boundaries[i]; int32, of the shape of `x`."""
    if len(boundaries) >= 1 << COMPARED:
        found = _lookup(boundaries, folded, str(x.dtype), str(x.device))
        if found is not None:
            name, scale = found
            if x.dtype != torch.bfloat16:
                x = (x * scale).half()
            value = x.reshape(-1).view(torch.int16).to(torch.int32) & 0xFFFF
            table: Tensor = getattr(_tables, name)
            return table[value].to(torch.int32).view(x.shape)
    v = x.abs() if folded else x
    if v.dtype != torch.float64:
        v = v.float()  # which holds every boundary exactly
    if len(boundaries) >= 1 << COMPARED_AT_MOST:
        limits = torch.tensor(boundaries, dtype=v.dtype, device=v.device)
        return torch.bucketize(v, limits, out_int32=True)
    codes = torch.zeros_like(v)  # in its dtype: Inductor's vectors of masks turn into such at once
    for boundary in boundaries:
        codes = codes + torch.where(v <= boundary, 0.0, 1.0)  # NaN gets the last one, as from bucketize
    return codes.to(torch.int32)


class _Tables:
    """What codes are looked up in: of each 16-bit value its code, uint8, in the order of their bits.

    They are attributes, each of a name of its own: of two tensors that one function returns as a constant, Dynamo takes
    but one into a graph; and of a module it does not see the buffers that it comes to have while it is read.
    """


_tables = _Tables()
_numbers = itertools.count()


def _lookup(*key: Any) -> tuple[str, float] | None:
    """Runs in Python, as `_constants`: the name of the table, and what inputs are multiplied by to be looked up in it;
    None where they are not."""
    return _make_table(*key)


@functools.cache
def _make_table(boundaries: tuple[float, ...], folded: bool, dtype: str, device: str) -> tuple[str, float] | None:
    coder = Thresholds(boundaries, folded)
    found = coder.lookup(getattr(torch, dtype.removeprefix("torch.")), torch.device(device))
    if found is None:
        return None
    lookup, scale = found
    torch._dynamo.mark_static_address(lookup.table)  # or with CUDA graphs it would be copied at every call
    name = f"table_{next(_numbers)}"
    setattr(_tables, name, lookup.table)
    return name, scale


_lookup._dynamo_marked_constant = True  # type: ignore[attr-defined]


def pack_bits(codes: Tensor, bits: int) -> list[Tensor]:
    """Codes, int32, as `bits` tensors of ceil(n / 8) bytes; see NOTE [ Eighths ]."""
    parts = _eighths(codes)
    columns = []
    for column in range(bits):
        byte = torch.zeros_like(parts[0])
        for i in range(8):
            shift = i * bits - column * 8
            if -bits < shift < 8:
                byte = byte | (parts[i] << shift if shift >= 0 else parts[i] >> -shift)
        columns.append((byte & 0xFF).to(torch.uint8))
    return columns


def unpack_bits(packed: Sequence[Tensor], bits: int) -> list[Tensor]:
    """The codes of each eighth, int32."""
    columns = [column.to(torch.int32) for column in packed]
    parts = []
    for i in range(8):
        column, shift = divmod(i * bits, 8)
        code = columns[column] >> shift
        if shift + bits > 8:
            code = code | (columns[column + 1] << (8 - shift))
        parts.append(code & ((1 << bits) - 1))
    return parts


def _eighths(t: Tensor) -> Tensor:
    """(8, ceil(n / 8)), with zeros after the end."""
    return torch.nn.functional.pad(t.reshape(-1), (0, -t.numel() % 8)).view(8, -1)


def decode(codes: Tensor, levels: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """The level of each code, of 1-D codes."""
    if len(levels) > 1 << SELECTED:
        return torch.tensor(levels, dtype=dtype, device=codes.device)[codes]
    slope = torch.full_like(codes, levels[0], dtype=dtype)
    for code, level in enumerate(levels[1:], 1):
        slope = torch.where(codes >= code, level, slope)
    return slope


def multiply(grad: Tensor, packed: Sequence[Tensor], bits: int, levels: tuple[float, ...]) -> Tensor:
    """`grad` times the level of each code; by eighths, so that no code is written."""
    parts = zip(_eighths(grad), unpack_bits(packed, bits), strict=True)
    products = [part * decode(codes, levels, grad.dtype) for part, codes in parts]
    return torch.stack(products).view(-1)[: grad.numel()].view(grad.shape)
