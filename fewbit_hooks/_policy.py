"""The policy: compress a call with how many bits, or keep it exact, and why."""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import _activations, ops
from ._calls import Call
from ._catalog import codebook
from ._codebook import Codebook
from ._dtensor import is_in_parts, reason_to_keep
from ._errors import FewbitError, FewbitTypeError, FewbitValueError
from ._exclude import Exclusion, Rule
from ._mask_calls import MASKS
from ._plan import Plan
from ._quantizer import check_bits
from ._standins import never_taken

Bits: TypeAlias = int | Mapping[str, int | None] | Callable[[str, Tensor], int | None] | None
Exclude: TypeAlias = Rule | Iterable[Rule]

DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})

OWN_CODEBOOKS = 32
"""Parameter combinations of one activation for which a codebook is computed (0.1 to 0.5 s each): a parameter that is
annealed from step to step would otherwise cost that at every step."""

MEASURE = "measured only: bits=None"
SMALL = "smaller than min_bytes"
EMPTY = "no elements"
CAPTURED = "it depends on another tensor that requires grad"
PARAMETER = "a parameter: the model keeps it anyway"
CHECKPOINT = "inside checkpoint"
HOOKS = "inside other saved-tensor hooks"
CHANGED = "the saved-tensor hooks around the scope change codes"
TRANSFORM = "inside a torch.func transform"
FORWARD_AD = "inside forward-mode AD"
TRACING = "being traced"
DISABLED = "saved-tensor hooks are disabled"
CAPTURING = "a CUDA graph is being captured, and its tables must be made before: run the step once without"
EXCLUDED = "excluded"
EXACT = "exact=True, and its derivative is not two-valued"
NOT_TWO_VALUED = "its derivative is not two-valued in this version of torch"


class Keep(Exception):
    """Not an error: this call stays exact, and the message says why."""


@dataclass(frozen=True, eq=False)
class Settings:
    """The arguments of a scope, validated."""

    bits: Bits = 3
    min_bytes: int = 65536
    exclude: Exclusion = field(default_factory=Exclusion)
    exact: bool = False
    recompute: bool = False
    codebooks: Mapping[str, tuple[Codebook, ...]] = field(default_factory=dict)
    engine: str = "auto"

    def identity(self) -> Hashable:
        """What two scopes have in common that do the same."""
        bits = tuple(sorted(self.bits.items())) if isinstance(self.bits, Mapping) else _name_of(self.bits)
        rules = tuple([_name_of(rule) for rule in self.exclude.rules])
        books = tuple(self.codebooks.values())
        return bits, self.min_bytes, rules, self.exact, self.recompute, books, self.engine

    def bits_for(self, name: str, x: Tensor | None, exact: bool) -> int | None:
        """The bits given for an activation; None keeps it. The two-valued ones take 1 where they are not turned off.

        Args:
            x: its input, of which a callable is asked; None where there is no callable.
        """
        bits = self.bits
        if bits is not None and type(bits) is not int:  # check_settings made plain ints of all others
            if isinstance(bits, Mapping):
                bits = bits.get(name, bits.get("default", 1 if exact else None))
            else:
                assert callable(bits)
                assert x is not None
                bits = bits(name, x)
                if bits is not None:
                    check_bits(bits, f"bits: the callable's answer for {name!r}")
        return 1 if bits is not None and exact else bits


def _name_of(setting: Any) -> Hashable:
    """A setting; of a function or a class a weak reference, for it may hold a model."""
    if not callable(setting):
        return setting  # type: ignore[no-any-return]
    try:
        ref = weakref.ref(setting)
        hash(ref)
    except TypeError:
        return object()  # like no other
    return ref


def check_settings(
    bits: Bits, min_bytes: int, exclude: Exclude, exact: bool, recompute: bool, engine: str, codebooks: object
) -> Settings:
    """Validate the arguments of a scope.

    Raises:
        FewbitTypeError, FewbitValueError: what was given, what is allowed.
        FewbitError: what is missing for it.
    """
    if isinstance(bits, Mapping):
        for name in bits:
            if name != "default" and name not in MASKS:
                _activations.find(name, also=MASKS)
        bits = {k: value if value is None else check_bits(value, f"bits[{k!r}]") for k, value in bits.items()}
    elif bits is not None and (not callable(bits) or isinstance(bits, nn.Module)):
        bits = check_bits(bits)
    if isinstance(min_bytes, bool) or not isinstance(min_bytes, (int, np.integer)):
        raise FewbitTypeError(f"min_bytes must be an integer of 0 or more, got {min_bytes!r}")
    if min_bytes < 0:
        raise FewbitValueError(f"min_bytes must be an integer of 0 or more, got {min_bytes}")
    switches: dict[str, object] = {"exact": exact, "recompute": recompute}
    for name, on in switches.items():
        if not isinstance(on, bool):
            raise FewbitTypeError(f"{name} must be True or False, got {on!r}")
    if engine not in ("hooks", "fused", "auto"):
        raise FewbitValueError(f"engine must be 'hooks', 'fused' or 'auto', got {engine!r}")
    if engine == "fused" and torch.cuda.is_available() and not ops.is_installed("triton"):
        raise FewbitError(
            "engine='fused' needs the package triton on CUDA, which is not installed. Install it (pip install triton), "
            "or use 'auto' or 'hooks'."
        )
    return Settings(bits, int(min_bytes), Exclusion(exclude), exact, recompute, _check_codebooks(codebooks), engine)


def _check_codebooks(codebooks: object) -> dict[str, tuple[Codebook, ...]]:
    given = codebooks.values() if isinstance(codebooks, Mapping) else codebooks
    if isinstance(given, Codebook):
        given = (given,)
    if isinstance(given, str) or not isinstance(given, Collection):
        raise FewbitTypeError(f"codebooks takes Codebook objects, got {codebooks!r}")
    for book in given:
        if not isinstance(book, Codebook):
            raise FewbitTypeError(f"codebooks takes Codebook objects, got {book!r}")
        activation = _activations.find(book.name)
        if activation.exact:
            raise FewbitValueError(f"codebooks: {book.name} is exact at 1 bit and has no codebook")
        if (level := _level_never_taken(activation, book)) is not None:
            raise FewbitValueError(
                f"codebooks: the derivative of {book.name} is nowhere {level:.6g}, which is a level of its codebook. "
                "Levels must be values of the derivative, as its means are; fewbit_hooks.codebook() makes such."
            )
    if isinstance(codebooks, Mapping):
        for name, book in codebooks.items():
            if name != book.name:
                raise FewbitValueError(f"codebooks: {name!r} maps to a codebook of {book.name!r}")
    books: dict[str, tuple[Codebook, ...]] = {}
    for book in given:
        others = books.get(book.name, ())
        if _of_parameters(others, _activations.find(book.name).check(book.parameters)) is not None:
            raise FewbitValueError(f"codebooks: two are of {book.name} with the same parameters, {book.parameters}")
        books[book.name] = (*others, book)
    return books


@functools.lru_cache(maxsize=64)
def _level_never_taken(activation: _activations.Activation, book: Codebook) -> float | None:
    """A level that cannot be stood in for; remembered, as a training loop may make its scope anew at each step."""
    if activation.one_node:
        return None
    return never_taken(lambda x: activation.derivative(x, **book.parameters), book.levels, book.interval)


def _of_parameters(books: Iterable[Codebook], parameters: Mapping[str, object]) -> Codebook | None:
    """The codebook of an activation with these parameters, where those that it does not name have their defaults."""
    return next((b for b in books if _activations.find(b.name).check(b.parameters) == parameters), None)


def disabled() -> bool:
    """FEWBIT_DISABLE is set in the environment (to anything but 0 or nothing)."""
    return os.environ.get("FEWBIT_DISABLE", "0") not in ("", "0")


def obstacle(x: Tensor, hooks: object, *, in_parts: bool = False) -> str:
    """Why this tensor cannot be coded here, whatever the settings; empty where it can.

    Args:
        x: the input of a recognised call.
        hooks: the innermost saved-tensor hooks when the scope was entered.
        in_parts: a DTensor can, by the part that lies on this rank.
    """
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return TRANSFORM  # grad-like transforms raise at any saved-tensor hook, and vmap's tensors are wrapped
    if forward_ad._current_level >= 0:
        return FORWARD_AD  # the tangent's formula saves tensors of its own
    if type(x) is not Tensor:
        if isinstance(x, nn.Parameter):
            return PARAMETER
        if not (in_parts and is_in_parts(x)):
            return reason_to_keep(x)
    if reason := unfit(x):
        return reason
    if traced():
        return TRACING
    if not torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
        return DISABLED
    top = torch._C._autograd._top_saved_tensors_default_hooks(False)
    if top is not None and (hooks is None or top[0] is not hooks):
        # innermost hooks win; packing inside a non-reentrant checkpoint takes from it what it expects to see
        return CHECKPOINT if getattr(top[0], "__module__", "") == "torch.utils.checkpoint" else HOOKS
    return ""


def unfit(x: Tensor) -> str:
    """Why what is in this tensor cannot be coded, or computed again, anywhere; empty where it can."""
    if x.dtype not in DTYPES:
        return f"dtype {str(x.dtype).removeprefix('torch.')}"
    if x.layout is not torch.strided or x.is_nested:
        return "a nested tensor" if x.is_nested else f"layout {str(x.layout).removeprefix('torch.')}"
    if not (x.is_cpu or x.is_cuda):
        return f"device {x.device.type}"
    return ""


def traced() -> bool:
    """Fake tensors or proxies stand for the true ones, or torch.jit.trace looks on."""
    if torch._C._get_tracing_state() is not None:
        return True
    if not ops.seen_by_modes():
        return False
    keys = torch._C._TorchDispatchModeKey
    return any(torch._C._get_dispatch_mode(key) is not None for key in (keys.FAKE, keys.PROXY))


_plans: dict[Any, Plan] = {}
_own_parameters: dict[str, set[Any]] = {}
MAX_PLANS = 256
"""Parameter combinations whose plans are kept at once: in 16 bits each has a table of 64 KiB, and more."""
_captured: set[Plan] = set()
"""Those whose tables a CUDA graph reads each time that it is replayed: they are kept for good."""
SLOPED = frozenset({"celu", "elu", "leaky_relu"})
"""In place they save their output, from which the sign of the input is told only if no slope is negative."""


def make_plan(
    settings: Settings, call: Call, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], x: Tensor
) -> Plan:
    """How to code this call: cached by the callable, its arguments but the input, and the bits.

    Raises:
        Keep: it stays exact.
    """
    activation = call.activation
    if activation is None:
        raise Keep(call.kept)
    bits = settings.bits_for(call.name, x, activation.exact)
    if bits is None:
        raise Keep(f"no bits are given for {call.name}")
    if settings.exact and not activation.exact:
        raise Keep(EXACT)
    rest = args[1:]
    named = {k: v for k, v in kwargs.items() if k not in ("input", "self")} if kwargs else kwargs
    for value in (*rest, *named.values()):
        if not isinstance(value, (int, float, str, type(None))):  # a tensor as a key would match after it has changed
            raise Keep(f"an argument of {call.name} is a {type(value).__name__}")
    books = settings.codebooks.get(call.name, ())
    key = function, activation, rest, tuple(named.items()), bits, books
    plan = _plans.get(key)
    if plan is None:
        try:
            parameters, inplace = call.parameters(args, kwargs)
            book = _of_parameters(books, parameters)
            if not activation.exact and book is None:
                _limit_own(activation, parameters)
                book = codebook(call.name, bits, weight=activation.weight, interval=activation.interval, **parameters)
        except FewbitError as error:
            raise Keep(str(error)) from None
        if inplace and call.name in SLOPED and min(v for v in parameters.values() if isinstance(v, float)) < 0:
            raise Keep(f"{call.name} in place with a negative parameter, for which it has no backward")
        with ops.unseen():
            plan = Plan(activation, parameters, book, lambda t: function(t, *rest, **named), inplace)
        if len(_plans) >= MAX_PLANS:  # parameters that change at every call, as in adaptive clipping
            _plans.clear()
        _plans[key] = plan
    if plan.two_valued is not None and not plan.two_valued.holds_in(x.dtype):
        raise Keep(NOT_TWO_VALUED)
    if ops.must_be_ready(x):
        try:
            ready = plan.is_ready(x.dtype, x.device)
        except FewbitError as error:  # its kernels there are unlike those here
            raise Keep(str(error)) from None
        if not ready:
            raise Keep(CAPTURING)
        if ops.is_captured(x):
            _captured.add(plan)
    return plan


def _limit_own(activation: _activations.Activation, parameters: Mapping[str, Any]) -> None:
    if parameters == dict(activation.parameters):
        return
    seen = _own_parameters.setdefault(activation.name, set())
    key = tuple(parameters.items())
    if key not in seen and len(seen) >= OWN_CODEBOOKS:
        raise Keep(f"more than {OWN_CODEBOOKS} combinations of {activation.name}'s parameters")
    seen.add(key)
