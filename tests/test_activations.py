"""The registry: what it says of each activation is what PyTorch does."""

from __future__ import annotations

import operator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fewbit_hooks as fewbit
from fewbit_hooks import _activations, _standins

BUILT_IN = [a for a in fewbit.activations() if a.calls != (a.name,)]  # other tests may have registered their own
SMOOTH = [a for a in BUILT_IN if not a.exact]
EXACT = [a for a in BUILT_IN if a.exact]

# Arguments of the functions and modules that have no defaults, and of clamp such that it has a limit.
REQUIRED = {"clamp": (0.5, 1.5), "threshold": (0.5, 20.0), "clamp_min": (0.5,), "clamp_max": (0.5,), "clip": (0.5, 1.5)}
REQUIRED["Threshold"] = (0.5, 20.0)

each = pytest.mark.parametrize("activation", BUILT_IN, ids=lambda a: a.name)
each_smooth = pytest.mark.parametrize("activation", SMOOTH, ids=lambda a: a.name)


def parameters_of(activation: fewbit.Activation) -> dict[str, Any]:
    return {"min": -0.5, "max": 1.5} if activation.name == "clamp" else dict(activation.parameters)


def test_activations_are_listed_by_name() -> None:
    names = [a.name for a in fewbit.activations()]
    assert names == sorted(set(names))
    exact = "clamp hardshrink hardsigmoid hardtanh leaky_relu relu relu6 softshrink threshold"
    smooth = "celu elu gelu hardswish logsigmoid mish quick_gelu selu sigmoid silu softplus softsign tanh tanhshrink"
    assert " ".join(a.name for a in EXACT) == exact
    assert " ".join(a.name for a in SMOOTH) == smooth


@pytest.mark.parametrize(
    ("name", "path"), [pytest.param(a.name, path, id=f"{a.name} {path}") for a in BUILT_IN for path in a.calls]
)
def test_each_call_that_is_listed_exists_and_is_recognised(name: str, path: str) -> None:
    called = operator.attrgetter(path)(SimpleNamespace(F=F, torch=torch, Tensor=Tensor, nn=nn))
    last = path.rpartition(".")[2]
    arguments = REQUIRED.get(last.rstrip("_"), ())
    x = torch.linspace(-8, 8, 1031).requires_grad_()
    with fewbit.scope(bits=2, min_bytes=0) as memory:
        y = called(*arguments)(x.clone()) if path.startswith("nn.") else called(x.clone(), *arguments)
    y = y[0] if isinstance(y, tuple) else y
    assert [(row.activation, row.calls) for row in memory.report().rows] == [(name, 1)]
    assert memory.report().rows[0].bits is not None
    assert torch.equal(y, _activations.find(name).function(x, **_given(name, last, arguments)))


def _given(name: str, last: str, arguments: tuple[Any, ...]) -> dict[str, Any]:
    if last.startswith("clamp_m"):
        return {last[6:9]: arguments[0]}
    given = dict(zip(_activations.find(name).parameters, arguments, strict=False))
    return {"min_val": 0.0, "max_val": 6.0} if last == "ReLU6" else given


def test_every_activation_module_of_torch_is_listed_or_known_to_be_none() -> None:
    listed = {path.removeprefix("nn.") for a in BUILT_IN for path in a.calls if path.startswith("nn.")}
    kept = {"GLU", "PReLU", "RReLU"}
    not_pointwise = {"MultiheadAttention", "Softmax", "Softmax2d", "Softmin", "LogSoftmax"}
    assert {*nn.modules.activation.__all__} == listed | kept | not_pointwise


@each
def test_what_the_node_saves_is_as_stated(activation: fewbit.Activation) -> None:
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)
    parameters = parameters_of(activation)
    saved = _standins.saved_by(lambda t: activation.function(t, **parameters), x)
    if activation.saves == "several":
        assert len(saved) > 1 or not torch.equal(saved[0], x)
        return
    assert len(saved) == 1
    assert torch.equal(saved[0], x if activation.saves == "input" else activation.function(x, **parameters))


@each
def test_the_derivative_is_that_of_the_function(activation: fewbit.Activation) -> None:
    x = np.linspace(-5.013, 5.017, 400)
    x = x[
        np.abs(x[:, None] - np.array([0.0, 0.5, -0.5, 1.0, -1.0, 1.5, 3.0, -3.0, 6.0])).min(1) > 1e-4
    ]  # not on a kink
    parameters = parameters_of(activation)
    step = 1e-5
    with torch.no_grad():
        up, down = (activation.function(torch.from_numpy(x + s), **parameters).numpy() for s in (step, -step))
    # a central difference: off by f''' step^2 / 6, and 1e-16 / step of rounding
    np.testing.assert_allclose(activation.derivative(x, **parameters), (up - down) / (2 * step), atol=1e-9)


@each
def test_exact_means_that_the_derivative_has_two_values(activation: fewbit.Activation) -> None:
    values = np.unique(activation.derivative(np.linspace(-8, 8, 4001), **parameters_of(activation)))
    assert (len(values) == 2) == activation.exact


@each
def test_even_means_that_the_derivative_is(activation: fewbit.Activation) -> None:
    x = np.linspace(0.01, 8, 500)
    there, back = (activation.derivative(side * x, **parameters_of(activation)) for side in (1, -1))
    two_valued_and_even = activation.name in ("hardsigmoid", "hardtanh", "hardshrink", "softshrink")  # need no folding
    assert np.allclose(there, back, atol=1e-12) == (activation.even or two_valued_and_even)


@pytest.mark.parametrize(
    ("name", "parameters", "jumps"),
    [
        ("gelu", {}, ()),
        ("celu", {"alpha": 2.0}, ()),
        ("elu", {}, ()),
        ("elu", {"alpha": 0.5}, (0.0,)),
        ("elu", {"alpha": 2.0, "input_scale": 0.5}, ()),
        ("elu", {"alpha": 2.0, "input_scale": 0.5, "scale": 3.0}, ()),
        ("selu", {}, (0.0,)),
        ("hardswish", {}, (-3.0, 3.0)),
        ("softplus", {"beta": 2.0, "threshold": 5.0}, (2.5,)),
        ("softplus", {"beta": -1.0, "threshold": 2.0}, (-2.0,)),
    ],
)  # fmt: skip
def test_the_derivative_jumps_where_it_is_said_to_and_nowhere_else(name: str, parameters: Any, jumps: Any) -> None:
    activation = _activations.find(name)
    assert activation.jumps(**parameters) == jumps
    x = np.arange(-8, 8, 1e-3) + 1e-4  # no jump lies on it
    steps = np.abs(np.diff(activation.derivative(x, **parameters)))
    assert [round(float(x[i]), 2) for i in np.flatnonzero(steps > 4e-3)] == list(jumps)


@each_smooth
def test_the_derivative_is_the_same_whatever_surrounds_the_question(activation: fewbit.Activation) -> None:
    x = np.linspace(-4, 4, 33)
    expected = activation.derivative(x)
    with torch.no_grad():
        assert np.array_equal(activation.derivative(x), expected)
    with torch.inference_mode():
        assert np.array_equal(activation.derivative(x), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert np.array_equal(activation.derivative(x), expected)
    with torch.device("meta"):
        assert np.array_equal(activation.derivative(x), expected)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t * 0, lambda t: t):
        assert np.array_equal(activation.derivative(x), expected)
    with pytest.warns(fewbit.FewbitWarning, match="compressed nothing"), fewbit.scope(min_bytes=0) as memory:
        assert np.array_equal(activation.derivative(x), expected)
    assert memory.report().rows == ()


def test_check_fills_in_defaults_and_makes_numbers_floats() -> None:
    assert _activations.find("softplus").check({"beta": 2}) == {"beta": 2.0, "threshold": 20.0}
    assert _activations.find("clamp").check({"max": np.float32(0.5)}) == {"min": None, "max": 0.5}
    assert _activations.find("gelu").check({}) == {"approximate": "none"}


@pytest.mark.parametrize(
    ("name", "parameters", "error", "message"),
    [
        ("silu", {"beta": 2.0}, fewbit.FewbitValueError, "silu has no parameter 'beta'. Its parameters: none."),
        ("elu", {"alfa": 1.0}, fewbit.FewbitValueError, "Its parameters: alpha, scale, input_scale."),
        (
            "elu",
            {"alpha": float("nan")},
            fewbit.FewbitValueError,
            "elu: alpha must be a number that a float can hold, got nan",
        ),
        ("elu", {"alpha": "1"}, fewbit.FewbitTypeError, "elu: alpha must be like 1.0, got '1'"),
        ("elu", {"alpha": torch.tensor(1.0)}, fewbit.FewbitTypeError, "elu: alpha must be a number, got Tensor"),
        ("gelu", {"approximate": 1.0}, fewbit.FewbitTypeError, "approximate must be like 'none', got 1.0"),
    ],
)
def test_wrong_parameters_are_named_with_what_is_allowed(name: str, parameters: Any, error: Any, message: str) -> None:
    with pytest.raises(error) as raised:
        _activations.find(name).check(parameters)
    assert message in str(raised.value)


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(fewbit.FewbitValueError, match=r"no activation 'gleu'. Known activations: .*gelu, .*register\("):
        _activations.find("gleu")


def test_an_activation_is_immutable() -> None:
    with pytest.raises(AttributeError):
        BUILT_IN[0].name = "other"  # type: ignore[misc]
