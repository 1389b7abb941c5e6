"""Tensors of unusual kinds and layouts: coded, or kept with the reason, and then with stock's result."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fewbit_hooks as fewbit

from .conftest import quiet


def run(make: Callable[[], Tensor], around: Any) -> tuple[Tensor, Tensor | None]:
    """gelu, and the gradient of what it was made from."""
    leaf = torch.linspace(-4, 4, 96).requires_grad_()
    with around:
        y = F.gelu(make(leaf))
    y.backward(torch.ones_like(y))
    return y.detach(), leaf.grad


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "zero stride": lambda t: t[:8, None].expand(8, 100),
    "zero stride in front": lambda t: t[:8].expand(100, 8),
    "overlapping": lambda t: t.as_strided((20, 30), (2, 1)),
    "overlapping windows": lambda t: t.unfold(0, 9, 3),
    "very large strides": lambda t: (t.new_zeros(1 << 22) + t.sum()).as_strided((4, 3), (1 << 20, 1 << 18)),
    "a slice of a large storage": lambda t: (t.new_zeros(1 << 16) + t.sum())[::4096],
    "one element of many": lambda t: (t * 1)[5:6],
    "steps of two dimensions": lambda t: (t * 1).view(8, 12)[::2, ::3],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_tensor_of_any_strides_has_the_gradient_of_its_levels(layout: Callable[[Tensor], Tensor]) -> None:
    opened = quiet(bits=8)
    y, gradient = run(layout, opened)
    stock, exact = run(layout, contextlib.nullcontext())
    assert torch.equal(y, stock)
    (row,) = opened.report().rows
    if row.bits is None:  # its codes would be no smaller than its storage
        assert row.reason == "codes would be no smaller than its storage"
        assert torch.equal(gradient, exact)
    else:
        assert row.bits == 8
        _, contiguous = run(lambda t: layout(t).contiguous(), quiet(bits=8))
        torch.testing.assert_close(gradient, contiguous)
        assert (gradient - exact).abs().max() <= 0.1 * max(1.0, float(exact.abs().max()))


def test_a_tensor_in_shared_memory_is_coded() -> None:
    def shared(t: Tensor) -> Tensor:
        return (t * 1).detach().share_memory_().requires_grad_()

    x, same = shared(torch.linspace(-4, 4, 96)), torch.linspace(-4, 4, 96).requires_grad_()
    for leaf in (x, same):
        with quiet(bits=3) as opened:
            y = F.gelu(leaf)
        assert opened.report().rows[0].bits == 3
        y.sum().backward()
    assert x.is_shared()
    assert torch.equal(x.grad, same.grad)


@pytest.mark.filterwarnings("ignore:.*quantize.*", "ignore:.*quantization.*")
def test_quantised_tensors_pass() -> None:
    q = torch.quantize_per_tensor(torch.linspace(-4, 4, 96), 0.1, 0, torch.qint8)
    expected = F.relu(q)
    with quiet(bits=3) as opened:
        F.gelu(torch.ones(8, requires_grad=True))
        assert torch.equal(F.relu(q).int_repr(), expected.int_repr())
    assert [row.activation for row in opened.report().rows] == ["gelu"]


@pytest.mark.filterwarnings("ignore:Sparse.*:UserWarning")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc], ids=str)
def test_sparse_tensors_of_each_layout_have_stocks_gradient(layout: torch.layout) -> None:
    values = torch.tensor([[0.0, 2.0, 0.0], [-3.0, 0.0, 1.0]])

    def gradient(around: Any) -> Tensor:
        leaf = values.clone().requires_grad_()
        with around:
            y = torch.relu(leaf.to_sparse(layout=layout))
        y.to_dense().sum().backward()
        return leaf.grad

    opened = quiet(bits=3)
    assert torch.equal(gradient(opened), gradient(contextlib.nullcontext()))
    assert {row.reason for row in opened.report().rows} == {f"layout {str(layout).removeprefix('torch.')}"}


def test_models_of_several_dtypes_are_coded_in_each() -> None:
    def gradients(around: Any) -> list[Tensor]:
        leaf = torch.linspace(-4, 4, 96).requires_grad_()
        with around:
            y = F.gelu(leaf * 1)
            y = F.silu(y.bfloat16() * 2)
            y = torch.tanh(y.double() * 0.5)
            y = F.relu(y.half() - 0.1)
        return list(torch.autograd.grad(y.float().sum(), leaf))

    opened = quiet(bits=8)
    (coded,), (exact,) = gradients(opened), gradients(contextlib.nullcontext())
    assert {row.activation: row.bits for row in opened.report().rows} == {"gelu": 8, "silu": 8, "tanh": 8, "relu": 1}
    assert (coded - exact).abs().max() < 0.05


def nested(layout: torch.layout) -> Tensor:
    rows = [torch.linspace(-2, 2, 24).view(3, 8), torch.linspace(-3, 3, 40).view(5, 8)]
    return torch.nested.nested_tensor(rows, layout=layout, requires_grad=True)


KINDS: dict[str, Callable[[], Tensor]] = {
    "nested": lambda: nested(torch.strided),
    "jagged": lambda: nested(torch.jagged),
    "meta": lambda: torch.empty(4, 8, device="meta", requires_grad=True),
    "complex": lambda: torch.linspace(-2, 2, 64).view(4, 8, 2).view(torch.complex64)[..., 0].requires_grad_(),
    "sparse": lambda: torch.linspace(-2, 2, 32).view(4, 8).to_sparse().requires_grad_(),
    "mkldnn": lambda: torch.linspace(-2, 2, 32).view(4, 8).to_mkldnn().requires_grad_(),
}
WEIGHT = torch.linspace(-1, 1, 64).view(8, 8).requires_grad_()
CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "tanh": torch.tanh,
    "hardtanh": F.hardtanh,
    "linear": lambda x: F.linear(F.gelu(x), WEIGHT),
    "linear after relu": lambda x: F.linear(F.relu(x), WEIGHT),
    "cast": lambda x: F.linear(F.silu(x).to(torch.bfloat16).to(torch.float32), WEIGHT),
    "product": lambda x: F.silu(x) * x,
    "norm": lambda x: F.linear(F.layer_norm(x, (8,)), WEIGHT),
    "dropout": lambda x: F.linear(F.dropout(F.gelu(x), 0.3), WEIGHT),
    "padded": lambda x: F.pad(F.relu(x), (1, 1)),
    "masked": lambda x: x.masked_fill(x > 0, 0.0),
    "softmax": lambda x: F.softmax(x, -1) @ WEIGHT,
}
ALL_SETTINGS: list[dict[str, Any]] = [
    {"bits": bits, "exact": exact, "recompute": recompute}
    for bits, exact in ((3, False), (3, True), (None, False))
    for recompute in (False, True)
]


def leaves(t: Tensor) -> list[Tensor]:
    """What can be compared of a tensor of any kind."""
    if t.is_meta:
        return []
    if t.is_nested:
        return list(t.unbind())
    return [t if t.layout is torch.strided else t.to_dense()]


def outcome(make: Callable[[], Tensor], call: Callable[[Tensor], Tensor], around: Any, steps: int) -> Any:
    """The output and the gradient of the last step; or what it says."""
    net = nn.Identity()
    net.forward = call
    for _ in range(steps):
        torch.manual_seed(0)
        x = make()
        try:
            with around:
                y = net(x)
            total = y.sum() if y.is_meta else sum(t.abs().sum() for t in leaves(y))
            total.backward()
        except (RuntimeError, NotImplementedError, ValueError) as error:
            return type(error)
    return [*leaves(y.detach()), *leaves(x.grad)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_tensor_of_another_kind_has_stocks_result_or_stocks_error(
    kind: Callable[[], Tensor], call: Callable[[Tensor], Tensor]
) -> None:
    stock = outcome(kind, call, contextlib.nullcontext(), 1)
    for settings in ALL_SETTINGS:
        mine = outcome(kind, call, quiet(**settings), 3)  # what is learned in two steps must not matter either
        assert type(mine) is type(stock), (settings, mine, stock)
        if isinstance(stock, list):
            assert len(mine) == len(stock)
            assert all(torch.equal(a, b) for a, b in zip(mine, stock, strict=True)), settings
        else:
            assert mine is stock, settings


@pytest.mark.parametrize("engine", ["hooks", "fused"])
@pytest.mark.parametrize(
    "change", [lambda t: t.contiguous(memory_format=torch.channels_last), lambda t: t.transpose(1, 3)]
)
def test_a_saved_tensor_may_lie_in_another_order_than_the_input(
    engine: str, change: Callable[[Tensor], Tensor]
) -> None:
    # log_sigmoid saves a buffer that is contiguous, whatever its input is
    leaf = torch.randn(4, 8, 6, 6).requires_grad_()
    x = change(leaf)
    weight = torch.randn_like(x)
    (stock,) = torch.autograd.grad((F.logsigmoid(x) * weight).sum(), leaf, retain_graph=True)
    with fewbit.scope(bits=8, min_bytes=0, engine=engine) as memory:
        y = F.logsigmoid(x)
    (coded,) = torch.autograd.grad((y * weight).sum(), leaf)
    assert memory.report().rows[0].bits == 8
    assert (coded - stock).norm() < 0.01 * stock.norm()


@pytest.mark.filterwarnings("ignore:fewbit_hooks.scope compressed nothing")
def test_a_view_of_the_other_sign_is_computed_again_with_its_sign() -> None:
    x, w = torch.randn(16, 8, 2).requires_grad_(), torch.randn(16, 8).requires_grad_()

    def gradient() -> Tensor:
        z = torch.view_as_complex(F.gelu(x * 1.0)).conj().imag  # a view of the output, negated by a bit of its own
        assert z.is_neg()
        return torch.autograd.grad((z * w).square().sum(), w)[0]

    stock = gradient()
    with fewbit.scope(exact=True, recompute=True, min_bytes=0), quiet():
        assert torch.equal(gradient(), stock)


class Strict(Tensor):
    """Refuses all that it does not know, as the weights of `call_for_per_sample_grads` do."""

    KNOWN = frozenset(
        {F.linear, F.gelu, F.relu, F.prelu, F.dropout, F.layer_norm, Tensor.square, Tensor.sum, Tensor.backward}
    )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in cls.KNOWN:
            raise NotImplementedError(f"{cls.__name__} does not know {func}")
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.filterwarnings("ignore:fewbit_hooks.scope compressed nothing")
@pytest.mark.parametrize(
    "settings", [{"exact": True}, {"bits": 3}, {"bits": None}, {"exact": True, "recompute": True}], ids=str
)
@pytest.mark.parametrize(
    "call",
    [
        F.gelu,
        F.relu,
        lambda x: F.prelu(x, torch.ones(1)),
        lambda x: F.dropout(x, 0.5),
        lambda x: F.dropout(F.gelu(x.as_subclass(Tensor)), 0.5),
    ],
    ids=["gelu", "relu", "prelu", "dropout", "only a parameter"],
)
def test_a_class_that_refuses_what_it_does_not_know_is_not_asked(
    call: Callable[[Tensor], Tensor], settings: dict[str, Any]
) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4)
            self._parameters["other"] = torch.zeros(3).as_subclass(Strict)  # type: ignore[assignment]

        def forward(self, x: Tensor) -> Tensor:
            return self.last(call(self.norm(self.first(x))))  # type: ignore[no-any-return]

    model, x = Model(), torch.randn(5, 8).as_subclass(Strict)
    found = []
    for around in (contextlib.nullcontext(), fewbit.scope(min_bytes=0, **settings)):
        for _ in range(3):
            torch.manual_seed(0)
            model.first.weight.grad = None
            with around:
                loss = model(x).square().sum()
            loss.backward()
        assert model.first.weight.grad is not None
        found.append(model.first.weight.grad)
    if settings.get("exact"):
        assert torch.equal(*found)
