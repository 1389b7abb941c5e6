"""Gated units in one kernel: by Triton's interpreter on the CPU, or on a CUDA device where there is one."""

from __future__ import annotations

import copy
import gc
import importlib
import inspect
import pickle
from contextlib import ExitStack, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import fewbit_hooks as fewbit
from fewbit_hooks import _fused, _gated, ops
from fewbit_hooks.ops import _dispatch
from held import held_for_backward

from .hard_cases import DTYPES
from .test_fused import CALLS, Halving
from .test_triton import DEVICE

pytest.importorskip("fewbit_hooks.ops._triton_gated", reason="triton is not installed")
hf = pytest.importorskip("transformers", reason="transformers is not installed")

from transformers.models.llama.modeling_llama import LlamaMLP  # noqa: E402

from fewbit_hooks.ops import _triton_fused, _triton_gated  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning")
FORMULAS = {
    "gelu": ("gelu", ()),
    "gelu tanh": ("gelu_tanh", ()),
    "silu": ("silu", ()),
    "mish": ("mish", ()),
    "elu": ("elu", (1.0, 1.0, 1.0)),
    "elu alpha": ("elu", (0.3, 1.0, 1.0)),
    "elu scales": ("elu", (0.7, 1.3, 0.9)),
    "selu": ("elu", _fused.SELU),
    "softplus": ("softplus", (1.0, 20.0)),
    "softplus beta": ("softplus", (0.6, 1.1)),
    "tanh": ("tanh", ()),
    "sigmoid": ("sigmoid", ()),
    "hardswish": ("hardswish", ()),
}


@pytest.fixture(autouse=True)
def fused_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CUDA device."""
    monkeypatch.setattr(_dispatch, "DEVICE_TYPES", frozenset({"cuda", "cpu"}))


def formula(name: str, dtype: torch.dtype) -> tuple[str, Tensor]:
    kernel, numbers = FORMULAS[name]
    return kernel, torch.tensor(numbers or (0.0,), dtype=ops.computed_in(dtype), device=DEVICE)


def numbers(dtype: torch.dtype, n: int = 2051) -> tuple[Tensor, Tensor, Tensor]:
    """A gate, an up and a gradient."""
    gate = 3 * torch.randn(n, dtype=torch.float64)
    gate[:10] = torch.tensor([0.0, -0.0, 3.0, -3.0, 20.0, -20.0, 60.0, -60.0, 100.0, -100.0])
    return tuple(t.to(dtype).to(DEVICE) for t in (gate, torch.randn(n), torch.randn(n)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMULAS)
def test_the_product_is_that_of_the_fused_activation_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    gate, up, _ = numbers(dtype)
    kernel, parameters = formula(name, dtype)
    y, *_ = _triton_fused.forward(kernel, gate, 1, ops.Thresholds([0.0]), parameters)
    product = _triton_gated.forward(kernel, parameters, gate, up)
    assert product.dtype == dtype
    assert torch.equal(product, y * up)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMULAS)
def test_gradients_are_stocks(name: str, dtype: torch.dtype) -> None:
    gate, up, grad = numbers(dtype)
    kernel, parameters = formula(name, dtype)
    found = _triton_gated.backward(kernel, parameters, grad, gate, up)
    exact = [t.double().requires_grad_() for t in (gate, up)]
    expected = torch.autograd.grad(CALLS[name](exact[0]) * exact[1], exact, grad.double())
    # the interpreter's exp and log, in float64 all of them, stand in for libdevice's
    units = 4 if dtype in (torch.float16, torch.bfloat16) else 128 if dtype == torch.float64 else 16
    scales = (grad.double() * up.double()).abs(), (grad.double() * gate.double()).abs() + grad.double().abs()
    for d, stock, scale in zip(found, expected, scales, strict=True):
        assert d.dtype == dtype
        assert ((d.double() - stock).abs() <= units * torch.finfo(dtype).eps * scale).all()


def test_sixteen_bit_gradients_are_rounded_where_stocks_are() -> None:
    gate, up, grad = numbers(torch.bfloat16)
    d_gate, d_up = _triton_gated.backward(*formula("silu", torch.bfloat16), grad, gate, up)
    y, d_y = F.silu(gate), grad * up  # each rounded
    assert (d_gate == torch.ops.aten.silu_backward(d_y, gate)).double().mean() > 0.99
    assert (d_up == grad * y).double().mean() > 0.99


@pytest.mark.parametrize("name", FORMULAS)
def test_nan_and_infinities_give_the_gradients_that_they_give_in_stock(name: str) -> None:
    gate = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0] * 8, dtype=torch.float64)
    up = torch.ones_like(gate)
    # one by one: at NaN the gradient of elu and hardswish is NaN where the CPU computes vectors, and there alone
    apart = zip(gate.requires_grad_().split(1), up.requires_grad_().split(1), strict=True)
    expected = torch.autograd.grad(torch.cat([CALLS[name](g) * u for g, u in apart]).sum(), (gate, up))
    one = torch.ones(32, device=DEVICE)
    found = _triton_gated.backward(*formula(name, torch.float32), one, gate.detach().to(DEVICE, torch.float32), one)
    for ours, stock in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), stock.float(), equal_nan=True)


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 2048])
def test_any_number_of_elements_and_any_dense_strides(n: int) -> None:
    for shape in ((n,), (n, 3)):
        gate, up, grad = (torch.randn(shape, device=DEVICE) for _ in range(3))
        if len(shape) == 2:
            gate, up = gate.t().contiguous().t(), up.t().contiguous().t()
        parameters = torch.zeros(1, device=DEVICE)
        y = _triton_gated.forward("silu", parameters, gate, up)
        assert y.stride() == gate.stride()
        torch.testing.assert_close(y, F.silu(gate) * up)
        d_gate, d_up = _triton_gated.backward("silu", parameters, grad, gate, up)
        s = gate.sigmoid()
        torch.testing.assert_close(d_gate, grad * up * s * (1 + gate * (1 - s)))
        torch.testing.assert_close(d_up, grad * gate * s)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(1, 16), (3, 8), (5, 24), (300, 40)])
@pytest.mark.parametrize("gate_first", [True, False])
def test_halves_are_read_and_written_where_they_lie(
    gate_first: bool, rows: int, columns: int, dtype: torch.dtype
) -> None:
    both, grad = (torch.randn(rows, n, device=DEVICE).to(dtype) for n in (2 * columns, columns))
    gate, up = _gated._factors((both,), gate_first)
    given = formula("silu", dtype)
    assert torch.equal(_triton_gated.forward(*given, gate, up), _triton_gated.forward(*given, gate + 0, up + 0))
    written = torch.full_like(both, 7)
    _triton_gated.backward(*given, grad, gate, up, _gated._factors((written,), gate_first))
    apart = _triton_gated.backward(*given, grad, gate + 0, up + 0)
    assert torch.equal(written, torch.cat(apart if gate_first else apart[::-1], -1))


# --- which forwards are gated units ---


class Renamed(nn.Module):
    def forward(self, hidden):
        """A docstring does not matter."""
        y = self.w2(self.f(self.w1(hidden)) * self.w3(hidden))
        return y  # noqa: RET504


class Scaled(nn.Module):
    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x) * 2)


class Other(nn.Module):
    def forward(self, x):
        return self.down(self.act(self.gate(x)) + self.up(x))


class Another(nn.Module):
    def forward(self, x):
        y = self.down(self.act(self.gate(x)) * self.up(x))  # noqa: F841
        return x


class OfItself(nn.Module):
    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(self))


class OfAnother(nn.Module):
    def forward(self, x):
        return self.down(self.act(self.gate(x)) * x.up(x))


class TwiceTheSame(nn.Module):
    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.gate(x))


class AGlobal(nn.Module):
    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(other))  # noqa: F821


class InThirds(nn.Module):
    def forward(self, x):
        gate, up = self.both(x).chunk(3, dim=-1)
        return self.down(self.drop(self.act(gate) * up))


class OneForBoth(nn.Module):
    def forward(self, x):
        gate, up = self.both(x).chunk(2, dim=-1)  # noqa: RUF059
        return self.down(self.drop(self.act(gate) * gate))


class TheSecondForBoth(nn.Module):
    def forward(self, x):
        gate, gate = self.both(x).chunk(2, dim=-1)
        return self.down(self.drop(self.act(gate) * gate))


class GateLast(nn.Module):
    """As one of the forms, but for which half is which."""

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.c(hidden)
        hidden, g = hidden.chunk(2, dim=-1)
        hidden = self.f(g) * hidden
        hidden = self.d(hidden)
        return hidden  # noqa: RET504


class GateFirst(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        h = self.c(hidden)
        g, h = h.chunk(2, dim=-1)
        h = h * self.f(g)
        return self.d(h)


class Defaults(nn.Module):
    def forward(self, x, y=None):
        return self.down(self.act(self.gate(x)) * self.up(y))


def test_the_source_says_what_is_a_gated_unit() -> None:
    llama = _gated.Unit(gate="gate_proj", act="act_fn", up="up_proj", down=("down_proj",))
    assert _gated.unit_of(inspect.unwrap(LlamaMLP.forward)) == llama
    assert _gated.unit_of(Renamed.forward) == _gated.Unit(gate="w1", act="f", up="w3", down=("w2",))
    assert _gated.unit_of(GateLast.forward) == _gated.Unit(both="c", act="f", down=("d",), gate_first=False)
    assert _gated.unit_of(GateFirst.forward) == _gated.Unit(both="c", act="f", down=("d",))
    others = (
        Scaled,
        Other,
        Another,
        OfItself,
        OfAnother,
        TwiceTheSame,
        AGlobal,
        InThirds,
        OneForBoth,
        TheSecondForBoth,
        Defaults,
    )
    for cls in (*others, nn.Linear, nn.Sequential, nn.TransformerEncoderLayer):
        assert _gated.unit_of(cls.forward) is None
    assert _gated.unit_of(len) is None
    scope: dict[str, Any] = {}
    exec("def forward(self, x):\n    return self.d(self.a(self.g(x)) * self.u(x))", scope)
    assert _gated.unit_of(scope["forward"]) is None  # its source is not there


# --- in modules ---


def mlp(act: str = "silu", hidden: int = 24, inner: int = 40) -> LlamaMLP:
    torch.manual_seed(0)
    config = hf.LlamaConfig(hidden_size=hidden, intermediate_size=inner, hidden_act=act, num_attention_heads=2)
    return LlamaMLP(config).to(DEVICE)


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype).requires_grad_()


def scope(**settings: Any) -> fewbit.scope:
    return fewbit.scope(**{"bits": 3, "engine": "fused", "min_bytes": 0, **settings})


def nodes(y: Tensor) -> set[str]:
    """The names of all nodes behind `y`."""
    found, seen = [y.grad_fn], set()
    names = set()
    while found:
        node = found.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        names.add(node.name())
        found.extend(following for following, _ in node.next_functions)
    return names


def is_gated(y: Tensor) -> bool:
    return "_GatedBackward" in nodes(y)


def gradients(module: nn.Module, x: Tensor, context: Any) -> list[Tensor]:
    with context:
        y = module(x)
    leaves = [t for t in (x, *module.parameters()) if t.requires_grad]
    return [y, *torch.autograd.grad(y.square().sum(), leaves)]


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_pytorch_tanh", "mish", "tanh", "sigmoid"])
def test_a_mlp_is_stocks_to_rounding_and_keeps_less(act: str) -> None:
    module, x = mlp(act), inputs()
    with scope():
        y = module(x)
    assert is_gated(y)
    for ours, stock in zip(gradients(module, x, scope()), gradients(module, x, nullcontext()), strict=True):
        torch.testing.assert_close(ours, stock, rtol=2e-5, atol=2e-6)
    known = [x, *module.parameters()]
    held = sum(held_for_backward(y, known).values())
    stock = sum(held_for_backward(module(x), known).values())
    one = 2 * 5 * 40 * 4
    assert stock - held == (0 if act in ("tanh", "sigmoid") else one)


def of(model: str, cls: str, **settings: Any) -> nn.Module:
    """The gated unit of another model of transformers."""
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    sizes = {"hidden_size": 24, "intermediate_size": 40, "shared_intermediate_size": 40}
    acts = {"hidden_act": "silu", "hidden_activation": "silu"}
    arguments = ("silu",) if model == "moonshine" else ()
    torch.manual_seed(0)
    return getattr(module, cls)(SimpleNamespace(**{**sizes, **acts, "mlp_bias": True, **settings}), *arguments).to(
        DEVICE
    )


UNITS = {
    "Qwen2.5-VL": ("qwen2_5_vl", "Qwen2_5_VLMLP"),
    "Llama": ("llama", "LlamaMLP"),
    "T5Gemma": ("t5gemma", "T5GemmaMLP"),
    "Phi-3": ("phi3", "Phi3MLP"),
    "Granite": ("granitemoeshared", "GraniteMoeSharedMLP"),
    "ModernBERT": ("modernbert", "ModernBertMLP"),
    "Moonshine": ("moonshine", "MoonshineDecoderMLP"),
}
DROPOUT = {"dropout_rate": 0.2, "mlp_dropout": 0.2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", UNITS)
def test_each_form_is_stocks_to_rounding_and_keeps_less(name: str, dtype: torch.dtype) -> None:
    module, x = of(*UNITS[name], **DROPOUT).to(dtype), inputs(dtype)
    one = 2 * 5 * 40 * dtype.itemsize

    def step(context: Any) -> tuple[list[Tensor], int]:
        torch.manual_seed(3)
        with context:
            y = module(x)
        held = sum(held_for_backward(y, [x, *module.parameters()], tables=False).values())
        return [y, *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])], held

    stock, held = step(nullcontext())
    memory = scope()
    ours, less = step(memory)
    assert is_gated(ours[0])
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    for mine, other in zip(ours, stock, strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance * float(other.detach().abs().max()))
    assert held - less >= one  # of a dropout's mask a bit is left
    row = next(row for row in memory.report().rows if row.activation == "silu")
    assert (row.how, row.stored_bytes, row.freed_bytes) == ("recomputed", 0, one)
    parts = 2 if name in ("Phi-3", "Granite", "ModernBERT", "Moonshine") else 1
    assert row.original_bytes == (parts + 1) * one


def test_every_form_is_that_of_a_class_here() -> None:
    found = {_gated.unit_of(inspect.unwrap(type(of(*UNITS[name], **DROPOUT)).forward)) for name in UNITS}
    assert None not in found
    assert len(found) == len(_gated.FORMS) - 1  # two spellings of one


@pytest.mark.filterwarnings("ignore:fewbit_hooks.scope compressed nothing")
def test_halves_of_a_frozen_projection() -> None:
    module, x = of("phi3", "Phi3MLP"), inputs()
    module.gate_up_proj.requires_grad_(False)
    for ours, stock in zip(gradients(module, x, scope()), gradients(module, x, nullcontext()), strict=True):
        torch.testing.assert_close(ours, stock, rtol=2e-5, atol=2e-6)
    with scope():
        assert not is_gated(module(x.detach()))  # neither factor needs a gradient


def laid_otherwise(t: Tensor) -> Tensor:
    return t.transpose(0, -1).contiguous().transpose(0, -1)


@pytest.mark.parametrize("name", ["Llama", "Phi-3"])
def test_others_hooks_may_hand_back_other_strides(name: str) -> None:
    module, x = of(*UNITS[name]), inputs()
    with torch.autograd.graph.saved_tensors_hooks(laid_otherwise, lambda t: t):
        found = gradients(module, x, scope())
    for ours, stock in zip(found, gradients(module, x, nullcontext()), strict=True):
        torch.testing.assert_close(ours, stock, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("name", "act", "original", "stored"),
    # tanh keeps its output alone; of halves stock keeps both anyway, and the activation's output
    [("Llama", "silu", 2, 0), ("Llama", "tanh", 1, 1), ("Phi-3", "silu", 3, 0), ("Phi-3", "tanh", 3, 0)],
)
def test_the_ledger_counts_what_never_came_to_be(name: str, act: str, original: int, stored: int) -> None:
    with scope() as memory:
        y = of(*UNITS[name], hidden_act=act)(inputs())
    assert is_gated(y)
    (row,) = [row for row in memory.report().rows if row.activation == act]
    one = 2 * 5 * 40 * 4
    assert row.how == "recomputed"
    assert (row.original_bytes, row.stored_bytes, row.freed_bytes) == (original * one, stored * one, one)
    y.sum().backward()


@pytest.mark.parametrize("act", ["silu", "tanh"])
@pytest.mark.parametrize("name", ["Llama", "Phi-3"])
def test_double_backward_is_stocks(name: str, act: str) -> None:
    module, x = of(*UNITS[name], hidden_act=act), inputs()

    def second(context: Any) -> list[Tensor]:
        with context:
            y = module(x)
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return list(torch.autograd.grad(first.square().sum(), [x, *module.parameters()]))

    for ours, stock in zip(second(scope()), second(nullcontext()), strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("act", ["silu", "tanh"])
@pytest.mark.parametrize("name", ["Llama", "Phi-3"])
def test_batched_gradients_are_those_of_one_at_a_time(name: str, act: str) -> None:
    module, x = of(*UNITS[name], hidden_act=act), inputs()
    with scope():
        y = module(x)
    grads = torch.randn(3, *y.shape, device=DEVICE)
    (batched,) = torch.autograd.grad(y, x, grads, is_grads_batched=True, retain_graph=True)
    single = torch.stack([torch.autograd.grad(y, x, g, retain_graph=True)[0] for g in grads])
    torch.testing.assert_close(batched, single)


def test_a_change_in_place_of_what_is_kept_is_an_error_as_in_stock() -> None:
    module, x = mlp(), inputs()
    kept: list[Tensor] = []
    module.up_proj.register_forward_hook(lambda m, i, y: kept.append(y))
    with scope():
        y = module(x)
    assert is_gated(y)
    with torch.no_grad():
        kept[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("frozen", ["gate_proj", "up_proj", "down_proj"])
def test_frozen_projections(frozen: str) -> None:
    module, x = mlp(), inputs()
    getattr(module, frozen).requires_grad_(False)
    for ours, stock in zip(gradients(module, x, scope()), gradients(module, x, nullcontext()), strict=True):
        torch.testing.assert_close(ours, stock, rtol=2e-5, atol=2e-6)
    x = x.detach()
    if frozen == "up_proj":  # the product's other factor needs no gradient
        with scope():
            assert is_gated(module(x))
        for ours, stock in zip(gradients(module, x, scope()), gradients(module, x, nullcontext()), strict=True):
            torch.testing.assert_close(ours, stock, rtol=2e-5, atol=2e-6)


def test_nothing_is_held_by_the_graph_that_was_dropped() -> None:
    def tensors() -> int:
        module, x, memory = mlp(), inputs(), scope()
        for _ in range(3):
            with memory:
                y = module(x)
            del y
        del module, x
        gc.collect()
        return sum(type(o) is Tensor for o in gc.get_objects())

    before = tensors()  # what is kept for good, the formula's parameters say
    assert tensors() == before


class Counting(nn.Module):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return F.silu(x) * self.calls / self.calls


class Excluded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


def left_alone() -> dict[str, tuple[nn.Module, Any]]:
    hooked, own, unknown, random, users, primitives, inplace = (mlp() for _ in range(7))
    hooked.act_fn.register_forward_hook(lambda m, i, y: None)
    own.act_fn.forward = lambda x: F.silu(x) * 1.0
    unknown.act_fn, random.act_fn, users.act_fn = nn.Softsign(), nn.RReLU(), Counting()
    primitives.act_fn = hf.activations.ACT2FN["gelu_new"]
    inplace.act_fn = nn.SiLU(inplace=True)
    return {
        "a hook on the activation": (hooked, scope()),
        "a forward of its own": (own, scope()),
        "no formula": (unknown, scope()),
        "random": (random, scope()),
        "the user's own": (users, scope()),
        "written in primitives": (primitives, scope()),
        "in place": (inplace, scope()),
        "engine='hooks'": (mlp(), scope(engine="hooks")),
        "engine='auto'": (mlp(), scope(engine="auto")),
        "exact=True": (mlp(), scope(exact=True)),
        "recompute=True": (mlp(), scope(recompute=True)),
        "bits=None": (mlp(), scope(bits=None)),
        "no bits for silu": (mlp(), scope(bits={"gelu": 3})),
        "smaller than min_bytes": (mlp(), scope(min_bytes=2 * 5 * 40 * 4 + 1)),
        "excluded": (Excluded(), scope(exclude="mlp")),
        "halves whose rows are no whole groups": (of("phi3", "Phi3MLP", intermediate_size=36), scope()),
        "small halves": (of("phi3", "Phi3MLP"), scope(min_bytes=2 * 5 * 40 * 4 + 1)),
        "halves, no bits for silu": (of("moonshine", "MoonshineDecoderMLP"), scope(bits={"gelu": 3})),
    }


@pytest.mark.parametrize("name", left_alone())
@pytest.mark.filterwarnings("ignore:fewbit_hooks.scope compressed nothing")
def test_all_else_runs_as_without(name: str) -> None:
    module, context = left_alone()[name]
    x = inputs()
    torch.manual_seed(2)
    with context:
        y = module(x)
    assert not is_gated(y)
    torch.manual_seed(2)
    stock = module(x)
    torch.testing.assert_close(y, stock, rtol=2e-5, atol=2e-6)
    y.sum().backward()
    if name == "the user's own":
        assert module.act_fn.calls == 2


def test_an_activation_that_is_changed_is_looked_at_again() -> None:
    module, x = mlp("gelu"), inputs()
    module.act_fn = nn.GELU()
    for approximate in ("none", "tanh", "none"):
        module.act_fn.approximate = approximate
        for _ in range(2):
            ours, stock = gradients(module, x, scope()), gradients(module, x, nullcontext())
            for mine, expected in zip(ours, stock, strict=True):
                torch.testing.assert_close(mine, expected, rtol=2e-5, atol=2e-6)
    module.act_fn.register_forward_hook(lambda m, i, y: None)
    with scope():
        assert not is_gated(module(x))


def test_a_hook_on_all_modules_sees_the_activation() -> None:
    seen: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, y: seen.append(type(m).__name__))
    try:
        with scope():
            y = mlp()(inputs())
    finally:
        handle.remove()
    assert not is_gated(y)
    assert seen == ["Linear", "SiLUActivation" if "SiLUActivation" in seen else "SiLU", "Linear", "Linear", "LlamaMLP"]


@pytest.mark.filterwarnings("ignore:fewbit_hooks.scope compressed nothing")
def test_no_grad_torch_func_and_other_peoples_hooks_are_left_alone() -> None:
    module, x = mlp(), inputs()
    with scope(), torch.no_grad():
        assert torch.equal(module(x), module(x))
    with scope():
        got = torch.func.grad(lambda t: module(t).sum())(x.detach())
        with torch.autograd.graph.save_on_cpu():
            assert not is_gated(module(x))
    torch.testing.assert_close(got, torch.autograd.grad(module(x).sum(), x)[0])


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:fewbit_hooks.scope compressed nothing")
def test_inside_checkpoints_gradients_are_stocks(use_reentrant: bool) -> None:
    module, x = mlp(), inputs()

    def step(run: Any) -> list[Tensor]:
        y = run()
        return [y, *torch.autograd.grad(y.square().sum(), [x])] if not use_reentrant else _backward(y, x)

    def around() -> Tensor:  # the scope outside
        with scope():
            return checkpoint(module, x, use_reentrant=use_reentrant)

    def inside() -> Tensor:
        return checkpoint(scope()(module), x, use_reentrant=use_reentrant)

    expected = step(lambda: module(x))
    for run in (around, inside):
        for ours, stock in zip(step(run), expected, strict=True):
            torch.testing.assert_close(ours, stock, rtol=2e-5, atol=2e-6)


def _backward(y: Tensor, x: Tensor) -> list[Tensor]:
    x.grad = None
    y.square().sum().backward()
    return [y, x.grad]


def test_under_autocast_the_product_has_the_dtype_that_it_has() -> None:
    module, x = mlp(), inputs()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        with scope():
            y = module(x)
        stock = module(x)
    assert is_gated(y)
    assert y.dtype == stock.dtype == torch.bfloat16
    torch.testing.assert_close(y, stock, rtol=2e-2, atol=2e-3)


def test_modules_are_copied_and_pickled_and_know_nothing_outside_of_a_scope() -> None:
    module, x = mlp(), inputs()
    with scope():
        module(x)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), module(x))
        assert not is_gated(other(x))
        with scope():
            assert is_gated(other(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_unit_is_scripted_as_before() -> None:
    module, x = mlp(), inputs()
    with scope():
        module(x)
    assert torch.equal(torch.jit.script(module)(x), module(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_in_a_compiled_graph_it_is_left_to_the_compiler() -> None:
    torch._dynamo.reset()
    module, x = mlp(), inputs()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with scope():
        y = compiled(x)
    assert not is_gated(y)
    torch.testing.assert_close(y, module(x), rtol=2e-5, atol=2e-6)
    y.sum().backward()


@pytest.mark.parametrize("name", ["Qwen2", "Phi3"])
def test_a_model_trains_and_holds_less(name: str) -> None:
    config = getattr(hf, f"{name}Config")(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(hf, f"{name}ForCausalLM")(config).to(DEVICE)
    tokens = torch.randint(1, 50, (2, 9), device=DEVICE)

    def loss(context: Any) -> Tensor:
        with context:
            found: Tensor = model(input_ids=tokens, labels=tokens).loss
        return found

    known, parameters = [tokens, *model.parameters(), *model.buffers()], list(model.parameters())
    by_stock, memory = loss(nullcontext()), scope()
    held = sum(held_for_backward(by_stock, known).values())
    stock = torch.autograd.grad(by_stock, parameters)
    for _ in range(3):  # there is nothing to be learned
        by_scope = loss(memory)
        assert memory.report().freed_bytes == 2 * 2 * 9 * 64 * 4
        assert sum(held_for_backward(by_scope, known).values()) == held - 2 * 2 * 9 * 64 * 4
        torch.testing.assert_close(by_scope, by_stock)
        ours = torch.autograd.grad(by_scope, parameters)
    for a, b in zip(ours, stock, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_where_its_kernels_do_not_work_the_two_calls_are_made_and_a_warning_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_dispatch, "_found", {})
    backward = _triton_gated.backward
    monkeypatch.setattr(_triton_gated, "backward", lambda *given: tuple(t + 1 for t in backward(*given)))
    with (
        pytest.warns(
            fewbit.FewbitWarning, match="its gradients are not those of PyTorch; engine='fused' makes products"
        ),
        scope(),
    ):
        y = mlp()(inputs())
    assert not is_gated(y)
    assert "_CodedBackward" in nodes(y)


class ReluInstead(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return F.relu(args[0]) if func is F.silu else func(*args, **(kwargs or {}))


@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("mode", [ReluInstead, lambda: Halving(torch.ops.aten.silu.default)], ids=["relu", "half"])
def test_what_a_mode_makes_of_the_activation_is_in_the_product(mode: Any, around: bool) -> None:
    net, x = mlp(), inputs()
    with mode():
        expected = net(x)
    with ExitStack() as both:
        for context in (mode(), scope()) if around else (scope(), mode()):
            both.enter_context(context)
        y = net(x)
    torch.testing.assert_close(y, expected)
    assert not is_gated(y)
