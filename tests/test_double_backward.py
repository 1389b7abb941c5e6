"""Models that differentiate a gradient: a Wasserstein GAN with gradient penalty, and forces from an energy."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewbit_hooks as fewbit


def critic() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 64), nn.SiLU(), nn.Linear(64, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 1))


def penalty(model: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """Gulrajani et al., "Improved Training of Wasserstein GANs", arXiv:1704.00028, equation 3."""
    mix = torch.rand(len(real), 1)
    between = (mix * real + (1 - mix) * fake).requires_grad_()
    (slope,) = torch.autograd.grad(model(between).sum(), between, create_graph=True)
    return (slope.norm(dim=1) - 1).square().mean()


def train(around: Any, around_penalty: Any, steps: int = 12) -> tuple[list[float], list[Tensor]]:
    """Losses of some steps of the critic, and the gradients of the last."""
    model = critic()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for step in range(steps):
        torch.manual_seed(step)
        real, fake = torch.randn(64, 8) + 1, torch.randn(64, 8)
        optimizer.zero_grad()
        with around:
            loss = model(fake).mean() - model(real).mean()
            with around_penalty:
                loss = loss + 10 * penalty(model, real, fake)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, [p.grad.clone() for p in model.parameters()]


def test_a_gradient_penalty_trains_with_its_region_kept_exact() -> None:
    stock, exact = train(contextlib.nullcontext(), contextlib.nullcontext())
    opened = fewbit.scope(bits=3, min_bytes=0)
    coded, gradients = train(opened, fewbit.scope(bits=None))
    assert coded[0] == stock[0]
    assert stock[-1] < stock[0] - 1  # it learns
    assert all(abs(a - b) < 0.02 * (1 + abs(b)) for a, b in zip(coded, stock, strict=True))
    assert any(row.bits is not None and row.freed_bytes for row in opened.report().rows)
    distance = sum((a - b).square().sum() for a, b in zip(gradients, exact, strict=True))
    assert 0 < distance < 0.05**2 * sum(b.square().sum() for b in exact)


def test_a_gradient_penalty_through_codes_names_the_activation_and_the_remedy() -> None:
    with pytest.raises(fewbit.FewbitError, match=r"create_graph=True.* through (silu|gelu).*scope\(bits=None\)"):
        train(fewbit.scope(bits=3, min_bytes=0), contextlib.nullcontext())


@pytest.mark.parametrize("settings", [{}, {"recompute": True}], ids=["", "recompute"])
def test_a_gradient_penalty_under_exact_true_is_stocks(settings: dict[str, bool]) -> None:
    # masks, two-valued activations and what is computed again are the true tensors, or constants
    stock = train(contextlib.nullcontext(), contextlib.nullcontext(), steps=4)
    losses, gradients = train(fewbit.scope(exact=True, min_bytes=0, **settings), contextlib.nullcontext(), steps=4)
    assert losses == stock[0]
    assert all(map(torch.equal, gradients, stock[1]))


# CHGNet (Deng et al., arXiv:2302.14231): pretrained, SiLU; forces are the gradient of an energy with respect to the
# positions of atoms, and training on them differentiates that


@pytest.fixture(scope="module")
def crystal() -> tuple[Any, Any]:
    """The model, and the graph of a small crystal."""
    model_module = pytest.importorskip("chgnet.model", reason="chgnet is not installed")
    structures = pytest.importorskip("pymatgen.core", reason="pymatgen is not installed")
    model = model_module.CHGNet.load(use_device="cpu", verbose=False)
    lattice = structures.Lattice.cubic(5.64)
    salt = structures.Structure.from_spacegroup("Fm-3m", lattice, ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    salt.perturb(0.1)
    return model, model.graph_converter(salt)


def forces(crystal: tuple[Any, Any], around: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Energy, forces, and the gradients of a loss on both."""
    model, graph = crystal
    model.zero_grad()
    with around:
        out = model([graph], task="ef")
    energy, force = out["e"].sum(), out["f"][0]
    (energy.square() + force.square().sum()).backward()
    return energy.detach(), force.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_chgnets_forces_are_stocks_where_its_region_is_kept_exact(crystal: tuple[Any, Any]) -> None:
    stock = forces(crystal, contextlib.nullcontext())
    with fewbit.scope(bits=3, min_bytes=0):
        kept = forces(crystal, fewbit.scope(bits=None))
    exact = forces(crystal, fewbit.scope(exact=True, min_bytes=0))
    assert stock[1].abs().max() > 0.1
    for mine in (kept, exact):
        assert torch.equal(mine[0], stock[0])
        assert torch.equal(mine[1], stock[1])
        assert all(map(torch.equal, mine[2], stock[2]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_chgnets_forces_through_codes_say_what_to_do(crystal: tuple[Any, Any]) -> None:
    with pytest.raises(fewbit.FewbitError, match=r"create_graph=True.* through silu.*scope\(bits=None\)"):
        forces(crystal, fewbit.scope(bits=3, min_bytes=0))
