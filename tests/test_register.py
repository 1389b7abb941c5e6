"""`register()`: a user's own pointwise function, coded as one node."""

from __future__ import annotations

import gc
import math
import re
import warnings
import weakref
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fewbit_hooks as fewbit

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


pytestmark = pytest.mark.usefixtures("registered_for_one_test_only")


def swish(x: Tensor, slope: float = 1.5) -> Tensor:
    """x sigmoid(slope x)."""
    return x * torch.sigmoid(slope * x)


def swish_derivative(x: Any, slope: float = 1.5) -> Any:
    s = torch.sigmoid(slope * x)
    return s + slope * x * s * (1 - s)


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.linspace(-8, 8, 1031, dtype=torch.float64).to(dtype)


def gradient(function: Any, x: Tensor, bits: Any = 3, **settings: Any) -> tuple[Tensor, Tensor, fewbit.Report]:
    """The result, the gradient of `2 * sum`, and the report."""
    leaf = x.clone().requires_grad_()
    with fewbit.scope(bits=bits, min_bytes=0, **settings) as memory:
        y = function(leaf)
    y.backward(torch.full_like(y, 2.0))
    assert leaf.grad is not None
    return y.detach(), leaf.grad, memory.report()


def saved_tensors(node: Any) -> list[Tensor]:
    """All that the graph behind `node` holds for backward."""
    found: list[Tensor] = []
    todo, seen = [node], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        raw = [getattr(node, name) for name in dir(node) if name.startswith("_raw_saved_")]
        for each in raw:
            found += [v.data for v in (each if isinstance(each, tuple) else (each,))]
        todo += [parent for parent, _ in node.next_functions]
    return [t for t in found if isinstance(t, Tensor)]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_the_forward_is_bit_equal_and_the_gradient_is_the_level(bits: int, dtype: torch.dtype) -> None:
    function = fewbit.register(swish)
    x = inputs(dtype)
    y, grad, report = gradient(function, x, bits)
    assert torch.equal(y, swish(x))
    assert torch.equal(grad, 2 * fewbit.codebook("swish", bits).derivative(x))
    assert [(row.activation, row.bits, row.calls) for row in report.rows] == [("swish", bits, 1)]
    assert report.stored_bytes == math.ceil(1031 * bits / 8)


def test_it_decorates() -> None:
    @fewbit.register
    def bare(x: Tensor) -> Tensor:
        """Documented."""
        return torch.sin(x)

    @fewbit.register(even=True)
    def with_arguments(x: Tensor) -> Tensor:
        return x - torch.tanh(x)

    assert (bare.__name__, bare.__doc__) == ("bare", "Documented.")
    for function, name in ((bare, "bare"), (with_arguments, "with_arguments")):
        assert [row.activation for row in gradient(function, inputs())[2].rows] == [name]
    assert [fewbit.codebook(name, 2).folded for name in ("bare", "with_arguments")] == [False, True]


def test_a_name_may_be_given() -> None:
    function = fewbit.register(lambda x: torch.sin(x), "wave")
    assert [row.activation for row in gradient(function, inputs())[2].rows] == ["wave"]
    assert "wave" in {a.name for a in fewbit.activations()}


def test_outside_of_a_scope_nothing_changes() -> None:
    function = fewbit.register(swish)
    x = inputs().requires_grad_()
    y = function(x, slope=2.0)
    assert type(y.grad_fn).__name__ == "MulBackward0"
    assert torch.equal(y, swish(x, 2.0))


def test_without_grad_nothing_is_recorded() -> None:
    function = fewbit.register(swish)
    x = inputs().requires_grad_()
    with torch.no_grad(), fewbit.scope(min_bytes=0) as memory:
        assert function(x).grad_fn is None
        assert torch.equal(function(x), swish(x))
    assert memory.report().rows == ()


def test_the_original_function_is_left_as_it_was() -> None:
    fewbit.register(swish)
    with fewbit.scope(min_bytes=0) as memory:
        y = swish(inputs().requires_grad_())  # its sigmoid is recognised, as in any code
    assert type(y.grad_fn).__name__ == "MulBackward0"
    assert [row.activation for row in memory.report().rows] == ["sigmoid"]


def test_each_combination_of_parameters_has_its_own_codebook() -> None:
    function = fewbit.register(swish)
    x = inputs()
    for call, slope in (
        (function, 1.5),
        (lambda x: function(x, 0.5), 0.5),
        (lambda x: function(x, slope=3), 3.0),
        (lambda x: function(x=x, slope=0.5), 0.5),
    ):
        y, grad, _ = gradient(call, x)
        assert torch.equal(y, swish(x, slope))
        assert torch.equal(grad, 2 * fewbit.codebook("swish", 3, slope=slope).derivative(x))


@pytest.mark.parametrize(
    "settings", [{}, {"engine": "fused"}, {"recompute": True}, {"exact": True}], ids=["", "fused", "recompute", "exact"]
)
@pytest.mark.parametrize("held", ["by nobody", "by a product", "by a Linear behind", "it has an infinity"])
def test_a_call_has_its_own_parameters_however_it_is_run(settings: Any, held: str) -> None:
    function = fewbit.register(swish)
    first, last = nn.Linear(32, 32), nn.Linear(32, 32)
    x = torch.randn(64, 32)

    def forward(swish: Any) -> Tensor:
        h = first(x)
        if held == "it has an infinity":
            h = h.index_fill(0, torch.tensor([0]), torch.inf)
        y = swish(h, 0.5)
        return y * h if held == "by a product" else last(y) if held == "by a Linear behind" else y

    class Model(nn.Module):
        def forward(self, swish: Any) -> Tensor:
            return forward(swish)

    parameters = [*first.parameters(), *last.parameters()]
    model, scope = Model(), fewbit.scope(bits=8, min_bytes=0, **settings)
    expected = forward(swish)
    stocks = torch.autograd.grad(expected.nan_to_num(0, 0, 0).sum(), parameters, allow_unused=True)
    for _ in range(5):  # it learns who else keeps what
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", fewbit.FewbitWarning)  # with exact=True nothing is compressed
            with scope:
                y = model(function)
        assert torch.equal(y.nan_to_num(), expected.nan_to_num())
        for mine, its in zip(
            torch.autograd.grad(y.nan_to_num(0, 0, 0).sum(), parameters, allow_unused=True), stocks, strict=True
        ):
            if its is not None and held != "it has an infinity":
                torch.testing.assert_close(mine, its, rtol=0.02, atol=0.02 * float(its.abs().max()))


def test_a_parameter_may_be_true_or_false() -> None:
    def half(x: Tensor, really: bool = False) -> Tensor:
        return torch.tanh(x) * (0.5 if really is True else 1.0)

    function = fewbit.register(half)
    for really in (True, False):
        _, grad, _ = gradient(lambda x, really=really: function(x, really), inputs(), 8)
        (exact,) = torch.autograd.grad(half(x := inputs().requires_grad_(), really).sum(), x)
        assert (grad / 2 - exact).abs().max() < 0.02


def test_a_parameter_may_have_to_be_an_integer() -> None:
    @fewbit.register
    def power(x: Tensor, times: int = 2) -> Tensor:
        for _ in range(times):
            x = x * torch.sigmoid(x)
        return x

    x = torch.randn(64, requires_grad=True)
    for times in (1, 3):
        with fewbit.scope(bits=8, min_bytes=0):
            y = power(x, times=times)
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(grad, fewbit.codebook("power", 8, times=times).derivative(x.detach()))
    assert fewbit.codebook("power", 8, times=np.int64(3)) == fewbit.codebook("power", 8, times=3)
    assert fewbit.Codebook.from_json(fewbit.codebook("power", 8).to_json()) == fewbit.codebook("power", 8)


def test_a_parameter_whose_default_is_an_integer_may_be_a_fraction() -> None:
    @fewbit.register
    def steep(x: Tensor, slope: float = 1) -> Tensor:
        return x * torch.sigmoid(slope * x)

    x = torch.randn(64, requires_grad=True)
    with fewbit.scope(bits=8, min_bytes=0):
        y = steep(x, slope=1.5)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, fewbit.codebook("steep", 8, slope=1.5).derivative(x.detach()))


def test_the_input_may_have_any_name_and_be_passed_by_it() -> None:
    function = fewbit.register(lambda input, slope=1.5: swish(input, slope), "named")
    x = inputs().requires_grad_()
    assert torch.equal(function(input=x), swish(x))
    _, grad, _ = gradient(lambda leaf: function(slope=0.5, input=leaf), inputs())
    assert torch.equal(grad, 2 * fewbit.codebook("named", 3, slope=0.5).derivative(inputs()))


@pytest.mark.filterwarnings("ignore:fewbit_hooks.scope compressed nothing")
def test_a_parameter_that_is_learned_keeps_the_call_exact() -> None:
    function = fewbit.register(swish)
    x = inputs()

    def with_slope(leaf: Tensor) -> Tensor:
        return function(leaf, slope=slope)

    slope = nn.Parameter(torch.tensor(1.2))
    _, grad, report = gradient(with_slope, x)
    assert [(row.bits, row.reason) for row in report.rows] == [(None, "an argument of swish is a Parameter")]
    leaf, same_slope = x.clone().requires_grad_(), nn.Parameter(torch.tensor(1.2))
    (2 * swish(leaf, same_slope)).sum().backward()  # type: ignore[arg-type]
    assert leaf.grad is not None
    torch.testing.assert_close(grad, leaf.grad)
    torch.testing.assert_close(slope.grad, same_slope.grad)


def test_a_derivative_that_is_taken_is_the_one_that_would_be_given() -> None:
    fewbit.register(swish, "taken")
    fewbit.register(swish, "given", derivative=swish_derivative)
    for parameters in ({}, {"slope": 0.7}):
        taken, given = (fewbit.codebook(name, 4, **parameters) for name in ("taken", "given"))
        np.testing.assert_allclose(taken.boundaries, given.boundaries, atol=1e-6)  # on the encoder's grid
        np.testing.assert_allclose(taken.levels, given.levels, atol=1e-6)


def step(x: Any, slope: float) -> Any:
    return torch.where(x > 0, 3.0, -1.0)


def test_a_derivative_that_is_given_is_the_one_used() -> None:
    function = fewbit.register(swish, "stepped", derivative=step, jumps=(0.0,))
    _, grad, _ = gradient(function, inputs(), 1)
    assert set(grad.tolist()) == {-2.0, 6.0}


def test_registering_anew_with_another_derivative_does_not_get_the_old_codebook() -> None:
    before = fewbit.codebook(fewbit.register(swish).__name__, 1)
    fewbit.register(swish, derivative=step, jumps=(0.0,))
    assert fewbit.codebook("swish", 1) != before


def test_even_folds_and_costs_less_error() -> None:
    fewbit.register(torch.sin, "plain")
    fewbit.register(torch.sin, "folded", even=True)
    plain, folded = fewbit.codebook("plain", 3), fewbit.codebook("folded", 3)
    assert folded.folded
    assert not plain.folded
    assert folded.error < plain.error / 2


def test_a_boundary_lies_on_a_jump() -> None:
    function = fewbit.register(lambda x: torch.where(x > 0.3, 2 * x, 0.5 * x + 0.45), "kink", jumps=(0.3,))
    assert np.abs(fewbit.codebook("kink", 2).boundaries - 0.3).min() < 1e-3
    _, grad, _ = gradient(function, inputs(), 1)
    assert set(grad.tolist()) == {1.0, 4.0}  # one bit suffices, and is exact


def test_the_weight_is_that_of_its_codebooks() -> None:
    function = fewbit.register(swish, weight="normal")
    x = inputs()
    _, grad, _ = gradient(function, x, 2)
    assert torch.equal(grad, 2 * fewbit.codebook("swish", 2, weight="normal").derivative(x))
    assert not torch.equal(grad, 2 * fewbit.codebook("swish", 2).derivative(x))


def test_the_interval_is_that_of_its_codebooks() -> None:
    function = fewbit.register(swish, interval=(-2.0, 3.0))
    x = inputs()
    _, grad, _ = gradient(function, x, 2)
    assert torch.equal(grad, 2 * fewbit.codebook("swish", 2, interval=(-2.0, 3.0)).derivative(x))


def test_one_node_saves_the_codes_and_nothing_else() -> None:
    function = fewbit.register(swish)
    x = inputs().requires_grad_()
    assert sum(t.nbytes for t in saved_tensors(function(x).grad_fn)) >= 2 * x.nbytes
    with fewbit.scope(bits=3, min_bytes=0):
        y = function(x)
    assert isinstance(y.grad_fn, torch.autograd.function.BackwardCFunction)
    assert [type(parent).__name__ for parent, _ in y.grad_fn.next_functions] == ["AccumulateGrad"]
    (codes,) = saved_tensors(y.grad_fn)
    assert (codes.dtype, codes.numel()) == (torch.uint8, math.ceil(1031 * 3 / 8))


def test_the_input_and_the_tensors_in_between_are_freed() -> None:
    function = fewbit.register(swish)
    storages = []

    def model(leaf: Tensor) -> Tensor:
        x = leaf.clone()
        storages.append(weakref.ref(x.untyped_storage()))
        return function(x)

    leaf = inputs().requires_grad_()
    with fewbit.scope(bits=3, min_bytes=0) as memory:
        y = model(leaf)
    gc.collect()
    report = memory.report()
    # stock keeps x for the product and the sigmoid's output for both
    assert (report.original_bytes, report.freed_bytes) == (2 * leaf.nbytes, 2 * leaf.nbytes)
    assert report.rows[0].reason == ""
    assert sum(t.nbytes for t in saved_tensors(y.grad_fn)) == report.stored_bytes


def test_an_input_that_somebody_holds_is_not_said_to_be_freed() -> None:
    function = fewbit.register(swish)
    x = inputs().requires_grad_()
    with fewbit.scope(bits=3, min_bytes=0) as memory:
        function(x)
    (row,) = memory.report().rows
    assert (row.original_bytes, row.freed_bytes) == (2 * x.nbytes, x.nbytes)
    assert "still held" in row.reason


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        (5, 5),
        ({"swish": 2, "default": 4}, 2),
        ({"default": 4}, 4),
        ({"gelu": 2}, None),
        ({"swish": None, "default": 3}, None),
        (lambda name, x: {"swish": 6}[name], 6),
        (lambda name, x: None, None),
        (None, None),
    ],
)
@pytest.mark.filterwarnings("ignore:fewbit_hooks.scope compressed nothing")
def test_bits_go_by_its_name(bits: Any, expected: int | None) -> None:
    function = fewbit.register(swish)
    x = inputs()
    _, grad, report = gradient(function, x, bits)
    assert [row.bits for row in report.rows if row.activation == "swish"] == [expected]
    if expected is None:
        assert [bool(row.reason) for row in report.rows if row.activation == "swish"] == [True]
        stock = x.clone().requires_grad_()
        (2 * swish(stock)).sum().backward()
        assert stock.grad is not None
        assert torch.equal(grad, stock.grad)


@pytest.mark.filterwarnings("ignore:fewbit_hooks.scope compressed nothing")
def test_exact_keeps_it() -> None:
    _, _, report = gradient(fewbit.register(swish), inputs(), exact=True)
    assert [(row.bits, row.reason[:10]) for row in report.rows if row.activation == "swish"] == [(None, "exact=True")]


def test_a_codebook_of_ones_own_is_used() -> None:
    function = fewbit.register(swish)
    book = fewbit.codebook("swish", 2, weight="normal(0, 0.5)")
    x = inputs()
    _, grad, _ = gradient(function, x, 3, codebooks=[book])
    assert torch.equal(grad, 2 * book.derivative(x))


def test_it_works_inside_modules_and_the_report_names_them() -> None:
    class Block(nn.Module):
        def __init__(self, act: Any) -> None:
            super().__init__()
            self.up, self.down, self.act = nn.Linear(16, 64), nn.Linear(64, 16), act

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.down(self.act(self.up(x)))
            return y

    torch.manual_seed(0)
    model = nn.Sequential(Block(fewbit.register(swish)), Block(nn.GELU()))
    x = torch.randn(8, 16)
    expected = model(x)
    with fewbit.scope(bits=4, min_bytes=0) as memory:
        y = model(x)
    assert torch.equal(y, expected)
    y.square().mean().backward()
    assert {(row.activation, row.module) for row in memory.report().rows} == {("swish", "0"), ("gelu", "1.act")}
    coded = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model(x).square().mean().backward()
    for g, parameter in zip(coded, model.parameters(), strict=True):
        assert parameter.grad is not None
        assert (g - parameter.grad).norm() < 0.1 * parameter.grad.norm()


def test_any_layout_and_backward_twice() -> None:
    function = fewbit.register(swish)
    book = fewbit.codebook("swish", 3)
    x = inputs()[:720].view(2, 5, 8, 9).contiguous(memory_format=torch.channels_last)
    for view in (x, x.transpose(1, 3), x[:, ::2], x[:1].expand(3, 5, 8, 9), x[0, 0, 0, 0]):
        leaf = view.detach().requires_grad_()
        with fewbit.scope(bits=3, min_bytes=0):
            y = function(leaf)
        first, second = (torch.autograd.grad(y.sum(), leaf, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, book.derivative(view.contiguous()))
        assert torch.equal(first, second)


def test_double_backward_is_refused() -> None:
    function = fewbit.register(swish)
    x = inputs().requires_grad_()
    with fewbit.scope(min_bytes=0):
        y = function(x).sum()
    with pytest.raises(fewbit.FewbitRuntimeError, match=r"double backward .* through swish.*scope\(bits=None\)"):
        torch.autograd.grad(y, x, create_graph=True)


def test_a_function_of_torch_that_is_not_in_the_registry_can_be_added() -> None:
    fewbit.register(torch.special.log_ndtr, "log_ndtr")
    x = inputs(torch.float64)
    _, grad, report = gradient(torch.special.log_ndtr, x)  # what it is called by needs no change
    assert [row.activation for row in report.rows] == ["log_ndtr"]
    assert torch.equal(grad, 2 * fewbit.codebook("log_ndtr", 3).derivative(x))


def test_registering_a_name_anew_replaces_the_function_and_its_codebooks() -> None:
    x = inputs()
    first = gradient(fewbit.register(torch.sin, "wave"), x)[1]
    function = fewbit.register(lambda t: torch.sin(2 * t) / 2, "wave")
    second = gradient(function, x)[1]
    assert not torch.equal(first, second)
    assert torch.equal(second, 2 * fewbit.codebook("wave", 3).derivative(x))


def any_number(x: Tensor, *slopes: float) -> Tensor:
    return x * sum(slopes)


def no_default(x: Tensor, slope: float) -> Tensor:
    return x * slope


def narrow(x: Tensor) -> Tensor:
    return torch.sigmoid(x).float()


def shorter(x: Tensor) -> Tensor:
    return x[1:]


def root(x: Tensor) -> Tensor:
    return x.abs().sqrt()


@pytest.mark.parametrize(
    ("function", "name", "error", "message"),
    [
        (lambda x: torch.softmax(x, -1), "soft", fewbit.FewbitValueError, "soft is not pointwise"),
        (lambda x: x - x.mean(), "centred", fewbit.FewbitValueError, "centred is not pointwise"),
        (lambda x: x.cumsum(0), "sums", fewbit.FewbitValueError, "sums is not pointwise"),
        (shorter, None, fewbit.FewbitValueError, "shorter is not pointwise"),
        (narrow, None, fewbit.FewbitValueError, "narrow is not pointwise"),
        (root, None, fewbit.FewbitValueError, "the derivative of root is not finite on the interval"),
        (
            swish,
            "gelu",
            fewbit.FewbitValueError,
            "'gelu' is that of a built-in activation. Give another: name='my_gelu'",
        ),
        (swish, "default", fewbit.FewbitValueError, "name must be an identifier other than 'default'"),
        (lambda x: x, None, fewbit.FewbitValueError, "got '<lambda>'"),
        (no_default, None, fewbit.FewbitTypeError, "no_default's parameter 'slope' needs a default"),
        (any_number, None, fewbit.FewbitTypeError, "any_number takes any number of arguments, *slopes"),
        (3, None, fewbit.FewbitTypeError, "register takes a function of a tensor, got 3"),
        (nn.SiLU(), None, fewbit.FewbitValueError, "SiLU() has no name. Give it one: name='my_function'"),
        (torch.log, "logarithm", fewbit.FewbitValueError, "logarithm is not finite on the interval (-10.0, 10.0)"),
    ],
)
def test_what_cannot_be_registered_is_refused_with_the_reason(
    function: Any, name: Any, error: Any, message: str
) -> None:
    before = fewbit.activations()
    with pytest.raises(error) as raised:
        fewbit.register(function, name)
    assert message in str(raised.value)
    assert fewbit.activations() == before


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"even": True},
            fewbit.FewbitValueError,
            "even=True says that the derivative of my_silu is the same at x and -x",
        ),
        ({"jumps": "a"}, fewbit.FewbitTypeError, "jumps must be numbers, got 'a'"),
        ({"derivative": 3}, fewbit.FewbitTypeError, "derivative must be a function of a tensor, got 3"),
    ],
)
def test_what_is_said_wrongly_of_a_function_is_refused(arguments: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        fewbit.register(F.silu, "my_silu", **arguments)


def test_a_derivative_that_is_even_but_where_it_jumps_may_be_called_so() -> None:
    clipped = fewbit.register(lambda x: x.clamp(-1.25, 1.25) + torch.tanh(x), "clipped", even=True, jumps=(-1.25, 1.25))
    assert clipped is not None
    assert fewbit.codebook("clipped", 2).folded


def test_a_function_that_overwrites_its_input_is_refused_when_it_does() -> None:
    calls = []

    def sneaky(x: Tensor) -> Tensor:
        calls.append(1)
        return x.mul_(2) if x.dtype == torch.float32 else x * 2

    function = fewbit.register(sneaky)
    x = inputs().requires_grad_() * 1
    with pytest.raises(fewbit.FewbitError, match="sneaky overwrites its input"), fewbit.scope(min_bytes=0):
        function(x)


def test_a_function_that_returns_another_shape_when_called_is_refused() -> None:
    function = fewbit.register(lambda x: torch.sin(x) if x.dtype == torch.float64 else x.sum(), "fickle")
    with pytest.raises(fewbit.FewbitError, match="fickle must return one tensor"), fewbit.scope(min_bytes=0):
        function(inputs().requires_grad_())


def test_a_closure_over_a_learned_parameter_runs_as_it_is() -> None:
    slope = torch.tensor(1.5, requires_grad=True)
    function = fewbit.register(lambda x: x * torch.sigmoid(slope * x), "learned")
    x = inputs().requires_grad_()
    with pytest.warns(fewbit.FewbitWarning, match="depends on another tensor"), fewbit.scope(min_bytes=0) as memory:
        y = function(x)
    expected = torch.autograd.grad(function(x).sum(), [x, slope])
    assert all(torch.equal(*pair) for pair in zip(torch.autograd.grad(y.sum(), [x, slope]), expected, strict=True))
    assert memory.report().rows[0].reason == "it depends on another tensor that requires grad"


def test_what_primitives_save_is_asked_for_each_dtype() -> None:
    @fewbit.register
    def in_float32(x: Tensor, a: float = 1.0) -> Tensor:
        h = x.float()
        return (h * torch.sigmoid(a * h)).to(x.dtype)

    def original(dtype: torch.dtype, a: float) -> int:
        x = torch.randn(64, 64).to(dtype).requires_grad_()
        with fewbit.scope(min_bytes=0) as memory:
            in_float32(x * 1, a)
        return memory.report().original_bytes

    alone = original(torch.bfloat16, 2.0)
    original(torch.float32, 1.0)
    assert original(torch.bfloat16, 1.0) == alone
