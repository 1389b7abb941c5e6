"""Decoding beside a kept output: the output's own value, and at most one bit, address a table."""

from __future__ import annotations

import torch
from torch import Tensor

from ._coders import look_up, sixteen_bits
from ._layout import Layout, chunks
from ._torch import unpack_bits

CHUNK_BESIDE = 1 << 17
"""(measured, CPU, 2 cores, float32) 2.0 to 2.4 ns an element, and 3.2 with `_layout.CHUNK`: there is more between the
output and the result than a core's cache holds of that."""


def decode_beside(output: Tensor, packed: Tensor | None, table: Tensor, layout: Layout) -> Tensor:
    """A tensor of the given layout that holds, for each element, the table's entry at its output and its bit.

    >>> output = torch.tensor([0.5, 2.0], dtype=torch.float16)
    >>> halves = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.float16)
    >>> decode_beside(output, None, halves * 10, Layout.of(output))
    tensor([ 5., 20.], dtype=torch.float16)

    Args:
        output: of the layout's shape. bfloat16 is looked up by its bits, every other dtype by those of its float16.
        packed: one bit an element, as `encode` packs them; None where the output says it all.
        table: 65,536 values, or 131,072: those for bit 0, then those for bit 1.
        layout: of the result, in the dtype and on the device of the table.
    """
    result = layout.empty()
    flat = result.as_strided((result.numel(),), (1,))
    for start, chunk in chunks(in_order_of(layout, output), 0 if output.is_cuda else CHUNK_BESIDE):
        stop = start + chunk.numel()
        index = sixteen_bits(chunk).to(torch.int32)
        if packed is not None:
            side = unpack_bits(packed[start // 8 : (stop + 7) // 8], 1, chunk.numel())
            index.add_(side, alpha=1 << 16)  # (measured, CPU) 0.16 ns an element; to an int64 index it takes 0.8
        look_up(table, index, flat[start:stop])
    return result


def in_order_of(layout: Layout, output: Tensor) -> Tensor:
    """`output` itself, or a copy of it, whose elements are in the order of the layout's memory."""
    if Layout.of(output).stride == layout.stride:
        return output
    return torch.empty_strided(layout.shape, layout.stride, dtype=output.dtype, device=output.device).copy_(output)
