"""Dropouts' masks in compiled graphs: one bit, and everything else as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fewbit_hooks as fewbit

from .conftest import quiet

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # Dynamo's and inductor's own
    pytest.mark.usefixtures("fresh_dynamo"),
]

N = 8 * 9 - 3
"""Elements: not a multiple of eight."""
P = 0.15
"""At which a dropout that Python runs on the CPU differs from that of a compiled graph, in last places."""


def scope(bits: Any = 3, **settings: Any) -> fewbit.scope:
    return fewbit.scope(bits, **{"min_bytes": 0, "exact": True, **settings})


def dropped(x: Tensor) -> Tensor:
    return F.dropout(x, P) * 2


def ran(
    function: Callable[[Tensor], Tensor], x: Tensor, under: Any = None, **options: Any
) -> tuple[list[torch.dtype], list[Tensor]]:
    """What the compiled graph keeps of one byte; its result, the gradient, and the generator's state after it."""
    torch._dynamo.reset()
    compiled = torch.compile(function, **options)
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(0)
    with under or contextlib.nullcontext():
        y = compiled(x)
    assert y.grad_fn is not None
    kept = getattr(y.grad_fn, "saved_tensors", ())  # of a graph
    masks = [t.dtype for t in kept if t.dtype in (torch.bool, torch.uint8)]
    weights = torch.arange(y.numel(), dtype=torch.float64).view(y.shape)
    (y.double() * weights).sum().backward()
    assert x.grad is not None
    return masks, [y.detach(), x.grad, torch.get_rng_state()]


def packs(function: Callable[[Tensor], Tensor], x: Tensor, under: Any, **options: Any) -> bool:
    """Whether a bool has become bits; all else must be as it was."""
    before, expected = ran(function, x, **options)
    after, found = ran(function, x, under, **options)
    assert before == [torch.bool]
    assert after in ([torch.bool], [torch.uint8])
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=0, equal_nan=True, check_stride=True)
    return after == [torch.uint8]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("options", [{}, {"options": {"fallback_random": True}}, {"dynamic": True}], ids=str)
def test_inductor_keeps_bits(dtype: torch.dtype, options: dict[str, Any]) -> None:
    assert packs(dropped, torch.randn(N, dtype=dtype), scope(), fullgraph=True, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_every_dtype_is_packed(dtype: torch.dtype) -> None:
    assert packs(dropped, torch.randn(3, N, dtype=dtype), scope(), backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize(
    "x",
    [torch.randn(2, 8, 3, 5).to(memory_format=torch.channels_last), torch.randn(()), torch.full((N,), float("nan"))],
    ids=["channels_last", "a number", "NaN"],
)
def test_every_tensor_is_packed(x: Tensor) -> None:
    assert packs(dropped, x, scope(), backend="aot_eager")


@pytest.mark.parametrize(
    "call",
    [
        lambda x: F.dropout(input=x, training=True),
        lambda x: torch.dropout(x, P, True),
        lambda x: torch.ops.aten.dropout(x, P, True),
        nn.Dropout(P),
        lambda x: F.dropout(x.t(), P),
        lambda x: F.dropout(x, P).mul_(3),
    ],
    ids=["by name", "torch.dropout", "aten", "module", "a view", "changed in place"],
)
def test_every_form_is_packed(call: Callable[[Tensor], Tensor]) -> None:
    assert packs(call, torch.randn(5, N), scope(), backend="aot_eager")


@pytest.mark.parametrize(
    ("under", "packed"),
    [
        (scope(exact=False), True),
        (scope(exact=False, codebooks=[fewbit.codebook("gelu", 2)]), True),
        (scope({"gelu": 2}, exact=False), True),
        (scope({"dropout": None, "default": 3}, exact=False), False),
        (scope({"gelu": 2, "default": None}, exact=False), False),
        (scope({"dropout": 1, "default": None}, exact=False), True),
        (scope(None, exact=False), False),
        (scope(exclude=["head"]), False),
        (scope(min_bytes=N), True),
        (scope(min_bytes=N + 1), False),  # of the mask, a byte an element
    ],
    ids=lambda value: repr(value).removeprefix("fewbit_hooks."),
)
def test_the_settings_decide(under: fewbit.scope, packed: bool) -> None:
    assert packs(dropped, torch.randn(N), under, backend="aot_eager") is packed


def run_as_it_is(graph: Any, _: Any) -> Any:
    return graph.forward


@pytest.mark.parametrize("backend", ["eager", run_as_it_is])
def test_a_backend_that_runs_what_was_traced_draws_what_it_drew(backend: Any) -> None:
    x = torch.randn(N)
    _, expected = ran(dropped, x, backend=backend)
    _, found = ran(dropped, x, scope(), backend=backend)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: F.dropout(x * 1, P, inplace=True),
        lambda x: F.dropout(x, P, training=False) * 2,
        lambda x: F.dropout(x, 1.0) * 2,
        lambda x: F.alpha_dropout(x, P, training=True),
        lambda x: F.dropout1d(x.view(1, 1, -1), P),
        lambda x: F.dropout(x.detach(), P) * x,
        lambda x: torch.vmap(lambda t: F.dropout(t, P), randomness="different")(x),
        lambda x: torch.func.grad(lambda t: F.dropout(t, P).sin().sum())(x),
        lambda x: checkpoint(lambda t: F.dropout(t.sin(), P).cos(), x, use_reentrant=False),
    ],
    ids=["in place", "evaluation", "p=1", "alpha", "of channels", "no gradient", "vmap", "grad", "checkpoint"],
)
def test_what_is_left_to_the_compiler_is_what_it_was(call: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(N)
    _, expected = ran(call, x, backend="aot_eager")
    _, found = ran(call, x, scope(), backend="aot_eager")
    assert all(map(torch.equal, found, expected))


def test_a_model_that_is_all_dropout_does_not_warn(recwarn: pytest.WarningsRecorder) -> None:
    assert packs(dropped, torch.randn(N), scope(), backend="aot_eager")
    assert not [w for w in recwarn if issubclass(w.category, fewbit.FewbitWarning)]


class Split(nn.Module):
    """So large that DistributedDataParallel makes two graphs of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.dropout, self.last = nn.Linear(512, 600), nn.Dropout(P), nn.Linear(600, 512)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.last(self.first(x)))  # type: ignore[no-any-return]


def test_in_graphs_that_ddp_splits_masks_are_packed(tmp_path: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        assert packs(DistributedDataParallel(Split()), torch.randn(3, 512), scope(), backend="aot_eager")
    finally:
        torch.distributed.destroy_process_group()


def test_a_compiled_block_in_a_checkpoint_keeps_its_masks_from_it() -> None:
    block, x = torch.compile(dropped, backend="aot_eager"), torch.randn(N, requires_grad=True)
    gradients = []
    for under in (contextlib.nullcontext(), quiet(exact=True)):
        torch.manual_seed(0)
        with under:
            y = checkpoint(block, x, use_reentrant=False)
        gradients += torch.autograd.grad(y.sum(), x)
    assert torch.equal(*gradients)
