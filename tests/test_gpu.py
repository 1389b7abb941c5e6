"""What only a CUDA device can show. Run with `pytest -m gpu`, or benchmarks/gpu.sh."""

from __future__ import annotations

import importlib
from typing import Any

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
SMOOTH = [a.name for a in fewbit.activations() if not a.exact and a.name != "quick_gelu"]  # recognised by its module
ENGINES = [
    "hooks",
    pytest.param(
        "fused", marks=pytest.mark.skipif(not ops.is_installed("triton"), reason="engine='fused' needs triton")
    ),
]
needs_triton = pytest.mark.skipif(not ops.is_installed("triton"), reason="triton is not installed")
FUSED = {
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "elu": F.elu,
    "elu alpha": lambda x: F.elu(x, alpha=0.3),
    "selu": F.selu,
    "celu": lambda x: F.celu(x, alpha=1.7),
    "softplus": F.softplus,
    "softplus beta": lambda x: F.softplus(x, beta=0.6, threshold=3.1),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "hardswish": F.hardswish,
}
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


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_the_host_never_waits_for_the_device(model: nn.Module, engine: str) -> None:
    x = torch.randn(512, 256, device="cuda")
    scope = fewbit.scope(min_bytes=0, engine=engine)
    for _ in range(3):  # the first step makes tables and copies them to the device, the third those beside an output
        with scope:
            loss = model(x).square().mean()
        loss.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with scope:
            loss = model(x).square().mean()
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_can_be_captured_in_a_cuda_graph(model: nn.Module, engine: str) -> None:
    x = torch.randn(512, 256, device="cuda")

    def step() -> None:
        model.zero_grad(set_to_none=False)
        with fewbit.scope(min_bytes=0, engine=engine):
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


@pytest.mark.filterwarnings("ignore:fewbit_hooks.scope compressed nothing")
@pytest.mark.parametrize("warm", [False, True])
def test_a_graph_that_is_captured_at_once_keeps_what_has_no_tables_yet(warm: bool) -> None:
    x = torch.randn(4096, device="cuda")
    alpha = 0.7 + warm / 10  # whose tables no other test has made

    def gradient() -> tuple[Tensor, fewbit.Report]:
        leaf = x.detach().requires_grad_()
        with fewbit.scope(min_bytes=0) as opened:
            y = F.elu(leaf, alpha=alpha)
        return torch.autograd.grad(y, leaf, torch.ones_like(y))[0], opened.report()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels of torch and Triton are loaded outside of capture
        torch.autograd.grad(F.elu(x.requires_grad_(), alpha=alpha).sum(), x)
        if warm:
            gradient()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grad, report = gradient()
    graph.replay()
    (row,) = report.rows
    assert row.bits == (3 if warm else None)
    assert warm or "CUDA graph" in row.reason
    exact = torch.where(x > 0, torch.ones_like(x), alpha * x.exp())
    torch.testing.assert_close(grad, exact.detach(), rtol=0, atol=0.2 if warm else 1e-6)


def test_a_table_is_filled_for_every_stream() -> None:
    x = torch.randn(4096, device="cuda")
    busy, other = torch.cuda.Stream(), torch.cuda.Stream()

    def gradient() -> Tensor:
        leaf = x.detach().requires_grad_()
        with fewbit.scope(min_bytes=0):
            y = F.elu(leaf, alpha=0.6)
        return torch.autograd.grad(y, leaf, torch.ones_like(y))[0]

    torch.cuda.synchronize()
    with torch.cuda.stream(busy):
        torch.cuda._sleep(1_000_000_000)  # the tables are made behind this
        gradient()
    with torch.cuda.stream(other):
        grad = gradient()
    torch.cuda.synchronize()
    torch.testing.assert_close(grad, gradient(), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")  # Dynamo's and inductor's own
def test_a_compiled_step_of_mode_reduce_overhead_is_coded(model: nn.Module) -> None:
    torch._dynamo.reset()
    compiled, x = torch.compile(model, mode="reduce-overhead", fullgraph=True), torch.randn(512, 256, device="cuda")

    def gradients(run: Any, scope: Any) -> list[Tensor]:
        model.zero_grad()
        torch.compiler.cudagraph_mark_step_begin()
        with scope:
            loss = run(x).square().mean()
        loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    coded = gradients(model, fewbit.scope(min_bytes=0))
    for _ in range(4):  # the first steps warm up and capture
        result = gradients(compiled, fewbit.scope(min_bytes=0))
        for mine, expected in zip(result, coded, strict=True):
            torch.testing.assert_close(mine, expected, rtol=2e-2, atol=2e-5)


def test_pinned_memory_is_coded() -> None:
    x = torch.randn(4096).pin_memory().requires_grad_()
    with fewbit.scope(min_bytes=0) as opened:
        y = F.gelu(x)
    assert opened.report().rows[0].bits == 3
    y.sum().backward()
    torch.testing.assert_close(x.grad, fewbit.codebook("gelu", 3).derivative(x.detach()), rtol=0, atol=5e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_peak_memory_falls(engine: str) -> None:
    deep = nn.Sequential(*(layer for _ in range(8) for layer in (nn.Linear(1024, 1024), nn.GELU()))).cuda()
    x = torch.randn(4096, 1024, device="cuda")

    def peak(bits: int | None) -> int:
        torch.cuda.reset_peak_memory_stats()
        with fewbit.scope(bits=bits, engine=engine):
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


@needs_triton
def test_the_kernels_serve_this_device() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    assert str(ops.backend(device)) == "triton"
    assert str(ops.fused_backend(device)) == "triton"


@needs_triton
def test_the_kernels_allocate_codes_and_the_result_and_nothing_else() -> None:
    x = torch.randn(2**28, device="cuda", dtype=torch.bfloat16)
    coder, table = ops.Thresholds(fewbit.codebook("gelu", 3).boundaries), ops.rows(torch.randn(8).bfloat16().cuda(), 3)
    ops.decode(ops.encode(x[:8], 3, coder), table, 3, ops.Layout.of(x[:8]))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    packed = ops.encode(x, 3, coder)
    decoded = ops.decode(packed, table, 3, ops.Layout.of(x))
    assert torch.cuda.max_memory_allocated() - before <= packed.nbytes + decoded.nbytes + 2**20


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FUSED)
def test_the_fused_forward_is_within_its_bound_of_stocks(name: str, dtype: torch.dtype) -> None:
    x = torch.randn(1_000_003, device="cuda", dtype=torch.float64).mul_(4).to(dtype)
    x[:4] = torch.tensor([0.0, float("nan"), float("inf"), -float("inf")], device="cuda").to(dtype)
    with fewbit.scope(engine="fused", min_bytes=0):
        y = FUSED[name](x.clone().requires_grad_())
    assert y.grad_fn.name() == "_CodedBackward"
    y, stock = y.detach().double(), FUSED[name](x).double()
    torch.testing.assert_close(y[:4], stock[:4], rtol=1e-2, atol=1e-6, equal_nan=True)
    unit = torch.finfo(dtype).eps * 2 ** stock[4:].abs().clamp(min=1).log2().floor()
    # NOTE [ Formulas ] in ops/_triton_fused.py
    assert float(((y - stock)[4:].abs() / unit).max()) <= (4 if dtype in (torch.float32, torch.float64) else 1)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FUSED)
def test_the_fused_gradient_is_that_of_the_hooks(name: str, dtype: torch.dtype) -> None:
    x = torch.randn(70_001, device="cuda").mul_(3).to(dtype).requires_grad_()
    grads = []
    for engine in ("fused", "hooks"):
        with fewbit.scope(bits=3, min_bytes=0, engine=engine):
            y = FUSED[name](x)
        grads += torch.autograd.grad(y, x, torch.ones_like(y))
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}.get(dtype, 5e-6)
    torch.testing.assert_close(*grads, rtol=0, atol=tolerance)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FUSED)
def test_the_fused_gradient_beside_a_kept_output_is_that_of_the_hooks(name: str, dtype: torch.dtype) -> None:
    class Kept(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = FUSED[name](x * 1)
            return y * y

    module, x = Kept(), torch.randn(70_001, device="cuda").mul_(3).to(dtype).requires_grad_()
    grads = []
    for engine in ("fused", "hooks"):
        opened = fewbit.scope(bits=3, min_bytes=0, engine=engine)
        for _ in range(3):  # that the output is kept is learned
            with opened:
                y = module(x)
            (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
        grads.append(grad)
    tolerance = {torch.float16: 4e-3, torch.bfloat16: 3.2e-2}.get(dtype, 1e-4)
    torch.testing.assert_close(*grads, rtol=tolerance, atol=tolerance)


@needs_triton
@pytest.mark.parametrize("name", FUSED)
def test_under_autocast_the_output_has_the_dtype_that_it_had(name: str) -> None:
    x = torch.randn(4096, device="cuda", dtype=torch.bfloat16).requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        stock = FUSED[name](x)
        with fewbit.scope(engine="fused", min_bytes=0):
            assert FUSED[name](x).dtype == stock.dtype


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_pytorch_tanh", "mish", "tanh", "sigmoid"])
@pytest.mark.parametrize("model", ["llama", "phi3"])
def test_a_gated_unit_is_stocks_to_rounding(model: str, act: str, dtype: torch.dtype) -> None:
    hf = pytest.importorskip("transformers", reason="transformers is not installed")
    config = hf.LlamaConfig(hidden_size=64, intermediate_size=136, num_attention_heads=2, hidden_act=act)
    modeling = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    module = getattr(modeling, {"llama": "LlamaMLP", "phi3": "Phi3MLP"}[model])(config).to("cuda", dtype)
    x = torch.randn(7, 64, device="cuda").to(dtype).requires_grad_()
    with fewbit.scope(engine="fused", min_bytes=0) as memory:
        y = module(x)
    assert [row.how for row in memory.report().rows] == ["recomputed"]
    stock = module(x)
    leaves = [x, *module.parameters()]
    ours, theirs = (torch.autograd.grad(t.square().sum(), leaves) for t in (y, stock))
    eps = torch.finfo(dtype).eps
    for a, b in zip((y, *ours), (stock, *theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=32 * eps * float(b.detach().abs().max()))


@pytest.mark.parametrize("engine", ENGINES)
def test_on_another_stream_the_work_is_ordered_by_that_stream(engine: str) -> None:
    x = torch.zeros(2**24, device="cuda").requires_grad_()
    with fewbit.scope(min_bytes=0, engine=engine):
        F.silu(x[:4096] * 1).sum().backward()  # compiles what is launched below: both sizes are multiples of 16
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)  # whatever does not wait for this stream sees zeros
        h = x + 3.0
        with fewbit.scope(min_bytes=0, engine=engine):
            y = F.silu(h)
        (grad,) = torch.autograd.grad(y.sum(), x)
    torch.cuda.current_stream().wait_stream(side)
    expected = fewbit.codebook("silu", 3).derivative(torch.full((1,), 3.0))
    torch.testing.assert_close(grad.cpu(), expected.expand(2**24), rtol=0, atol=5e-6)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("engine", ENGINES)
def test_a_tensor_is_coded_on_its_own_device_whichever_is_current(engine: str) -> None:
    x = torch.randn(70_001)
    with torch.cuda.device(0):
        there = x.to("cuda:1").requires_grad_()
        with fewbit.scope(min_bytes=0, engine=engine):
            y = F.silu(there)
        (grad,) = torch.autograd.grad(y.sum(), there)
    assert grad.device == y.device == torch.device("cuda:1")
    torch.testing.assert_close(grad.cpu(), fewbit.codebook("silu", 3).derivative(x), rtol=0, atol=5e-6)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("bits", [3, 8])
def test_more_than_two_to_the_31_elements(bits: int) -> None:
    n = 2**31 + 4103
    try:
        x = torch.zeros(n, device="cuda", dtype=torch.bfloat16)
    except torch.OutOfMemoryError:
        pytest.skip("needs about 13 GiB of device memory")
    x[-4103:] = torch.randn(4103).bfloat16()
    book = fewbit.codebook("gelu", bits)
    coder, values = ops.Thresholds(book.boundaries), torch.randn(1 << bits).bfloat16()
    packed = ops.encode(x, bits, coder)
    tail = ops.encode(x[-4103:].cpu(), bits, coder)
    assert torch.equal(packed[-tail.numel() :].cpu(), tail)  # 2**31 codes end on a whole byte
    table, layout = ops.rows(values, bits), ops.Layout.of(x)
    decoded = ops.decode(packed, table.cuda(), bits, layout)
    assert torch.equal(decoded[-4103:].cpu(), ops.decode(tail, table, bits, ops.Layout.of(x[-4103:].cpu())))
    del decoded
    with fewbit.scope(bits, engine="fused"):
        y = F.gelu(x.requires_grad_())
    torch.testing.assert_close(y[-4103:].detach(), F.gelu(x[-4103:].detach()), rtol=0, atol=1e-2)
