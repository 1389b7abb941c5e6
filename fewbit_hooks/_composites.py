"""Modules that compute an activation or a norm from primitives, treated as a whole.

NOTE [ Composites by module class ]

A mode sees the primitives, not what they add up to; the module's class says it. So `cls.forward` is replaced, once, by
a function that calls the original outside of any scope, and inside one has the original run as one node
(`_one_node.py`) or so that it can be run again (`_again.py`); in a compiled graph it is coded as any activation is
(`_compiled.py`), or left to the compiler. No formula is copied.

1. The classes are those of `register_module`, and those of a built-in table (`_built_in.py`), which are looked for
   among the modules already imported whenever a scope is entered. Nothing is imported for it.
2. What the user has put on an *instance* goes first: one with a `forward` of its own (accelerate's hooks, a kernel
   from the hub) is left alone.
3. Whether an instance's forward computes the activation that the table says is asked of it: on a grid, in float64.
4. An instance whose forward is a single native node already (`GELUActivation`, mostly) is left to the mode; as long as
   its attributes are the same objects, that is remembered.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import inspect
import types
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from . import _activations, _compiled, _policy, _recipes, _recompute, _stack, _treatment, ops
from ._activations import Activation, Parameter, pristine
from ._calls import Call
from ._errors import FewbitRuntimeError, FewbitTypeError, FewbitValueError
from ._locks import lock
from ._modules import has_hooks, parameters_of
from ._policy import Keep
from ._replay import Autocast
from ._standins import Saves, saves

SEEN_INTO = "a mode or a hook sees what is in it"
OWN_FORWARD = "its instance has a forward of its own"
OTHER_FUNCTION = "its forward does not compute {}"
HAS_PARAMETERS = "it has parameters, and so is not pointwise in its input alone"
NO_NODE = "it does not return one new tensor of its input's shape"
NO_PROBE = "it could not be tried on a small input: {}"
INPUT_CHANGES = "its input is changed in place before its backward"
CAPTURES = "it depends on a tensor that requires grad and is no parameter of its own"

PLAIN = frozenset({bool, int, float, str})
"""What an attribute of an instance may be that tells by its value what is computed."""

Forward = Callable[..., Tensor]
ModuleClass = TypeVar("ModuleClass", bound=type[nn.Module])


@dataclass(frozen=True, eq=False)
class Composite:
    """A module class that is treated as a whole.

    Attributes:
        name: of the activation; for any other module, as reports name it.
        forward: the class's own.
        call: of the activation that it computes; None: it is run again, exactly, under `recompute=True`.
        parameters: of the activation.
        native: the instances that are a native node, by address, and the addresses of their attributes: (measured) in a
            small model what is asked of `_facts` is a fortieth of a step.
    """

    name: str
    forward: Forward
    call: Call | None
    parameters: Mapping[str, Parameter]
    native: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def note_native(self, module: nn.Module) -> None:
        """An instance is one."""
        if len(self.native) >= NATIVE:
            self.native.clear()
        self.native[id(module)] = tuple(map(id, module.__dict__.values()))


@dataclass(frozen=True)
class Facts:
    """What was found of one instance.

    Attributes:
        reason: why it is left alone; empty where it is not.
        primitives: what its primitives save, beside the parameters.
        unseen: its node is that of a `torch.autograd.Function`, of which a mode is not told.
    """

    reason: str
    primitives: Saves
    unseen: bool = False

    def gains(self, composite: Composite, x: Tensor) -> bool:
        """Whether less is kept if it is treated as a whole."""
        if composite.call is None:
            return self.primitives.gain(x) >= _recompute.GAIN
        return self.primitives.extra > 0 or self.unseen

    def anchors(self, x: Tensor) -> bool:
        """Whether it is this input that they save, and no copy of it."""
        return self.primitives.keeps_x and x.is_contiguous()


_lock = lock()
_facts: weakref.WeakKeyDictionary[nn.Module, dict[Any, Facts]] = weakref.WeakKeyDictionary()
_alike: dict[Any, Facts] = {}
"""The same of instances that hold nothing that could be told apart: some models make one for each call."""
STATES = 32
"""Of so many states of an instance it is known at once what it computes."""
NATIVE = 4096
"""So many instances of a class are remembered to be a native node."""


def register_module(
    cls: ModuleClass, activation: str | None = None, *, name: str | None = None, **parameters: Parameter
) -> ModuleClass:
    """Have a module class that computes an activation or a norm from primitives treated as a whole.

    >>> import torch, fewbit_hooks as fewbit
    >>> class TanhGELU(torch.nn.Module):
    ...     def forward(self, x):
    ...         return 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x**3)))
    >>> _ = fewbit.register_module(TanhGELU, "gelu", approximate="tanh")
    >>> x = torch.randn(256, 256, requires_grad=True)
    >>> with fewbit.scope(bits=3) as memory:
    ...     y = TanhGELU()(x)
    >>> memory.report().stored_bytes == 256 * 256 * 3 // 8
    True

    The module's own forward runs, so that the result is bit for bit what it was. For backward, in place of all that its
    primitives would save, a scope keeps what it keeps of the activation: codes of the input, or, where another node
    keeps the output, that and a bit. With `exact=True`, and for modules that are no activation, it keeps the input (and
    parameters), and runs the forward again for what its nodes need: gradients are bit for bit stock PyTorch's.

    Args:
        cls: its forward takes one tensor, returns a new one of the same shape, and depends on nothing but the tensor
            and the module's own parameters: no random numbers, no buffers that it changes. Subclasses that inherit
            that forward are included.
        activation: one of `fewbit_hooks.activations()`; `register()` adds yours. Left out: a norm, say; it is run
            again under `scope(recompute=True)` and left as it is otherwise.
        name: of the latter in reports. Default: the name of the class.
        parameters: of the activation, such as `approximate="tanh"`; PyTorch's defaults where not given.

    Returns:
        `cls`, whose `forward` was replaced by one that calls the original outside of a scope.

    Raises:
        FewbitTypeError: not a module class, or one whose forward takes something else than one tensor.
        FewbitValueError: no such activation, or one without a codebook (exact at 1 bit), or parameters that it lacks.
    """
    if not (inspect.isclass(cls) and issubclass(cls, nn.Module)):
        raise FewbitTypeError(f"register_module takes a subclass of torch.nn.Module, got {cls!r}")
    if activation is None and parameters:
        raise FewbitValueError(f"register_module: {sorted(parameters)[0]!r} is a parameter of which activation?")
    if not _takes_one_tensor(cls.forward):
        raise FewbitTypeError(
            f"register_module: {cls.__name__}.forward must take one tensor, and further arguments only with a default"
        )
    found = _activations.find(activation) if activation is not None else None
    if found is not None and found.exact:
        raise FewbitValueError(
            f"register_module: {activation} is exact at 1 bit; what computes it from primitives cannot be run from its "
            "bit alone. Leave activation out: the module is then run again under scope(recompute=True)."
        )
    replace_forward(cls, name or cls.__name__, found, found.check(parameters) if found is not None else {})
    return cls


def _takes_one_tensor(forward: Any) -> bool:
    try:
        _, first, *others = inspect.signature(forward).parameters.values()
    except (ValueError, TypeError):
        return False
    positional = first.kind in (first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD)
    return positional and all(p.default is not p.empty for p in others)


def replace_forward(
    cls: type[nn.Module], name: str, activation: Activation | None, parameters: Mapping[str, Parameter]
) -> None:
    """Put what runs a module as a whole in the place of its class's forward; once more, if it was registered before."""
    with _lock:
        forward = getattr(cls.forward, "_fewbit_original", cls.forward)
        if activation is not None:
            name = activation.name
        call = Call(name, activation, tuple(parameters)) if activation is not None else None
        composite = Composite(name, forward, call, dict(parameters))
        cls.forward = in_place_of(forward, _run_or_leave(composite))
        cls.forward._fewbit_original = forward  # type: ignore[attr-defined]


def _run_or_leave(composite: Composite) -> types.FunctionType:
    """What takes the place of a class's forward."""
    forward, run, run_compiled, plainly = composite.forward, _run, _compiled.run, _compiled.plainly
    thread, acting, coding = _stack.this_thread, _stack.acting, _stack.coding_here
    is_compiling, is_grad_enabled, partial = torch.compiler.is_compiling, torch.is_grad_enabled, functools.partial
    is_exporting, others_see = _compiled.is_exporting, _stack.others_see
    native = composite.native
    call = replace(composite.call, fixed=tuple(composite.parameters.items())) if composite.call is not None else None
    tensor = Tensor

    def serves(address: int, dtype: str, device: str) -> bool:
        """Runs in Python, when a graph is traced: whether an instance computes what its class says.

        Args:
            address: its id, which Dynamo guards; up to torch 2.11 it hands a function like this no module. The instance
                is there: its forward is being read.
        """
        module: nn.Module = ctypes.cast(address, ctypes.py_object).value
        like = torch.zeros(8, dtype=getattr(torch, dtype.removeprefix("torch.")), device=device, requires_grad=True)
        return not look_at(composite, module, like).reason

    serves._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def run_or_leave(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if thread.acting is None:  # outside of any scope this is all that it costs
            return forward(self, *args, **kwargs)
        if is_compiling():
            found, given = None if others_see() else coding(), (*args, *kwargs.values())
            if call is None or found is None or len(given) != 1 or not isinstance(given[0], tensor) or is_exporting():
                return forward(self, *args, **kwargs)
            whole = serves(id(self), str(given[0].dtype), str(given[0].device))
            return run_compiled(found, call, partial(forward, self), given, {}, whole)
        if native.get(id(self)) == tuple(map(id, self.__dict__.values())):
            return forward(self, *args, **kwargs)
        entry = acting()
        if entry is None or not is_grad_enabled():
            return forward(self, *args, **kwargs)
        return plainly(partial(run, entry, composite, self, args, kwargs))

    return cast(types.FunctionType, run_or_leave)


def in_place_of(forward: Any, function: types.FunctionType) -> types.FunctionType:
    """The function, which needs no globals, as what takes the place of a class's `forward`: with its name, and its
    globals, for torch.jit.script reads the source of the one, and looks names up in the globals of the other."""
    found = getattr(inspect.unwrap(forward), "__globals__", function.__globals__)
    code = function.__code__
    same = types.FunctionType(code, found, function.__name__, function.__defaults__, function.__closure__)
    return cast(types.FunctionType, functools.wraps(forward)(same))


def _run(entry: Any, composite: Composite, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A module's forward under a scope, or under the recorder of a profile."""
    if not isinstance(entry, _stack.Entry):
        return entry.run_composite(composite, module, args, kwargs)
    x = args[0] if args else next(iter(kwargs.values()), None)
    if len(args) + len(kwargs) != 1 or not isinstance(x, Tensor) or _policy.traced():
        return composite.forward(module, *args, **kwargs)
    with torch._C.DisableTorchFunction():  # or the mode would see each attribute that is read here
        return _run_in_scope(entry, composite, module, x)


def _run_in_scope(entry: _stack.Entry, composite: Composite, module: nn.Module, x: Tensor) -> Any:
    run_it = functools.partial(_stack.with_modes, composite.forward, module, x)
    if composite.call is not None:
        facts = _known(module, x)
        if facts is not None and not facts.reason and not facts.gains(composite, x):
            composite.note_native(module)
            return run_it()  # a native node, which the mode sees
        return _run_activation(entry, composite, module, x, run_it, facts)
    settings, ledger = entry.scope._settings, entry.scope._ledger
    parameters = own(module)
    if not settings.recompute or parameters is None:
        return run_it()
    if entry.hooks is not None:  # what is kept is theirs: they were there before ours, and would not be handed it
        return run_it()
    try:
        if not _treatment.admits(entry, composite.name, x):
            return run_it()
        _refuse_if_seen_into(module)
        facts = look_at(composite, module, x)
        if facts.reason:
            raise Keep(facts.reason)
    except Keep as keep:
        ledger.passed(composite.name, str(keep), 0)
        return run_it()
    forward = _Shell(composite, module)
    if facts.gains(composite, x) and module not in _recipes.changed:
        return _recompute.again(ledger, composite.name, run_it, forward, x, parameters, facts.primitives)
    y = run_it()
    if facts.anchors(x):
        _recipes.anchor_by_node(x, y)
        _recipes.note(y, forward, [x, *parameters])
    return y


def _run_activation(
    entry: _stack.Entry,
    composite: Composite,
    module: nn.Module,
    x: Tensor,
    run_it: functools.partial[Tensor],
    facts: Facts | None,
) -> Tensor:
    settings, call = entry.scope._settings, composite.call
    assert call is not None
    assert call.activation is not None
    try:
        if not _treatment.admits(entry, call.name, x):
            if x.requires_grad and not _policy.obstacle(x, entry.hooks) and not _is_seen_into(module):
                look_at(composite, module, x)  # or it would never be found out that it is a native node
            with _stack.hidden() if x.requires_grad else contextlib.nullcontext():  # it was counted, as a whole
                return run_it()
        _refuse_if_seen_into(module)
        facts = facts or look_at(composite, module, x)
        if facts.reason:
            raise Keep(facts.reason)
        if not facts.gains(composite, x):
            return run_it()  # a native node, which the mode sees
        forward = _Shell(composite, module)
        if settings.exact:
            if not facts.primitives.extra:
                raise Keep(_policy.EXACT)  # it keeps its input, as it would to be run again
            if module in _recipes.changed:
                raise Keep(INPUT_CHANGES)
            if entry.hooks is not None:
                raise Keep(_policy.HOOKS)
            if settings.bits_for(call.name, x, exact=False) is None:
                raise Keep(f"no bits are given for {call.name}")
            return _treatment.again(entry, call.name, forward, x, facts.primitives)
        function = call.activation.function
        plan = _policy.make_plan(settings, call, function, (x,), dict(composite.parameters), x)
    except Keep as keep:
        with _stack.hidden():  # a tanh in it is not the user's, to be coded by itself
            result: Tensor = _treatment.leave(entry, call, str(keep), x, run_it)
        return result
    return _treatment.as_one_node(entry, plan, x, run_it, forward, facts.primitives)


def _is_seen_into(module: nn.Module) -> bool:
    """Whether somebody else sees its primitives, or the modules in it: what he does with what he sees, a penalty on it
    say, must be recorded, and be done once."""
    return _stack.others_see() or any(has_hooks(m) for m in module.modules() if m is not module)


def _refuse_if_seen_into(module: nn.Module) -> None:
    if _is_seen_into(module):
        raise Keep(SEEN_INTO)


def _own(module: nn.Module) -> list[Tensor]:
    """The parameters that the module itself has, not those of modules in it."""
    return [p for p in module._parameters.values() if p is not None]


def own(module: nn.Module) -> list[Tensor] | None:
    """The same; None where one is of a class that no tensor can take the place of."""
    parameters = _own(module)
    return parameters if all(type(p) is nn.Parameter for p in parameters) else None


class _Shell:
    """The forward of a module as it is now, with parameters to be given: `shell(x, *_own(module))`.

    It refers neither to the module nor to the parameters, so that it keeps no model alive, and what is set on the
    module after the forward, another epsilon or buffer say, does not reach the backward.
    """

    __slots__ = ("_class", "_content", "_forward", "_names", "_versions")

    def __init__(self, composite: Composite, module: nn.Module) -> None:
        self._forward = composite.forward
        self._class = type(module)
        self._content = dict(module.__dict__)
        self._names = [name for name, p in module._parameters.items() if p is not None]
        self._content["_parameters"] = dict.fromkeys(module._parameters)
        self._content["_buffers"] = dict(module._buffers)
        self._versions = {
            name: b._version for name, b in module._buffers.items() if b is not None and not b.is_inference()
        }

    def __call__(self, x: Tensor, *parameters: Tensor) -> Tensor:
        for name, version in self._versions.items():
            if self._content["_buffers"][name]._version != version:
                raise FewbitRuntimeError(
                    f"the buffer {name!r} of a {self._class.__name__}, whose forward is run again for its gradient, "
                    "has been modified by an inplace operation. Set a new one, or run the module under "
                    "`with fewbit_hooks.scope(bits=None):`."
                )
        shell = object.__new__(self._class)
        shell.__dict__.update(self._content)
        shell.__dict__["_parameters"] = {
            **self._content["_parameters"],
            **dict(zip(self._names, parameters, strict=True)),
        }
        return self._forward(shell, x)


def look_at(composite: Composite, module: nn.Module, x: Tensor) -> Facts:
    """Ask an instance, once for each dtype and state, what it computes and saves."""
    facts = _known(module, x)
    if facts is None and ops.capturing(x.device):  # to ask, the host would wait for the device: another time
        return Facts(_policy.CAPTURING, Saves(0.0, True))
    if facts is None:
        content = _content(module)
        alike = (composite, type(module), content, _state(module, x)) if content is not None else None
        facts = _alike.get(alike)
        if facts is None:
            with ops.unseen():
                reason = _reason_to_leave(composite, module, x)
                facts = Facts(reason, Saves(0.0, True)) if reason else _find_out(composite, module, x)
            if alike is not None:
                if len(_alike) >= _policy.MAX_PLANS:
                    _alike.clear()
                _alike[alike] = facts
        known = _facts.setdefault(module, {})
        if len(known) >= STATES:  # a number that changes from call to call
            known.clear()
        known[_state(module, x)] = facts
    return facts


def _known(module: nn.Module, x: Tensor) -> Facts | None:
    known = _facts.get(module)
    return known.get(_state(module, x)) if known is not None else None


def _content(module: nn.Module) -> tuple[tuple[str, Any], ...] | None:
    """What an instance that may be alike others of its class holds: numbers, strings and functions; None if there is
    more."""
    content = [item for item in module.__dict__.items() if not _is_nothing(item[1])]
    return tuple(content) if all(_is_constant(value) for _, value in content) else None


def _is_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, (dict, set)) and not value)


def _is_constant(value: Any) -> bool:
    """Whether this is a number, a string, or a function that depends on nothing."""
    if isinstance(value, types.BuiltinFunctionType):
        return not isinstance(value.__self__, Tensor)
    if isinstance(value, types.FunctionType):
        return value.__closure__ is None
    return type(value) in PLAIN


def _state(module: nn.Module, x: Tensor) -> Any:
    trainable = tuple([p.requires_grad for p in module._parameters.values() if p is not None])
    content = tuple(
        [
            (name, value if type(value) in PLAIN else id(value))
            for name, value in module.__dict__.items()
            if type(value) in PLAIN or callable(value)
        ]
    )
    buffers = tuple([(id(b), 0 if b.is_inference() else b._version) for b in module._buffers.values() if b is not None])
    return x.dtype, x.device, x.requires_grad, trainable, content, buffers, Autocast.of(x.device.type)


def _reason_to_leave(composite: Composite, module: nn.Module, x: Tensor) -> str:
    if "forward" in module.__dict__:
        return OWN_FORWARD
    inner = (m for m in module._modules.values() if m is not None)
    if any(p is not None for m in inner for p in parameters_of(m)):
        return HAS_PARAMETERS
    probe = _probe(composite, x)
    version = probe._version
    try:
        with pristine(autocast=True):
            y = _Shell(composite, module)(probe, *(p.detach() for p in _own(module)))
    except ops.OUT_OF_MEMORY:
        raise  # the module is asked again
    except Exception as error:  # the report has it
        return NO_PROBE.format(error)
    if not isinstance(y, Tensor) or y.shape != probe.shape or probe._version != version or _shared(y, probe):
        return NO_NODE
    if y.requires_grad:
        return CAPTURES  # a weight computed from others, by a hook say
    if composite.call is None:
        return ""
    if any(p is not None for p in module._parameters.values()):
        return HAS_PARAMETERS
    try:
        same = _computes(composite, composite.call, module)
    except ops.OUT_OF_MEMORY:
        raise
    except Exception as error:
        return NO_PROBE.format(error)
    return "" if same else OTHER_FUNCTION.format(composite.name)


def _computes(composite: Composite, call: Call, module: nn.Module) -> bool:
    """Whether an instance computes what its class is said to."""
    assert call.activation is not None
    buffers = list(module.buffers())
    device = buffers[0].device if buffers else torch.device("cpu")
    with pristine(), torch.no_grad(), ops.waiting(device):
        grid = torch.linspace(-8, 8, 65, dtype=torch.float64, device=device)
        expected = call.activation.function(grid, **composite.parameters)
        found = composite.forward(module, grid.clone())
        # FastGELU's constant has ten digits
        return (
            isinstance(found, Tensor)
            and found.shape == grid.shape
            and torch.allclose(found.double(), expected, rtol=0, atol=1e-6)
        )


def _shared(a: Tensor, b: Tensor) -> bool:
    return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)


def _find_out(composite: Composite, module: nn.Module, x: Tensor) -> Facts:
    with pristine(autocast=True):
        y = composite.forward(module, _probe(composite, x).requires_grad_())
    return Facts("", _saves(composite, module, x), isinstance(y.grad_fn, torch.autograd.function.BackwardCFunction))


def _saves(composite: Composite, module: nn.Module, x: Tensor) -> Saves:
    own = [*parameters_of(module), *module.buffers()]
    probe = _probe(composite, x)
    saved = functools.partial(saves, functools.partial(composite.forward, module), own=own, autocast=True)
    found = saved(probe)
    if composite.call is not None or probe.dim() > 1:
        # what does not grow with the input, as Gemma's 1 + weight, is as large as that of the probe alone
        found = found._replace(extra=max(0.0, 2 * saved(probe.repeat(2, *[1] * (probe.dim() - 1))).extra - found.extra))
    return found


def _probe(composite: Composite, x: Tensor) -> Tensor:
    shape = _recompute.probe_shape(x) if composite.call is None else (8,)
    return torch.zeros(shape, dtype=x.dtype, device=x.device)
