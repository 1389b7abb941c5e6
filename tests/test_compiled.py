"""Codes in compiled graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.autograd import forward_ad

import fewbit_hooks as fewbit
from fewbit_hooks import _in_graph, ops

from .conftest import quiet

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # Dynamo's and inductor's own
    pytest.mark.usefixtures("fresh_dynamo", "registered_for_one_test_only"),
]

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def scope(bits: Any = 3, **settings: Any) -> fewbit.scope:
    return fewbit.scope(bits, **{"min_bytes": 0, **settings})


def mlp(activation: nn.Module | None = None) -> nn.Sequential:
    """With a frozen next layer: the codes are all that is left."""
    net = nn.Sequential(nn.Linear(16, 64), activation or nn.GELU(), nn.Linear(64, 16))
    net[2].requires_grad_(False)
    return net


def gradient(net: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor, under: Any = None) -> Tensor:
    net.zero_grad()
    with under or contextlib.nullcontext():
        y = run(x)
    y.square().sum().backward()
    return net[0].weight.grad.clone()


def saved(y: Tensor) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """What the compiled graph keeps."""
    return [(tuple(t.shape), t.dtype) for t in y.grad_fn.saved_tensors]


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() <= 1e-5 * b.norm())


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["gelu", "tanh", "hardswish"])  # one is folded, one jumps
def test_the_codes_are_those_of_the_reference(bits: int, dtype: torch.dtype, name: str) -> None:
    book = fewbit.codebook(name, bits)
    boundaries = torch.tensor(book.boundaries).to(dtype)
    x = torch.cat([torch.linspace(-9, 9, 983).to(dtype), boundaries, -boundaries, torch.tensor([torch.inf, torch.nan])])
    codes = _in_graph.encode(x, tuple(book.boundaries.tolist()), book.folded)
    packed = ops.encode(x, bits, ops.Thresholds(book.boundaries, book.folded))
    assert torch.equal(codes, ops.unpack_bits(packed, bits, len(x)).to(torch.int32))


@pytest.mark.parametrize("n", [0, 1, 7, 8, 1023])
@pytest.mark.parametrize("bits", range(1, 9))
def test_packing_is_undone_at_every_length(bits: int, n: int) -> None:
    codes = torch.randint(0, 1 << bits, (n,), dtype=torch.int32)
    packed = _in_graph.pack_bits(codes, bits)
    assert [(column.dtype, len(column)) for column in packed] == [(torch.uint8, -(-n // 8))] * bits
    assert torch.equal(torch.cat(_in_graph.unpack_bits(packed, bits))[:n], codes)


@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (4, 2, 3)])
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_a_product_has_the_shape_of_the_gradient(bits: int, shape: tuple[int, ...]) -> None:
    levels = tuple(torch.randn(1 << bits).tolist())
    codes, grad = torch.randint(0, 1 << bits, shape, dtype=torch.int32), torch.randn(shape)
    product = _in_graph.multiply(grad, _in_graph.pack_bits(codes, bits), bits, levels)
    assert torch.equal(product, grad * torch.tensor(levels)[codes.flatten()].view(shape))


@pytest.mark.parametrize("bits", [2, 6])
def test_decoding_gives_each_code_its_level(bits: int) -> None:
    levels = tuple(torch.randn(1 << bits).tolist())
    codes = torch.arange(1 << bits, dtype=torch.int32)
    assert _in_graph.decode(codes, levels, torch.float32).tolist() == list(levels)


ACTIVATIONS = [nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Mish(), nn.Tanh(), nn.Sigmoid(), nn.ELU(0.7), nn.Softplus(2.0)]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_a_compiled_gradient_is_the_one_that_the_codebook_gives(activation: nn.Module) -> None:
    net, x = mlp(activation), torch.randn(32, 16)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    exact, coded = gradient(net, net, x), gradient(net, net, x, scope())
    assert close(gradient(net, compiled, x, scope()), coded)
    assert not close(coded, exact)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("bits", [1, 3, 4])
def test_the_compiled_graph_keeps_the_codes_in_the_place_of_the_activation(backend: str, bits: int) -> None:
    compiled, x = torch.compile(mlp(), backend=backend, fullgraph=True), torch.randn(32, 16)
    with scope(bits):
        y = compiled(x)
    assert saved(y).count(((32 * 64 // 8,), torch.uint8)) == bits
    assert ((32, 64), torch.float32) not in saved(y)
    assert ((32, 64), torch.float32) in saved(compiled(x))  # outside


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_the_forward_is_that_of_the_compiled_model_without_a_scope(backend: str) -> None:
    net, x = mlp(nn.SiLU()), torch.randn(32, 16)
    compiled = torch.compile(net, backend=backend, fullgraph=True)
    stock = compiled(x)
    with scope():
        assert torch.equal(compiled(x), stock)


def test_scopes_with_equal_settings_share_a_graph_and_others_have_their_own() -> None:
    net, x = mlp(), torch.randn(32, 16)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    graphs = []
    expected = {bits: gradient(net, net, x, scope(bits)) for bits in (2, 3, None)}
    for bits in (3, 3, {"gelu": 3}, 2, 3, 2, None, 3):
        exact = bits is None
        result = gradient(net, compiled, x, None if exact else scope(bits))
        assert close(result, expected[3 if isinstance(bits, dict) else bits])
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [1, 1, 2, 3, 3, 3, 4, 4]


def test_one_scope_entered_for_every_step_does_not_recompile() -> None:
    net, x, memory = mlp(), torch.randn(32, 16), scope()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for _ in range(5):
        gradient(net, compiled, x, memory)
    assert counters["stats"]["unique_graphs"] == 1


def test_the_innermost_scope_decides() -> None:
    net, x = mlp(), torch.randn(32, 16)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    with scope(2):
        assert close(gradient(net, compiled, x, scope(4)), gradient(net, net, x, scope(4)))
        assert close(gradient(net, compiled, x, scope(None)), gradient(net, net, x, scope(None)))


def test_lengths_that_change_are_coded_in_one_dynamic_graph() -> None:
    net = mlp()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True, dynamic=True)
    for n in (32, 33, 47, 64):
        x = torch.randn(n, 16)
        assert close(gradient(net, compiled, x, scope()), gradient(net, net, x, scope()))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"exact": True},
        {"bits": {"silu": 3}},
        pytest.param({"bits": lambda name, x: 3}, id="a callable for bits"),
        {"exclude": "*"},
        {"codebooks": fewbit.codebook("gelu", 2)},
        {"min_bytes": 1 << 20},
        {"exact": True, "recompute": True},
    ],
    ids=str,
)
def test_what_cannot_be_decided_in_a_graph_is_exact_there(settings: dict[str, Any]) -> None:
    net, x = mlp(), torch.randn(32, 16)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    assert torch.equal(gradient(net, compiled, x, scope(**settings)), gradient(net, net, x))


@pytest.mark.parametrize(
    "call",
    [lambda x: F.silu(x * 1, inplace=True), lambda x: torch.relu(x), lambda x: F.dropout(x, 0.0), lambda x: x.clamp(x)],
    ids=["in place", "two-valued", "dropout", "tensor limits"],
)
def test_calls_that_are_left_to_the_compiler_are_exact(call: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(64, requires_grad=True)
    (exact,) = torch.autograd.grad(call(x).sum(), x)
    with scope():
        y = torch.compile(call, backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], exact)


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_coded_as_without_compilation(autocast: bool) -> None:
    net, x = mlp(), torch.randn(32, 16)
    if not autocast:
        net, x = net.to(torch.bfloat16), x.to(torch.bfloat16)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        a, b = gradient(net, compiled, x, scope()), gradient(net, net, x, scope())
    assert (a - b).norm() <= 0.01 * b.norm()


def test_a_second_derivative_through_a_compiled_graph_is_refused() -> None:
    net, x = mlp(), torch.randn(32, 16, requires_grad=True)
    with scope():
        y = torch.compile(net, backend="aot_eager", fullgraph=True)(x)
    with pytest.raises(RuntimeError):
        (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        g.square().sum().backward()


def test_a_scope_around_a_compiled_model_does_not_warn_that_it_did_nothing(recwarn: pytest.WarningsRecorder) -> None:
    with scope():
        torch.compile(mlp(), backend="aot_eager")(torch.randn(32, 16))
    assert not [w for w in recwarn if issubclass(w.category, fewbit.FewbitWarning)]


def test_no_grad_and_inputs_without_gradient_are_left_alone() -> None:
    net, x = mlp(), torch.randn(32, 16)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    with scope(), torch.no_grad():
        assert torch.equal(compiled(x), net(x))
    with scope():
        assert torch.compile(F.gelu, backend="aot_eager", fullgraph=True)(x).grad_fn is None


class TanhGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x**3)))


fewbit.register_module(TanhGELU, "gelu", approximate="tanh")


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_composite_is_coded_as_a_whole(backend: str) -> None:
    net, x = mlp(TanhGELU()), torch.randn(32, 16)
    compiled = torch.compile(net, backend=backend, fullgraph=True)
    assert close(gradient(net, compiled, x, scope()), gradient(net, net, x, scope()))
    assert close(gradient(net, compiled, x), gradient(net, net, x))
    assert close(gradient(net, compiled, x, scope(exact=True)), gradient(net, net, x))
    with scope():
        y = compiled(x)
    assert saved(y).count(((32 * 64 // 8,), torch.uint8)) == 3


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("bits", [5, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_more_bits_are_looked_up_in_the_graph(dtype: torch.dtype, bits: int, backend: str) -> None:
    x = torch.linspace(-9, 9, 1003).to(dtype).requires_grad_()
    with scope(bits):
        y = torch.compile(lambda x: F.gelu(x) + 1.0, backend=backend, fullgraph=True)(x)
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    expected = fewbit.codebook("gelu", bits).derivative(x.detach())
    torch.testing.assert_close(grad, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_graph_looks_codes_up_in_as_many_tables_as_it_has_codebooks(dynamic: bool) -> None:
    def call(x: Tensor) -> Tensor:
        return F.gelu(x) + F.silu(x * 1) + F.mish(x * 1) + F.silu(x.bfloat16()) + F.gelu(x * 1)

    x = torch.randn(33, 7, requires_grad=True)
    with fewbit.scope(bits=5, min_bytes=0):
        y = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=dynamic)(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    slopes = [fewbit.codebook(name, 5).derivative(x.detach()) for name in ("gelu", "silu", "mish", "gelu")]
    slopes.append(fewbit.codebook("silu", 5).derivative(x.detach().bfloat16()).float())
    torch.testing.assert_close(grad, torch.stack(slopes).sum(0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("bits", [3, 8])
def test_a_number_is_coded(bits: int, backend: str) -> None:
    x = torch.tensor(0.7, requires_grad=True)
    with scope(bits):
        y = torch.compile(lambda x: F.gelu(x) * 2.0, backend=backend)(x)
    (grad,) = torch.autograd.grad(y, x)
    torch.testing.assert_close(grad, 2 * fewbit.codebook("gelu", bits).derivative(x.detach()))


def _net(x: Tensor) -> Tensor:
    return F.gelu(F.gelu(x * 1.3) @ torch.linspace(-1, 1, 64, dtype=x.dtype).view(8, 8)).sum()


TRANSFORMED: dict[str, Callable[[Tensor], Tensor]] = {
    "grad": torch.func.grad(_net),
    "grad of grad": torch.func.grad(lambda x: torch.func.grad(_net)(x).square().sum()),
    "vmap of grad": torch.func.vmap(torch.func.grad(_net)),
    "vjp of grad": lambda x: torch.func.vjp(torch.func.grad(_net), x)[1](torch.ones_like(x))[0],
    "jacrev": torch.func.jacrev(lambda x: F.gelu(x)),
}


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", TRANSFORMED)
def test_a_transform_inside_a_compiled_function_is_stocks(name: str, backend: str) -> None:
    x = torch.randn(4, 8, dtype=torch.float64)
    with scope():
        found = torch.compile(TRANSFORMED[name], backend=backend)(x)
    torch.testing.assert_close(found, TRANSFORMED[name](x))


def test_a_loss_of_a_derivative_that_is_compiled_is_stocks() -> None:
    x = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)

    def loss(x: Tensor) -> Tensor:
        return torch.func.grad(_net)(x).square().mean()

    with scope():
        (found,) = torch.autograd.grad(torch.compile(loss, backend="inductor")(x), x)
    torch.testing.assert_close(found, torch.autograd.grad(loss(x), x)[0])


def test_checkpoint_inside_a_compiled_function_is_correct() -> None:
    net, x = mlp(), torch.randn(32, 16)

    def run(h: Tensor) -> Tensor:
        y: Tensor = torch.utils.checkpoint.checkpoint(net, h, use_reentrant=False)
        return y

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    result = gradient(net, compiled, x, scope())
    assert close(result, gradient(net, net, x)) or close(result, gradient(net, net, x, scope()))


@pytest.mark.parametrize("bits", [{"gelu": None, "default": 3}, {"silu": 3}], ids=str)
def test_of_a_composite_that_is_kept_no_primitive_is_coded(bits: dict[str, int | None]) -> None:
    activations = pytest.importorskip("transformers.activations", reason="transformers is not installed")
    net, x = mlp(activations.NewGELUActivation()), torch.randn(8, 16)
    run = torch.compile(net, backend="aot_eager", fullgraph=True)
    exact = gradient(net, net, x)
    assert close(gradient(net, run, x, scope(bits)), exact)
    assert not close(gradient(net, run, x, scope(3)), exact)


def test_the_eager_part_of_a_model_is_counted() -> None:
    net, x = mlp(), torch.randn(8, 16)
    run = torch.compile(net[0], backend="aot_eager")
    with scope(None) as memory:
        net[2](net[1](run(x))).sum().backward()
    assert [(row.activation, row.bits) for row in memory.report().rows] == [("gelu", None)]


@pytest.mark.parametrize("activation", [nn.Mish(), nn.ReLU()], ids=repr)
def test_what_dynamo_leaves_to_python_is_coded_and_counted_as_ever(
    activation: nn.Module, recwarn: pytest.WarningsRecorder
) -> None:
    class Recurrent(nn.Module):  # Dynamo does not take it, but tries all that it calls
        def __init__(self) -> None:
            super().__init__()
            self.gru, self.act, self.head = nn.GRU(8, 32), activation, nn.Linear(32, 4).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(F.dropout(self.act(self.gru(x)[0]), 0.5))
            return y

    def reasons(run: Callable[[Tensor], Tensor]) -> dict[str, tuple[int | None, str]]:
        with scope() as memory:
            y = run(x)
        y.square().sum().backward()
        return {row.activation: (row.bits, row.reason) for row in memory.report().rows}

    net, x = Recurrent(), torch.randn(16, 4, 8)
    eager = reasons(net)
    assert len(eager) == 2
    assert all(bits for bits, _ in eager.values())
    for _ in range(2):
        assert reasons(torch.compile(net, backend="aot_eager")) == eager
    assert not [w for w in recwarn if "fewbit" in str(w.message) or "eval_frame" in str(w.message)]


def tanh_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x**3)))


class Scaled(nn.Module):
    """A gelu times something, which one may have registered as if it were a gelu."""

    def __init__(self, by: str) -> None:
        super().__init__()
        if by == "parameter":
            self.by = nn.Parameter(torch.full((), 2.0))
        else:  # a tensor that is no parameter, or a number
            self.__dict__["by"] = torch.full((), 2.0, requires_grad=True) if by == "tensor" else 2.0

    def forward(self, x: Tensor) -> Tensor:
        return self.by * tanh_gelu(x)


@pytest.mark.parametrize("by", ["parameter", "tensor", "number"])
def test_an_instance_that_computes_something_else_is_left_to_the_compiler(by: str) -> None:
    fewbit.register_module(Scaled, "gelu", approximate="tanh")
    module, x = Scaled(by), torch.randn(32, 64, requires_grad=True)
    leaves = [x, module.by] if isinstance(module.by, Tensor) else [x]
    stock = torch.autograd.grad(module(x).sum(), leaves)
    with scope():
        y = torch.compile(module, backend="aot_eager", fullgraph=True)(x)
    for mine, exact in zip(torch.autograd.grad(y.sum(), leaves), stock, strict=True):
        torch.testing.assert_close(mine, exact)


def test_of_a_registered_function_no_primitive_is_coded() -> None:
    @fewbit.register
    def my_swish(x: Tensor, slope: float = 1.5) -> Tensor:
        return x * torch.sigmoid(slope * x)

    x = torch.randn(32, 64, requires_grad=True)
    (stock,) = torch.autograd.grad(my_swish(x).sum(), x)
    with scope():
        y = torch.compile(lambda x: my_swish(x=x), backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], stock)


def test_a_composite_that_is_called_by_keyword_is_coded_as_a_whole() -> None:
    module = pytest.importorskip("transformers.activations", reason="transformers is not installed").NewGELUActivation()
    x = torch.randn(32, 64, requires_grad=True)
    for bits in (3, {"gelu": None, "default": 3}):
        with fewbit.scope(bits=bits, min_bytes=0):
            y = torch.compile(lambda x: module(input=x), backend="aot_eager", fullgraph=True)(x)
        (grad,) = torch.autograd.grad(y.sum(), x)
        (stock,) = torch.autograd.grad(module(x).sum(), x)
        expected = fewbit.codebook("gelu", 3, approximate="tanh").derivative(x.detach()) if bits == 3 else stock
        torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize(
    ("call", "name", "parameter"),
    [
        (F.celu, "celu", "alpha"),
        (lambda x, number: F.softplus(x, threshold=number), "softplus", "threshold"),
        (lambda x, number: torch.clamp(x, -number, number), None, ""),
        (lambda x, number: torch.clamp(x, max=x.shape[0] / 64), None, ""),
    ],
)
def test_a_parameter_may_be_a_number_that_changes(
    call: Callable[..., Tensor], name: str | None, parameter: str, dynamic: bool | None
) -> None:
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for number in (1.0, 2, 2.5):
        x = torch.randn(32, 64, requires_grad=True)
        with scope():
            y = compiled(x, number)
        (grad,) = torch.autograd.grad(y.sum(), x)
        (expected,) = torch.autograd.grad(call(x, number).sum(), x)
        if name is not None:
            expected = fewbit.codebook(name, 3, **{parameter: number}).derivative(x.detach())
        torch.testing.assert_close(grad, expected)


def test_forward_mode_inside_of_a_compiled_function_is_stocks() -> None:
    def run(x: Tensor, tangent: Tensor) -> Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(F.gelu(forward_ad.make_dual(x, tangent))).tangent

    x, tangent = torch.randn(32, 64, requires_grad=True), torch.randn(32, 64)
    with scope():
        mine = torch.compile(run, backend="aot_eager", fullgraph=True)(x, tangent)
    torch.testing.assert_close(mine, run(x, tangent))


def test_a_derivative_that_is_taken_in_the_graph_is_stocks() -> None:
    first, last = nn.Linear(8, 64), nn.Linear(64, 1)

    def penalty(x: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad(last(F.silu(first(x))).sum(), x, create_graph=True)
        return slope.square().sum()

    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        pytest.skip("this torch traces no torch.autograd.grad")
    x = torch.randn(32, 8, requires_grad=True)
    stock = torch.autograd.grad(penalty(x), first.weight)[0]
    with torch._dynamo.config.patch(trace_autograd_ops=True), scope():
        loss = torch.compile(penalty, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(torch.autograd.grad(loss, first.weight)[0], stock)


def test_bits_may_be_numpys_in_a_mapping() -> None:
    x = torch.randn(32, 64, requires_grad=True)
    with fewbit.scope(bits={"gelu": np.int64(3)}, min_bytes=0):
        y = torch.compile(F.gelu, backend="aot_eager", fullgraph=True)(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, fewbit.codebook("gelu", 3).derivative(x.detach()))


@torch.compiler.disable(recursive=False)
def attributes(t: Tensor) -> tuple[Any, ...]:
    """Where Dynamo leaves code to Python, functions that it calls may still be compiled, a mode's among them."""
    return t.dtype, t.device, t.shape, t.requires_grad, t.is_leaf, t.ndim, t.device, t.dtype


@pytest.mark.parametrize(
    "settings", [{}, {"exact": True}, {"recompute": True}, {"exact": True, "recompute": True}, {"bits": None}], ids=str
)
def test_where_dynamo_leaves_code_to_python_each_attribute_is_what_it_is(settings: dict[str, Any]) -> None:
    compiled = torch.compile(lambda t: attributes(t), backend="eager")
    with quiet(**settings):
        found = [compiled(nn.Parameter(torch.zeros(3, 4))) for _ in range(4)]
    assert (
        found == [(torch.float32, torch.device("cpu"), (3, 4), True, True, 2, torch.device("cpu"), torch.float32)] * 4
    )


def test_a_profile_reads_each_attribute_where_dynamo_leaves_code_to_python() -> None:
    found: list[Any] = []

    def step() -> Tensor:
        w = nn.Parameter(torch.zeros(3, 4))
        found.append(compiled(w))
        return w.sum()

    compiled = torch.compile(lambda t: attributes(t), backend="eager")
    fewbit.profile(step)
    assert set(found) == {
        (torch.float32, torch.device("cpu"), (3, 4), True, True, 2, torch.device("cpu"), torch.float32)
    }


@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
def test_a_compiled_block_in_a_checkpoint_is_left_to_the_checkpoint(inside: bool) -> None:
    net, x = mlp(), torch.randn(32, 16)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)

    def checkpointed(x: Tensor) -> Tensor:
        y: Tensor = torch.utils.checkpoint.checkpoint(compiled, x, use_reentrant=False)
        return y

    stock = gradient(net, checkpointed, x)
    for _ in range(2):
        net.zero_grad()
        with scope():
            loss = checkpointed(x).square().sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        assert torch.equal(net[0].weight.grad, stock)
        assert not close(gradient(net, compiled, x, scope()), stock)  # where there is no checkpoint it is coded
    assert counters["stats"]["unique_graphs"] == 3


def test_hooks_of_others_inside_the_scope_around_a_compiled_call_keep_it_exact() -> None:
    net, x = mlp(), torch.randn(32, 16)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)

    def offloaded(x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            y: Tensor = compiled(x)
        return y

    stock, coded = gradient(net, compiled, x), gradient(net, net, x, scope())
    assert torch.equal(gradient(net, offloaded, x, scope()), stock)
    assert close(gradient(net, compiled, x, scope()), coded)
    with torch.autograd.graph.save_on_cpu():  # around the scope: they are handed the codes
        assert close(gradient(net, compiled, x, scope()), coded)


def test_a_size_that_depends_on_data_is_coded_with_no_break() -> None:
    net, x = mlp(), torch.randn(1024, 16)  # of so many the activations may be larger than `min_bytes`
    chosen = x[:, 0] > 0
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(lambda x: net(x[chosen]), backend="aot_eager", fullgraph=True)
        found = gradient(net, compiled, x, fewbit.scope(3))
    assert close(found, gradient(net, lambda x: net(x[chosen]), x, scope()))
