"""What a scope would free of what a step keeps: the rules, applied to a recording.

| the recognised call's saved storage                       | what a scope stores for it           | frees     |
| --------------------------------------------------------- | ------------------------------------ | --------- |
| another node, the model or the user keeps it, too         | nothing: the call is left alone      | nothing   |
| only it keeps it; another node keeps the output           | 0 or 1 bit an element, see below     | all of it |
| only it keeps it; the derivative has two values           | 1 bit an element, exact              | all of it |
| only it keeps it; smooth                                  | `bits` an element                    | all of it |
| a mask that the call made (dropout), which only it keeps  | 1 bit an element, exact              | all of it |
| what a composite, run as one node, makes in between       | as its input; nothing if that stays  | all of it |

The output and at most a bit determine the derivative: none where the function is monotone, the side of the minimum
where it has one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from . import _policy, ops
from ._recorder import IN, Operation, Saved

SHARED = "kept: somebody else keeps it"
AGAIN = "kept: run again from it"


@dataclass(frozen=True)
class Prediction:
    """What a scope would do to the step.

    Attributes:
        setting: "3 bits", or "exact".
        stored_bytes: codes.
        freed_bytes: storages that would be gone.
        held_bytes: what would be held for the step's backward in all.
    """

    setting: str
    stored_bytes: int
    freed_bytes: int
    held_bytes: int


@dataclass(frozen=True)
class Outlook:
    """What becomes of each storage.

    Attributes:
        freed: storage -> how it is coded ("3 bits", "1 bit, exact").
        kept: storage -> why a recognised call's is kept.
        stored_bytes: the codes.
    """

    freed: Mapping[int, str]
    kept: Mapping[int, str]
    stored_bytes: int


def predict(
    saved: Iterable[Saved], bits: int, *, exact: bool = False, min_bytes: int = 65536, own: Collection[int] = ()
) -> Outlook:
    """Apply the table above.

    Args:
        saved: what autograd keeps.
        bits, exact, min_bytes: of the scope.
        own: storages that the model or the user keeps anyway.
    """
    saved = list(saved)
    kept: dict[int, str] = {}
    coded: dict[Operation, list[Saved]] = {}
    for tensor in saved:
        reason = _obstacle(tensor, exact, min_bytes)
        if reason is None:
            coded.setdefault(tensor.operation, []).append(tensor)
        elif reason:
            kept[tensor.storage] = reason
    while True:  # a call that is left alone keeps its tensors, and so may leave others with nothing to free
        chosen = {tensor for tensors in coded.values() for tensor in tensors}
        held = {tensor.storage for tensor in saved if tensor not in chosen}.union(own)
        width = {operation: _bits(operation, tensors, bits, held) for operation, tensors in coded.items()}
        idle = [
            operation
            for operation, tensors in coded.items()
            if sum({t.storage: t.nbytes for t in tensors if t.storage not in held}.values())
            <= _code_bytes(operation, tensors, width[operation])
        ]
        if not idle:
            break
        for operation in idle:
            kept.update((tensor.storage, SHARED) for tensor in coded.pop(operation))
    freed: dict[int, str] = {}
    stored = 0
    for operation, tensors in coded.items():
        stored += _code_bytes(operation, tensors, width[operation])
        text = _text(operation, width[operation], held)
        freed.update((tensor.storage, text) for tensor in tensors if tensor.storage not in held)
    return Outlook(freed, kept, stored)


def _obstacle(tensor: Saved, exact: bool, min_bytes: int) -> str | None:
    """Why the tensor is not coded, empty where nothing is known of it; None where it is, if nobody else keeps it."""
    operation = tensor.operation
    if tensor.mask:
        return None if tensor.tensor_bytes >= max(min_bytes, 1) else _policy.SMALL
    if operation.call is None:
        return ""
    if operation.reason:
        return f"kept: {operation.reason}"
    if operation.x_bytes < max(min_bytes, 1):
        return _policy.SMALL
    assert operation.call.activation is not None
    if exact and operation.composite:
        return AGAIN if tensor.role == IN else None
    if exact and not operation.call.activation.exact:
        return "kept: not two-valued"
    if tensor.leaf and tensor.role == IN:
        return SHARED  # a variable of the user's
    if operation.composite:
        return None
    if tensor.shape != operation.x_shape and operation.call.one_node is None:
        return ""  # beside the tensors that codes stand for
    return None


def _bits(operation: Operation, tensors: list[Saved], bits: int, held: Collection[int]) -> int:
    if operation.composite and operation.input in held:
        return 0  # it is run again from its input
    if tensors[0].mask or operation.call is None or operation.call.activation is None:
        return 1
    if operation.beside_output is not None and operation.output in held:
        return operation.beside_output
    return 1 if operation.call.activation.exact else bits


def _code_bytes(operation: Operation, tensors: list[Saved], bits: int) -> int:
    shape = operation.x_shape if operation.x_shape is not None else tensors[0].shape
    return ops.packed_bytes(shape.numel(), bits)


def _text(operation: Operation, bits: int, held: Collection[int]) -> str:
    if operation.composite and operation.input in held:
        return "run again"
    count = f"{bits} bit" + ("" if bits == 1 else "s")
    if operation.call is None or operation.call.activation is None:
        return f"{count}, exact"  # a mask
    if operation.beside_output is not None and operation.output in held:
        return f"{count} beside the output"
    return f"{count}, exact" if operation.call.activation.exact else count
