"""Saved-tensor hooks of others around a scope: an offloader, a checkpoint. They are handed the codes."""

from __future__ import annotations

import contextlib
import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint
from transformers.activations import NewGELUActivation

import fewbit_hooks as fewbit
from fewbit_hooks import _around

from .conftest import quiet

N = 128 * 256
"""Elements of the activation."""


class Offloader(saved_tensors_hooks):
    """In the style of torchtune's: tensors by number, each given back once; small ones and parameters stay.

    Attributes:
        moved: the bytes moved, by shape and dtype.
    """

    def __init__(self, min_bytes: int = 1024) -> None:
        self.moved: list[tuple[torch.Size, torch.dtype, int]] = []
        self._there: dict[int, Tensor] = {}
        self._number = 0
        self._min_bytes = min_bytes
        super().__init__(self._pack, self._unpack)

    def _pack(self, t: Tensor) -> int:
        self._number += 1
        stays = t.nbytes < self._min_bytes or isinstance(t, nn.Parameter) or isinstance(t._base, nn.Parameter)
        if not stays:
            self.moved.append((t.shape, t.dtype, t.nbytes))
        self._there[self._number] = t.detach() if stays else t.detach().clone()
        return self._number

    def _unpack(self, number: int) -> Tensor:
        assert number in self._there, "given back before"
        return self._there.pop(number)

    @property
    def nbytes(self) -> int:
        """What went over the bus."""
        return sum(nbytes for *_, nbytes in self.moved)


def mlp(*activations: nn.Module, frozen: bool = True) -> nn.Sequential:
    layers = [nn.Linear(64, 256), *activations, nn.Linear(256, 8)]
    layers[-1].requires_grad_(not frozen)
    return nn.Sequential(*layers)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(128, 64)


def gradients(model: nn.Module, x: Tensor, *around: Any) -> list[Tensor]:
    model.zero_grad()
    torch.manual_seed(1)
    with contextlib.ExitStack() as stack:
        for context in around:
            stack.enter_context(context)
        loss = model(x).square().sum()
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_an_offloader_moves_the_codes_and_not_the_activation(bits: int, x: Tensor) -> None:
    model = mlp(nn.GELU())
    stock, coded = Offloader(), Offloader()
    gradients(model, x, stock)
    result = gradients(model, x, coded, fewbit.scope(bits=bits, min_bytes=0))
    assert stock.nbytes - coded.nbytes == N * 4 - N * bits // 8
    assert (torch.Size([N * bits // 8]), torch.uint8, N * bits // 8) in coded.moved
    assert same(result, gradients(model, x, fewbit.scope(bits=bits, min_bytes=0)))


def test_two_bits_of_float32_are_sixteen_times_fewer_bytes_over_the_bus(x: Tensor) -> None:
    def moved(*around: Any) -> int:
        offloader, h = Offloader(), torch.randn(128, 256, requires_grad=True)
        with offloader, contextlib.ExitStack() as stack:
            for context in around:
                stack.enter_context(context)
            y = F.silu(h)
        y.sum().backward()
        return offloader.nbytes

    assert moved() == 16 * moved(fewbit.scope(bits=2, min_bytes=0))


@pytest.mark.parametrize(
    ("activation", "stored"),
    [
        (nn.ReLU6(), N // 8),
        (nn.Dropout(0.3), N // 8),
        (nn.Tanh(), N * 3 // 8),
        (nn.LogSigmoid(), 2 * N * 3 // 8),  # its node saves two tensors
    ],
    ids=str,
)
def test_bits_and_masks_are_handed_on_as_well(activation: nn.Module, stored: int, x: Tensor) -> None:
    model, offloader = mlp(activation), Offloader()
    result = gradients(model, x, offloader, fewbit.scope(bits=3, min_bytes=0))
    assert sum(nbytes for _, dtype, nbytes in offloader.moved if dtype == torch.uint8) == stored
    assert same(result, gradients(model, x, fewbit.scope(bits=3, min_bytes=0)))


def test_a_mask_of_the_callers_is_handed_on_at_once(x: Tensor) -> None:
    mask, offloader = torch.rand(128, 64) < 0.5, Offloader()
    h = (x.requires_grad_() * 1).detach().requires_grad_()
    with offloader, fewbit.scope(min_bytes=0):
        y = (h * 1).masked_fill(mask, 0.0)
    assert offloader.moved == [(torch.Size([128 * 64 // 8]), torch.uint8, 128 * 64 // 8)]
    y.sum().backward()
    assert torch.equal(h.grad, (~mask).float())


def test_what_a_recognised_call_keeps_is_theirs_too() -> None:
    q, k, v = (torch.randn(2, 4, 32, 16, requires_grad=True) for _ in range(3))

    def run(*around: Any) -> tuple[list[tuple[torch.Size, torch.dtype, int]], tuple[Tensor, ...]]:
        torch.manual_seed(0)
        offloader = Offloader()
        with offloader, contextlib.ExitStack() as stack:
            for context in around:
                stack.enter_context(context)
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.2)
        return offloader.moved, torch.autograd.grad(y.square().sum(), (q, k, v))

    stock, exact = run()
    coded, result = run(fewbit.scope(min_bytes=0))
    noise = 2 * 4 * 32 * 32
    assert sum(n for *_, n in stock) - sum(n for *_, n in coded) == noise * 4 - noise // 8
    assert len(stock) == len(coded)  # nothing passes them by
    assert all(map(torch.equal, result, exact))


def test_a_composite_hands_on_its_codes(x: Tensor) -> None:
    model = mlp(NewGELUActivation())
    stock, coded = Offloader(), Offloader()
    gradients(model, x, stock)
    result = gradients(model, x, coded, fewbit.scope(bits=3, min_bytes=0))
    assert (torch.Size([N * 3 // 8]), torch.uint8, N * 3 // 8) in coded.moved
    assert coded.nbytes < stock.nbytes - 3 * N * 4
    assert same(result, gradients(model, x, fewbit.scope(bits=3, min_bytes=0)))


def test_for_many_steps_nothing_is_learned_and_nothing_left_with_the_offloader(x: Tensor) -> None:
    model, opened = mlp(nn.GELU(), frozen=False), fewbit.scope(bits=3, min_bytes=0)
    for _ in range(5):
        offloader = Offloader()
        gradients(model, x, offloader, opened)
        assert opened.report().rows[0].bits == 3
        assert not offloader._there


@pytest.mark.parametrize("settings", [{"bits": 3}, {"exact": True}, {"exact": True, "recompute": True}], ids=str)
def test_save_on_cpu_around_a_scope_gives_the_scopes_gradients(settings: dict[str, Any], x: Tensor) -> None:
    model = mlp(nn.LayerNorm(256), nn.GELU(), nn.Dropout(0.1), nn.ReLU6())
    alone = gradients(model, x, fewbit.scope(min_bytes=0, **settings))
    for _ in range(3):
        assert same(gradients(model, x, save_on_cpu(), fewbit.scope(min_bytes=0, **settings)), alone)


def test_backward_twice_asks_the_hooks_around_twice(x: Tensor) -> None:
    unpacked: list[Tensor] = []
    h = torch.randn(128, 256, requires_grad=True)
    with saved_tensors_hooks(lambda t: t.detach(), lambda t: unpacked.append(t) or t), fewbit.scope(min_bytes=0):
        y = F.gelu(h)
    first, second = (torch.autograd.grad(y.sum(), h, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert len(unpacked) == 2


# Hooks that compress what they are handed: codes do not survive that

Compress = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]


def to_int8(t: Tensor) -> tuple[Tensor, Tensor]:
    scale = t.abs().max() / 127
    return (t / scale).round().to(torch.int8), scale


def to_float8(t: Tensor) -> tuple[Tensor, torch.dtype]:
    return t.to(torch.float8_e4m3fn), t.dtype


COMPRESS: dict[str, Compress] = {
    "int8": (to_int8, lambda packed: packed[0].float() * packed[1]),
    "float8": (to_float8, lambda packed: packed[0].to(packed[1])),
}


def but_integers(hooks: Compress) -> Compress:
    """The same, but that they leave alone what is none of theirs."""
    pack, unpack = hooks
    return (
        lambda t: pack(t) if t.is_floating_point() else t,
        lambda packed: packed if isinstance(packed, Tensor) else unpack(packed),
    )


@pytest.fixture
def nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of hooks that were there before."""
    monkeypatch.setattr(_around, "_pairs", weakref.WeakKeyDictionary())


@pytest.mark.usefixtures("nothing_is_known")
@pytest.mark.parametrize("kind", COMPRESS)
@pytest.mark.parametrize(
    ("activation", "settings"),
    [
        (nn.GELU, {"bits": 3}),
        (nn.GELU, {"bits": 3, "engine": "fused"}),
        (nn.LogSigmoid, {"bits": 8}),
        (nn.ReLU6, {"exact": True}),
        (functools.partial(nn.Dropout, 0.3), {"exact": True}),
        (NewGELUActivation, {"bits": 3}),
    ],
    ids=str,
)
def test_codes_do_not_suffer_from_hooks_around_that_compress(
    activation: Callable[[], nn.Module], settings: dict[str, Any], kind: str, x: Tensor
) -> None:
    model, hooks = mlp(activation()), COMPRESS[kind]
    coded = gradients(model, x, saved_tensors_hooks(*but_integers(hooks)), fewbit.scope(min_bytes=0, **settings))
    stock = gradients(model, x, saved_tensors_hooks(*hooks))
    memory = quiet(**settings)
    assert same(gradients(model, x, saved_tensors_hooks(*hooks), memory), coded)
    for _ in range(2):  # it was seen: what is under such hooks is left to them
        assert same(gradients(model, x, saved_tensors_hooks(*hooks), memory), stock)
        assert {row.reason for row in memory.report().rows} == {"the saved-tensor hooks around the scope change codes"}


@pytest.mark.usefixtures("nothing_is_known")
def test_codes_are_compared_until_it_is_known_and_not_where_nothing_can_be_remembered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.randn(128, 256, requires_grad=True)
    compared: list[bool] = []
    equal = torch.equal
    monkeypatch.setattr(torch, "equal", lambda a, b: compared.append(True) or equal(a, b))
    hooks = lambda t: t.clone(), lambda t: t
    for pack, looks in ((hooks[0], 1), (functools.partial(hooks[0]), 0)):
        compared.clear()
        for _ in range(3):
            with saved_tensors_hooks(pack, hooks[1]), fewbit.scope(min_bytes=0):
                y = F.gelu(x * 1)
            y.sum().backward()
        assert len(compared) == looks


@pytest.mark.usefixtures("nothing_is_known")
@pytest.mark.parametrize("engine", ["hooks", "fused"])
def test_codes_are_kept_beside_until_they_have_come_back_once(engine: str, x: Tensor) -> None:
    h = torch.randn(128, 256, requires_grad=True)
    for step in range(3):
        coded: list[StorageWeakRef] = []

        def pack(t: Tensor, coded: list[StorageWeakRef] = coded) -> Tensor:
            coded.append(StorageWeakRef(t.untyped_storage()))
            return t.detach().clone()

        with saved_tensors_hooks(pack, lambda t: t), fewbit.scope(min_bytes=0, engine=engine):
            y = F.gelu(h)
        assert len(coded) == 1
        assert coded[0].expired() == (step > 0)
        y.sum().backward()


@pytest.mark.usefixtures("nothing_is_known")
def test_hooks_that_come_to_change_codes_are_named() -> None:
    h, of = torch.randn(128, 256, requires_grad=True), torch.uint8
    for step in range(2):
        with saved_tensors_hooks(lambda t: t.detach(), lambda t: t.to(of)), fewbit.scope(min_bytes=0):
            y = F.gelu(h)
        if step == 0:
            y.sum().backward()
    of = torch.float32
    with pytest.raises(fewbit.FewbitError, match=r"gave back torch\.float32 of shape"):
        y.sum().backward()


@pytest.mark.usefixtures("nothing_is_known")
@pytest.mark.filterwarnings("ignore")
def test_a_graph_that_is_compiled_under_hooks_that_nobody_knows_is_exact(x: Tensor) -> None:
    torch._dynamo.reset()
    model = mlp(nn.GELU())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

    def run(*around: Any) -> list[Tensor]:
        model.zero_grad()
        with contextlib.ExitStack() as stack:
            for context in around:
                stack.enter_context(context)
            loss = compiled(x).square().sum()
        loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    hooks = COMPRESS["float8"]
    expected = run(saved_tensors_hooks(*hooks))
    assert same(run(saved_tensors_hooks(*hooks), quiet(bits=3)), expected)
    assert not same(run(save_on_cpu(), quiet(bits=3)), run())  # of PyTorch's own it is known
    torch._dynamo.reset()


# A checkpoint is hooks around the scope in its function: what it keeps it drops, the codes too


@pytest.mark.parametrize("make", [nn.GELU, nn.Tanh, nn.ReLU6, functools.partial(nn.Dropout, 0.3)], ids=str)
def test_inside_a_checkpoint_the_codes_are_dropped_with_all_else(
    make: Callable[[], nn.Module], x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fewbit_hooks import ops

    coded: list[StorageWeakRef] = []

    def encode(*args: Any) -> Tensor:
        codes = encode_(*args)
        coded.append(StorageWeakRef(codes.untyped_storage()))
        return codes

    def encode_mask(x: Tensor) -> tuple[Tensor, int] | None:
        found = encode_mask_(x)
        coded.append(StorageWeakRef(found[0].untyped_storage()))
        return found

    encode_, encode_mask_ = ops.encode, ops.encode_two_values
    model = mlp(make())
    alone = gradients(model, x, fewbit.scope(bits=3, min_bytes=0))
    monkeypatch.setattr(ops, "encode", encode)
    monkeypatch.setattr(ops, "encode_two_values", encode_mask)

    @fewbit.scope(bits=3, min_bytes=0)
    def forward(x: Tensor) -> Tensor:
        return model(x)

    model.zero_grad()
    torch.manual_seed(1)
    loss = checkpoint(forward, x, use_reentrant=False).square().sum()
    gc.collect()
    assert len(coded) == 1
    assert coded[0].expired()
    loss.backward()
    assert len(coded) == 2
    assert same([p.grad for p in model.parameters() if p.grad is not None], alone)
