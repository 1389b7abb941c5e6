"""Triton kernels for the product of a gated unit, `f(gate) * up`, and for both its gradients.

Imported on first use, as `_triton_fused.py`, whose NOTE [ Formulas ] says what f is. Not yet measured on a GPU.

Forward reads two tensors and writes one, where PyTorch's two kernels read three and write two; backward reads three and
writes two, where theirs read six and write three. What is rounded there between two kernels is rounded here: f(gate)
before the product, and grad * up before it is multiplied by f'(gate). f' is that of PyTorch's CUDA kernels:

    gelu        1/2 (1 + erf(x / sqrt(2))) + x exp(-x^2 / 2) / sqrt(2 pi)
    gelu_tanh   with t = tanh(sqrt(2 / pi) (x + 0.044715 x^3)):
                1/2 (1 + t) + x / 2 (1 - t^2) sqrt(2 / pi) (1 + 3 * 0.044715 x^2)
    silu        with s = 1 / (1 + exp(-x)): s (1 + x (1 - s))
    mish        with t = tanh(log1p(exp(x))): t + x s (1 - t^2)
    elu         x <= 0 ? alpha scale input_scale exp(input_scale x) : scale
    softplus    beta x > threshold ? 1 : exp(beta x) / (exp(beta x) + 1)
    hardswish   x <= -3 ? 0 : x < 3 ? x / 3 + 1/2 : 1
    tanh        1 - y^2, of the rounded y = f(x)
    sigmoid     y (1 - y)

NOTE [ Halves ]

Gate and up may be the two halves of one tensor's last dimension, as `chunk(2, -1)` gives them. Then a row of each lies
`row` groups of 8 elements apart from the next, and so do their gradients. A group lies in one row, as a row is a whole
number of groups.

    memory   row 0 of gate | row 0 of up | row 1 of gate | row 1 of up | ...
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._layout import Layout, in_memory_order, is_dense
from ._triton import GROUPS, elements, grid, on, round_to
from ._triton_fused import activation, divide, erf, exp, log1p, tanh


@triton.jit
def _slope(x, y, parameters, NAME: tl.constexpr):
    """f'(x), `y` being f(x) as it is stored. `x` is float32 or float64, and so are `y` and the parameters."""
    if NAME == "gelu":
        slope = 0.5 * (1.0 + erf(x * 0.7071067811865476)) + x * exp(x * x * -0.5) * 0.3989422804014327
    elif NAME == "gelu_tanh":
        t = tanh(0.7978845608028654 * (x + 0.044715 * (x * x * x)))
        slope = 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * (0.7978845608028654 * (1.0 + 0.134145 * (x * x)))
    elif NAME == "silu":
        s = divide(tl.zeros_like(x) + 1.0, 1.0 + exp(-x))
        slope = s * (1.0 + x * (1.0 - s))
    elif NAME == "mish":
        s = divide(tl.zeros_like(x) + 1.0, 1.0 + exp(-x))
        t = tanh(log1p(exp(x)))
        slope = t + x * s * (1.0 - t * t)
    elif NAME == "elu":
        alpha, scale, input_scale = tl.load(parameters), tl.load(parameters + 1), tl.load(parameters + 2)
        slope = tl.where(x <= 0, exp(x * input_scale) * (alpha * scale * input_scale), tl.zeros_like(x) + scale)
    elif NAME == "softplus":
        beta, threshold = tl.load(parameters), tl.load(parameters + 1)
        z = exp(x * beta)
        slope = tl.where(x * beta > threshold, tl.zeros_like(x) + 1.0, divide(z, z + 1.0))
    elif NAME == "tanh":
        slope = 1.0 - y * y
    elif NAME == "sigmoid":
        slope = y * (1.0 - y)
    else:
        tl.static_assert(NAME == "hardswish")
        slope = tl.where(x <= -3.0, 0.0, tl.where(x < 3.0, x * 0.3333333333333333 + 0.5, 1.0))
    return slope


@triton.jit
def _apart(start, index, row, HALVES: tl.constexpr, LONG: tl.constexpr, GROUPS: tl.constexpr):
    """Where a program's elements of a half lie, as `start` and `index`; see NOTE [ Halves ].

    LONG: a row has GROUPS groups or more, so that a program reaches into one other row at most.
    """
    if HALVES:
        group = (start // 8).to(tl.uint32)  # a division of 64 bits is a long one
        row = row.to(tl.uint32)
        above = group // row
        from_row = (group - above * row).to(tl.int32) + tl.arange(0, GROUPS)
        row = row.to(tl.int32)
        below = tl.where(from_row >= row, 1, 0) if LONG else from_row // row
        start += above.to(tl.int64) * row * 8
        index += (below * row * 8)[:, None]
    return start, index


@triton.jit(do_not_specialize=["row"])
def _gated_forward(
    gate, up, out, parameters, n, row,
    NAME: tl.constexpr, HALVES: tl.constexpr, LONG: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    start, index, left = elements(n, GROUPS)
    base, at = _apart(start, index, row, HALVES, LONG, GROUPS)
    x = tl.load(gate + base + at, mask=index < left, other=0.0).to(parameters.dtype.element_ty)
    u = tl.load(up + base + at, mask=index < left, other=0.0).to(parameters.dtype.element_ty)
    y = round_to(activation(x, parameters, NAME), out).to(parameters.dtype.element_ty)
    tl.store(out + start + index, round_to(y * u, out), mask=index < left)


@triton.jit(do_not_specialize=["row"])
def _gated_backward(
    grad, gate, up, d_gate, d_up, parameters, n, row,
    NAME: tl.constexpr, HALVES: tl.constexpr, LONG: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    start, index, left = elements(n, GROUPS)
    base, at = _apart(start, index, row, HALVES, LONG, GROUPS)
    g = tl.load(grad + start + index, mask=index < left, other=0.0).to(parameters.dtype.element_ty)
    x = tl.load(gate + base + at, mask=index < left, other=0.0).to(parameters.dtype.element_ty)
    u = tl.load(up + base + at, mask=index < left, other=0.0).to(parameters.dtype.element_ty)
    y = round_to(activation(x, parameters, NAME), gate).to(parameters.dtype.element_ty)
    d_y = round_to(g * u, gate).to(parameters.dtype.element_ty)
    tl.store(d_up + base + at, round_to(g * y, gate), mask=index < left)
    tl.store(d_gate + base + at, round_to(d_y * _slope(x, y, parameters, NAME), gate), mask=index < left)


def forward(name: str, parameters: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """`f(gate) * up`.

    Args:
        name, parameters: of a formula, as for `_triton_fused.forward`.
        gate, up: of one shape, dtype and device; dense, with the same strides, or halves as in NOTE [ Halves ].
    """
    out = Layout.of(gate).empty()
    n = out.numel()
    if n:
        row, whole = _row(gate), in_memory_order(out)
        with on(out.device):
            _gated_forward[grid(n)](
                *_flat(row, gate, up), whole, parameters, n, row,
                NAME=name, HALVES=row > 0, LONG=row >= GROUPS, GROUPS=GROUPS,
            )  # fmt: skip
    return out


def backward(
    name: str, parameters: Tensor, grad: Tensor, gate: Tensor, up: Tensor, into: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The gradients of `forward` for the gate and for `up`.

    Args:
        grad: of the gate's shape and dtype; any strides.
        into: where they are written; they lie as the gate and `up` do.
    """
    n = gate.numel()
    d_gate, d_up = into or (_lying_as(gate), _lying_as(up))
    if n:
        row, grad = _row(gate), in_memory_order(Layout.of(gate).like(grad.detach()))
        with on(gate.device):
            _gated_backward[grid(n)](
                grad, *_flat(row, gate, up, d_gate, d_up), parameters, n, row,
                NAME=name, HALVES=row > 0, LONG=row >= GROUPS, GROUPS=GROUPS,
            )  # fmt: skip
    return d_gate, d_up


def _row(gate: Tensor) -> int:
    """The groups in a row of a half; 0 where the gate is dense by itself."""
    return 0 if is_dense(gate) else gate.shape[-1] // 8


def _lying_as(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)


def _flat(row: int, *tensors: Tensor) -> list[Tensor]:
    return [t.detach() if row else in_memory_order(t.detach()) for t in tensors]
