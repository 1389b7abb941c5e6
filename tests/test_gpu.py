"""What only a CUDA device can show. Run with `pytest -m gpu`, or benchmarks/gpu.sh."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fewbit_hooks as fewbit
from fewbit_hooks import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SMOOTH = [a.name for a in fewbit.activations() if not a.exact]
TWO_VALUED = [F.relu, F.relu6, F.leaky_relu, F.hardtanh, F.hardsigmoid, F.hardshrink, F.softshrink]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", range(1, 9))
def test_the_bytes_are_those_of_the_cpu(bits: int, dtype: torch.dtype) -> None:
    book = fewbit.codebook("gelu", bits)
    coder = ops.Thresholds(book.boundaries, book.folded)
    x = torch.randn(100_003).to(dtype)
    on_cpu, on_gpu = ops.encode(x, bits, coder), ops.encode(x.cuda(), bits, coder)
    assert torch.equal(on_gpu.cpu(), on_cpu)
    values = torch.arange(2**bits).to(dtype)
    layout = ops.Layout.of(x.cuda())
    decoded = ops.decode(on_gpu, ops.rows(values.cuda(), bits), bits, layout)
    assert torch.equal(decoded.cpu(), ops.decode(on_cpu, ops.rows(values, bits), bits, ops.Layout.of(x)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SMOOTH)
def test_the_gradient_is_grad_times_the_level(name: str, dtype: torch.dtype) -> None:
    function = next(a for a in fewbit.activations() if a.name == name).function
    x = torch.randn(70_001, device="cuda").mul_(3).to(dtype).requires_grad_()
    with fewbit.scope(bits=3, min_bytes=0):
        y = function(x)
    assert torch.equal(y, function(x))
    y.backward(torch.ones_like(y))
    expected = fewbit.codebook(name, 3).derivative(x.detach())
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}.get(dtype, 5e-6)
    torch.testing.assert_close(x.grad, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", TWO_VALUED, ids=lambda f: f.__name__)
def test_the_two_valued_ones_are_bit_for_bit_stock(function, dtype: torch.dtype) -> None:
    x = torch.randn(70_001, device="cuda").mul_(3).to(dtype)
    x[::97], x[1::97], x[2::97] = float("nan"), float("inf"), -float("inf")
    x[3::97], x[4::97], x[5::97], x[6::97] = 0.0, 0.5, -1.0, 6.0
    grad = torch.randn_like(x)

    def gradient() -> Tensor:
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(function(leaf), leaf, grad)[0]

    exact = gradient()
    with fewbit.scope(min_bytes=0) as memory:
        coded = gradient()
    assert memory.report().rows[0].bits == 1
    assert torch.equal(coded.view(torch.uint8), exact.view(torch.uint8))


@pytest.fixture
def model() -> nn.Module:
    layers = [nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256), nn.ReLU(), nn.Linear(256, 8)]
    return nn.Sequential(*layers).cuda()


def test_the_host_never_waits_for_the_device(model: nn.Module) -> None:
    x = torch.randn(512, 256, device="cuda")
    for _ in range(2):  # the first step makes tables and copies them to the device
        with fewbit.scope(min_bytes=0):
            loss = model(x).square().mean()
        torch.cuda.set_sync_debug_mode("default")
        loss.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with fewbit.scope(min_bytes=0):
            loss = model(x).square().mean()
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_can_be_captured_in_a_cuda_graph(model: nn.Module) -> None:
    x = torch.randn(512, 256, device="cuda")

    def step() -> None:
        model.zero_grad(set_to_none=False)
        with fewbit.scope(min_bytes=0):
            loss = model(x).square().mean()
        loss.backward()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    eager = [p.grad.clone() for p in model.parameters()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    for p, expected in zip(model.parameters(), eager, strict=True):
        torch.testing.assert_close(p.grad, expected)


def test_the_peak_memory_falls(model: nn.Module) -> None:
    deep = nn.Sequential(*(layer for _ in range(8) for layer in (nn.Linear(1024, 1024), nn.GELU()))).cuda()
    x = torch.randn(4096, 1024, device="cuda")

    def peak(bits: int | None) -> int:
        torch.cuda.reset_peak_memory_stats()
        with fewbit.scope(bits=bits):
            loss = deep(x).square().mean()
        loss.backward()
        deep.zero_grad()
        return torch.cuda.max_memory_allocated()

    peak(3)
    assert peak(None) - peak(3) > 0.7 * 8 * x.nbytes


def test_packing_allocates_chunks_and_codes_only() -> None:
    x = torch.randn(2**28, device="cuda")
    book = fewbit.codebook("gelu", 3)
    coder = ops.Thresholds(book.boundaries)
    ops.encode(x[:8], 3, coder)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    packed = ops.encode(x, 3, coder)
    assert torch.cuda.max_memory_allocated() - before < packed.nbytes + 2**28
