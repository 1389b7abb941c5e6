"""`profile()`: what autograd keeps of a step, whose it is, and what few bits would free."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import _policy, _stack
from ._errors import FewbitTypeError
from ._modules import parameters_of
from ._predict import Outlook, Prediction, predict
from ._profile_table import Profile, ProfileRow
from ._quantizer import check_bits
from ._recorder import Recorder, tensors_in
from ._recording import Operation, Saved
from ._restore import buffers_restored, generators_restored
from ._scope import scope

_NOTHING = object()
BITS = (1, 2, 3, 4)


def profile(
    model: Callable[..., Any],
    batch: Any = _NOTHING,
    *,
    bits: int = 3,
    exact: bool = False,
    recompute: bool = False,
    min_bytes: int = 65536,
) -> Profile:
    """What autograd keeps of a step, whose it is, and what few bits would free.

    >>> import torch, fewbit_hooks as fewbit
    >>> model = torch.nn.Sequential(torch.nn.Linear(256, 1024), torch.nn.GELU(), torch.nn.Linear(1024, 256))
    >>> result = fewbit.profile(model, torch.randn(512, 256))
    >>> [(row.operation, row.module, row.nbytes) for row in result.rows]
    [('gelu', '1', 2097152), ('linear', '2', 2097152), ('linear', '0', 524288)]
    >>> result.rows[0].few_bits
    '1 bit beside the output'
    >>> result.predictions[2].setting, result.predictions[2].held_bytes
    ('3 bits', 2686976)

    `profile(model, batch)` runs the forward of `model`; `profile(step)` runs a step of yours, whatever it does. The
    saved tensors are looked at as they are saved: on any torch that the library runs on, and for any model. Every
    storage is counted once, however many nodes keep it; parameters and buffers are the model's and are not counted.
    The predictions play a scope on what was recorded, until it has learned what others keep.

    Args:
        model: what to run: a module, or any callable.
        batch: a dict (keyword arguments), a tuple or list (positional ones) or one argument. Left out: there are none.
        bits, exact, recompute, min_bytes: of the scope that the rows' `few_bits` speak of. `predictions` has 1 to 4
            bits and `exact=True` whatever is given here, and both `bits` and `exact=True` with `recompute=True`.

    Returns:
        A `Profile`: `rows`, totals and `predictions`; `str()`, `to_markdown()`, `to_dict()`, `plot(path)`.

    Raises:
        FewbitTypeError: what was returned has no graph.
        FewbitTypeError, FewbitValueError: `bits` is not a number from 1 to 8, and the like.

    What counts is held when the forward is over: when a backward begins inside the step, or else when it has returned
    a tensor with a graph (the loss; or an output with a `.loss`; or else its first floating tensor). The forward is
    bit for bit what it was. The random number generators and the buffers of the modules that ran are given back as
    they were; what the step itself changes (gradients, an optimizer) is not. A graph that the step hands out still has
    its gradients; where it keeps a buffer that had to be given back (BatchNorm's), its backward raises.

    Not seen: what custom autograd Functions keep as attributes of `ctx` (Liger, bitsandbytes, Transformer Engine; they
    are named, and what they save by `save_for_backward` is counted), what is kept inside other saved-tensor hooks
    (checkpoint, offloading; the report says so), and what other threads save. Numbers that take part in an operation
    (`3.0 * x`, 8 bytes each) are not counted. torch.func's grad, vjp and jacrev do not run under saved-tensor hooks,
    and so not here.
    """
    bits = check_bits(bits)
    if not callable(model):
        raise FewbitTypeError(f"profile() takes a model, or a step that returns its loss, got {model!r}")
    recorder = Recorder()
    args, kwargs = _arguments(batch)
    user = list(tensors_in((args, kwargs)))
    if isinstance(model, nn.Module):
        recorder.note_own([*parameters_of(model), *model.buffers()])
    outer = scope(bits=None) if _stack.active() is not None else contextlib.nullcontext()
    with generators_restored(), buffers_restored(), outer, torch.enable_grad():
        with recorder:
            loss = _loss(model(*args, **kwargs))  # the output itself is let go: what only it held is not kept
        if loss is None and not recorder.frozen:
            raise FewbitTypeError(
                "profile() needs a graph: the model or step must return its loss, or an output with a floating tensor "
                "that requires grad (is it under torch.no_grad(), or all frozen?)"
            )
        recorder.freeze([loss] if loss is not None else [])
    held_anyway = recorder.own | recorder.storages(user)
    saved = [tensor for tensor in recorder.saved if tensor.storage not in recorder.own]
    original = sum({tensor.storage: tensor.nbytes for tensor in saved}.values())

    def outlook(bits: int, exact: bool, recompute: bool) -> Outlook:
        settings = _policy.check_settings(bits, min_bytes, (), exact, recompute, "hooks", ())
        return predict(recorder.operations, saved, settings, held_anyway)

    def prediction(bits: int, exact: bool = False, recompute: bool = False) -> Prediction:
        found = outlook(bits, exact, recompute)
        freed = sum({t.storage: t.nbytes for t in saved if t.storage in found.freed}.values())
        setting = ("exact" if exact else f"{bits} bit" + ("" if bits == 1 else "s")) + (
            ", recompute" if recompute else ""
        )
        return Prediction(setting, found.stored_bytes, freed, original - freed + found.stored_bytes)

    asked = outlook(bits, exact, recompute)
    return Profile(
        rows=_rows(saved, {**asked.kept, **asked.freed}, set(asked.freed)),
        predictions=(
            *map(prediction, BITS),
            prediction(1, exact=True),
            prediction(bits, recompute=True),
            prediction(1, exact=True, recompute=True),
        ),
        own_bytes=sum({t.storage: t.nbytes for t in recorder.saved if t.storage in recorder.own}.values()),
        opaque=_opaque(recorder, saved),
        notes=_notes(recorder),
    )


def _arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if batch is _NOTHING:
        return (), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)), {}


def _loss(output: Any) -> Tensor | None:
    """A scalar whose graph is that of the output."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        if hasattr(output, "to_tuple"):
            output = output.to_tuple()
        loss = next((t for t in tensors_in(output) if t.is_floating_point() and t.requires_grad), None)
    if loss is None or loss.grad_fn is None:
        return None
    return loss.mean() if loss.numel() != 1 else loss


def _rows(saved: list[Saved], few_bits: Mapping[int, str], freed: set[int]) -> tuple[ProfileRow, ...]:
    """One for each operation, module, dtype, sharers and treatment; largest first."""
    savers: dict[int, list[Saved]] = {}
    for tensor in saved:
        savers.setdefault(tensor.storage, []).append(tensor)
    names = _Names()
    sums: dict[tuple[Any, ...], list[int]] = {}
    for storage, tensors in savers.items():
        operations = [tensor.operation.within or tensor.operation for tensor in tensors]
        first, *others = dict.fromkeys((operation.name, names(operation)) for operation in operations)
        treatment = few_bits.get(storage, "")
        key = *first, str(tensors[0].dtype).removeprefix("torch."), tuple(others), treatment, storage in freed
        total = sums.setdefault(key, [0, 0])
        total[0] += 1
        total[1] += tensors[0].nbytes
    rows = [
        ProfileRow(operation, module, dtype, count, nbytes, others, treatment, nbytes if gone else 0)
        for (operation, module, dtype, others, treatment, gone), (count, nbytes) in sums.items()
    ]
    return tuple(sorted(rows, key=lambda row: -row.nbytes))


class _Names:
    """The paths of modules, each model's looked up once."""

    def __init__(self) -> None:
        self._models: dict[int, dict[int, str]] = {}

    def __call__(self, operation: Operation) -> str:
        module = operation.module() if operation.module else None
        model = operation.model() if operation.model else None
        if module is None or model is None:
            return ""
        if id(model) not in self._models:
            self._models[id(model)] = {id(m): name for name, m in model.named_modules()}
        return self._models[id(model)].get(id(module)) or type(module).__name__


def _opaque(recorder: Recorder, saved: list[Saved]) -> dict[str, tuple[int, int]]:
    """Custom Functions: the number of their nodes, and the bytes that they are seen to keep."""
    seen: dict[str, dict[int, int]] = {name: {} for name in recorder.opaque}
    for tensor in saved:
        if tensor.operation.custom:
            seen.setdefault(tensor.operation.name, {})[tensor.storage] = tensor.nbytes
    return {name: (recorder.opaque[name], sum(storages.values())) for name, storages in seen.items()}


def _notes(recorder: Recorder) -> tuple[str, ...]:
    notes = [
        f"{count} calls ran inside the saved-tensor hooks of {whose}: what these keep is not seen"
        for whose, count in recorder.others.items()
    ]
    notes += [f"{count} saved tensors are {layout}: not counted" for layout, count in recorder.uncounted.items()]
    return tuple(notes)
