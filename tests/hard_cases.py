"""Shared by the tests of coding: values, boundaries and layouts on which a backend may go wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewbit_hooks._float16 import snap

BITS = range(1, 9)
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def random_codes(n: int, bits: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(n).integers(0, 1 << bits, n, dtype=np.uint8))


def boundaries_for(bits: int, folded: bool = False) -> np.ndarray[Any, np.dtype[np.float64]]:
    return snap(np.linspace(0.1 if folded else -3.0, 3.1, (1 << bits) - 1))


def hard_values(boundaries: np.ndarray[Any, Any], dtype: torch.dtype) -> Tensor:
    """Boundaries and their neighbours in every precision, both signs, the special values, and ordinary numbers."""
    near: list[float] = [0.0, 1e-45, 6e-8, 65504.0, 65519.0, 65520.0, 1e30, float("inf"), float("nan")]
    for kind in (np.float64, np.float32, np.float16):
        with np.errstate(over="ignore"):
            b = boundaries.astype(kind)
        near += [float(v) for v in np.concatenate([np.nextafter(b, kind(-9)), b, np.nextafter(b, kind(9))])]
    values = torch.tensor(near, dtype=torch.float64)
    noise = 3 * torch.randn(4096, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return torch.cat([values, -values, noise]).to(dtype)


def views() -> dict[str, Tensor]:
    x = torch.linspace(-4, 4, 960)
    return {
        "contiguous": x.view(4, 6, 40),
        "transposed": x.view(24, 40).t(),
        "permuted": x.view(4, 6, 40).permute(1, 2, 0),
        "channels last": x.view(4, 5, 6, 8).to(memory_format=torch.channels_last),
        "channels last 3d": x.view(2, 5, 2, 6, 8).to(memory_format=torch.channels_last_3d),
        "every other": x[::2],
        "every other column": x.view(24, 40)[:, ::2],
        "second half of the last dimension": x.view(4, 6, 40).chunk(2, dim=-1)[1],
        "half of the channels": x.view(4, 5, 6, 8).to(memory_format=torch.channels_last)[:, 1:4],
        "offset": x[1:],
        "narrow and transposed": x.view(24, 40)[1:, 3:].t(),
        "expanded": x[:40].expand(7, 40),
        "expanded inside": x[:24, None].expand(24, 9),
        "one value expanded": x[5].expand(30, 5),
        "overlapping": x.as_strided((50, 7), (3, 1)),
        "overlapping columns": x.as_strided((50, 70), (1, 2)),
        "odd strides of size 1": x.as_strided((1, 30, 1), (7, 1, 99)),
        "0-d": x[17],
        "0 elements": x.view(24, 40)[:0],
        "0 elements inside": x.view(24, 40)[:, 40:].t(),
    }
