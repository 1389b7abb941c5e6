"""The recorder: every tensor that autograd keeps of a step, by the operation and the module that keep it.

Saved-tensor hooks are told a tensor, never the operation; a `TorchFunctionMode` sees the operation, never what it
keeps. Together they know both. For a profile, and only for one, the hooks are on for the whole step; the pack hook
hands autograd a `Kept` in place of the tensor, of which the recorder holds a weak reference: what is dropped of the
graph before the forward ends was not kept, and is not counted.

Beside what is kept, the recorder writes down what a scope would see in each call (`_seen.py`). Modules that a scope
treats as a whole hand it their forward (`run_composite`), so that what their primitives keep is known as theirs.

Custom autograd Functions are no torch calls, and from torch 2.14 on `apply` has no Python frame: of what no torch call
saves, it is noted at which place in autograd's sequence that was, and when the forward is over the graph tells which
node is the latest before it. What such a Function keeps as attributes of `ctx`, and not by `save_for_backward`, passes
no hook.
"""

from __future__ import annotations

import bisect
import weakref
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import _built_in, _consumers, _graph, _stack
from ._calls import BACKWARD, RECOGNISED
from ._compiled import never_by_itself
from ._composites import Composite
from ._hooked import innermost_hooks
from ._hooks import Kept, unpack
from ._mask_calls import MaskCall
from ._modules import innermost_module, outermost_module, parameters_of
from ._recompute_calls import RECOMPUTE
from ._recording import ACTIVATION, IN, MADE, OUT, Operation, Saved
from ._seen import Seen
from ._steep import KEPT, RECENT, SATURATE, STEEP, made_of
from ._storages import StorageWeakRef

UNSEEN = "(no torch call)"
"""What is saved neither by a torch call nor by a custom Function: scripted functions, C++ extensions."""


@dataclass(slots=True)
class _Current:
    """The torch call that is running; it becomes an operation when it saves something."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    operation: Operation | None = None
    first: int = 0

    @property
    def name(self) -> str:
        """Of the activation, or else torch's own."""
        call = RECOGNISED.get(self.function)
        return _name(self.function) if call is None or isinstance(call, MaskCall) else call.name


class Recorder(TorchFunctionMode):
    """Inside it, all that autograd is given to keep is recorded, until a backward begins.

    Attributes:
        saved: what is kept at the end, in the order of saving.
        operations: the calls, in their order; those of primitives are parts of their module's.
        own: the storages of parameters and buffers.
        opaque: custom autograd Functions in the graph: name -> nodes.
        others: calls that ran inside other people's saved-tensor hooks: whose -> calls.
        uncounted: saved tensors without a storage (sparse): layout -> tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.saved: list[Saved] = []
        self.operations: list[Operation] = []
        self.own: set[int] = set()
        self.opaque: Counter[str] = Counter()
        self.others: Counter[str] = Counter()
        self.uncounted: Counter[str] = Counter()
        self.frozen = False
        self._noted: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._weak: dict[int, StorageWeakRef] = {}  # keeps the address of a storage that is gone from being used again
        self._current: _Current | None = None
        self._within: Operation | None = None
        self._recent: deque[tuple[int, Operation]] = deque(maxlen=RECENT)  # and the numbers of their nodes
        self._unseen: list[tuple[int, Operation]] = []  # autograd's sequence number when it saved something
        self._pack_hook = self._pack  # one bound method, to be recognised as the innermost hook
        self._seen = Seen(self._key, self._pack_hook)
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack_hook, unpack)

    def __enter__(self) -> Recorder:
        _built_in.find_built_in()
        self._stacked = _stack.recording(self)
        self._stacked.__enter__()
        self._modules = nn.modules.module.register_module_forward_pre_hook(self._note_module)
        self._hooks.__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(kind, value, traceback)  # type: ignore[no-untyped-call]
        self._hooks.__exit__(kind, value, traceback)
        self._modules.remove()
        self._stacked.__exit__(kind, value, traceback)

    def freeze(self, roots: Iterable[Tensor]) -> None:
        """The forward is over: strike off what is no longer kept, and look at the nodes of the graph."""
        if not self.frozen:
            self.frozen = True
            self.saved = [saved for saved in self.saved if saved.held() is not None]
            nodes = sorted(_graph.nodes(roots), key=lambda node: node._sequence_nr())
            self.opaque.update(name for node in nodes if (name := _custom_function(node)))
            self._name_unseen(nodes)

    def note_own(self, tensors: Iterable[Tensor]) -> None:
        """These belong to the model: they are listed, and not counted."""
        self.own |= self.storages(tensors)

    def storages(self, tensors: Iterable[Tensor]) -> set[int]:
        """The names of their storages."""
        with torch._C.DisableTorchFunction():
            return {key for t in tensors if (key := self._key(t))}

    @never_by_itself
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            return func(*args, **kwargs)
        if RECOGNISED.get(func) is BACKWARD:
            self.freeze(tensors_in(args[:1] or tuple(kwargs.values())[:1]))
        if self.frozen or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if (operand := STEEP.get(func)) is not None and self._recent:
            self._look(operand.of(args, kwargs))
        outer, self._current = self._current, _Current(func, args, kwargs, first=len(self.saved))
        try:
            result = func(*args, **kwargs)
            if self._current.operation is None and not _is_attribute(func):
                innermost = innermost_hooks()
                if innermost is None or innermost[0] is not self._pack_hook:
                    self.others[getattr(innermost and innermost[0], "__module__", "")] += 1
            with torch._C.DisableTorchFunction():
                self._finish(self._current, result)
            return result
        finally:
            self._current = outer

    def run_composite(
        self, composite: Composite, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run the forward of a module that a scope would run as one node."""
        operation = None
        if self._within is None and not self.frozen:
            with torch._C.DisableTorchFunction():
                what = self._seen.composite(composite, module, args, kwargs)
                operation = self._new(composite.name, **what) if what else None
        if operation is None:
            return composite.forward(module, *args, **kwargs)
        self._within = operation
        try:
            y = composite.forward(module, *args, **kwargs)
        finally:
            self._within = None
        self.operations.append(operation)
        if isinstance(y, Tensor):
            with torch._C.DisableTorchFunction():
                operation.y = self._seen.ref(y)
        return y

    def _pack(self, t: Tensor) -> Kept:
        with torch._C.DisableTorchFunction():
            operation = self._operation()
            held = Kept(t, operation.name)
            if not self.frozen:
                leaf = t.grad_fn is None
                t = getattr(t, "_local_tensor", t)  # a DTensor's own part
                if key := self._key(t):
                    nbytes = t.untyped_storage().nbytes()
                    self.saved.append(Saved(operation, weakref.ref(held), key, nbytes, t.dtype, t.shape, leaf))
                    self.saved[-1].copy_of = self._copied(t)
                else:
                    self.uncounted[str(t.layout).removeprefix("torch.")] += 1
        return held

    def _operation(self) -> Operation:
        """That of the running call; or a new one, of whatever saves a tensor outside of any."""
        if self._current is not None:
            if self._current.operation is None:
                self._current.operation = self._new(self._current.name)
            return self._current.operation
        operation = self._new(UNSEEN)
        self._unseen.append((torch._C._autograd._get_sequence_nr(), operation))
        self._append(operation)
        return operation

    def _name_unseen(self, nodes: list[Any]) -> None:
        """Of what was saved outside of a torch call, find the custom Functions.

        Args:
            nodes: those of the graph, in the order in which they were made. A node is made before it saves anything,
                and what a Function's forward records for itself is not of the graph.
        """
        numbers = [node._sequence_nr() for node in nodes]
        for number, operation in self._unseen:
            latest = bisect.bisect_left(numbers, number) - 1
            name = _custom_function(nodes[latest]) if latest >= 0 else ""
            if name:
                operation.name, operation.custom = name, True

    def _new(self, name: str, **what: Any) -> Operation:
        module, model = innermost_module(), outermost_module()
        return Operation(
            name,
            weakref.ref(module) if module is not None else None,
            weakref.ref(model) if model is not None else None,
            within=self._within,
            **what,
        )

    def _append(self, operation: Operation) -> None:
        (self.operations if self._within is None else self._within.parts).append(operation)

    def _finish(self, current: _Current, result: Any) -> None:
        """The call is over: what were the tensors to it, and what would a scope see in it?"""
        if current.operation is not None:
            inputs = {self._key(t) for t in tensors_in((current.args, current.kwargs))}
            outputs = {self._key(t) for t in tensors_in(result)}
            for saved in self.saved[current.first :]:
                saved.role = OUT if saved.storage in outputs else IN if saved.storage in inputs else MADE
        y = result if isinstance(result, Tensor) else None
        what = self._seen.call(current.function, current.args, current.kwargs, y, self.saved[current.first :])
        if current.operation is None and not what:
            return
        operation = self._operation()
        for key, value in what.items():
            setattr(operation, key, value)
        if what and y is not None:
            operation.y = self._seen.ref(y)
            if what.get("kind") == ACTIVATION and operation.name in SATURATE and y.grad_fn is not None:
                self._recent.append((y.grad_fn._sequence_nr(), operation))
        self._append(operation)

    def _look(self, t: Any) -> None:
        """A logarithm, or a quotient, is about to be taken: what it is taken of a scope would keep."""
        numbers = made_of(t, {number for number, _ in self._recent})
        for number, operation in self._recent:
            if number in numbers and not operation.reason:
                operation.reason = KEPT

    def _copied(self, t: Tensor) -> int:
        """The storage of the operand that a consumer's saved tensor is autocast's copy of."""
        current = self._current
        if current is None or current.function not in RECOMPUTE or t.grad_fn is None:
            return 0
        operands = (o for o in (*current.args, *current.kwargs.values()) if isinstance(o, Tensor))
        return next((self._key(o) for o in operands if _consumers.is_autocast_of(t, o)), 0)

    def _key(self, t: Tensor) -> int:
        """The address of the storage, its name as long as the recorder lives; 0 where there is none."""
        if t.layout is not torch.strided or (t.is_nested and type(t) is not Tensor):
            return 0
        storage = t.untyped_storage()
        if storage._cdata not in self._weak:
            self._weak[storage._cdata] = StorageWeakRef(storage)
        return int(storage._cdata)

    def _note_module(self, module: nn.Module, _: Any) -> None:
        # a parameter may be used without its module's forward: DeBERTa normalises the weight of an Embedding
        new = module not in self._noted
        if new:
            self._noted.update(module.modules())
        self.note_own(parameters_of(module, recurse=new))
        self.note_own(module.buffers(recurse=new))


def _is_attribute(function: Any) -> bool:
    return getattr(function, "__name__", "") in ("__get__", "__set__")


def _name(function: Any) -> str:
    """`linear` of F.linear, `matmul` of Tensor.__matmul__, `gelu` of torch.ops.aten.gelu.default."""
    name = getattr(function, "__name__", None) or str(function)
    if name == "__get__":
        name = getattr(getattr(function, "__self__", None), "__name__", name)
    return str(name).removeprefix("aten.").partition(".")[0].strip("_") or str(name)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors_in(part)
    elif isinstance(value, dict):
        yield from tensors_in(tuple(value.values()))


def _custom_function(node: Any) -> str:
    """The name of a custom Function's node, Python's or C++'s; empty for all others."""
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        return type(node).__name__.removesuffix("Backward")
    name: str = node.name()
    return name if "CppNode" in name else ""
