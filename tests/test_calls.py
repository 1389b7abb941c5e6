"""Recognition: every form that a PyTorch user writes, and never another parameter's table."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fewbit_hooks as fewbit
from fewbit_hooks import _calls

aten = torch.ops.aten
BITS = 3

# name, parameters of the codebook or None for the exact ones -> the forms, as a user writes them.
SMOOTH: list[tuple[str, dict[str, Any], dict[str, Callable[[Tensor], Tensor]]]] = [
    (
        "celu",
        {"alpha": 2.0},
        {
            "F": lambda x: F.celu(x, 2.0),
            "F keywords": lambda x: F.celu(input=x, alpha=2.0),
            "F inplace": lambda x: F.celu(x, 2.0, True),
            "F inplace keyword": lambda x: F.celu(x, alpha=2, inplace=True),
            "F_": lambda x: F.celu_(x, 2.0),
            "torch": lambda x: torch.celu(x, alpha=2.0),
            "torch_": lambda x: torch.celu_(x, alpha=2.0),
            "module": nn.CELU(2.0),
            "module inplace": nn.CELU(2.0, inplace=True),
            "packet": lambda x: aten.celu(x, 2.0),
            "overload": lambda x: aten.celu.default(x, 2.0),
            "overload_": lambda x: aten.celu_.default(x, 2.0),
        },
    ),
    ("celu", {"alpha": 1.0}, {"F": F.celu, "module": nn.CELU(), "packet": aten.celu}),
    (
        "elu",
        {"alpha": 0.5},
        {
            "F": lambda x: F.elu(x, 0.5),
            "F inplace": lambda x: F.elu(x, 0.5, inplace=True),
            "F_": lambda x: F.elu_(x, 0.5),
            "module": nn.ELU(0.5),
            "module inplace": nn.ELU(alpha=0.5, inplace=True),
            "packet": lambda x: aten.elu(x, 0.5),
            "packet keyword": lambda x: aten.elu(self=x, alpha=0.5),
            "overload_": lambda x: aten.elu_.default(x, alpha=0.5),
        },
    ),
    (
        "elu",
        {"alpha": 1.5, "scale": 1.05, "input_scale": 0.7},
        {
            "packet": lambda x: aten.elu(x, 1.5, 1.05, 0.7),
            "overload keywords": lambda x: aten.elu.default(x, alpha=1.5, scale=1.05, input_scale=0.7),
            "packet_": lambda x: aten.elu_(x, 1.5, 1.05, 0.7),
        },
    ),
    ("elu", {"alpha": 2.0}, {"F": lambda x: F.elu(x, 2), "module": nn.ELU(2)}),
    ("elu", {}, {"F": F.elu, "module": nn.ELU(), "packet": aten.elu}),
    (
        "gelu",
        {"approximate": "none"},
        {
            "F": F.gelu,
            "F keyword": lambda x: F.gelu(input=x),
            "F named": lambda x: F.gelu(x, approximate="none"),
            "module": nn.GELU(),
            "packet": aten.gelu,
            "packet_": aten.gelu_,
            "overload": aten.gelu.default,
            "overload self": lambda x: aten.gelu.default(self=x),
        },
    ),
    (
        "gelu",
        {"approximate": "tanh"},
        {
            "F": lambda x: F.gelu(x, approximate="tanh"),
            "F keywords": lambda x: F.gelu(approximate="tanh", input=x),
            "module": nn.GELU(approximate="tanh"),
            "packet": lambda x: aten.gelu(x, approximate="tanh"),
            "overload": lambda x: aten.gelu.default(x, approximate="tanh"),
            "overload_": lambda x: aten.gelu_.default(x, approximate="tanh"),
        },
    ),
    (
        "hardswish",
        {},
        {
            "F": F.hardswish,
            "F inplace": lambda x: F.hardswish(x, inplace=True),
            "module": nn.Hardswish(),
            "module inplace": nn.Hardswish(inplace=True),
            "packet": aten.hardswish,
            "overload_": aten.hardswish_.default,
        },
    ),
    (
        "logsigmoid",
        {},
        {
            "F": F.logsigmoid,
            "module": nn.LogSigmoid(),
            "packet": aten.log_sigmoid,
            "overload": aten.log_sigmoid.default,
        },
    ),
    (
        "mish",
        {},
        {
            "F": F.mish,
            "F inplace": lambda x: F.mish(x, True),
            "module": nn.Mish(),
            "packet": aten.mish,
            "overload_": aten.mish_.default,
        },
    ),
    (
        "selu",
        {},
        {
            "F": F.selu,
            "F inplace": lambda x: F.selu(x, inplace=True),
            "F_": F.selu_,
            "torch": torch.selu,
            "torch_": torch.selu_,
            "module": nn.SELU(),
            "module inplace": nn.SELU(inplace=True),
            "packet": aten.selu,
            "overload_": aten.selu_.default,
        },
    ),
    (
        "sigmoid",
        {},
        {
            "F": F.sigmoid,
            "torch": torch.sigmoid,
            "torch keyword": lambda x: torch.sigmoid(input=x),
            "torch_": torch.sigmoid_,
            "special": torch.special.expit,
            "method": lambda x: x.sigmoid(),
            "method_": lambda x: x.sigmoid_(),
            "unbound": Tensor.sigmoid,
            "module": nn.Sigmoid(),
            "packet": aten.sigmoid,
            "overload": aten.sigmoid.default,
            "special packet": aten.special_expit,
        },
    ),
    (
        "silu",
        {},
        {
            "F": F.silu,
            "F keyword": lambda x: F.silu(input=x),
            "F inplace": lambda x: F.silu(x, inplace=True),
            "module": nn.SiLU(),
            "module inplace": nn.SiLU(inplace=True),
            "packet": aten.silu,
            "overload_": aten.silu_.default,
        },
    ),
    (
        "softplus",
        {"beta": 2.0, "threshold": 5.0},
        {
            "F": lambda x: F.softplus(x, 2, 5),
            "F keywords": lambda x: F.softplus(x, threshold=5, beta=2),
            "module": nn.Softplus(beta=2, threshold=5),
            "packet": lambda x: aten.softplus(x, 2.0, 5.0),
            "overload": lambda x: aten.softplus.default(x, beta=2.0, threshold=5.0),
        },
    ),
    ("softplus", {"beta": 0.5}, {"F": lambda x: F.softplus(x, 0.5), "module": nn.Softplus(0.5)}),
    ("softplus", {}, {"F": F.softplus, "module": nn.Softplus()}),
    ("softsign", {}, {"F": F.softsign, "module": nn.Softsign()}),
    (
        "tanh",
        {},
        {
            "F": F.tanh,
            "torch": torch.tanh,
            "torch_": torch.tanh_,
            "method": lambda x: x.tanh(),
            "method_": lambda x: x.tanh_(),
            "unbound": Tensor.tanh,
            "module": nn.Tanh(),
            "packet": aten.tanh,
            "overload": aten.tanh.default,
            "overload_": aten.tanh_.default,
        },
    ),
    ("tanhshrink", {}, {"F": F.tanhshrink, "module": nn.Tanhshrink()}),
]
EXACT: dict[str, dict[str, Callable[[Tensor], Tensor]]] = {
    "clamp": {
        "torch": lambda x: torch.clamp(x, -0.5, 1.5),
        "torch keywords": lambda x: torch.clamp(input=x, min=-0.5, max=1.5),
        "torch max": lambda x: torch.clamp(x, max=0.5),
        "torch None": lambda x: torch.clamp(x, None, 0.5),
        "torch int": lambda x: torch.clamp(x, 0, 1),
        "torch_": lambda x: torch.clamp_(x, 0.1, 1.5),
        "clip": lambda x: torch.clip(x, -0.5, 1.5),
        "clip_": lambda x: torch.clip_(x, 0.5, 1.5),
        "clamp_min": lambda x: torch.clamp_min(x, 0.5),
        "clamp_min keyword": lambda x: torch.clamp_min(x, min=0.5),
        "clamp_max": lambda x: torch.clamp_max(x, 0.5),
        "clamp_min_": lambda x: torch.clamp_min_(x, 0.5),
        "clamp_max_": lambda x: torch.clamp_max_(x, 0.5),
        "method": lambda x: x.clamp(-0.5, 1.5),
        "method keyword": lambda x: x.clamp(min=0),
        "method_": lambda x: x.clamp_(0.5, 1.5),
        "method clip": lambda x: x.clip(max=0.5),
        "method clip_": lambda x: x.clip_(0.5),
        "method clamp_min": lambda x: x.clamp_min(0.5),
        "method clamp_max_": lambda x: x.clamp_max_(0.5),
        "packet": lambda x: aten.clamp(x, -0.5, 1.5),
        "overload": lambda x: aten.clamp.default(x, -0.5),
        "overload_": lambda x: aten.clamp_.default(x, 0.5, 1.5),
        "clamp_min packet": lambda x: aten.clamp_min(x, 0.5),
        "clamp_max overload": lambda x: aten.clamp_max.default(x, 0.5),
        "clip packet": lambda x: aten.clip(x, -0.5, 1.5),
    },
    "hardshrink": {
        "F": F.hardshrink,
        "F lambd": lambda x: F.hardshrink(x, 1.25),
        "torch": lambda x: torch.hardshrink(x, lambd=1.25),
        "method": lambda x: x.hardshrink(1.25),
        "module": nn.Hardshrink(1.25),
        "packet": lambda x: aten.hardshrink(x, 1.25),
        "overload": lambda x: aten.hardshrink.default(x, lambd=1.25),
    },
    "hardsigmoid": {
        "F": F.hardsigmoid,
        "F inplace": lambda x: F.hardsigmoid(x, True),
        "module": nn.Hardsigmoid(),
        "module inplace": nn.Hardsigmoid(inplace=True),
        "packet": aten.hardsigmoid,
        "overload_": aten.hardsigmoid_.default,
    },
    "hardtanh": {
        "F": F.hardtanh,
        "F limits": lambda x: F.hardtanh(x, -2, 0.5),
        "F inplace": lambda x: F.hardtanh(x, -2.0, 0.5, True),
        "F_": lambda x: F.hardtanh_(x, -2.0, 0.5),
        "module": nn.Hardtanh(-2, 0.5),
        "module inplace": nn.Hardtanh(-2, 0.5, inplace=True),
        "nn.ReLU6": nn.ReLU6(),  # which calls F.hardtanh(x, 0, 6)
        "nn.ReLU6 inplace": nn.ReLU6(inplace=True),
        "packet": lambda x: aten.hardtanh(x, -2.0, 0.5),
        "overload_": lambda x: aten.hardtanh_.default(x, max_val=0.5),
    },
    "leaky_relu": {
        "F": F.leaky_relu,
        "F slope": lambda x: F.leaky_relu(x, 0.3),
        "F negative slope": lambda x: F.leaky_relu(x, -0.3),
        "F inplace": lambda x: F.leaky_relu(x, 0.3, True),
        "F_": lambda x: F.leaky_relu_(x, 0.3),
        "module": nn.LeakyReLU(0.3),
        "module inplace": nn.LeakyReLU(0.3, inplace=True),
        "packet": lambda x: aten.leaky_relu(x, 0.3),
        "overload": lambda x: aten.leaky_relu.default(x, negative_slope=0.3),
        "overload_": lambda x: aten.leaky_relu_.default(x, 0.3),
    },
    "relu": {
        "F": F.relu,
        "F inplace": lambda x: F.relu(x, inplace=True),
        "F_": F.relu_,
        "torch": torch.relu,
        "torch keyword": lambda x: torch.relu(input=x),
        "torch_": torch.relu_,
        "method": lambda x: x.relu(),
        "method_": lambda x: x.relu_(),
        "unbound": Tensor.relu,
        "module": nn.ReLU(),
        "module inplace": nn.ReLU(inplace=True),
        "packet": aten.relu,
        "overload": aten.relu.default,
        "overload_": aten.relu_.default,
    },
    "relu6": {
        "F": F.relu6,
        "F inplace": lambda x: F.relu6(x, inplace=True),
        "packet": aten.relu6,
        "overload_": aten.relu6_.default,
    },
    "softshrink": {
        "F": F.softshrink,
        "F lambd": lambda x: F.softshrink(x, 1.25),
        "F keyword": lambda x: F.softshrink(x, lambd=1.25),
        "module": nn.Softshrink(1.25),
        "packet": lambda x: aten.softshrink(x, 1.25),
        "overload": lambda x: aten.softshrink.default(x, lambd=1.25),
    },
    "threshold": {
        "F": lambda x: F.threshold(x, 0.5, -7.0),
        "F keywords": lambda x: F.threshold(x, threshold=0.5, value=20.0),
        "F inplace": lambda x: F.threshold(x, 0.5, 20.0, True),
        "F_": lambda x: F.threshold_(x, 0.5, 20.0),
        "torch": lambda x: torch.threshold(x, 0.5, 20.0),
        "torch_": lambda x: torch.threshold_(x, 0.5, 20.0),
        "module": nn.Threshold(0.5, 20.0),
        "module inplace": nn.Threshold(0.5, 20.0, inplace=True),
        "packet": lambda x: aten.threshold(x, 0.5, 20.0),
        "overload": lambda x: aten.threshold.default(x, threshold=0.5, value=20.0),
    },
}


def inputs() -> Tensor:
    return torch.linspace(-8, 8, 1031)  # an odd number: there is a tail behind the vectorised loop


def run(call: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """The result and the gradient."""
    leaf = inputs().requires_grad_()
    y = call(leaf.clone())
    (gradient,) = torch.autograd.grad(y, leaf, torch.linspace(-2, 3, leaf.numel()))
    return y.detach(), gradient


def run_under_a_scope(call: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, fewbit.Report]:
    with fewbit.scope(bits=BITS, min_bytes=0) as memory:
        y, gradient = run(call)
    return y, gradient, memory.report()


@pytest.mark.parametrize(
    ("name", "parameters", "call"),
    [
        pytest.param(name, parameters, call, id=f"{name} {', '.join(map(str, parameters.values()))} {form}")
        for name, parameters, forms in SMOOTH
        for form, call in forms.items()
    ],
)
def test_a_smooth_call_is_recognised_with_its_own_parameters(name: str, parameters: Any, call: Any) -> None:
    y0, _ = run(call)
    y, gradient, report = run_under_a_scope(call)
    assert torch.equal(y, y0)
    assert [(row.activation, row.bits, row.calls) for row in report.rows] == [(name, BITS, 1)]
    assert report.stored_bytes == math.ceil(y.numel() * BITS / 8)
    slope = fewbit.codebook(name, BITS, **parameters).derivative(inputs())
    # levels are attained to 5e-7 in float32 (tests/test_standins.py), and |grad| is 3 at most
    assert (gradient - torch.linspace(-2, 3, y.numel()) * slope).abs().max() <= 2e-6


@pytest.mark.parametrize(
    ("name", "call"),
    [pytest.param(name, call, id=f"{name} {form}") for name, forms in EXACT.items() for form, call in forms.items()],
)
def test_a_two_valued_call_is_recognised_and_exact(name: str, call: Any) -> None:
    y0, gradient0 = run(call)
    y, gradient, report = run_under_a_scope(call)
    assert torch.equal(y, y0)
    assert torch.equal(gradient, gradient0)
    assert [(row.activation, row.bits, row.calls) for row in report.rows] == [(name, 1, 1)]
    assert report.stored_bytes == math.ceil(y.numel() / 8)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("celu", [{"alpha": a} for a in (0.5, 1.0, 2.0)]),
        ("elu", [{"alpha": a} for a in (0.5, 1.0, 2.0)]),
        ("gelu", [{"approximate": a} for a in ("none", "tanh")]),
        ("softplus", [{"beta": 1.0}, {"beta": 2.0}, {"threshold": 1.0}, {"beta": 2.0, "threshold": 1.0}]),
        ("hardtanh", [{"min_val": -2.0}, {"max_val": 0.5}, {"min_val": -2.0, "max_val": 0.5}, {}]),
        ("leaky_relu", [{"negative_slope": s} for s in (0.0, 0.01, 0.3, -0.3, 1.0)]),
        ("softshrink", [{"lambd": v} for v in (0.0, 0.5, 2.0)]),
        ("hardshrink", [{"lambd": v} for v in (0.0, 0.5, 2.0)]),
    ],
)
def test_calls_with_different_parameters_under_one_scope_do_not_share_a_table(name: str, parameters: Any) -> None:
    function = getattr(F, name)
    exact = next(a for a in fewbit.activations() if a.name == name).exact
    with fewbit.scope(bits=BITS, min_bytes=0):
        gradients = [run(lambda x, p=p: function(x, **p))[1] for p in parameters * 2]  # the second time from the cache
    for p, gradient in zip(parameters * 2, gradients, strict=True):
        if exact:
            expected = run(lambda x, p=p: function(x, **p))[1]
        else:
            expected = torch.linspace(-2, 3, 1031) * fewbit.codebook(name, BITS, **p).derivative(inputs())
        assert (gradient - expected).abs().max() <= (0 if exact else 2e-6), p


@pytest.mark.filterwarnings("ignore:fewbit_hooks.scope compressed nothing")
@pytest.mark.parametrize(
    ("call", "name", "reason"),
    [
        (lambda x: F.prelu(x, torch.tensor([0.25])), "prelu", "the gradient of prelu's weight needs the true input"),
        (lambda x: x.prelu(torch.tensor([0.25])), "prelu", "the gradient of prelu's weight needs the true input"),
        (lambda x: aten.prelu(x, torch.tensor([0.25])), "prelu", "the gradient of prelu's weight needs the true input"),
        (nn.PReLU(), "prelu", "the gradient of prelu's weight needs the true input"),
        (lambda x: F.rrelu(x, 0.1, 0.3, training=True), "rrelu", "rrelu keeps random slopes"),
        (lambda x: F.rrelu(x, 0.1, 0.3, training=True, inplace=True), "rrelu", "rrelu keeps random slopes"),
        (nn.RReLU(), "rrelu", "rrelu keeps random slopes"),
        (lambda x: F.glu(torch.cat([x, x])), "glu", "the gradient of glu's values needs the true gate"),
        (lambda x: torch.clamp(x, torch.tensor(-0.5)), "clamp", "an argument of clamp is a Tensor"),
        (lambda x: x.clamp(max=torch.linspace(0, 1, 1031)), "clamp", "an argument of clamp is a Tensor"),
        (lambda x: aten.clamp.Tensor(x, torch.tensor(-0.5)), "clamp", "an argument of clamp is a Tensor"),
        (lambda x: x.clamp_min(torch.tensor(0.5)), "clamp", "an argument of clamp is a Tensor"),
        (lambda x: F.elu(x, alpha=math.nan), "elu", "elu: alpha must be a number that a float can hold, got nan"),
        (
            lambda x: F.leaky_relu(x, math.nan),
            "leaky_relu",
            "leaky_relu: negative_slope must be a number that a float can hold, got nan",
        ),
    ],
)
def test_what_is_kept_is_right_and_says_why(call: Any, name: str, reason: str) -> None:
    torch.manual_seed(0)  # rrelu draws
    y0, gradient0 = run(call)
    torch.manual_seed(0)
    y, gradient, report = run_under_a_scope(call)
    assert torch.equal(y.nan_to_num(), y0.nan_to_num())
    assert torch.equal(gradient.nan_to_num(), gradient0.nan_to_num())
    assert [(row.activation, row.bits, row.reason) for row in report.rows] == [(name, None, reason)]


def test_the_weight_of_prelu_gets_its_exact_gradient() -> None:
    def gradients() -> Any:
        x, weight = inputs().requires_grad_(), torch.tensor([0.25], requires_grad=True)
        return torch.autograd.grad(F.prelu(x, weight).sum(), [x, weight])

    expected = gradients()
    with pytest.warns(fewbit.FewbitWarning, match="prelu's weight"), fewbit.scope(min_bytes=0):
        given = gradients()
    assert all(map(torch.equal, given, expected))


@pytest.mark.filterwarnings("ignore:fewbit_hooks.scope compressed nothing")
@pytest.mark.parametrize(
    "call",
    [
        lambda x, out: torch.sigmoid(x, out=out),
        lambda x, out: torch.tanh(x, out=out),
        lambda x, out: torch.clamp(x, -0.5, 1.5, out=out),
        lambda x, out: torch.clamp_min(x, 0.5, out=out),
        lambda x, out: torch.special.expit(x, out=out),
        lambda x, out: aten.gelu.out(x, out=out),
        lambda x, out: aten.silu(x, out=out),
    ],
)
def test_out_is_written_as_ever_and_refused_where_a_gradient_is_asked_for(call: Any) -> None:
    expected = call(inputs(), torch.empty(1031))
    with fewbit.scope(min_bytes=0):
        out = torch.empty(1031)
        assert call(inputs(), out) is out
        assert torch.equal(out, expected)
        with torch.no_grad():
            assert torch.equal(call(inputs().requires_grad_(), out), expected)
        with pytest.raises(RuntimeError, match="don't support automatic differentiation"):
            call(inputs().requires_grad_(), out)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("clamp", lambda x: x.clamp_(-1, 1)),
        ("clamp", lambda x: x.clamp_min_(-0.5)),
        ("threshold", lambda x: F.threshold(x, -0.5, -7.0, inplace=True)),
    ],
)
def test_negative_limits_in_place_are_coded(name: str, call: Any) -> None:
    test_a_two_valued_call_is_recognised_and_exact(name, call)


@pytest.mark.parametrize("name", ["leaky_relu", "elu", "celu"])
def test_a_negative_slope_in_place_fails_in_backward_as_in_stock(name: str) -> None:
    """Stock cannot do it; the error must be stock's, at stock's place."""

    def call(x: Tensor) -> Tensor:
        y: Tensor = getattr(F, name)(x, -0.5, inplace=True)
        return y

    with pytest.raises(RuntimeError, match=r"In-place .* backward calculation is triggered with a negative slope"):
        run(call)
    with (
        pytest.raises(RuntimeError, match=r"In-place .* backward calculation is triggered with a negative slope"),
        fewbit.scope(min_bytes=0),
    ):
        y = call(inputs().requires_grad_().clone())  # not here
        y.sum().backward()


@pytest.mark.filterwarnings("ignore:fewbit_hooks.scope compressed nothing")
@pytest.mark.parametrize("call", [lambda x: F.elu(x, math.inf), lambda x: F.softplus(x, math.inf)])
def test_a_parameter_for_which_there_can_be_no_codebook_keeps_the_call(call: Any) -> None:
    y0, _ = run(call)
    y, _, report = run_under_a_scope(call)
    assert torch.equal(y.nan_to_num(), y0.nan_to_num())
    assert [(row.bits, bool(row.reason)) for row in report.rows] == [(None, True)]


def test_wrong_arguments_raise_what_stock_raises() -> None:
    x = inputs().requires_grad_()
    calls: list[Callable[[], Any]] = [
        lambda: F.gelu(x, approximate="tanhh"),
        lambda: F.gelu(),
        lambda: F.elu(x, alfa=1.0),
        lambda: torch.clamp(x),
        lambda: F.hardtanh(x, 1.0, -1.0),
        lambda: F.softshrink(x, -1.0),
        lambda: torch.relu(x, 1),
        lambda: torch.sigmoid_(x),  # a leaf
        lambda: F.silu(None),
        lambda: torch.clamp(x, max=10**30),
        lambda: torch.clamp(x, max=10**400),
    ]
    for call in calls:
        with pytest.raises(Exception) as stock:  # noqa: PT011 - whatever it is
            call()
        with pytest.raises(stock.type) as ours, fewbit.scope(min_bytes=0):
            call()
        assert str(ours.value) == str(stock.value)


def test_the_aten_packets_are_recognised_with_all_their_overloads_but_out() -> None:
    for packet in (aten.gelu, aten.clamp, aten.sigmoid, aten.relu_):
        assert packet in _calls.RECOGNISED
        for overload in packet.overloads():
            assert (getattr(packet, overload) in _calls.RECOGNISED) == ("out" not in overload)


@pytest.mark.filterwarnings("ignore:fewbit_hooks.scope compressed nothing")
def test_calls_on_what_is_not_a_float_tensor_run_as_ever() -> None:
    with fewbit.scope(min_bytes=0) as memory:
        assert torch.clamp(torch.tensor([1, 5]), 0, 3).tolist() == [1, 3]
        assert torch.relu(torch.tensor([-1, 5])).tolist() == [0, 5]
        z = torch.randn(8, dtype=torch.complex64, requires_grad=True)
        torch.tanh(z).abs().sum().backward()
    assert [(row.bits, row.reason) for row in memory.report().rows] == [(None, "dtype complex64")]
