"""Two processes: the losses and gradients of one, and less memory on each. What they do is in distributed_cases.py."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewbit_hooks as fewbit
from fewbit_hooks import _dtensor, _policy
from held import held_for_backward

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


def test_a_source_whose_memory_is_freed_after_the_forward_is_named() -> None:
    # as FSDP would, if its hooks were to gather the norm later than the layer behind it asks
    norm, linear = nn.LayerNorm(32), nn.Linear(32, 32)
    with fewbit.scope(exact=True, recompute=True, min_bytes=0):
        loss = linear(norm(torch.randn(8, 32, requires_grad=True) * 1)).sum()
    norm.weight.untyped_storage().resize_(0)
    with pytest.raises(fewbit.FewbitError, match=r"a parameter of shape \[32\].*memory was freed after the forward"):
        loss.backward()


# One process is enough for what a DTensor is


@pytest.fixture
def mesh(tmp_path: Path) -> Any:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


class Changed(nn.Module):
    """The product keeps what was made of the activation's output, in place."""

    def __init__(self, function: Any, change: Any) -> None:
        super().__init__()
        self.function, self.change = function, change

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.function(x)
        self.change(y)
        return y * y


def change_whole(y: Tensor) -> None:
    y.mul_(-1.7)


def change_view(y: Tensor) -> None:
    y.view(12, 8).add_(1)


@torch.no_grad()
def change_part(y: Any) -> None:
    y.to_local().mul_(-1.7)


def exchange(y: Tensor) -> None:
    torch.distributed.all_to_all_single(y.detach(), -1.7 * y.detach())


def exchange_in_lists(y: Tensor) -> None:
    torch.distributed.all_to_all([y.detach()], [-1.7 * y.detach()])


def scatter(y: Tensor) -> None:
    torch.distributed.scatter(y.detach(), [-1.7 * y.detach()], 0)


@pytest.mark.parametrize("settings", [{"exact": True}, {"exact": True, "recompute": True}, {"bits": 8}], ids=str)
@pytest.mark.parametrize(
    "collective",
    [
        exchange,
        *[
            pytest.param(
                collective,
                marks=pytest.mark.skipif(
                    not hasattr(torch.distributed, "all_gather_single"),
                    reason="before torch 2.13 no mode is told of it",
                ),
            )
            for collective in (exchange_in_lists, scatter)
        ],
    ],
)
def test_an_output_that_a_collective_changes_is_not_relied_upon(
    mesh: Any, collective: Any, settings: dict[str, Any]
) -> None:
    # torch counts no change of most collectives
    for function in (nn.functional.gelu, nn.functional.relu6):
        model, opened = Changed(function, collective), fewbit.scope(min_bytes=0, **settings)
        opened._warned = True
        for step in range(5):
            x = torch.randn(8, 12, generator=torch.Generator().manual_seed(step))
            (mine,), (stock,) = (gradients_of(model, x, scope) for scope in (opened, contextlib.nullcontext()))
            if "exact" in settings or function is nn.functional.relu6:
                assert torch.equal(mine, stock), (function, step)
            assert (mine - stock).norm() < 0.01 * stock.norm(), (function, step)


def gradients_of(model: nn.Module, x: Tensor, scope: Any) -> tuple[Tensor]:
    x = x.requires_grad_()
    with scope:
        y = model(x * 1)
    return torch.autograd.grad(y.sum(), x)


@pytest.mark.parametrize("change", [change_whole, change_view, change_part])
@pytest.mark.parametrize("name", ["gelu", "silu", "leaky_relu"])
def test_a_dtensor_output_that_is_changed_in_place_is_not_relied_upon(mesh: Any, name: str, change: Any) -> None:
    # its part does not count what is done to the whole: the derivative would be that of the changed output
    from torch.distributed.tensor import Shard, distribute_tensor

    model = Changed(getattr(nn.functional, name), change)
    opened = fewbit.scope(bits=8, min_bytes=0)
    for step in range(5):
        x = distribute_tensor(torch.randn(8, 12, generator=torch.Generator().manual_seed(step)), mesh, [Shard(0)])
        _, mine = gradient(model, x, opened)
        _, stock = gradient(model, x, contextlib.nullcontext())
        difference = (mine - stock).full_tensor().norm() / stock.full_tensor().norm()
        assert difference < (1e-6 if name == "leaky_relu" else 0.01), step


@pytest.mark.parametrize("change", [change_whole, change_view, change_part])
def test_a_dtensor_output_that_is_changed_once_it_is_relied_upon_raises(mesh: Any, change: Any) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    model = Changed(nn.functional.gelu, lambda y: None)
    opened = fewbit.scope(bits=3, min_bytes=0)
    x = distribute_tensor(torch.randn(8, 12), mesh, [Shard(0)]).requires_grad_()
    for _ in range(3):
        with opened:
            model(x * 1).sum().backward()
    model.change = change
    with opened:
        loss = model(x * 1).sum()
    with pytest.raises(fewbit.FewbitError, match=r"the output of gelu, of shape \[8, 12\], has been modified"):
        loss.backward()


def test_a_padded_copy_of_a_dtensors_part_is_not_relied_upon(mesh: Any) -> None:
    # it may be a copy of what the whole was changed to
    from torch.distributed.tensor import Shard, distribute_tensor

    class Padded(nn.Module):
        def forward(self, x: Any) -> Tensor:
            y = nn.functional.gelu(x)
            y.mul_(-1.7)
            copy = nn.functional.pad(y.to_local(), (1, 1))
            return copy * copy

    model, opened = Padded(), fewbit.scope(bits=8, min_bytes=0)
    for step in range(5):
        x = distribute_tensor(torch.randn(8, 12), mesh, [Shard(0)])
        _, mine = gradient(model, x, opened)
        _, stock = gradient(model, x, contextlib.nullcontext())
        assert (mine - stock).full_tensor().norm() / stock.full_tensor().norm() < 0.01, step


def test_what_is_saved_in_other_parts_than_the_input_is_kept(mesh: Any) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    x = distribute_tensor(torch.randn(8, 12), mesh, [Shard(0)])
    hook = _dtensor.PartHook(lambda part: "coded", x, lambda t: "kept", type(None))
    saved = [x, distribute_tensor(torch.randn(8, 12), mesh, [Replicate()]), torch.randn(8, 12)]
    assert [hook(t) == "kept" for t in saved] == [False, True, True]


def test_a_kept_dtensor_that_is_changed_in_place_raises_as_without_a_scope(mesh: Any) -> None:
    from torch.distributed.tensor import Replicate, distribute_tensor

    for scope in (contextlib.nullcontext(), opened := fewbit.scope(bits=3, min_bytes=0)):
        opened._warned = True
        row = distribute_tensor(torch.randn(1, 8), mesh, [Replicate()]).requires_grad_() * 1
        with scope:
            y = nn.functional.gelu(row.expand(64, 8))  # codes would be larger than the one row
        row.mul_(-2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    assert [row.reason for row in opened.report().rows] == ["codes would be no smaller than its storage"]


def test_what_is_held_of_a_dtensor_is_its_part_once(mesh: Any) -> None:
    # the storage of the DTensor itself, one for each that is saved, has the size of the whole, and no memory
    from torch.distributed.tensor import Shard, distribute_tensor

    x = distribute_tensor(torch.randn(8, 12), mesh, [Shard(0)]).requires_grad_()
    y = -x  # keeps nothing itself
    part = y.to_local().untyped_storage()
    assert held_for_backward((y * y).to_local().sum(), [x]) == {part._cdata: part.nbytes()}


def test_a_parameter_that_is_a_dtensor_is_kept(mesh: Any) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    weight = nn.Parameter(distribute_tensor(torch.randn(8, 12), mesh, [Shard(0)]))
    opened = fewbit.scope(bits=3, min_bytes=0)
    opened._warned = True
    with opened:
        nn.functional.gelu(weight).sum().backward()
    assert [row.bits for row in opened.report().rows] == [None]


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
    # a DTensor's backward may be made of primitives (mish's up to torch 2.11), and round as they do
    _, stocks = gradient(function, distribute_tensor(x, mesh, [Shard(0)]), contextlib.nullcontext())
    _, of_x = gradient(function, x, contextlib.nullcontext())
    rounding = (stocks.full_tensor() - of_x).abs().max()
    assert (mine.full_tensor() - plain).abs().max() <= rounding


def test_a_partial_dtensor_is_kept_exact(mesh: Any) -> None:
    from torch.distributed.tensor import DTensor, Partial

    x = DTensor.from_local(torch.linspace(-3, 3, 96).view(8, 12), mesh, [Partial()])
    opened = fewbit.scope(bits=3, min_bytes=0)
    opened._warned = True
    _, mine = gradient(nn.functional.gelu, x, opened)
    _, stock = gradient(nn.functional.gelu, x, fewbit.scope(bits=None))
    assert torch.equal(mine.full_tensor(), stock.full_tensor())
    assert [row.reason for row in opened.report().rows] == ["a partial DTensor: its parts are summed first"]


@pytest.mark.filterwarnings("ignore:DTensor random operators may not have complete support")
def test_a_mask_of_a_dtensor_is_kept_exact(mesh: Any) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    x = distribute_tensor(torch.randn(8, 12), mesh, [Shard(0)])
    opened = fewbit.scope(bits=3, min_bytes=0)
    opened._warned = True
    torch.manual_seed(0)
    y, mine = gradient(lambda t: nn.functional.dropout(t, 0.5), x, opened)
    assert torch.equal(mine.full_tensor(), (y.full_tensor() != 0) * 2.0)
    (row,) = opened.report().rows
    assert row.reason == "a DTensor, of which only activations of one node are coded"


def test_a_part_still_being_gathered_is_kept(mesh: Any) -> None:
    from torch.distributed._functional_collectives import AsyncCollectiveTensor
    from torch.distributed.tensor import DTensor, Replicate

    part = AsyncCollectiveTensor(torch.randn(8, 12))
    whole = DTensor.from_local(part, mesh, [Replicate()], run_check=False)
    reason = "a DTensor whose part is a AsyncCollectiveTensor: wrapper subclasses are kept"
    assert _policy.obstacle(whole, None, in_parts=True) == reason


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
