"""Stand-ins: what a node's own backward makes of them is the codebook's level; and what a call saves is asked."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fewbit_hooks as fewbit
from fewbit_hooks import _standins

aten = torch.ops.aten
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]

# Name, parameters of the codebook, the call.
FORMS: list[tuple[str, dict[str, Any], Callable[[Tensor], Tensor]]] = [
    *[("celu", {"alpha": a}, partial(F.celu, alpha=a, inplace=i)) for a in (0.5, 1.0, 2.0) for i in (False, True)],
    *[("elu", {"alpha": a}, partial(F.elu, alpha=a, inplace=i)) for a in (0.5, 1.0, 2.0) for i in (False, True)],
    ("elu", {"alpha": 1.5, "scale": 1.05, "input_scale": 0.7}, lambda x: aten.elu(x, 1.5, 1.05, 0.7)),
    ("elu", {"alpha": 1.5, "scale": 1.05, "input_scale": 0.7}, lambda x: aten.elu_(x, 1.5, 1.05, 0.7)),
    ("gelu", {"approximate": "none"}, F.gelu),
    ("gelu", {"approximate": "none"}, aten.gelu_),
    ("gelu", {"approximate": "tanh"}, partial(F.gelu, approximate="tanh")),
    *[("hardswish", {}, partial(F.hardswish, inplace=i)) for i in (False, True)],
    ("logsigmoid", {}, F.logsigmoid),
    *[("mish", {}, partial(F.mish, inplace=i)) for i in (False, True)],
    *[("selu", {}, partial(F.selu, inplace=i)) for i in (False, True)],
    ("sigmoid", {}, torch.sigmoid),
    ("sigmoid", {}, torch.sigmoid_),
    *[("silu", {}, partial(F.silu, inplace=i)) for i in (False, True)],
    ("softplus", {"beta": 1.0, "threshold": 20.0}, F.softplus),
    # its derivative jumps: by 0.27 at 2, by 0.007 at 2.5
    ("softplus", {"beta": 0.5, "threshold": 1.0}, partial(F.softplus, beta=0.5, threshold=1.0)),
    ("softplus", {"beta": 2.0, "threshold": 5.0}, partial(F.softplus, beta=2.0, threshold=5.0)),
    ("softsign", {}, F.softsign),
    ("tanh", {}, torch.tanh),
    ("tanh", {}, torch.tanh_),
    ("tanhshrink", {}, F.tanhshrink),
]
each_form = pytest.mark.parametrize(
    ("name", "parameters", "call"), [pytest.param(*form, id=f"{form[0]}{i}") for i, form in enumerate(FORMS)]
)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def tolerance(dtype: torch.dtype, levels: np.ndarray[Any, Any]) -> float:
    """How near a level is attained, measured as the gradient of ones, which is rounded to the dtype itself.

    float64 and float32: 4.4e-16 and 2.2e-7 are seen; the kernels lose a few digits of their own.
    The 16-bit dtypes: rounding the gradient takes half an ulp of it, eps / 2 of the largest level; and the stand-in is
    a value of the dtype, up to eps / 2 times the steepness of f' away. Together eps of the largest level: 1e-3, 8e-3.
    Seen: gelu 5.3e-4 and 4.1e-3, all with levels up to 1.1 at most 7.0e-4 and 5.7e-3.
    """
    if dtype in (torch.float64, torch.float32):
        return {torch.float64: 1e-15, torch.float32: 5e-7}[dtype]
    return torch.finfo(dtype).eps * max(1.0, float(np.abs(levels).max()))


def gradient(call: Callable[[Tensor], Tensor], x: Tensor, bits: int) -> Tensor:
    leaf = x.clone().requires_grad_()
    with fewbit.scope(bits=bits, min_bytes=0) as memory:
        y = call(leaf.clone())
    y.backward(torch.ones_like(y))
    assert [row.bits for row in memory.report().rows] == [bits]
    assert leaf.grad is not None
    return leaf.grad


def stock(call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    call(leaf.clone()).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("bits", [1, 2, 3, 4, *(pytest.param(b, marks=pytest.mark.slow) for b in (5, 6, 7)), 8])
@each_dtype
@each_form
def test_the_nodes_own_backward_gives_the_level(
    name: str, parameters: Any, call: Any, dtype: torch.dtype, bits: int
) -> None:
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64).to(dtype)
    book = fewbit.codebook(name, bits, **parameters)
    deviation = (gradient(call, x, bits).double() - book.derivative(x.double())).abs().max().item()
    assert deviation <= tolerance(dtype, book.levels)


@pytest.mark.parametrize("bits", range(1, 9))
def test_gelu_attains_its_levels_to_the_digits_that_the_docs_name(bits: int) -> None:
    levels = fewbit.codebook("gelu", bits).levels
    derivative = partial(_derivative, "gelu")
    s = _standins.standins(F.gelu, derivative, levels, (-10.0, 10.0), torch.float32)
    assert np.abs(derivative(s.numpy()) - levels).max() <= 5e-7
    for dtype, limit in ((torch.float16, 4e-4), (torch.bfloat16, 4e-3)):
        s = _standins.standins_16bit(F.gelu, levels, dtype)
        assert torch.equal(s, s.to(dtype).double())
        assert np.abs(derivative(s.numpy()) - levels).max() <= limit


def _derivative(name: str, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return next(a for a in fewbit.activations() if a.name == name).derivative(x)


@each_dtype
@each_form
def test_a_nan_reaches_the_loss_and_its_gradient_is_stocks(
    name: str, parameters: Any, call: Any, dtype: torch.dtype
) -> None:
    x = torch.linspace(-3, 3, 67, dtype=dtype)
    x[40] = math.nan
    leaf = x.clone().requires_grad_()
    with fewbit.scope(bits=3, min_bytes=0):
        y = call(leaf.clone())
    assert y.isnan().nonzero().tolist() == [[40]]
    assert y.sum().isnan()
    (slope,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
    torch.testing.assert_close(slope, stock(call, x), rtol=0, atol=0, equal_nan=True)


@each_dtype
@each_form
def test_infinities_and_huge_inputs_take_the_outermost_levels(
    name: str, parameters: Any, call: Any, dtype: torch.dtype
) -> None:
    huge = torch.finfo(dtype).max
    x = torch.tensor([-math.inf, -huge, huge, math.inf], dtype=dtype)
    book = fewbit.codebook(name, 3, **parameters)
    ends = book.levels[[-1, -1]] if book.folded else book.levels[[0, -1]]
    expected = torch.from_numpy(ends).repeat_interleave(2)
    if stock(call, x).isnan().any():  # such an infinity is kept exact
        x, expected = x[1:3], expected[1:3]
    assert (gradient(call, x, 3).double() - expected).abs().max() <= tolerance(dtype, book.levels)


@each_dtype
@pytest.mark.parametrize("engine", ["hooks", "fused"])
@pytest.mark.parametrize("bits", [3, 5, 8])
def test_inputs_on_the_jumps_of_hardswish_have_the_gradient_of_their_side(
    bits: int, engine: str, dtype: torch.dtype
) -> None:
    x = torch.tensor([-3.0, 3.0] * 20, dtype=dtype, requires_grad=True)
    with fewbit.scope(bits, min_bytes=0, engine=engine):
        (grad,) = torch.autograd.grad(F.hardswish(x * 1).sum(), x)
    torch.testing.assert_close(grad, stock(F.hardswish, x.detach()), rtol=0, atol=1e-6)


def test_saved_by_gives_copies_of_what_a_call_saves() -> None:
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    (saved,) = _standins.saved_by(torch.sigmoid, x)
    assert torch.equal(saved, x.sigmoid())
    (saved,) = _standins.saved_by(F.gelu, x)
    assert torch.equal(saved, x)
    assert saved.data_ptr() != x.data_ptr()
    (saved,) = _standins.saved_by(partial(F.elu, inplace=True), x)  # saves its output where F.elu saves its input
    assert torch.equal(saved, F.elu(x))


@pytest.mark.parametrize("inplace", [False, True])
def test_derivative_from_is_computed_from_the_tensors_that_it_is_handed(inplace: bool) -> None:
    x = torch.zeros(3, dtype=torch.float64)
    slope = _standins.derivative_from(
        partial(F.hardtanh, inplace=inplace), [torch.tensor([-2.0, 0.5, 2.0]).double()], x
    )
    assert slope.tolist() == [0.0, 1.0, 0.0]
    assert x.tolist() == [0.0, 0.0, 0.0]


def test_what_a_function_saves_is_counted_by_storage_input_and_output_apart() -> None:
    x = torch.randn(64)
    assert _standins.saves(F.gelu, x) == (0, True, False)
    assert _standins.saves(torch.tanh, x) == (0, False, True)
    assert _standins.saves(lambda t: t * torch.sigmoid(t), x) == (1, True, False)
    assert _standins.saves(lambda t: torch.reciprocal(1 + torch.exp(t)), x) == (1, False, True)
    assert _standins.saves(lambda t: t * x, x, own=[x]) == (0, False, False)


def test_the_stand_in_next_to_a_jump_lies_well_on_its_side() -> None:
    """Rounded to float32, the least float64 number above the jump would be the jump itself, and 0.27 off."""
    book = fewbit.codebook("softplus", 1, beta=0.5, threshold=1.0)
    activation = next(a for a in fewbit.activations() if a.name == "softplus")
    function = partial(F.softplus, beta=0.5, threshold=1.0)
    derivative = partial(activation.derivative, beta=0.5, threshold=1.0)
    for dtype in (torch.float32, torch.float64):
        s = _standins.standins(function, derivative, book.levels, book.interval, dtype)
        assert book.levels[1] == 1.0
        assert s[1] > 2.5
    for dtype in (torch.float16, torch.bfloat16):
        assert _standins.standins_16bit(function, book.levels, dtype)[1] > 2.5


def test_all_values_are_the_bit_patterns_in_order() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        values = _standins.all_values(dtype)
        assert torch.equal(values.view(torch.uint16).to(torch.int64), torch.arange(65536))


ANOMALY = """
import torch, torch.nn.functional as F, fewbit_hooks as fewbit
x = torch.randn(64, 64, requires_grad=True)
with torch.autograd.detect_anomaly(), fewbit.scope(bits=3, min_bytes=0) as memory:
    F.gelu(x * 1).sum().backward()
print(memory.report().stored_bytes)
"""


def test_what_a_plan_asks_of_nan_is_no_anomaly() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", ANOMALY], capture_output=True, text=True, timeout=120)
    assert done.stdout == "1536\n", done.stderr
