"""What a scope is held by, or holds, copied, pickled, saved and exported; and functions that it decorates."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fewbit_hooks as fewbit

from .conftest import normed, quiet

COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_scope_is_copied_with_its_settings_and_books_of_its_own(copied: Callable[[Any], Any]) -> None:
    net, x, opened = normed(), torch.randn(64, 6), quiet(bits=2, exclude=("0",))
    with opened:
        net(x).sum().backward()
    other = copied(opened)
    assert repr(other) == repr(opened)
    assert other.report().rows == ()
    with other:
        net(x).sum().backward()
    assert {row.bits for row in other.report().rows} == {2}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copied_handle_holds_nothing_open(copied: Callable[[Any], Any]) -> None:
    with fewbit.enable(bits=2, min_bytes=0) as handle:
        other = copied(handle)
        other.remove()
        assert fewbit.active() is handle.scope
        assert repr(other.scope) == repr(handle.scope)
    assert fewbit.active() is None


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_activations_and_profiles_are_copied(copied: Callable[[Any], Any]) -> None:
    gelu = next(a for a in fewbit.activations() if a.name == "gelu")
    assert copied(gelu).name == "gelu"
    profile = fewbit.profile(normed(), torch.randn(64, 6))
    assert str(copied(profile)) == str(profile)


def test_a_model_trained_under_a_scope_is_saved_and_copied_as_before(tmp_path: Any) -> None:
    net, x, opened = normed(nn.Dropout(0.3)), torch.randn(64, 6), quiet(bits=3, recompute=True)
    for _ in range(3):
        with opened:
            loss = net(x).sum()
        loss.backward()
    net.eval()
    torch.save(net.state_dict(), tmp_path / "state.pt")
    torch.save(net, tmp_path / "whole.pt")
    other = normed(nn.Dropout(0.3)).eval()
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    for found in (other, torch.load(tmp_path / "whole.pt", weights_only=False), copy.deepcopy(net)):
        assert torch.equal(found(x), net(x))
        with opened:
            assert torch.equal(found(x), net(x))
    assert torch.equal(torch.export.export(net, (x,)).module()(x), net(x))


class Gelu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.linear(x))

    def steps(self, x: Tensor) -> Iterator[Tensor]:
        for _ in range(2):
            x = self(x)
            yield x


class Decorated(Gelu):
    @fewbit.scope(bits=2, min_bytes=0)
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def replaced() -> Gelu:
    """A module whose own methods were decorated, as it is done to a model of somebody else's."""
    net, opened = Gelu(), quiet(bits=2)
    net.forward = opened(net.forward)
    net.steps = opened(net.steps)
    return net


@pytest.mark.parametrize("copied", [COPIES["deepcopy"], COPIES["pickle"]], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("make", [replaced, Decorated])
def test_a_copy_of_a_module_with_a_decorated_method_runs_its_own(
    make: Callable[[], Gelu], copied: Callable[[Any], Any]
) -> None:
    net, x = make(), torch.randn(4, 8)
    other = copied(net)
    with torch.no_grad():
        other.linear.weight.zero_()
        other.linear.bias.fill_(1.5)
    expected = F.gelu(torch.full((4, 8), 1.5))
    assert torch.equal(other(x), expected)
    assert all(torch.equal(y, expected) for y in other.steps(x))
    assert not torch.equal(net(x), expected)
    (gradient,) = torch.autograd.grad(other(x).sum(), other.linear.bias)
    level = fewbit.codebook("gelu", 2).derivative(torch.tensor(1.5))
    torch.testing.assert_close(gradient, torch.full((8,), 4 * float(level)))


def test_a_copy_of_a_decorated_module_is_of_the_module() -> None:
    net, x = Gelu(), torch.randn(4, 8)
    run = quiet(bits=2)(net)
    other = copy.deepcopy(run)
    with torch.no_grad():
        net.linear.weight.zero_()
    assert not torch.equal(other(x), run(x))


def test_a_decorated_method_still_looks_like_itself() -> None:
    net, run = Gelu(), replaced()
    assert run.forward.__name__ == "forward"
    assert run.forward.__wrapped__.__func__ is Gelu.forward
    assert inspect.signature(run.forward) == inspect.signature(net.forward)
    assert inspect.isgeneratorfunction(run.steps)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.export's own
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@pytest.mark.parametrize("make", [replaced, Decorated])
def test_a_module_with_a_decorated_forward_is_exported_as_it_was(make: Callable[[], Gelu], strict: bool) -> None:
    net, x = make(), torch.randn(4, 8)
    exported = torch.export.export(net, (x,), strict=strict)
    plain = Gelu()
    plain.load_state_dict(net.state_dict())
    stock = torch.export.export(plain, (x,), strict=strict)
    assert [str(n.target) for n in exported.graph.nodes] == [str(n.target) for n in stock.graph.nodes]
    assert torch.equal(exported.module()(x), net(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit's own
@pytest.mark.parametrize("make", [replaced, Decorated])
def test_a_module_with_a_decorated_forward_is_traced_as_it_was(make: Callable[[], Gelu]) -> None:
    net, x = make(), torch.randn(4, 8)
    traced = torch.jit.trace(net, (x,))
    assert "gelu" in traced.code
    assert torch.equal(traced(x), net(x))
