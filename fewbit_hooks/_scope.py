"""The scope: what happens to the tensors that autograd saves inside it.

Read this first. A scope is open on a thread (`_stack.py`). While it is, a `TorchFunctionMode` sees every torch call of
that thread. Calls that are not in the registry (`_calls.py`) run as they are, with no hooks at all. Around a recognised
call, the policy (`_policy.py`) having nothing against it, two saved-tensor hooks are put (`_hooks.py`): the pack hook
replaces what the node saves by packed codes (`ops/`), the unpack hook hands it stand-ins (`_standins.py`), for which
the node's own backward gives the derivative that the codebook (`_codebook.py`) has for each code. What is done with one
call is decided in `_treatment.py`, of what is known (`_learning.py`) of its place (`_sites.py`); what a logarithm is
taken of is kept after all (`_steep.py`). What dropout and its like save, a mask, is packed to one bit an element as it
is (`_masks.py`); modules that are written in primitives are treated as a whole (`_composites.py`); under
`recompute=True` what is cheap is computed again (`_recompute.py`, `_recipes.py`). Under `engine="fused"` a call gets a
node of our own in place of PyTorch's, whose backward is one product (`_one_node.py`); on CUDA the kernel that computes
the activation makes the codes (`_fused.py`), and gated units are one kernel (`_gated.py`). A function that is compiled
has codes in its graph (`_compiled.py`). The ledger (`_ledger.py`) keeps the books.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import warnings
from collections.abc import Callable, Generator, Iterator
from types import TracebackType
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from . import (
    _built_in,
    _compiled,
    _copies,
    _fast_path,
    _gated,
    _masks,
    _plan,
    _policy,
    _recipes,
    _recompute,
    _stack,
    _steep,
    _treatment,
)
from ._calls import BACKWARD, RECOGNISED, Call
from ._errors import FewbitError, FewbitTypeError, FewbitWarning
from ._ledger import HELD, Ledger
from ._mask_calls import MaskCall
from ._policy import Bits, Exclude
from ._recompute_calls import EXPOSES, RECOMPUTE
from ._report import Report
from ._sites import learned_under
from ._steep import STEEP, any_recent

P = ParamSpec("P")
R = TypeVar("R")


class scope:
    """Inside it, what autograd keeps of each recognised activation shrinks to `bits` bits an element.

    >>> import torch, fewbit_hooks as fewbit
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 10))
    >>> with fewbit.scope(bits=3, min_bytes=0) as memory:
    ...     loss = model(torch.randn(32, 64)).square().mean()
    >>> loss.backward()
    >>> memory.report().original_bytes, memory.report().stored_bytes
    (32768, 3072)

    The forward is bit for bit what it was; the gradients are those of a piecewise-constant derivative, or, for
    activations whose derivative has two values (relu and its like), exactly stock's. Backward may run inside or
    outside of the scope.

    It decorates functions, methods and generator functions (which are inside while their own code runs). It nests: the
    innermost scope wins, so `scope(bits=None)` inside another keeps a region exact. One object may be entered again,
    reused, and used by several threads; it is in force on the threads that entered it, and on no other. A scope is
    about the thread, not the asyncio task: tasks that interleave on one thread share what is open on it. What others
    keep of a model's tensors is learned by all scopes of equal settings together: a new one for each step is as good.

    Args:
        bits: 1 to 8 for the smooth activations (the two-valued ones take 1). Or a mapping such as
            `{"gelu": 2, "silu": 4, "default": 3}`, where None keeps an activation exact, as does leaving a smooth one
            out without a "default"; masks ("dropout", "masked_fill", "scaled_dot_product_attention", "where") always
            take 1; or a callable `(activation_name, tensor) -> int | None`; or None: measure only.
        min_bytes: tensors smaller than this many bytes pass through. 0: none do.
        exclude: modules left alone: names as `model.named_modules()` gives them (glob patterns), classes, predicates.
        exact: only what is lossless.
        recompute: what is cheap to compute again from tensors that are kept anyway (activations' outputs, norms,
            products, casts, dropped inputs) is not kept itself where a Linear, matmul, convolution or product would
            save it, but computed again in backward, bit for bit. With `exact=True` nothing else is done.
        engine: "hooks": PyTorch's own nodes, which are handed stand-ins. "fused": where the derivative is approximated,
            a node of the library's own, whose backward is one product; on CUDA one Triton kernel computes an activation
            and its codes, where it has the formula, and the forward may differ from PyTorch's in the last places.
            "auto" is the hooks: "fused" is not yet measured on a GPU.
        codebooks: codebooks to use in place of the built-in ones, each for its activation and parameters, with its
            own bits.

    Raises:
        FewbitError: an argument is wrong (FewbitTypeError, FewbitValueError), or `engine="fused"` finds CUDA without
            the package triton.

    What it cannot compress it keeps exact, and `report()` says how much and why. Double backward (`create_graph=True`)
    through a compressed activation raises a FewbitError. Setting FEWBIT_DISABLE=1 in the environment turns every scope
    into a no-op.

    Source: Novikov et al., "Few-Bit Backward", arXiv:2202.00441, section 3.
    """

    def __init__(
        self,
        bits: Bits = 3,
        *,
        min_bytes: int = 65536,
        exclude: Exclude = (),
        exact: bool = False,
        recompute: bool = False,
        engine: str = "auto",
        codebooks: Any = (),
    ) -> None:
        self._settings = _policy.check_settings(bits, min_bytes, exclude, exact, recompute, engine, codebooks)
        self._begin_books()

    def _begin_books(self) -> None:
        self._sites = learned_under(self._settings.identity())
        self._ledger = Ledger(self._sites)
        self._warned = self._looked_at_names = False

    def __repr__(self) -> str:
        settings, default = self._settings, _policy.Settings()
        names = ("exact", "recompute", "engine")
        changed = [
            f"{name}={value!r}" for name in names if (value := getattr(settings, name)) != getattr(default, name)
        ]
        if settings.exclude.rules:
            changed.append(f"exclude={settings.exclude.rules!r}")
        if settings.codebooks:
            changed.append(f"codebooks={[book for books in settings.codebooks.values() for book in books]!r}")
        return f"fewbit_hooks.scope({', '.join([f'bits={settings.bits!r}, min_bytes={settings.min_bytes}', *changed])})"

    def __enter__(self) -> scope:
        self._enter(enabled=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        mine = [entry for entry in _stack.entries() if entry.scope is self and not entry.enabled]
        if not mine:
            raise FewbitError("this scope is not open on this thread: it is left on the thread that entered it")
        self._leave(mine[-1], failed=kind is not None)
        if kind is None and not mine[-1].inert:
            self._warn_if_nothing_was_compressed()
            self._warn_of_names_that_no_module_has()

    def _enter(self, *, enabled: bool) -> _stack.Entry:
        entry = _stack.Entry(self, inert=_policy.disabled(), enabled=enabled)
        if not entry.inert:
            _built_in.find_built_in()
            _fast_path.keep_open()
            if entry.by_kernels:
                _gated.find_gated()
        _stack.push(entry, _Mode)
        return entry

    def _leave(self, entry: _stack.Entry, *, failed: bool = False) -> None:
        _stack.remove(entry)
        _masks.look_again()
        _steep.forget()
        if not _stack.entries():
            _recipes.forget()
        self._ledger.settle(failed=failed)

    @contextlib.contextmanager
    def _open(self) -> Iterator[None]:
        entry, failed = self._enter(enabled=False), True
        try:
            yield
            failed = False
        finally:
            self._leave(entry, failed=failed)

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        """Decorate a function, a method or a generator function."""
        if inspect.isclass(function):
            raise FewbitTypeError(
                f"a scope decorates functions, got the class {function.__name__}: decorate its forward"
            )
        called = function if inspect.isroutine(function) else getattr(function, "__call__", function)  # noqa: B004
        if inspect.iscoroutinefunction(called) or inspect.isasyncgenfunction(called):
            name = getattr(function, "__name__", function)
            raise FewbitTypeError(
                f"a scope does not decorate the coroutine function {name}: other tasks would run inside "
                "it while it awaits. Open the scope inside, around code that does not await."
            )
        argument: Any = function
        if not callable(argument):
            given = (
                f"a tensor of shape {list(argument.shape)}" if isinstance(argument, torch.Tensor) else repr(argument)
            )
            missing = "; the decorator is @scope(), with parentheses" if callable(self._settings.bits) else ""
            raise FewbitTypeError(f"a scope decorates functions, got {given}{missing}")
        generates = inspect.isgeneratorfunction(called)
        run = cast(Callable[..., R], self._run_generator if generates else self._run)
        if not inspect.isroutine(function) or inspect.ismethod(function):
            # A bound method or a module, say: a copy of whoever holds the result must call its copy. Functions are
            # never copied, and neither is what they close over.
            updated = () if isinstance(function, nn.Module) else functools.WRAPPER_UPDATES
            held: Any = functools.partial(run, function)
            return cast(Callable[P, R], functools.update_wrapper(held, cast(Any, function), updated=updated))
        if generates:

            @functools.wraps(function)
            def generator(*args: P.args, **kwargs: P.kwargs) -> Any:
                return (yield from run(function, *args, **kwargs))  # type: ignore[misc]

            return generator

        @functools.wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            return run(function, *args, **kwargs)

        return wrapper

    def _run(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        if _compiled.is_exporting():  # what is exported is the function, and a strict export enters no scope
            return function(*args, **kwargs)
        with self:
            return function(*args, **kwargs)

    def _run_generator(
        self, function: Callable[P, Generator[Any, Any, Any]], /, *args: P.args, **kwargs: P.kwargs
    ) -> Generator[Any, Any, Any]:
        generator = function(*args, **kwargs)
        resume: Callable[[], Any] = functools.partial(next, generator)
        try:
            while True:
                with self._open():  # only while the generator's own code runs, not the caller's between two items
                    try:
                        item = resume()
                    except StopIteration as stop:
                        return stop.value
                try:
                    sent = yield item
                    resume = functools.partial(generator.send, sent)
                except GeneratorExit:
                    raise
                except BaseException as error:
                    resume = functools.partial(generator.throw, error)
        finally:
            with self:  # this, the last time, looks whether anything was compressed
                generator.close()

    def report(self) -> Report:
        """What the latest step saved, stored and freed, by activation and module, and what was kept and why.

        A step is all that was saved since the last backward began.
        """
        return Report.from_ledger(self._ledger, self._settings.bits is None)

    def _warn_if_nothing_was_compressed(self) -> None:
        if self._warned or self._settings.bits is None or not torch.is_grad_enabled():
            return
        rows = self._ledger.rows()
        if any(row.bits is not None for row in rows):
            self._warned = True  # once it has compressed something it needs no such warning any more
            return
        if any(row.reason in (_plan.NOT_FINITE, HELD) for row in rows):
            return  # the next step will be another; that nothing can be freed was learned where something was coded
        self._warned = True
        if _compiled.traced and not rows:
            return  # what compiled graphs keep is not counted
        reasons = sorted({f"{row.reason} ({row.activation})" for row in rows})
        why = "; ".join(reasons) or (
            "no recognised activation was called with an input that requires grad. Calls inside scripted "
            "functions are not seen; `python -m fewbit_hooks doctor` lists the recognised ones"
        )
        warnings.warn(f"fewbit_hooks.scope compressed nothing: {why}.", FewbitWarning, stacklevel=3)

    def _warn_of_names_that_no_module_has(self) -> None:
        exclude = self._settings.exclude
        models = exclude.models() if exclude.rules and not self._looked_at_names else []
        if not models:  # none was seen yet
            return
        self._looked_at_names = True
        for name in exclude.misses():
            warnings.warn(
                f"exclude={name!r} names no module of {', '.join(models)}. Names are those that "
                "`named_modules()` of the outermost module that is called gives, or glob patterns of them.",
                FewbitWarning,
                stacklevel=3,
            )

    # A copy or an unpickled scope has the settings, and books of its own.
    def __getstate__(self) -> dict[str, Any]:
        return {"_settings": self._settings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin_books()


class _Mode(TorchFunctionMode):
    """Sees every torch call of its thread. One a thread; `entry` is the active scope's."""

    entry: _stack.Entry | None = None

    @_compiled.never_by_itself
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        call = RECOGNISED.get(func)
        if call is None:
            entry = self.entry
            if (
                entry is not None
                and (entry.recomputes or entry.inside or EXPOSES.get(func) or any_recent())
                and not torch.compiler.is_compiling()
            ):
                operand = STEEP.get(func)
                if operand is not None:
                    _compiled.plainly(functools.partial(_steep.look, operand, args, kwargs or {}))
                again = RECOMPUTE.get(func)
                if again is not None:
                    if torch._C._len_torch_function_stack():
                        return _stack.beneath(self, func, args, kwargs or {})
                    return _compiled.plainly(functools.partial(_recompute.run, entry, again, func, args, kwargs))
            return func(*args, **kwargs) if kwargs else func(*args)
        kwargs = kwargs or {}
        if call is BACKWARD:
            _recipes.forget()
            _steep.forget()
            for entry in _stack.entries():
                entry.scope._ledger.step.begin_backward()
            return func(*args, **kwargs)
        if self.entry is None:
            return func(*args, **kwargs)
        if torch.compiler.is_compiling():
            # what modes around make of it is not known here
            return _compiled.run(None if _stack.others_see() else self.entry.coding, call, func, args, kwargs)
        if torch._C._len_torch_function_stack():  # modes of others lie around the scope
            return _stack.beneath(self, func, args, kwargs)
        if _compiled.callback() is None:
            return _run(self.entry, call, func, args, kwargs)
        return _compiled.plainly(functools.partial(_run, self.entry, call, func, args, kwargs))


def _run(entry: _stack.Entry, call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Make a recognised call."""
    if call is _copies.COPY:
        return _copies.run(entry, func, args, kwargs)
    if torch._C._get_tracing_state() is not None:
        # the same line with and without gradients: torch.jit.trace compares where its two runs' calls come from
        if torch.is_grad_enabled():
            entry.scope._ledger.passed(call.name, _policy.TRACING, 0)
        return func(*args, **kwargs)
    if not torch.is_grad_enabled():
        return func(*args, **kwargs)
    if isinstance(call, MaskCall):
        return _masks.run(entry, call, func, args, kwargs)
    return _treatment.run(entry, call, func, args, kwargs)
