"""compare(): the gradient error of few bits, and everything as it was afterwards."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

import fewbit_hooks as fewbit


@pytest.fixture
def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 128), nn.BatchNorm1d(128), nn.GELU(), nn.Dropout(0.1), nn.Linear(128, 1))


def test_the_error_falls_with_the_bits_and_the_loss_stays(model: nn.Module) -> None:
    x = torch.randn(64, 32)
    result = fewbit.compare(lambda: model(x).square().mean(), bits=[1, 2, 3, 4], min_bytes=0)
    errors = [row.relative_error for row in result.rows]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 0.5
    assert errors[-1] < 0.05
    assert {row.loss for row in result.rows} == {result.exact_loss}
    assert result.repeat_error == 0


def test_cosine_and_relative_error_are_those_of_the_gradients(model: nn.Module) -> None:
    model.eval()
    model[4].requires_grad_(False)  # it keeps no input: codes, also after learning
    x = torch.randn(64, 32)
    (few,) = fewbit.compare(lambda: model(x).square().mean(), bits=2, min_bytes=0).rows
    parameters = [p for p in model.parameters() if p.requires_grad]
    exact = torch.autograd.grad(model(x).square().mean(), parameters)
    with fewbit.scope(bits=2, min_bytes=0):
        coded = torch.autograd.grad(model(x).square().mean(), parameters)
    a, b = (torch.cat([g.double().flatten() for g in grads]) for grads in (exact, coded))
    assert few.relative_error == pytest.approx(float((a - b).norm() / a.norm()))
    assert few.cosine == pytest.approx(float(torch.nn.functional.cosine_similarity(a, b, dim=0)))


def test_everything_is_restored(model: nn.Module) -> None:
    x = torch.randn(64, 32)
    model(x).sum().backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    grads = [p.grad.clone() for p in model.parameters()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002

    def step() -> torch.Tensor:
        random.random()
        np.random.random()  # noqa: NPY002
        return model(x).square().mean()

    fewbit.compare(step, bits=[1, 2], min_bytes=0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), grads, strict=True))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert str(np.random.get_state()) == str(states[2])  # noqa: NPY002


def test_buffers_are_restored_after_an_error(model: nn.Module) -> None:
    before = model[1].running_mean.clone()

    def step() -> torch.Tensor:
        model(torch.randn(64, 32))
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        fewbit.compare(step, min_bytes=0)
    assert torch.equal(model[1].running_mean, before)


def test_a_step_that_does_not_repeat_itself_is_warned_about(model: nn.Module) -> None:
    batches = iter(torch.randn(11, 64, 32))
    with pytest.warns(fewbit.FewbitWarning, match="does not repeat itself"):
        result = fewbit.compare(lambda: model(next(batches)).square().mean(), bits=[1, 2, 3], min_bytes=0)
    assert result.repeat_error > 0.01


def test_bits_may_be_mappings_and_errors_of_the_scopes_arguments_come_first(model: nn.Module) -> None:
    x = torch.randn(64, 32)
    result = fewbit.compare(lambda: model(x).mean(), bits=[{"gelu": 2}, {"gelu": 4}], min_bytes=0)
    assert result.rows[0].relative_error > result.rows[1].relative_error
    with pytest.raises(ValueError, match="got 9"):
        fewbit.compare(lambda: pytest.fail("it ran"), bits=[3, 9])


@pytest.mark.parametrize(
    ("loss", "got"),
    [(None, "None"), (torch.zeros(3, requires_grad=True) * 1, r"shape \[3\]"), (torch.zeros(()), "without a graph")],
)
def test_a_step_that_returns_no_loss_is_told(loss, got: str) -> None:
    with pytest.raises(TypeError, match=rf"must return its loss.*got .*{got}"):
        fewbit.compare(lambda: loss)


def test_the_text_has_a_line_for_each_number_of_bits(model: nn.Module) -> None:
    x = torch.randn(64, 32)
    result = fewbit.compare(lambda: model(x).mean(), bits=[1, 8], min_bytes=0)
    lines = str(result).splitlines()
    assert lines[0].split() == ["bits", "cosine", "relative", "error", "loss", "original", "held"]
    assert [line.split()[0] for line in lines[1:]] == ["1", "8", "exact"]
    assert result.to_dict()["rows"][1]["bits"] == 8


def test_the_markdown_has_as_many_cells_in_every_line(model: nn.Module) -> None:
    x = torch.randn(64, 32)
    result = fewbit.compare(lambda: model(x).mean(), bits=[2, 4], min_bytes=0)
    lines = result.to_markdown().splitlines()
    assert len(lines) == 2 + 3  # the exact step, too
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| 2 | 0.9")
    assert result._repr_markdown_() == result.to_markdown()


def test_what_counts_is_the_step_after_learning() -> None:
    model = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 1))
    x = torch.randn(64, 32)
    (learned,) = fewbit.compare(lambda: model(x).square().mean(), bits=1, min_bytes=0).rows
    assert learned.relative_error < 0.005  # from the output, which the second Linear keeps; 1 bit alone has 20 %


def test_what_is_no_step_is_refused() -> None:
    with pytest.raises(fewbit.FewbitTypeError, match="takes a function without arguments that returns the loss, got 3"):
        fewbit.compare(3)
    with pytest.raises(fewbit.FewbitTypeError, match="takes a model, or a step that returns its loss, got 3"):
        fewbit.profile(3)
