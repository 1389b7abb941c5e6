"""Calls that matter under `recompute=True`: what makes a tensor that can be computed again, and what would save it.

    norm        anchors its input; what it returns has a recipe. Where the native node is none (an RMSNorm that is
                decomposed, a norm whose input autocast casts) it is run again
    softmax     anchors its output
    cast        what it returns has a recipe
    product     saves both factors, by recipe where they have one; what it returns has a recipe
    consumer    saves its operands, by recipe where they have one: Linear, matmul, convolution
    exposure    gives away the memory of a tensor, so that nothing is known of it any more

and, in `note_activation` and `note_dropout`, the calls that a scope recognises anyway. See NOTE [ Recipes ] in
`_recipes.py`.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from . import _policy, _recipes
from ._again import run_again
from ._calls import _callables
from ._hooks import Kept, unpack
from ._ledger import RECOMPUTED, Ledger, Step
from ._recipes import Geometry, Recipe
from ._replay import Autocast
from ._sites import Site, Verdict, Watch
from ._stack import Entry
from ._standins import saves

GAIN = 0.25
"""Bytes, for each byte of its input, that a norm must keep less if it is run again: more than a kernel's statistics."""


@dataclass(frozen=True)
class RecomputeCall:
    """A callable that makes a tensor which can be computed again, or would save one.

    Attributes:
        name: as reports name it.
        kind: "norm", "softmax", "cast", "product", "consumer" or "exposure".
    """

    name: str
    kind: str


_CALLS = {
    ("layer_norm", "norm"): "F.layer_norm torch.layer_norm",
    ("rms_norm", "norm"): "F.rms_norm torch.rms_norm",
    ("group_norm", "norm"): "F.group_norm torch.group_norm",
    ("softmax", "softmax"): "F.softmax torch.softmax Tensor.softmax",
    ("to", "cast"): "Tensor.to Tensor.float Tensor.half Tensor.bfloat16 Tensor.double Tensor.type Tensor.type_as",
    ("mul", "product"): "torch.mul torch.multiply Tensor.mul Tensor.multiply Tensor.__mul__ Tensor.__rmul__ "
    "torch.ops.aten.mul",
    ("linear", "consumer"): "F.linear torch.ops.aten.linear",
    ("matmul", "consumer"): "torch.matmul Tensor.matmul Tensor.__matmul__ torch.mm Tensor.mm torch.bmm Tensor.bmm "
    "torch.ops.aten.matmul torch.ops.aten.mm torch.ops.aten.bmm",
    ("addmm", "consumer"): "torch.addmm Tensor.addmm torch.baddbmm Tensor.baddbmm torch.ops.aten.addmm",
    ("conv", "consumer"): "F.conv1d F.conv2d F.conv3d F.conv_transpose1d F.conv_transpose2d F.conv_transpose3d "
    "torch.conv1d torch.conv2d torch.conv3d torch.ops.aten.convolution",
    ("memory", "exposure"): "Tensor.data.__get__ Tensor.numpy Tensor.__array__ Tensor.data_ptr Tensor.__dlpack__",
}
RECOMPUTE: dict[Any, RecomputeCall] = {
    function: RecomputeCall(name, kind)
    for (name, kind), paths in _CALLS.items()
    for path in paths.split()
    for function in _callables(path)
}


def run(entry: Entry, call: RecomputeCall, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Any:
    """Make such a call under a scope with `recompute=True`, or in one inside it."""
    kwargs = kwargs or {}
    if call.kind == "exposure":
        if type(args[0]) is Tensor and not _policy.traced():
            _recipes.expose(args[0])
        return func(*args, **kwargs)
    settings = entry.scope._settings
    if (
        not entry.recomputes
        or entry.hooks is not None  # innermost hooks win: those that were there before ours keep what is kept
        or (admitted := admits(args, kwargs, settings.min_bytes)) is None
        or (settings.exclude and settings.exclude.here())
    ):
        return func(*args, **kwargs)
    x, tensors = admitted
    if call.kind == "norm":
        return _norm(entry, call, func, args, kwargs)
    if call.kind == "softmax":
        return keeping(call.name, func, args, kwargs)
    if call.kind == "cast":
        y = func(*args, **kwargs)
        if is_cast(x, y, args):
            _note_cast(x, y, args, kwargs)
        return y
    y = _consume(entry, call, func, args, kwargs, tensors)
    if call.kind == "product" and isinstance(y, Tensor) and are_factors(tensors, kwargs):
        _recipes.note(y, torch.mul, tensors)
    return y


def admits(
    args: tuple[Any, ...], kwargs: dict[str, Any], min_bytes: int, hooks: object = None
) -> tuple[Tensor, list[Tensor]] | None:
    """The first plain tensor and all tensors of a call that is worth a second look; None of one that is not.

    Args:
        hooks: as `_policy.obstacle` takes them.
    """
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    x = next((t for t in tensors if type(t) is Tensor), None)
    if (
        x is None
        or not torch.is_grad_enabled()
        or not all(type(t) in (Tensor, nn.Parameter) for t in tensors)
        or not any(t.requires_grad for t in tensors)
        or _policy.traced()  # before the size is asked for: that would be traced, too
        or x.numel() * x.element_size() < max(min_bytes, 1)
        or _policy.obstacle(x, hooks)
    ):
        return None
    return x, tensors


# --- what makes a tensor ---


def are_factors(tensors: Sequence[Tensor], kwargs: Mapping[str, Any]) -> bool:
    """Whether a product can be computed again: of two tensors of one shape."""
    return len(tensors) == 2 and not kwargs and tensors[0].shape == tensors[1].shape


def is_cast(x: Tensor, y: Any, args: tuple[Any, ...]) -> bool:
    """Whether `y` is `x` in another dtype, and nothing else."""
    plain = isinstance(y, Tensor) and y.dtype in _policy.DTYPES and y.device == x.device
    return plain and bool(args) and args[0] is x


@dataclass(frozen=True)
class Norm:
    """A call of a norm.

    Attributes:
        forward: the call, of the input and the parameters.
        parameters: the tensors beside the input.
        gain: bytes, for each byte of the input, that it keeps less if it is run again.
        extra: bytes that it saves beside the input, for each byte of it.
        keeps_x: it saves the input, too.
        anchors_x: and that itself, no copy of it.
    """

    forward: Callable[..., Tensor]
    parameters: list[Tensor]
    gain: float
    extra: float
    keeps_x: bool
    anchors_x: bool

    @property
    def run_again(self) -> bool:
        """It is run again in backward."""
        return self.gain >= GAIN


def look_at_norm(call: RecomputeCall, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Norm | None:
    """layer_norm(input, normalized_shape, weight, bias, eps) and its like; None where the input is not the first."""
    if not args or not isinstance(args[0], Tensor):
        return None
    x, given = args[0], (*args, *kwargs.values())
    where = [i for i, value in enumerate(given) if isinstance(value, Tensor)]
    names, positional = tuple(kwargs), len(args)
    given_without = [None if i in where else value for i, value in enumerate(given)]

    def forward(*tensors: Tensor) -> Tensor:  # it is kept: it must refer to no tensor, and so not to `args`
        values = list(given_without)
        for i, t in zip(where, tensors, strict=True):
            values[i] = t
        y: Tensor = func(*values[:positional], **dict(zip(names, values[positional:], strict=True)))
        return y

    parameters = [given[i] for i in where[1:]]
    gain, extra, keeps_x = _facts(call.name, forward, x, parameters, given_without)
    # others than layer_norm keep a contiguous copy of what is not
    itself = call.name == "layer_norm" or x.is_contiguous() or x.is_contiguous(memory_format=_LAST[x.dim()])
    return Norm(forward, parameters, gain, extra, keeps_x, keeps_x and itself)


def _norm(entry: Entry, call: RecomputeCall, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    norm = look_at_norm(call, func, args, kwargs)
    if norm is None:
        return func(*args, **kwargs)
    x: Tensor = args[0]
    if norm.run_again:
        run_it, ledger = functools.partial(func, *args, **kwargs), entry.scope._ledger
        return again(ledger, call.name, run_it, norm.forward, x, norm.parameters, norm.extra, norm.keeps_x)
    y = func(*args, **kwargs)
    if norm.anchors_x:
        _recipes.anchor(x)
    _recipes.note(y, norm.forward, [x, *norm.parameters])
    return y


_LAST = defaultdict(lambda: torch.contiguous_format, {4: torch.channels_last, 5: torch.channels_last_3d})


def keeping(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Make a call whose node keeps what serves to compute others again, its output too: that only a hook can name."""

    def pack(t: Tensor) -> Kept:
        kept = Kept(t, name)
        _recipes.anchor(t, kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return func(*args, **kwargs)


def again(
    ledger: Ledger,
    name: str,
    run_it: Callable[[], Any],
    forward: Callable[..., Tensor],
    x: Tensor,
    parameters: list[Tensor],
    extra: float,
    keeps_x: bool,
) -> Any:
    """Run a norm that is run again in backward, and note what came of it."""
    y = run_again(name, ledger, run_it, forward, [x, *parameters], int(extra * x.nbytes), keeps_x)
    _recipes.note(y, forward, [x, *parameters])
    return y


_known_facts: dict[Any, tuple[float, float, bool]] = {}


def _facts(
    name: str, forward: Callable[..., Tensor], x: Tensor, parameters: Sequence[Tensor], others: list[Any]
) -> tuple[float, float, bool]:
    """What a norm that is run again would keep less, what it saves beside its input, and whether it saves that."""
    shape = probe_shape(x, channels=name == "group_norm")
    trainable = x.requires_grad, *(p.requires_grad for p in parameters)
    dtypes = tuple(p.dtype for p in parameters)
    key = name, x.dtype, x.device, shape, trainable, dtypes, str(others), Autocast.of(x.device.type)
    if key not in _known_facts:
        probe = torch.zeros(shape, dtype=x.dtype, device=x.device)
        extra, keeps_x = saves(lambda t: forward(t, *parameters), probe, parameters, autocast=True)
        if len(_known_facts) >= _policy.MAX_PLANS:
            _known_facts.clear()
        _known_facts[key] = extra + keeps_x - 1.0, extra, keeps_x
    return _known_facts[key]


def probe_shape(x: Tensor, *, channels: bool = False) -> tuple[int, ...]:
    """The shape of a small input on which a norm saves, for each byte, what it saves of `x`.

    Args:
        channels: those of the second dimension must be there, as they are if there are four.
    """
    ones = [1] * x.dim()
    if x.dim():
        ones[-1] = x.shape[-1]
    if x.dim() > 1 and (channels or x.dim() == 4):
        ones[1] = x.shape[1]
    return tuple(ones)


def _note_cast(x: Tensor, y: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    formats = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.memory_format)]
    memory_format = formats[0] if formats else torch.preserve_format
    run = functools.partial(torch.Tensor.to, dtype=y.dtype, copy=True, memory_format=memory_format)
    _recipes.note(y, run, [x])


def note_activation(run_it: functools.partial[Any], x: Tensor, y: Tensor, site: tuple[Site, int] | None = None) -> None:
    """An activation ran as `run_it()`; whether its node keeps its input is told by an anchor, or not."""
    rest = {key: value for key, value in run_it.keywords.items() if key not in ("input", "self")}
    if takes_one_tensor(run_it.args, rest):
        _recipes.note(y, _With(run_it.func, run_it.args[1:], rest), [x], site=site)


def takes_one_tensor(args: tuple[Any, ...], rest: Mapping[str, Any]) -> bool:
    """Whether an activation depends on its input alone."""
    return not any(isinstance(value, Tensor) for value in (*args[1:], *rest.values()))


def note_dropout(x: Tensor, y: Tensor, mask: Any, p: float) -> None:
    """A dropout ran, whose node keeps its mask alone."""
    replay = functools.partial(torch.ops.aten.native_dropout_backward, scale=1 / (1 - p)) if x.is_cuda else torch.mul
    _recipes.note(y, replay, [x], [mask])


class _With:
    """A function of a tensor, with its other arguments."""

    __slots__ = ("_args", "_func", "_kwargs")

    def __init__(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._func, self._args, self._kwargs = func, args, kwargs

    def __call__(self, t: Tensor) -> Tensor:
        y: Tensor = self._func(t, *self._args, **self._kwargs)
        return y


# --- what would save it ---


def _consume(
    entry: Entry, call: RecomputeCall, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]
) -> Any:
    """Make a call whose operands are saved, by recipe where they have one."""
    saved = saved_operands(call, tensors)
    if not saved:
        return func(*args, **kwargs)
    ledger = entry.scope._ledger
    made = [(t, origin) for t in saved if (origin := _recipes.find(t)) is not None and not _recipes.is_anchor(t)]
    site = entry.scope._sites.find(call.name, ledger.coming_step) if made else None
    if site is not None and site.verdict is Verdict.LEAVE:
        made = []  # nor is anything asked for
    recipes = {t.untyped_storage()._cdata: (t, recipe) for t, origin in made if (recipe := origin.recipe()) is not None}
    if not recipes:
        y = func(*args, **kwargs)
        for t in saved:
            if is_saved_itself(call, t):
                _recipes.anchor(t)
        return y
    hook = ConsumerHook(call.name, recipes, ledger)
    try:
        with torch.autograd.graph.saved_tensors_hooks(hook, unpack):
            y = func(*args, **kwargs)
        if site is not None and hook.replaced:
            ledger.watch(Watch(site, hook.replaced, y))
        return y
    finally:
        hook.release()


def saved_operands(call: RecomputeCall, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Those that the call saves: each for the gradient of the other."""
    operands = tensors[-2:] if call.name == "addmm" else tensors[:2]
    if len(operands) < 2:
        return []
    both = call.name == "conv"  # its node saves the input for the gradient of a frozen weight, too
    return [t for t, other in (operands, operands[::-1]) if other.requires_grad or both]


def is_saved_itself(call: RecomputeCall, operand: Tensor) -> bool:
    """Whether what is saved is this operand for certain, and no copy: autocast's, or a contiguous one."""
    if torch.is_autocast_enabled(operand.device.type):
        return False
    return call.name == "mul" or operand.is_contiguous()


class Recomputed:
    """A recipe in the place of a saved tensor."""

    __slots__ = ("_cast", "_geometry", "_recipe", "_step")

    def __init__(self, recipe: Recipe, geometry: Geometry, step: Step, cast: _Cast | None = None) -> None:
        recipe.add_user()
        self._recipe = recipe
        self._geometry = geometry
        self._cast = cast
        self._step = step

    def unpack(self) -> Tensor:
        """The saved tensor, bit for bit."""
        if torch._C._current_graph_task_id() != -1 and not self._step.backward_began:
            self._step.begin_backward()
        with torch._C.DisableTorchFunction(), torch.no_grad():
            value = self._recipe.value()
            if self._cast is not None:
                value = self._cast(value)
            return self._geometry.of(value)


class _Cast:
    """The copy that autocast makes of an operand."""

    __slots__ = ("_dtype", "_geometry")

    def __init__(self, operand: Geometry, dtype: torch.dtype) -> None:
        self._geometry = operand
        self._dtype = dtype

    def __call__(self, value: Tensor) -> Tensor:
        return self._geometry.of(value).to(self._dtype)


def is_autocast_of(t: Tensor, operand: Tensor) -> bool:
    """Whether `t` is the copy that autocast made of an operand, or a view of it."""
    node = t.grad_fn
    while node is not None and node.name() in VIEWS:
        node = node.next_functions[0][0]
    if node is None or node.name() != "ToCopyBackward0":
        return False
    return bool(node.next_functions[0] == (operand.grad_fn, operand.output_nr))


VIEWS = frozenset(
    f"{name}Backward0" for name in ("View", "UnsafeView", "ReshapeAlias", "T", "Transpose", "Permute", "Unsqueeze")
)


class ConsumerHook:
    """The pack hook of a call whose operands have recipes.

    Attributes:
        replaced: the storages of the tensors in whose place a recipe was put.
    """

    def __init__(self, name: str, recipes: Mapping[int, tuple[Tensor, Recipe]], ledger: Ledger) -> None:
        self._name = name
        self._recipes = recipes
        self._ledger = ledger
        self.replaced: list[StorageWeakRef] = []

    def __call__(self, t: Tensor) -> Recomputed | Kept:
        _, recipe = self._recipes.get(t.untyped_storage()._cdata, (None, None))
        cast = None
        if recipe is None:
            recipe, cast = self._cast_of(t)
        elif t.dtype != recipe.dtype:
            recipe = None
        if recipe is None:
            kept = Kept(t, self._name)
            if t.grad_fn is not None:
                _recipes.anchor(t, kept)
            return kept
        row = self._ledger.row(self._name, 0, how=RECOMPUTED)
        self._ledger.original(row, t)
        self.replaced.append(StorageWeakRef(t.untyped_storage()))
        return Recomputed(recipe, Geometry(t), self._ledger.step, cast)

    def _cast_of(self, t: Tensor) -> tuple[Recipe | None, _Cast | None]:
        """What `t` is autocast's copy of."""
        for operand, recipe in self._recipes.values():
            if is_autocast_of(t, operand):
                return recipe, _Cast(Geometry(operand), t.dtype)
        return None, None

    def release(self) -> None:
        """The call is over; the hook itself lives as long as the node."""
        del self._recipes, self._ledger, self.replaced
