"""What a scope would free of what a step keeps: it is played on a recording, step after step, until it has learned.

What is played is in `_play.py`: NOTE [ A scope, played ].
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ._play import Step
from ._policy import Settings
from ._recording import ACTIVATION, IN, Operation, Saved

STEPS = 8
"""Forwards that are played. An activation's verdict takes two; that of a consumer behind it, two more; to see that its
output stays for all that, or serves nobody, one."""


@dataclass(frozen=True)
class Prediction:
    """What a scope would do to the step.

    Attributes:
        setting: "3 bits", "exact", "3 bits, recompute".
        stored_bytes: codes; and what is kept so that more is freed: the input of a norm that is run again.
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
        freed: storage -> what is kept in its place ("3 bits", "1 bit, exact", "computed again").
        kept: storage -> why a recognised call's is kept.
        stored_bytes: the codes, and what is kept so that more is freed.
    """

    freed: Mapping[int, str]
    kept: Mapping[int, str]
    stored_bytes: int


def predict(
    operations: Sequence[Operation], saved: Iterable[Saved], settings: Settings, own: Collection[int] = ()
) -> Outlook:
    """Play a scope until it has learned.

    Args:
        operations, saved: the recording.
        settings: of the scope; its bits are a number.
        own: storages that the model or the user keeps anyway.
    """
    saved = list(saved)
    kept_by: dict[Operation, list[Saved]] = {}
    for tensor in saved:
        kept_by.setdefault(tensor.operation, []).append(tensor)
    # a leaf that requires grad is kept by its own node, which accumulates the gradient
    leaves = {t.storage for t in saved if t.leaf and t.role == IN and t.operation.kind == ACTIVATION}
    own = leaves.union(own)
    sites = {o.site for o in operations for o in (o, *o.parts) if o.site is not None}
    for site in sites:
        site.begin_anew()
    # a model that the step makes is another one in the next step; of a part that a model makes the scope learns there
    passing = [site for site in sites if site.module() is None and site.model() is None]
    played = {o for operation in operations for o in (operation, *operation.parts)}
    strays = [tensor for tensor in saved if tensor.operation not in played]  # of calls that raised
    for number in range(STEPS):
        for site in passing:
            site.forget()
        step = Step(kept_by, settings, own, number)
        step.hold(strays)
        for operation in operations:
            step.play(operation)
        step.end()
    original = {tensor.storage for tensor in saved}
    held = own.union(step.held)
    added = sum(nbytes for storage, nbytes in step.held.items() if storage not in original and storage not in own)
    return Outlook(
        freed={storage: step.freed.get(storage, "") for storage in original if storage not in held},
        kept={storage: text for storage, text in step.kept.items() if storage in held},
        stored_bytes=step.code_bytes + added,
    )
