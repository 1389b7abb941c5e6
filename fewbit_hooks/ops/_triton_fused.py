"""Triton kernels that compute an activation and its codes in one pass.

Imported on first use, as `_triton.py`, whose byte layout and NOTE [ One program ] hold here. Not yet measured on a GPU.

NOTE [ Formulas ]

Each forward is written as PyTorch's CUDA kernel writes it, computed in float32 (float64 for float64 inputs) and rounded
once:

    gelu        x / 2 (1 + erf(x / sqrt(2)))
    gelu_tanh   x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))
    silu        x / (1 + exp(-x))
    mish        x tanh(log1p(exp(x)))
    elu         x > 0 ? scale x : alpha scale expm1(input_scale x); selu and celu are elu with constants
    softplus    beta x > threshold ? x : log1p(exp(beta x)) / beta
    hardswish   x min(max(x + 3, 0), 6) / 6
    tanh        tanh(x)
    sigmoid     1 / (1 + exp(-x))

erf, exp, expm1, log1p and tanh are libdevice's, as the CUDA compiler's are; divisions are rounded correctly. Yet the
result need not be bit for bit that of PyTorch's kernel: the two compilers may contract products and sums differently,
and libdevice is told to flush float32 denormals. The bound, to which a `gpu` test holds it: 4 units in the last place
in float32 and float64, 1 in float16 and bfloat16; of the result, or of 1 where the result is smaller (`1 + erf`
cancels in PyTorch's own kernel too). Triton's interpreter has no libdevice: there exp and log stand in for it, in
float64, which tests the formulas but not libdevice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._coders import Thresholds
from ._layout import Layout, in_memory_order
from ._torch import packed_bytes
from ._triton import (
    GROUPS,
    INTERPRETED,
    code_of,
    elements,
    grid,
    new_flag,
    note_not_a_number,
    on,
    round_to,
    store_packed,
    units,
)

if INTERPRETED:

    @triton.jit
    def exp(x):
        return tl.exp(x)

    @triton.jit
    def expm1(x):
        return (tl.exp(x.to(tl.float64)) - 1.0).to(x.dtype)

    @triton.jit
    def log1p(x):
        return tl.log(1.0 + x.to(tl.float64)).to(x.dtype)

    @triton.jit
    def tanh(x):
        a = tl.exp(-2.0 * tl.abs(x.to(tl.float64)))
        y = (1.0 - a) / (1.0 + a)
        return tl.where(x < 0, -y, y).to(x.dtype)

    @triton.jit
    def erf(x):
        return tl.erf(x)

else:
    from triton.language.extra import libdevice

    @triton.jit
    def exp(x):
        return libdevice.exp(x)  # tl.exp is the fast one, of fewer digits

    @triton.jit
    def expm1(x):
        return libdevice.expm1(x)

    @triton.jit
    def log1p(x):
        return libdevice.log1p(x)

    @triton.jit
    def tanh(x):
        return libdevice.tanh(x)

    @triton.jit
    def erf(x):
        return libdevice.erf(x)


# --- kernels: arithmetic only ---


@triton.jit
def divide(a, b):
    """Rounded correctly: the plain division of float32 is Triton's approximate one."""
    return a / b if b.dtype == tl.float64 else tl.div_rn(a, b)


@triton.jit
def activation(x, parameters, NAME: tl.constexpr):
    """See NOTE [ Formulas ]. `x` is float32 or float64, and so are the parameters."""
    if NAME == "gelu":
        y = x * 0.5 * (1.0 + erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        y = 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * (x * x * x))))
    elif NAME == "silu":
        y = divide(x, 1.0 + exp(-x))
    elif NAME == "mish":
        y = x * tanh(log1p(exp(x)))
    elif NAME == "elu":
        alpha, scale, input_scale = tl.load(parameters), tl.load(parameters + 1), tl.load(parameters + 2)
        y = tl.where(x > 0, x * scale, expm1(x * input_scale) * (alpha * scale))
    elif NAME == "softplus":
        beta, threshold = tl.load(parameters), tl.load(parameters + 1)
        y = tl.where(x * beta > threshold, x, divide(log1p(exp(x * beta)), tl.zeros_like(x) + beta))
    elif NAME == "tanh":
        y = tanh(x)
    elif NAME == "sigmoid":
        y = divide(tl.zeros_like(x) + 1.0, 1.0 + exp(-x))
    else:
        tl.static_assert(NAME == "hardswish")
        # comparisons, and not maximum and minimum, which differ at NaN from one version of Triton to the next
        above = tl.where(x + 3.0 < 0.0, 0.0, x + 3.0)
        y = x * tl.where(above > 6.0, 6.0, above) * 0.16666666666666666
    return y


@triton.jit
def _forward(
    x, y, packed, boundaries, parameters, flag, n,
    NAME: tl.constexpr, BITS: tl.constexpr, FOLDED: tl.constexpr, FLAG: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    start, index, left = elements(n, GROUPS)
    v = tl.load(x + start + index, mask=index < left, other=0.0).to(boundaries.dtype.element_ty)
    note_not_a_number(v, flag, FLAG)
    tl.store(y + start + index, round_to(activation(v, parameters, NAME), y), mask=index < left)
    store_packed(packed, start, code_of(v, boundaries, BITS, FOLDED), left, BITS, GROUPS)


# --- launchers ---


def forward(
    name: str, x: Tensor, bits: int, thresholds: Thresholds, parameters: Tensor, or_infinite: bool | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The activation of `x`, and the packed codes of `x`.

    Args:
        name: of a formula in NOTE [ Formulas ].
        x: dense; of a dtype in `_triton.FLOATS`.
        thresholds: 2**bits - 1 of them.
        parameters: those of the formula, in its order; dtype `computed_in(x.dtype)`, on the device of `x`.
        or_infinite: as for `encode_flagged`; None: no flag.

    Returns:
        A tensor in the layout of `x`; what `encode(x, bits, thresholds)` returns; the flag.
    """
    n = x.numel()
    y = Layout.of(x).empty()
    packed = torch.empty(packed_bytes(n, bits), dtype=torch.uint8, device=x.device)
    flag, kind = new_flag(x, or_infinite)
    if n:
        with on(x.device):
            _forward[grid(n)](
                in_memory_order(x.detach()), y.as_strided((n,), (1,)), units(packed, bits, n),
                thresholds.limits(x.dtype, x.device), parameters, parameters if flag is None else flag, n,
                NAME=name, BITS=bits, FOLDED=thresholds.folded, FLAG=kind, GROUPS=GROUPS,
            )  # fmt: skip
    return y, packed, flag
