"""Two processes: the losses and gradients of one, and less memory on each. What they do is in distributed_cases.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewbit_hooks as fewbit
from fewbit_hooks import _dtensor

from . import distributed_cases
from .distributed_cases import CASES, SCOPES, WORLD, alone

Results = list[dict[tuple[str, str], dict[str, Any]]]

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each process found, by case and scope."""
    directory = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(distributed_cases.process, (str(directory), tuple(CASES)), nprocs=WORLD)
    return [torch.load(Path(directory) / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


@pytest.fixture(scope="module")
def one() -> dict[str, dict[str, Any]]:
    """What one process finds with the whole batch."""
    return {name: alone(name) for name in SCOPES}


def of(results: Results, case: str, name: str) -> list[dict[str, Any]]:
    """Each process's results."""
    found = [process[case, name] for process in results]
    for error in found:
        assert not isinstance(error, str), error
    return found


def data_parallel(case: str) -> bool:
    return not case.startswith(("tensor", "pipeline"))


@pytest.mark.parametrize("name", SCOPES)
@pytest.mark.parametrize("case", [case for case in CASES if case != "ddp_no_sync"])
def test_losses_and_gradients_are_those_of_one_process(
    case: str, name: str, results: Results, one: dict[str, dict[str, Any]]
) -> None:
    found, expected = of(results, case, name), one[name]
    if name == "3 bits" and case in ("fsdp_checkpoint", "pipeline", "pipeline_1f1b"):
        # a checkpoint's region is exact; a pipeline learns from its first step, which is of another kind
        expected = one["stock"]
    for step, loss in enumerate(expected["losses"]):
        losses = [r["losses"][step] for r in found]
        total = sum(losses) if case.startswith("pipeline") else sum(losses) / WORLD
        tolerance = 2e-4 if name == "3 bits" else 2e-6
        torch.testing.assert_close(total, loss, rtol=tolerance, atol=0)
    gradients: dict[str, Tensor] = {}
    for r in found:
        gradients |= {
            k.removeprefix("module.").replace("_checkpoint_wrapped_module.", ""): g for k, g in r["gradients"].items()
        }
    assert gradients.keys() == expected["gradients"].keys()
    for key, gradient in expected["gradients"].items():
        tolerance = 0.02 if name == "3 bits" and not data_parallel(case) else 2e-5
        difference = (gradients[key] - gradient).norm() / gradient.norm()
        assert difference <= tolerance, key


@pytest.mark.parametrize("name", [name for name in SCOPES if name != "stock"])
@pytest.mark.parametrize("case", [case for case in CASES if case != "fsdp_checkpoint"])
def test_each_process_holds_less_than_stock(case: str, name: str, results: Results) -> None:
    for stock, mine in zip(of(results, case, "stock"), of(results, case, name), strict=True):
        assert 0 < mine["held"] < stock["held"]


def test_inside_the_checkpoint_wrapper_of_fsdp_what_is_held_is_its_own(results: Results) -> None:
    held = {r["held"] for name in SCOPES for r in of(results, "fsdp_checkpoint", name)}
    assert len(held) == 1


def test_accumulation_without_synchronising_is_that_of_one_process(results: Results) -> None:
    for name in SCOPES:
        expected = alone(name, accumulate=True)
        found = of(results, "ddp_no_sync", name)
        for key, gradient in expected["gradients"].items():
            torch.testing.assert_close(found[0]["gradients"]["module." + key], gradient, rtol=2e-4, atol=2e-6)


def test_a_norm_gathered_for_itself_is_no_source(results: Results) -> None:
    # its weight is not there when the Linear behind it, another unit, needs the norm's output again
    for together, apart, exact in zip(
        of(results, "fsdp", "exact, recompute"),
        of(results, "fsdp_parts", "exact, recompute"),
        of(results, "fsdp_parts", "exact"),
        strict=True,
    ):
        assert together["held"] < apart["held"] < exact["held"]


def test_a_dtensors_part_is_coded(results: Results) -> None:
    # colwise and rowwise with the activation between them a DTensor: as with the local tensor
    for local, dtensor in zip(
        of(results, "tensor_parallel", "3 bits"), of(results, "tensor_parallel_dtensor", "3 bits"), strict=True
    ):
        assert local["held"] == dtensor["held"]
        for key, gradient in local["gradients"].items():
            assert torch.equal(dtensor["gradients"][key], gradient)


# One process is enough for what a DTensor is


@pytest.fixture
def mesh(tmp_path: Path) -> Any:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def gradient(function: Any, x: Tensor, scope: Any) -> tuple[Any, Any]:
    leaf = x.detach().requires_grad_()
    with scope:
        y = function(leaf * 1)
    (result,) = torch.autograd.grad(y.sum(), leaf)
    return y, result


@pytest.mark.parametrize(
    "activation",
    ["gelu", "silu", "tanh", "sigmoid", "relu", "softplus", "leaky_relu", "elu", "mish"],
)
def test_a_sharded_activation_has_the_gradient_of_its_part(mesh: Any, activation: str) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    function = getattr(nn.functional, activation)
    x = torch.linspace(-7, 7, 96).view(8, 12)
    opened = fewbit.scope(bits=3, min_bytes=0)
    y, mine = gradient(function, distribute_tensor(x, mesh, [Shard(0)]), opened)
    (row,) = opened.report().rows
    assert (row.bits, row.original_bytes) == (
        1 if activation in ("relu", "leaky_relu") else 3,
        x.nbytes,
    )
    assert (type(y).__name__, type(mine).__name__) == ("DTensor", "DTensor")
    _, plain = gradient(function, x, fewbit.scope(bits=3, min_bytes=0))
    assert torch.equal(mine.full_tensor(), plain)


def test_a_partial_dtensor_is_kept_exact(mesh: Any) -> None:
    from torch.distributed.tensor import DTensor, Partial

    x = DTensor.from_local(torch.linspace(-3, 3, 96).view(8, 12), mesh, [Partial()])
    opened = fewbit.scope(bits=3, min_bytes=0)
    opened._warned = True
    _, mine = gradient(nn.functional.gelu, x, opened)
    _, stock = gradient(nn.functional.gelu, x, fewbit.scope(bits=None))
    assert torch.equal(mine.full_tensor(), stock.full_tensor())
    assert [row.reason for row in opened.report().rows] == ["a DTensor: wrapper subclasses are kept"]


@pytest.mark.filterwarnings("ignore:DTensor random operators may not have complete support")
def test_a_mask_of_a_dtensor_is_kept_exact(mesh: Any) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    x = distribute_tensor(torch.randn(8, 12), mesh, [Shard(0)])
    opened = fewbit.scope(bits=3, min_bytes=0)
    opened._warned = True
    torch.manual_seed(0)
    y, mine = gradient(lambda t: nn.functional.dropout(t, 0.5), x, opened)
    assert torch.equal(mine.full_tensor(), (y.full_tensor() != 0) * 2.0)


def test_an_offloader_is_handed_the_codes_of_the_part(mesh: Any) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    seen: list[Tensor] = []
    x = distribute_tensor(torch.randn(8, 12), mesh, [Shard(0)])
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t.detach(), lambda t: t):
        gradient(nn.functional.gelu, x, fewbit.scope(bits=3, min_bytes=0))
    assert [(type(t), t.dtype, t.numel()) for t in seen] == [(Tensor, torch.uint8, 8 * 12 * 3 // 8)]


def test_nothing_of_torch_distributed_is_needed_to_tell_a_dtensor() -> None:
    class DTensor(Tensor):
        """Somebody else's class of that name."""

    other = torch.zeros(3).as_subclass(DTensor)
    assert not _dtensor.is_dtensor(other)
    assert _dtensor.local_part(other) is other
