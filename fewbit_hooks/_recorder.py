"""The recorder: every tensor that autograd keeps of a step, by the operation and the module that keep it.

Saved-tensor hooks are told a tensor, never the operation; a `TorchFunctionMode` sees the operation, never what it
keeps. Together they know both. For a profile, and only for one, the hooks are on for the whole step; the pack hook
hands autograd a `Kept` in place of the tensor, of which the recorder holds a weak reference: what is dropped of the
graph before the forward ends was not kept, and is not counted.

Custom autograd Functions are no torch calls; the Python frame of their `apply` names them. What they keep as
attributes of `ctx`, and not by `save_for_backward`, passes no hook.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from . import _composites, _policy, ops
from ._calls import BACKWARD, RECOGNISED, Call
from ._hooks import Kept, unpack
from ._mask_calls import MaskCall
from ._modules import ModuleRef, innermost_module, outermost_module

_APPLY = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]
UNSEEN = "(no torch call)"
"""What is saved neither by a torch call nor by a custom Function: scripted functions, C++ extensions."""

IN, OUT, MADE = "input", "output", "made by the call"


@dataclass(eq=False, slots=True)
class Operation:
    """One call that keeps something for backward.

    Attributes:
        name: of the torch call, the activation or the custom Function.
        module, model: the innermost and the outermost module it was made in.
        call: what the scope recognises it as; None otherwise.
        reason: why a scope would keep a recognised call exact; empty where it would not.
        x_bytes, x_shape: of a recognised call's input.
        input: of a composite, the storage of its input.
        output: the storage of its output.
        beside_output: bits an element that the derivative takes beside it; None where it cannot be had from it.
        custom: it is a custom autograd Function.
        composite: it is a whole module, written in primitives, that a scope runs as one node.
    """

    name: str
    module: ModuleRef | None
    model: ModuleRef | None
    call: Call | None = None
    reason: str = ""
    x_bytes: int = 0
    x_shape: torch.Size | None = None
    input: int = 0
    output: int = 0
    beside_output: int | None = None
    custom: bool = False
    composite: bool = False


@dataclass(eq=False, slots=True)
class Saved:
    """One tensor that an operation keeps.

    Attributes:
        storage, nbytes: the storage that it is in, all of it.
        role: what it is to the operation: its input, its output, or made by the call.
        leaf: it is not the result of an operation that autograd records.
        mask: it has two values, one of them 0, so that a bit an element is exact.
    """

    operation: Operation
    held: weakref.ref[Kept]
    storage: int
    nbytes: int
    dtype: torch.dtype
    shape: torch.Size
    leaf: bool
    role: str = MADE
    mask: bool = False

    @property
    def numel(self) -> int:
        """Elements of the tensor."""
        return self.shape.numel()

    @property
    def tensor_bytes(self) -> int:
        """Bytes of the tensor, which may be a part of its storage."""
        return self.numel * self.dtype.itemsize


@dataclass(slots=True)
class _Current:
    """The torch call that is running; it becomes an operation when it saves something."""

    function: Any
    call: Call | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    operation: Operation | None = None
    first: int = 0


class Recorder(TorchFunctionMode):
    """Inside it, all that autograd is given to keep is recorded, until a backward begins.

    Attributes:
        saved: what is kept at the end, in the order of saving.
        own: the storages of parameters and buffers.
        opaque: custom autograd Functions in the graph: name -> nodes.
        others: calls that ran inside other people's saved-tensor hooks: whose -> calls.
        uncounted: saved tensors without a storage (sparse): layout -> tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.saved: list[Saved] = []
        self.own: set[int] = set()
        self.opaque: Counter[str] = Counter()
        self.others: Counter[str] = Counter()
        self.uncounted: Counter[str] = Counter()
        self.frozen = False
        self._weak: dict[int, StorageWeakRef] = {}  # keeps the address of a storage that is gone from being used again
        self._current: _Current | None = None
        self._composite: tuple[nn.Module, Operation] | None = None  # that is running
        self._pack_hook = self._pack  # one bound method, to be recognised as the innermost hook
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack_hook, unpack)

    def __enter__(self) -> Recorder:
        _composites.find_built_in()
        self._modules = nn.modules.module.register_module_forward_pre_hook(self._note_module)
        self._after = nn.modules.module.register_module_forward_hook(self._end_composite)
        self._hooks.__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(kind, value, traceback)  # type: ignore[no-untyped-call]
        self._hooks.__exit__(kind, value, traceback)
        self._modules.remove()
        self._after.remove()

    def freeze(self, roots: Iterable[Tensor]) -> None:
        """The forward is over: strike off what is no longer kept, and look at the nodes of the graph."""
        if not self.frozen:
            self.frozen = True
            self.saved = [saved for saved in self.saved if saved.held() is not None]
            self.opaque.update(_custom_functions(roots))

    def note_own(self, tensors: Iterable[Tensor]) -> None:
        """These belong to the model: they are listed, and not counted."""
        self.own |= self.storages(tensors)

    def storages(self, tensors: Iterable[Tensor]) -> set[int]:
        """The names of their storages."""
        with torch._C.DisableTorchFunction():
            return {key for t in tensors if (key := self._key(t))}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            return func(*args, **kwargs)
        call = RECOGNISED.get(func)
        if isinstance(call, MaskCall):
            call = None  # its masks are known by what they are
        if call is BACKWARD:
            self.freeze(tensors_in(args[:1] or tuple(kwargs.values())[:1]))
        if self.frozen or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        outer, self._current = self._current, _Current(func, call, args, kwargs, first=len(self.saved))
        try:
            result = func(*args, **kwargs)
            if self._current.operation is not None:
                self._finish(self._current, result)
            elif (innermost := _policy.innermost_hooks()) is not self._pack_hook and not _is_attribute(func):
                self.others[getattr(innermost, "__module__", "")] += 1
            return result
        finally:
            self._current = outer

    def _pack(self, t: Tensor) -> Kept:
        with torch._C.DisableTorchFunction():
            operation = self._operation(sys._getframe(1))
            held = Kept(t, operation.name)
            if not self.frozen:
                leaf = t.grad_fn is None
                t = getattr(t, "_local_tensor", t)  # a DTensor's own part
                if key := self._key(t):
                    nbytes = t.untyped_storage().nbytes()
                    self.saved.append(Saved(operation, weakref.ref(held), key, nbytes, t.dtype, t.shape, leaf))
                else:
                    self.uncounted[str(t.layout).removeprefix("torch.")] += 1
        return held

    def _operation(self, frame: FrameType | None) -> Operation:
        if self._composite is not None:
            return self._composite[1]
        current = self._current
        if current is not None and current.operation is not None:
            return current.operation
        custom = current is None and frame is not None and frame.f_code is _APPLY
        if current is not None:
            name = current.call.name if current.call is not None else _name(current.function)
        else:
            name = frame.f_locals["cls"].__name__ if custom and frame is not None else UNSEEN
        module, model = innermost_module(), outermost_module()
        operation = Operation(
            name,
            weakref.ref(module) if module is not None else None,
            weakref.ref(model) if model is not None else None,
            custom=custom,
        )
        if current is not None:
            current.operation = operation
        return operation

    def _finish(self, current: _Current, result: Any) -> None:
        """The call is over: what were the tensors to it, and would a scope take it?"""
        operation, call = current.operation, current.call
        assert operation is not None
        inputs = {self._key(t) for t in tensors_in((current.args, current.kwargs))}
        outputs = [self._key(t) for t in tensors_in(result)]
        operation.output = outputs[0] if outputs else 0
        for saved in self.saved[current.first :]:
            saved.role = OUT if saved.storage in outputs else IN if saved.storage in inputs else MADE
            held = saved.held()
            if saved.role == MADE and held is not None:
                saved.mask = _is_mask(held.tensor, operation.name)
        if call is None or not isinstance(x := call.input(current.args, current.kwargs), Tensor):
            return
        self._recognise(operation, call, current.function, current.args, current.kwargs, x)

    def _recognise(
        self, operation: Operation, call: Call, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor
    ) -> None:
        operation.call, operation.x_bytes, operation.x_shape = call, x.numel() * x.element_size(), x.shape
        operation.reason = _policy.obstacle(x, self._pack_hook)
        if not operation.reason:
            try:
                inverse = _policy.make_plan(_policy.Settings(), call, function, args, kwargs, x).inverse(x)
                operation.beside_output = None if inverse is None else inverse.bits
            except _policy.Keep as keep:
                operation.reason = str(keep)

    def _key(self, t: Tensor) -> int:
        """The address of the storage, its name as long as the recorder lives; 0 where there is none."""
        if t.layout is not torch.strided or (t.is_nested and type(t) is not Tensor):
            return 0
        storage = t.untyped_storage()
        if storage._cdata not in self._weak:
            self._weak[storage._cdata] = StorageWeakRef(storage)
        return int(storage._cdata)

    def _note_module(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.note_own(module.parameters(recurse=False))
        self.note_own(module.buffers(recurse=False))
        if self._composite is not None or self.frozen or not args or not torch.is_grad_enabled():
            return
        composite = _composites.acts_as(module, x := args[0])
        if composite is None or composite.call is None or composite.call.activation is None:
            return
        operation = Operation(composite.name, weakref.ref(module), weakref.ref(outermost_module() or module))
        operation.composite = True
        with torch._C.DisableTorchFunction():
            operation.input = self._key(x)
            function = composite.call.activation.function
            self._recognise(operation, composite.call, function, (x,), dict(composite.parameters), x)
        self._composite = module, operation

    def _end_composite(self, module: nn.Module, _: Any, output: Any) -> None:
        if self._composite is None or self._composite[0] is not module:
            return
        _, operation = self._composite
        self._composite = None
        with torch._C.DisableTorchFunction():
            operation.output = next((self._key(t) for t in tensors_in(output)), 0)
        for saved in self.saved:
            if saved.operation is operation and saved.storage == operation.input:
                saved.role = IN


ATTENTION = ("scaled_dot_product_attention", "multi_head_attention_forward")


def _is_mask(t: Tensor, operation: str) -> bool:
    if t.dtype is torch.bool:
        return True
    draws_a_mask = "dropout" in operation or operation in ATTENTION
    return draws_a_mask and t.dtype in _policy.DTYPES and t.numel() > 0 and ops.second_value(t) is not None


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


def _custom_functions(roots: Iterable[Tensor]) -> Iterator[str]:
    """The names of the nodes of custom Functions, Python's and C++'s."""
    stack: list[Any] = [root.grad_fn for root in roots]
    seen: set[Any] = {None}
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            yield type(node).__name__.removesuffix("Backward")
        elif "CppNode" in node.name():
            yield node.name()
        stack.extend(following for following, _ in node.next_functions)
