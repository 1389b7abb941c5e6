"""Tensors of two values, 0 and another: what a dropout mask is."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import _torch
from ._coders import compare
from ._devices import put
from ._layout import INTEGERS, chunks
from ._torch import rows

CHUNK = 1 << 18
"""Elements that are read a second time before they have left the cache."""


def as_integers(x: Tensor) -> Tensor:
    """The bits of the elements: 0.0 is 0, -0.0 is not, and a NaN is equal to itself."""
    return x.view(INTEGERS[x.element_size()])


def not_zero(chunk: Tensor) -> Tensor:
    """The coder of a tensor of two values: 0 where all bits are 0, else 1."""
    return compare(lambda bits: bits != 0, as_integers(chunk))


def encode_two_values(x: Tensor) -> tuple[Tensor, int] | None:
    """The packed codes of `not_zero`, and the second value's bits; None if there are more values than 0 and that, or if
    the second has the sign bit: no mask has.

    >>> encode_two_values(torch.tensor([0, 7, 7]))
    (tensor([6], dtype=torch.uint8), 7)
    >>> encode_two_values(torch.tensor([0.0, 1.25, -0.0])) is None
    True

    The answer makes the host wait for the device.

    (measured, CPU, one core) 0.8 ns an element, where dropout's own forward and backward take 7 to 8.
    """
    packs, other = [], 0
    for _, chunk in chunks(as_integers(x.detach()), CHUNK):
        packs.append(_torch.encode(chunk, 1, not_zero))
        other = other or max(int(chunk.amax()), 0)
        # where all are 0, none is 1; where some are negative, neither
        if not torch.equal(packs[-1], _torch.encode(chunk, 1, functools.partial(_is, other or 1))):
            return None
    return (packs[0] if len(packs) == 1 else torch.cat(packs or [x.new_empty(0, dtype=torch.uint8)])), other


def _is(other: int, chunk: Tensor) -> Tensor:
    return compare(lambda bits: bits == other, chunk)


@functools.lru_cache(maxsize=256)
def two_value_rows(other: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The table that `decode` looks up for a tensor of 0 and the value of these bits, at 1 bit."""
    values = torch.tensor([0, other], dtype=INTEGERS[dtype.itemsize], device="cpu").view(dtype)
    return put(rows(values, 1), device)
