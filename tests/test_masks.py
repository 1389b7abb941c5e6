"""Masks: one bit an element, gradients bit for bit stock's, and bytes that are really gone."""

from __future__ import annotations

import contextlib
import gc
import math
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fewbit_hooks as fewbit
from fewbit_hooks import _masks, ops

from .conftest import held_for_backward

aten = torch.ops.aten
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPE = (4, 6, 5, 7)

# Forms of dropout whose mask is of the input's shape; with an input that is no leaf, so that it may be overwritten.
DROPOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "F.dropout": lambda x: F.dropout(x, 0.3),
    "F.dropout, default p": lambda x: F.dropout(x),
    "F.dropout, by name": lambda x: F.dropout(input=x, training=True, p=0.15),
    "F.dropout inplace": lambda x: F.dropout(x, 0.3, inplace=True),
    "F.dropout(training, inplace)": lambda x: F.dropout(x, 0.3, True, True),
    "nn.Dropout": nn.Dropout(0.3),
    "nn.Dropout inplace": nn.Dropout(0.3, inplace=True),
    "torch.dropout": lambda x: torch.dropout(x, 0.3, True),
    "torch.dropout_": lambda x: torch.dropout_(x, 0.3, True),
    "torch.dropout, by name": lambda x: torch.dropout(x, p=0.3, train=True),
    "aten.dropout": lambda x: aten.dropout(x, 0.3, True),
    "aten.dropout.default": lambda x: aten.dropout.default(x, 0.3, True),
    "aten.dropout_": lambda x: aten.dropout_(x, 0.3, True),
    "F.alpha_dropout": lambda x: F.alpha_dropout(x, 0.3, True),
    "nn.AlphaDropout": nn.AlphaDropout(0.3),
    "torch.alpha_dropout": lambda x: torch.alpha_dropout(x, 0.3, True),
    "torch.alpha_dropout_": lambda x: torch.alpha_dropout_(x, 0.3, True),
    "aten.alpha_dropout": lambda x: aten.alpha_dropout(x, 0.3, True),
    "torch.native_dropout": lambda x: torch.native_dropout(x, 0.3, True)[0],
    "torch.native_dropout, None": lambda x: torch.native_dropout(x, 0.3, None)[0],
    "aten.native_dropout": lambda x: aten.native_dropout(x, 0.3, True)[0],
}
FEATURE_DROPOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "F.dropout1d": lambda x: F.dropout1d(x.flatten(2), 0.3, True),
    "F.dropout2d": lambda x: F.dropout2d(x, 0.3, True),
    "F.dropout2d inplace": lambda x: F.dropout2d(x, 0.3, True, True),
    "F.dropout3d": lambda x: F.dropout3d(x.unsqueeze(-1), 0.3, True),
    "nn.Dropout2d": nn.Dropout2d(0.3),
    "torch.feature_dropout": lambda x: torch.feature_dropout(x, 0.3, True),
    "torch.feature_dropout_": lambda x: torch.feature_dropout_(x, 0.3, True),
    "F.feature_alpha_dropout": lambda x: F.feature_alpha_dropout(x, 0.3, True),
    "torch.feature_alpha_dropout": lambda x: torch.feature_alpha_dropout(x, 0.3, True),
}
# The condition is made for the call, and nobody keeps it.
CONDITIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "Tensor.masked_fill": lambda x: x.masked_fill(x > 0, -1.0),
    "Tensor.masked_fill_": lambda x: x.masked_fill_(x > 0, -1.0),
    "Tensor.masked_fill, by name": lambda x: x.masked_fill(mask=x > 0, value=-1.0),
    "torch.masked_fill": lambda x: torch.masked_fill(x, x > 0, -1.0),
    "masked_fill by a tensor": lambda x: x.masked_fill(x > 0, x.detach().sum()),
    "aten.masked_fill": lambda x: aten.masked_fill(x, x > 0, -1.0),
    "aten.masked_fill.Scalar": lambda x: aten.masked_fill.Scalar(x, x > 0, -1.0),
    "torch.where": lambda x: torch.where(x > 0, x, 2.0),
    "torch.where, both": lambda x: torch.where(x > 0, x, -x),
    "torch.where, by name": lambda x: torch.where(condition=x > 0, input=x, other=x * x),
    "torch.where, other": lambda x: torch.where(x > 0, x.detach(), x),
    "Tensor.where": lambda x: x.where(x > 0, -x),
    "aten.where": lambda x: aten.where(x > 0, x, -x),
    "aten.where.self": lambda x: aten.where.self(x > 0, x, -x),
}
ALL = DROPOUTS | FEATURE_DROPOUTS | CONDITIONS
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(1, 3),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": lambda x: x[:, 1::2, :, ::3],
    "expanded": lambda x: x[:, :1].expand(-1, 6, -1, -1),
    "one element": lambda x: x[:1, :1, :1, :1],
    "empty": lambda x: x[:0],
}


def bits(t: Tensor) -> Tensor:
    """The bits of the elements: what tells -0.0 from 0.0 and lets NaN be equal."""
    return t.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def run(
    function: Callable[[Tensor], Tensor], x: Tensor, scope: Any, grad: Callable[[Tensor], Tensor] = torch.ones_like
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, the gradient, and what the random stream gives next."""
    torch.manual_seed(7)
    leaf = x.detach().requires_grad_()
    with scope:
        y = function(leaf * 1)
    following = torch.rand(4)
    (slope,) = torch.autograd.grad(y, leaf, grad(y.detach()))
    return y.detach(), slope, following


def packed(memory: fewbit.scope, name: str) -> list[tuple[int | None, int]]:
    return [(row.bits, row.stored_bytes) for row in memory.report().rows if row.activation == name]


def reasons(memory: fewbit.scope) -> set[str]:
    return {row.reason for row in memory.report().rows}


@pytest.fixture
def x() -> Tensor:
    return torch.randn(SHAPE)


# Exact


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", ALL)
def test_output_gradient_and_random_stream_are_bit_for_bit_stocks(name: str, dtype: torch.dtype, x: Tensor) -> None:
    ours = run(ALL[name], x.to(dtype), fewbit.scope(min_bytes=0))
    stock = run(ALL[name], x.to(dtype), contextlib.nullcontext())
    for a, b in zip(ours, stock, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(bits(a), bits(b))


@pytest.mark.filterwarnings("ignore:fewbit_hooks.scope compressed nothing")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["F.dropout", "F.alpha_dropout", "torch.native_dropout", "torch.where", "F.dropout2d"])
def test_any_layout_has_stocks_gradient(name: str, layout: str, x: Tensor) -> None:
    def function(t: Tensor) -> Tensor:
        return ALL[name](LAYOUTS[layout](t))

    ours = run(function, x, fewbit.scope(min_bytes=0))
    stock = run(function, x, contextlib.nullcontext())
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(ours, stock, strict=True))
    assert ours[0].stride() == stock[0].stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", ["F.dropout", "F.alpha_dropout", "Tensor.masked_fill", "torch.where, both"])
def test_gradients_of_nan_inf_and_minus_zero_are_stocks(name: str, dtype: torch.dtype, x: Tensor) -> None:
    def grad(y: Tensor) -> Tensor:
        values = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 0.0, 1.0], dtype=y.dtype)
        return values.repeat(-(-y.numel() // 6))[: y.numel()].view_as(y)

    ours = run(ALL[name], x.to(dtype), fewbit.scope(min_bytes=0), grad)
    stock = run(ALL[name], x.to(dtype), contextlib.nullcontext(), grad)
    nan = ours[1].isnan()
    assert torch.equal(nan, stock[1].isnan())
    assert torch.equal(bits(ours[1].masked_fill(nan, 0)), bits(stock[1].masked_fill(nan, 0)))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("kwargs", [{}, {"is_causal": True}, {"attn_mask": True}], ids=str)
def test_attention_with_dropout_has_stocks_output_and_gradients(kwargs: dict[str, Any], dtype: torch.dtype) -> None:
    if kwargs.get("attn_mask"):
        kwargs = {"attn_mask": torch.rand(9, 9) > 0.2}
    q, k, v = (torch.randn(2, 3, 9, 4, dtype=dtype, requires_grad=True) for _ in range(3))

    def attention(scope: Any) -> tuple[Tensor, ...]:
        torch.manual_seed(7)
        with scope:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.2, **kwargs)
        return y, *torch.autograd.grad(y.square().sum(), (q, k, v))

    memory = fewbit.scope(min_bytes=0)
    for ours, stock in zip(attention(memory), attention(contextlib.nullcontext()), strict=True):
        assert torch.equal(bits(ours), bits(stock))
    assert packed(memory, "scaled_dot_product_attention") == [(1, math.ceil(2 * 3 * 9 * 9 / 8))]


@pytest.mark.parametrize("value", [-0.0, math.nan, 2.0], ids=str)
def test_what_has_a_third_value_is_no_mask(value: float) -> None:
    mask = torch.tensor([0.0, 1.25]).repeat(2**20)
    assert ops.second_value(mask) == bits(torch.tensor(1.25)).item()
    mask[-1] = value  # in the last chunk
    assert ops.second_value(mask) is None


def test_zeros_of_both_signs_are_no_mask() -> None:
    assert ops.second_value(torch.tensor([0.0, -0.0]).repeat(64)) is None
    assert ops.second_value(torch.zeros(128)) == 0


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, 1.25], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_a_mask_comes_back_bit_for_bit(dtype: torch.dtype, value: float) -> None:
    mask = torch.where(torch.rand(1023) > 0.3, torch.tensor(value, dtype=dtype), torch.tensor(0.0, dtype=dtype))
    other = ops.second_value(mask)
    assert other is not None
    rows = ops.two_value_rows(other, dtype, mask.device)
    again = ops.decode(ops.encode(mask, 1, ops.not_zero), rows, 1, ops.Layout.of(mask))
    assert torch.equal(bits(again), bits(mask))


# Bytes


@pytest.mark.parametrize("shape", [(8,), (1023,), (16, 33), (3, 5, 7, 11)], ids=str)
@pytest.mark.parametrize("name", DROPOUTS | CONDITIONS)
def test_a_mask_takes_one_bit_an_element_and_its_storage_is_gone(name: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    memory = fewbit.scope(min_bytes=0)
    with memory:
        y = (DROPOUTS | CONDITIONS)[name](x + 1)
    expected = math.ceil(x.numel() / 8)
    assert held_bytes(y) == expected + (x.nbytes if name == "torch.where, by name" else 0)  # x * x keeps x + 1
    (row,) = memory.report().rows
    assert (row.bits, row.stored_bytes, row.freed_bytes) == (1, expected, row.original_bytes)
    assert row.original_bytes == x.numel() * (4 if row.activation == "dropout" and "native" not in name else 1)


def saved(root: Tensor) -> list[Any]:
    """What the pack hooks of a graph's nodes returned."""
    nodes, found = [root.grad_fn], []
    while nodes:
        node = nodes.pop()
        if node is not None:
            found += [getattr(node, name).data for name in dir(node) if name.startswith("_raw_saved_")]
            nodes += [following for following, _ in node.next_functions]
    return [getattr(data, "_content", data) for data in found]


def held_bytes(*roots: Tensor) -> int:
    """The bytes that some graphs hold, without the decoding tables, which all masks share."""
    held: dict[int, int] = {}
    for root in roots:
        held |= held_for_backward(root)
        for data in saved(root):
            if isinstance(data, _masks.PackedMask):
                held[data.rows.untyped_storage()._cdata] = 0
    return sum(held.values())


@pytest.mark.parametrize("shape", [(4, 6, 50), (4, 6, 5, 7)], ids=str)
def test_feature_dropouts_mask_is_one_bit_a_feature(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    with fewbit.scope(min_bytes=0) as memory:
        torch.feature_dropout(x, 0.3, True)
    assert packed(memory, "dropout") == [(1, 3)]


def test_an_input_or_mask_smaller_than_min_bytes_passes(x: Tensor) -> None:
    leaf = x.requires_grad_()
    q = torch.randn(1, 2, 8, 4, requires_grad=True)
    scope = fewbit.scope(min_bytes=x.nbytes)
    with scope as memory:
        F.dropout(x)
        F.dropout(x[1:])
        F.dropout2d(leaf)
        torch.where(x > 0, x, 0.0)
        F.scaled_dot_product_attention(q, q, q, dropout_p=0.1)
    rows = {(row.activation, row.bits, row.reason) for row in memory.report().rows}
    small = "smaller than min_bytes"
    assert rows == {
        ("dropout", 1, ""),
        ("dropout", None, small),
        ("where", None, small),
        ("scaled_dot_product_attention", None, small),
    }


@pytest.mark.parametrize(
    ("query", "key", "kwargs"),
    [
        ((1, 2, 8, 4), (1, 2, 8, 4), {}),
        ((3, 8, 4), (3, 5, 4), {}),
        ((2, 6, 8, 4), (2, 2, 7, 4), {"enable_gqa": True}),
        ((8, 4), (7, 4), {"is_causal": True}),
    ],
)
def test_the_mask_of_attention_is_counted_before_it_is_made(
    query: tuple[int, ...], key: tuple[int, ...], kwargs: dict[str, Any]
) -> None:
    q, k = torch.randn(query, requires_grad=True), torch.randn(key, requires_grad=True)
    masks: list[int] = []

    def see(t: Tensor) -> Tensor:
        masks.extend([t.nbytes] if t.grad_fn is None and not t.requires_grad and ops.second_value(t) else [])
        return t.detach()

    with torch.autograd.graph.saved_tensors_hooks(see, lambda t: t):
        F.scaled_dot_product_attention(q, k, k, dropout_p=0.4, **kwargs)
    memory = fewbit.scope(min_bytes=1 << 20)
    with pytest.warns(fewbit.FewbitWarning, match="smaller than min_bytes"), memory:
        y = F.scaled_dot_product_attention(q, k, k, dropout_p=0.4, **kwargs)
    assert y.requires_grad
    assert [(row.reason, row.original_bytes) for row in memory.report().rows] == [
        ("smaller than min_bytes", sum(masks))
    ]


# Masks that somebody may hold


def test_one_mask_that_all_layers_share_stays_as_it_is(x: Tensor) -> None:
    leaf, mask = x.requires_grad_(), x.detach() > 0
    with fewbit.scope(min_bytes=0) as memory:
        outputs = [leaf.masked_fill(mask, 0.0) for _ in range(20)]
    assert held_bytes(*outputs) == mask.nbytes
    report = memory.report()
    assert (report.original_bytes, report.stored_bytes, report.freed_bytes) == (mask.nbytes, 0, 0)
    assert "its storage is still held" in report.rows[0].reason


@pytest.mark.parametrize("view", [lambda m: m[:], lambda m: m.unsqueeze(0), lambda m: m.transpose(0, 1)])
def test_a_view_of_a_mask_that_is_held_stays_as_it_is(view: Callable[[Tensor], Tensor], x: Tensor) -> None:
    leaf, mask = x.transpose(0, 1).contiguous().unsqueeze(0).requires_grad_(), torch.ones(6, 6, 5, 7) > 0
    leaf = torch.randn(1, 6, 6, 5, 7, requires_grad=True)
    with fewbit.scope(min_bytes=0) as memory:
        y = torch.where(view(mask), leaf, 0.0)
    assert memory.report().stored_bytes == 0
    assert held_bytes(y) == mask.nbytes


def test_a_view_of_a_temporary_mask_is_packed(x: Tensor) -> None:
    leaf = x.requires_grad_()
    with fewbit.scope(min_bytes=0) as memory:
        torch.where((leaf > 0).transpose(0, 1).contiguous().transpose(0, 1), leaf, 0.0).sum().backward()
    assert torch.equal(leaf.grad, (leaf > 0).float())
    with fewbit.scope(min_bytes=0) as memory:
        y = torch.where((leaf > 0).flatten().view(SHAPE), leaf, 0.0)
    assert y.requires_grad
    assert memory.report().stored_bytes == math.ceil(x.numel() / 8)


def test_a_mask_is_packed_when_its_last_holder_lets_go_of_it(x: Tensor) -> None:
    leaf, mask = x.requires_grad_(), x.detach() > 0
    with fewbit.scope(min_bytes=0) as memory:
        y = leaf.masked_fill(mask, 0.0)
        leaf.masked_fill(leaf < 0, 0.0)
        assert held_bytes(y) == mask.nbytes
        expected = (~mask).float()
        del mask
        leaf.masked_fill(leaf < 0, 0.0)
        assert held_bytes(y) < leaf.numel() / 2
    assert memory.report().freed_bytes == memory.report().original_bytes
    y.sum().backward()
    assert torch.equal(leaf.grad, expected)


@pytest.mark.filterwarnings("ignore:fewbit_hooks.scope compressed nothing")
def test_an_expanded_mask_whose_storage_is_small_stays_as_it_is(x: Tensor) -> None:
    leaf = x.requires_grad_()
    with fewbit.scope(min_bytes=0) as memory:
        y = torch.where((leaf[:1, :1, :1] > 0).expand(SHAPE), leaf, 0.0)
    assert reasons(memory) == {"codes would be no smaller than its storage"}
    assert held_bytes(y) == 7


def test_a_held_mask_modified_before_the_backward_is_stocks_error(x: Tensor) -> None:
    leaf, mask = x.requires_grad_(), x.detach() > 0
    with fewbit.scope(min_bytes=0):
        y = leaf.masked_fill(mask, 0.0)
        mask.logical_not_()
        del mask
    with pytest.raises(fewbit.FewbitRuntimeError, match=r"masked_fill .* modified by an inplace operation"):
        y.sum().backward()


def test_the_mask_that_native_dropout_returns_stays_while_it_is_held(x: Tensor) -> None:
    leaf = x.requires_grad_()
    with fewbit.scope(min_bytes=0) as memory:
        y, mask = torch.native_dropout(leaf, 0.3, True)
    assert memory.report().stored_bytes == 0
    y.sum().backward()
    assert torch.equal(leaf.grad != 0, mask)


def test_a_waiting_mask_does_not_outlive_its_graph(x: Tensor) -> None:
    leaf, mask = x.requires_grad_(), x.detach() > 0
    with fewbit.scope(min_bytes=0):
        leaf.masked_fill(mask, 0.0)
    gc.collect()
    _masks.look_again()
    assert not _masks._waiting.masks


def test_a_waiting_mask_that_there_is_no_memory_to_pack_serves_as_it_is(
    x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, calls = ops.encode, []

    def short_of_memory(*args: Any) -> Tensor:
        calls.append(args)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(*args)

    monkeypatch.setattr(ops, "encode", short_of_memory)
    leaf, masks = x.requires_grad_(), [x.detach() > limit for limit in (-1, 0, 1)]
    expected = torch.stack([~mask for mask in masks]).float().sum(0)
    with fewbit.scope(min_bytes=0) as memory:
        outputs = [leaf.masked_fill(mask, 0.0) for mask in masks]
        masks.clear()
    assert len(calls) == 3  # all three were tried
    _masks.look_again()
    assert len(calls) == 4  # the second again
    assert memory.report().stored_bytes == 3 * math.ceil(x.numel() / 8)
    torch.autograd.backward(outputs, [torch.ones_like(x)] * 3)
    assert torch.equal(leaf.grad, expected)


@pytest.mark.parametrize("error", [None, ValueError], ids=str)
def test_a_look_at_waiting_masks_inside_of_another_or_that_fails_forgets_none(
    error: type[Exception] | None, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, calls = ops.encode, []

    def interrupted(*args: Any) -> Tensor:
        calls.append(args)
        if len(calls) == 2:
            _masks.look_again()  # as when the garbage collector leaves a scope
            if error is not None:
                raise error
        return encode(*args)

    leaf, masks = x.requires_grad_(), [x.detach() > limit for limit in (-1, 0, 1)]
    expected = torch.stack([~mask for mask in masks]).float().sum(0)
    monkeypatch.setattr(ops, "encode", interrupted)
    with pytest.raises(error) if error is not None else contextlib.nullcontext(), fewbit.scope(min_bytes=0):
        outputs = [leaf.masked_fill(mask, 0.0) for mask in masks]
        masks.clear()
    _masks.look_again()
    assert not _masks._waiting.masks
    torch.autograd.backward(outputs, [torch.ones_like(x)] * 3)
    assert torch.equal(leaf.grad, expected)


# Nothing to do


@pytest.mark.parametrize("p", [0.0, 1.0, 0, 1])
@pytest.mark.parametrize("name", ["F.dropout", "F.alpha_dropout", "F.dropout2d", "torch.dropout", "attention"])
def test_a_dropout_of_nothing_or_all_is_stocks_and_leaves_no_trace(name: str, p: float) -> None:
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "F.dropout": lambda t: F.dropout(t, p),
        "F.alpha_dropout": lambda t: F.alpha_dropout(t, p, True),
        "F.dropout2d": lambda t: F.dropout2d(t, p),
        "torch.dropout": lambda t: torch.dropout(t, p, True),
        "attention": lambda t: F.scaled_dot_product_attention(t, t, t, dropout_p=p),
    }
    x = torch.randn(SHAPE)
    memory = fewbit.scope(bits={"gelu": 3}, min_bytes=0)
    with pytest.warns(fewbit.FewbitWarning, match="compressed nothing"):
        ours = run(functions[name], x, memory)
    stock = run(functions[name], x, contextlib.nullcontext())
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(ours, stock, strict=True))
    assert not memory.report().rows


@pytest.mark.filterwarnings("ignore:fewbit_hooks.scope compressed nothing")
def test_evaluation_no_grad_and_inputs_without_gradient_leave_no_trace(x: Tensor) -> None:
    leaf = x.clone().requires_grad_()
    with fewbit.scope(min_bytes=0) as memory:
        nn.Dropout(0.3).eval()(leaf)
        F.dropout(leaf, 0.3, False)
        torch.native_dropout(leaf, 0.3, False)
        F.dropout(x, 0.3)
        torch.where(x > 0, x, 0.0)
        torch.where(leaf > 0)
        x.masked_fill(x > 0, 0.0)
        with torch.no_grad():
            F.dropout(leaf, 0.3)
    assert not memory.report().rows


def test_wrong_arguments_raise_what_stock_raises(x: Tensor) -> None:
    leaf = x.requires_grad_()
    calls: list[Callable[[], Any]] = [
        lambda: F.dropout(leaf, 1.5),
        lambda: F.dropout(leaf, p=-1),
        lambda: F.dropout(),
        lambda: F.dropout(leaf, q=0.1),
        lambda: torch.dropout(leaf, 0.1),
        lambda: F.dropout(leaf, 0.5, inplace=True),
        lambda: torch.where(leaf, leaf, leaf),
        lambda: leaf.masked_fill(leaf, 0.0),
        lambda: F.scaled_dot_product_attention(leaf, leaf[:, :1, :, :2], leaf, dropout_p=0.1),
    ]
    for call in calls:
        with pytest.raises(Exception) as stock:  # noqa: PT011 - whatever it is
            call()
        with pytest.raises(stock.type) as ours, fewbit.scope(min_bytes=0):
            call()
        assert str(ours.value) == str(stock.value)


# Settings


@pytest.mark.parametrize(
    "settings",
    [{"exact": True}, {"bits": {}}, {"bits": {"dropout": 1}}, {"bits": {"default": 4}}, {"bits": 8}],
    ids=str,
)
def test_masks_are_packed_at_one_bit(settings: dict[str, Any], x: Tensor) -> None:
    with fewbit.scope(min_bytes=0, **settings) as memory:
        F.dropout(x.requires_grad_(), 0.3)
    assert packed(memory, "dropout") == [(1, x.numel() // 8)]


@pytest.mark.filterwarnings("ignore:fewbit_hooks.scope compressed nothing")
@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"bits": {"dropout": None, "where": None, "default": 3}}, "no bits are given for"),
        pytest.param({"bits": lambda name, tensor: None}, "no bits are given for", id="a callable for bits"),
        ({"bits": None}, "measured only: bits=None"),
        ({"exclude": nn.Module}, "excluded"),
    ],
    ids=str,
)
def test_masks_kept_by_the_settings_have_no_hooks_and_are_counted(
    settings: dict[str, Any], reason: str, x: Tensor
) -> None:
    class Both(nn.Module):
        def forward(self, t: Tensor) -> tuple[Tensor, ...]:
            return F.dropout(t, 0.3), torch.where(t > 0, t, 0.0), F.dropout(t * 1, 0.3, inplace=True)

    with fewbit.scope(min_bytes=0, **settings) as memory:
        outputs = Both()((x.requires_grad_() * 1).sin())
    assert all(row.reason.startswith(reason) for row in memory.report().rows)
    assert {(row.activation, row.original_bytes) for row in memory.report().rows} == {
        ("dropout", 2 * x.nbytes),
        ("where", x.numel()),
    }
    assert isinstance(outputs[0].grad_fn._raw_saved_other.data, Tensor)


def test_bits_names_must_be_known() -> None:
    fewbit.scope(bits={"dropout": 1, "where": None, "masked_fill": 1, "scaled_dot_product_attention": None})
    with pytest.raises(fewbit.FewbitValueError, match=r"no activation 'dropuot'.* dropout, .* masked_fill, "):
        fewbit.scope(bits={"dropuot": 1})


def test_a_callable_is_asked_with_name_and_tensor(x: Tensor) -> None:
    asked = []

    def bits(name: str, tensor: Tensor) -> int:
        asked.append((name, tensor.shape))
        return 5

    with fewbit.scope(bits=bits, min_bytes=0) as memory:
        F.dropout(x.requires_grad_(), 0.3)
    assert asked == [("dropout", x.shape)]
    assert packed(memory, "dropout") == [(1, x.numel() // 8)]


# Other machinery


def penalty(function: Callable[[Tensor], Tensor], x: Tensor, scope: Any) -> tuple[Tensor, Tensor]:
    torch.manual_seed(7)
    leaf = x.detach().requires_grad_()
    with scope:
        y = function(leaf * 1).square().sum()
    (slope,) = torch.autograd.grad(y, leaf, create_graph=True)
    (second,) = torch.autograd.grad(slope.square().sum(), leaf)
    return slope.detach(), second


@pytest.mark.parametrize("name", [name for name in ALL if "where, by name" not in name])
def test_double_backward_is_stocks(name: str, x: Tensor) -> None:
    ours = penalty(ALL[name], x, fewbit.scope(min_bytes=0))
    stock = penalty(ALL[name], x, contextlib.nullcontext())
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(ours, stock, strict=True))


def test_double_backward_through_attention_is_stocks(x: Tensor) -> None:
    def attention(t: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(t, t.sin(), t.cos(), dropout_p=0.2)

    ours = penalty(attention, x, fewbit.scope(min_bytes=0))
    stock = penalty(attention, x, contextlib.nullcontext())
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(ours, stock, strict=True))


@pytest.mark.parametrize("name", ["F.dropout", "torch.native_dropout", "torch.where"])
def test_two_backwards_through_a_retained_graph_are_equal(name: str, x: Tensor) -> None:
    leaf = x.requires_grad_()
    with fewbit.scope(min_bytes=0):
        y = ALL[name](leaf * 1)
    (first,) = torch.autograd.grad(y.sum(), leaf, retain_graph=True)
    (second,) = torch.autograd.grad(y.sum(), leaf)
    assert torch.equal(first, second)


@pytest.mark.filterwarnings("ignore:fewbit_hooks.scope compressed nothing")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_checkpointed_regions_have_stocks_gradient(inside: bool, reentrant: bool, x: Tensor) -> None:
    lin = nn.Linear(7, 7)

    def region(t: Tensor) -> Tensor:
        return F.dropout(lin(F.dropout(t, 0.3).masked_fill(t > 1, 0.0)), 0.2)

    def scoped(t: Tensor) -> Tensor:
        with fewbit.scope(min_bytes=0):
            return region(t)

    def gradient(function: Callable[[Tensor], Tensor], scope: Any) -> Tensor:
        torch.manual_seed(7)
        leaf = x.detach().requires_grad_()
        with scope:
            y = checkpoint(function, leaf, use_reentrant=reentrant, preserve_rng_state=True)
            y.square().sum().backward()
        return leaf.grad

    stock = gradient(region, contextlib.nullcontext())
    ours = gradient(scoped, contextlib.nullcontext()) if inside else gradient(region, fewbit.scope(min_bytes=0))
    assert torch.equal(bits(ours), bits(stock))


@pytest.mark.filterwarnings("ignore:fewbit_hooks.scope compressed nothing")
def test_inside_other_hooks_and_transforms_masks_are_left_alone(x: Tensor) -> None:
    memory = fewbit.scope(min_bytes=0)
    leaf = x.requires_grad_()
    with memory, torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        F.dropout(leaf, 0.3)
    assert reasons(memory) == {"inside other saved-tensor hooks"}
    with memory:
        slope = torch.func.grad(lambda t: torch.where(t > 0, t, 0.0).sum())(x.detach())
    assert torch.equal(slope, (x > 0).float())
    assert "inside a torch.func transform" in reasons(memory)
    with memory, torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        F.dropout(leaf, 0.3).sum().backward()
    assert "saved-tensor hooks are disabled" in reasons(memory)


@pytest.mark.filterwarnings("ignore:fewbit_hooks.scope compressed nothing")
def test_tensor_subclasses_are_left_alone(x: Tensor) -> None:
    class Subclass(Tensor):
        pass

    leaf = x.as_subclass(Subclass).requires_grad_()
    with fewbit.scope(min_bytes=0) as memory:
        F.dropout(leaf, 0.3).sum().backward()
        torch.where(leaf > 0, x.clone().requires_grad_(), 0.0)
    assert reasons(memory) == {"a Subclass: wrapper subclasses are kept"}


def test_the_mask_of_a_parameter_is_packed() -> None:
    weight = nn.Parameter(torch.randn(16, 16))
    with fewbit.scope(min_bytes=0) as memory:
        F.dropout(weight, 0.3).sum().backward()
    assert packed(memory, "dropout") == [(1, 32)]


@pytest.mark.filterwarnings("ignore:fewbit_hooks.scope compressed nothing")
def test_tracing_and_fake_tensors_record_what_they_did(x: Tensor) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    def function(t: Tensor) -> Tensor:
        return torch.where(t > 0, F.dropout(t, 0.3), 0.0)

    def step(t: Tensor) -> Tensor:
        with fewbit.scope(min_bytes=0):
            (slope,) = torch.autograd.grad(function(t).sum(), t)
        return slope

    make_fx(step)(x.requires_grad_())
    with fewbit.scope(min_bytes=0), FakeTensorMode(allow_non_fake_inputs=True):
        function(x)
        function(torch.randn(4, 4, requires_grad=True))


def test_the_backward_runs_on_another_thread_after_the_scope_is_gone(x: Tensor) -> None:
    stock = run(DROPOUTS["F.dropout"], x, contextlib.nullcontext())[1]
    torch.manual_seed(7)
    leaf = x.requires_grad_()
    with fewbit.scope(min_bytes=0):
        y = F.dropout(leaf, 0.3)
    thread = threading.Thread(target=lambda: y.sum().backward())
    thread.start()
    thread.join()
    assert torch.equal(leaf.grad, stock)


@pytest.mark.parametrize("name", ["F.dropout", "torch.where", "torch.native_dropout"])
def test_a_forward_without_backward_leaves_nothing_alive(name: str, x: Tensor) -> None:
    leaf = x.requires_grad_()
    gc.collect()
    gc.disable()
    try:
        with fewbit.scope(min_bytes=0):
            y = ALL[name](leaf * 1)
        (data,) = (d for d in saved(y) if isinstance(d, _masks.PackedMask))
        codes, output = (weakref.ref(t) for t in (data.codes, y))
        del y, data
        assert output() is None
        assert codes() is None
    finally:
        gc.enable()


def test_an_input_overwritten_later_is_stocks_error() -> None:
    q, k, v = (torch.randn(2, 3, 9, 4, requires_grad=True).sin() for _ in range(3))
    with fewbit.scope(min_bytes=0):
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.2)
    v.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# Models


def step(model: nn.Module, forward: Callable[[], Tensor], scope: Any) -> list[Tensor]:
    torch.manual_seed(7)
    model.zero_grad()
    with scope:
        loss = forward()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("need_weights", [True, False])
def test_a_step_of_multi_head_attention_is_stocks(need_weights: bool) -> None:
    model = nn.MultiheadAttention(16, 4, dropout=0.2, batch_first=True)
    x = torch.randn(2, 9, 16)

    def forward() -> Tensor:
        return model(x, x, x, need_weights=need_weights)[0].square().sum()

    memory = fewbit.scope(min_bytes=0)
    ours, stock = step(model, forward, memory), step(model, forward, contextlib.nullcontext())
    assert all(torch.equal(a, b) for a, b in zip(ours, stock, strict=True))
    assert packed(memory, "scaled_dot_product_attention") == [(1, math.ceil(2 * 4 * 9 * 9 / 8))]


def test_a_step_of_a_transformer_layer_is_stocks() -> None:
    model = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.2, activation="relu", batch_first=True)
    x = torch.randn(2, 9, 16)

    def forward() -> Tensor:
        return model(x, src_mask=nn.Transformer.generate_square_subsequent_mask(9), is_causal=True).square().sum()

    memory = fewbit.scope(min_bytes=0, exact=True)
    ours, stock = step(model, forward, memory), step(model, forward, contextlib.nullcontext())
    assert all(torch.equal(a, b) for a, b in zip(ours, stock, strict=True))
    masks = [r for r in memory.report().rows if r.activation != "relu"]
    assert sum(r.stored_bytes for r in masks) == (2 * 4 * 9 * 9 + 2 * 9 * 32 + 2 * (2 * 9 * 16)) // 8
    assert all(r.freed_bytes == r.original_bytes for r in masks)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_step_of_bert_with_dropout_is_stocks(attention: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        attn_implementation=attention,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).train()
    ids = torch.randint(0, 50, (2, 12))
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 8:] = 0

    def forward() -> Tensor:
        return model(input_ids=ids, attention_mask=mask, labels=torch.tensor([0, 1])).loss

    memory = fewbit.scope(min_bytes=0, exact=True)
    ours, stock = step(model, forward, memory), step(model, forward, contextlib.nullcontext())
    assert all(torch.equal(a, b) for a, b in zip(ours, stock, strict=True))
    masks = [r for r in memory.report().rows if r.bits == 1]
    assert sum(r.original_bytes for r in masks) == 4 * (2 * 12 * 32 * 5 + 2 * (2 * 2 * 12 * 12) + 2 * 32)
    assert all(r.freed_bytes == r.original_bytes for r in masks)
