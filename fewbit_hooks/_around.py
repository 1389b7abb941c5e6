"""Saved-tensor hooks of others around a scope: whether they give codes back as they were.

NOTE [ Hooks that change codes ]

An offloader gives back, bit for bit, what it is handed; hooks that compress, to int8 or float8 say, give back something
near it. Near is nothing for codes. Which of the two a pair of hooks is cannot be tried out: offloaders take the first
unpack for the beginning of the backward, and a checkpoint runs its region again. So

1. the codes that a pair is handed are kept beside until some have come back, in the first backward, and been compared;
   what is decoded till then are the kept ones;
2. a pair that was seen to change codes is handed none from then on: what is under it is left to it;
3. a pair is known by the code of its pack hook, for many are made anew at each step. Where it has none, a partial say,
   nothing is remembered, and codes are always kept beside;
4. of a pair that has once given all codes back, dtype and shape are still looked at;
5. a compiled graph, whose codes nobody compares, has none under a pair that was not seen to give all back.

PyTorch's own (`save_on_cpu`, the checkpoint's) give back what they are given.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from . import ops
from ._errors import FewbitRuntimeError
from ._hooked import Hooks

OWN = frozenset({"torch.autograd.graph", "torch.utils.checkpoint"})


class Pair:
    """What is known of a pair of hooks.

    Attributes:
        gives_back: codes came back as they were; False once some did not; None as long as none did.
    """

    __slots__ = ("__weakref__", "gives_back")

    def __init__(self, gives_back: bool | None = None) -> None:
        self.gives_back = gives_back

    def see(self, same: bool) -> None:
        """Codes came back."""
        self.gives_back = same and self.gives_back is not False


_pairs: weakref.WeakKeyDictionary[Any, Pair] = weakref.WeakKeyDictionary()
_OWN = Pair(gives_back=True)


def _pair(hooks: Hooks | None) -> Pair | None:
    """What is known of these; None where nothing can be remembered."""
    if hooks is None:
        return _OWN
    function = getattr(hooks[0], "__func__", hooks[0])  # of a bound method
    if getattr(function, "__module__", "") in OWN:
        return _OWN
    code = getattr(function, "__code__", None)
    return _pairs.setdefault(code, Pair()) if code is not None else None


def change_codes(hooks: Hooks | None) -> bool:
    """Whether the hooks were seen to give back other codes than they were given."""
    pair = _pair(hooks)
    return pair is not None and pair.gives_back is False


def give_back_codes(hooks: Hooks | None) -> bool:
    """Whether they were seen to give them back as they were, or there are none."""
    pair = _pair(hooks)
    return pair is not None and pair.gives_back is True


class Receipt:
    """For codes that a pair of hooks is handed: what they are, to be compared with what comes back."""

    __slots__ = ("_codes", "_pair", "_shape")

    def __init__(self, codes: Tensor, hooks: Hooks) -> None:
        self._pair = _pair(hooks)
        self._codes = None if give_back_codes(hooks) else codes
        self._shape = codes.shape

    def redeem(self, back: Tensor) -> Tensor:
        """The codes, given what the hooks gave back."""
        mine = self._codes
        alike = back.dtype == torch.uint8 and back.shape == self._shape
        if mine is None:
            if not alike:
                raise FewbitRuntimeError(
                    f"saved-tensor hooks around the scope were handed codes, torch.uint8 of shape {list(self._shape)}, "
                    f"and gave back {back.dtype} of shape {list(back.shape)}. Enter such hooks inside the scope, or "
                    "let them pass integers as they are."
                )
            return back
        if self._pair is not None and not ops.capturing(mine.device):
            with torch._C.DisableTorchFunction():
                self._pair.see(alike and back.device == mine.device and torch.equal(back, mine))
        return mine
