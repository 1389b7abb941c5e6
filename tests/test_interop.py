"""Beside others who have a hand in the same things: checkpointing, offloading, compilation, autocast, threads, other
modes, Hugging Face models, DistributedDataParallel. Nothing wrong, nothing left behind, and coded where it can be."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import inspect
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

import fewbit_hooks as fewbit
from fewbit_hooks import _policy, _stack
from fewbit_hooks._hooks import Packed
from fewbit_hooks.ops import _dispatch

from .conftest import forget_what_was_learned, torch_threads


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny operations on a busy machine: a second thread would only be waited for."""
    with torch_threads(1):
        yield


def model(depth: int = 3) -> nn.Sequential:
    torch.manual_seed(1)
    layers = [nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16), nn.Tanh()) for _ in range(depth)]
    return nn.Sequential(*layers)


def gradients(of: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in of.parameters() if p.grad is not None]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) > 0 and all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


def few(bits: Any = 2) -> fewbit.scope:
    return fewbit.scope(bits=bits, min_bytes=0)


def quiet(bits: Any = 2) -> fewbit.scope:
    """A scope that may turn out to have compressed nothing; the tests below say what it did in other ways."""
    opened = few(bits)
    opened._warned = True
    return opened


def is_coded(x: Tensor) -> bool:
    """Whether a gelu that is called now is coded."""
    y = F.gelu(x * 1)  # it must live while its node's saved tensor is looked at: torch crashes otherwise
    return isinstance(y.grad_fn._raw_saved_self.data, Packed)


def torch_state() -> tuple[int, Any]:
    return torch._C._len_torch_function_stack(), torch._C._autograd._top_saved_tensors_default_hooks(False)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(32, 16, requires_grad=True)


# Checkpointing (H6, H15)


def run_checkpointed(
    x: Tensor,
    *,
    reentrant: bool,
    around: int | None = None,
    inside: int | None = None,
    backward_inside: bool = False,
    backward: Callable[[Tensor], None] = Tensor.backward,
    **options: Any,
) -> tuple[list[Tensor], fewbit.scope]:
    """Gradients of a checkpointed model, with scopes of `around` and `inside` bits; 0 is no scope."""
    net = model()
    memory = quiet(around or None)

    def forward(block: nn.Module, h: Tensor) -> Tensor:
        with quiet(inside) if inside else contextlib.nullcontext():
            return block(h)

    with contextlib.ExitStack() as stack:
        if around:
            stack.enter_context(memory)
        h = x
        for block in net:
            h = checkpoint(functools.partial(forward, block), h, use_reentrant=reentrant, **options)
        loss = h.square().mean()
        if backward_inside:
            backward(loss)
    if not backward_inside:
        backward(loss)
    return gradients(net), memory


def run_plain(x: Tensor, bits: int | None) -> list[Tensor]:
    net = model()
    with quiet(bits):
        loss = net(x).square().mean()
    loss.backward()
    return gradients(net)


BACKWARDS = {"loss.backward": Tensor.backward, "torch.autograd.backward": torch.autograd.backward}


@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("backward_inside", [True, False], ids=["backward inside", "backward outside"])
@pytest.mark.parametrize("around", [0, 2], ids=["", "scope around"])
def test_non_reentrant_checkpoint_with_the_scope_inside_is_coded(
    x: Tensor, around: int, backward_inside: bool, backward: str
) -> None:
    result, _ = run_checkpointed(
        x,
        reentrant=False,
        around=around,
        inside=3,
        backward_inside=backward_inside,
        backward=BACKWARDS[backward],
    )
    assert equal(result, run_plain(x, 3))


@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("backward_inside", [True, False], ids=["backward inside", "backward outside"])
def test_non_reentrant_checkpoint_with_the_scope_around_is_left_to_the_checkpoint(
    x: Tensor, backward_inside: bool, backward: str
) -> None:
    result, memory = run_checkpointed(
        x, reentrant=False, around=2, backward_inside=backward_inside, backward=BACKWARDS[backward]
    )
    assert equal(result, run_plain(x, None))
    assert {row.reason for row in memory.report().rows} == {"inside checkpoint"}


@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("backward_inside", [True, False], ids=["backward inside", "backward outside"])
@pytest.mark.parametrize("around", [0, 2], ids=["", "scope around"])
def test_reentrant_checkpoint_with_the_scope_inside_is_coded(
    x: Tensor, around: int, backward_inside: bool, backward: str
) -> None:
    result, _ = run_checkpointed(
        x, reentrant=True, around=around, inside=3, backward_inside=backward_inside, backward=BACKWARDS[backward]
    )
    assert equal(result, run_plain(x, 3))


@pytest.mark.parametrize("backward", BACKWARDS)
def test_reentrant_checkpoint_with_the_scope_around_and_backward_outside_is_exact(x: Tensor, backward: str) -> None:
    result, memory = run_checkpointed(x, reentrant=True, around=2, backward=BACKWARDS[backward])
    assert equal(result, run_plain(x, None))
    assert memory.report().rows == ()  # its forward runs under no_grad, its recomputation outside of the scope


@pytest.mark.parametrize("backward", BACKWARDS)
def test_reentrant_checkpoint_recomputed_inside_the_scope_is_coded_or_exact_but_nothing_else(
    x: Tensor, backward: str
) -> None:
    result, _ = run_checkpointed(x, reentrant=True, around=2, backward_inside=True, backward=BACKWARDS[backward])
    assert equal(result, run_plain(x, 2)) or equal(result, run_plain(x, None))


def test_a_gradient_taken_by_autograd_grad_through_a_checkpoint_is_exact(x: Tensor) -> None:
    net = model()
    (expected,) = torch.autograd.grad(net(x).sum(), x)
    with quiet():
        y = checkpoint(net, x, use_reentrant=False)
        (result,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(result, expected)


def test_nested_checkpoints_are_left_to_them(x: Tensor) -> None:
    net = model(2)

    def inner(h: Tensor) -> Tensor:
        return checkpoint(net[1], checkpoint(net[0], h, use_reentrant=False), use_reentrant=False)

    (expected,) = torch.autograd.grad(net(x).sum(), x)
    with quiet():
        y = checkpoint(inner, x, use_reentrant=False)
    (result,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(result, expected)


def save_matmuls(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    save = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE


def save_activations(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    save = op in (torch.ops.aten.gelu.default, torch.ops.aten.tanh.default)
    return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE


RESPECTS = "respect_saved_tensors_hooks" in inspect.signature(checkpoint).parameters


def save_all_else(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    again = op is torch.ops.aten.addmm.default
    return CheckpointPolicy.PREFER_RECOMPUTE if again else CheckpointPolicy.MUST_SAVE


@pytest.mark.parametrize("policy", [save_matmuls, save_activations, save_all_else])
@pytest.mark.parametrize(("around", "inside"), [(2, 0), (0, 3), (2, 3)])
def test_selective_checkpointing_gives_the_gradients_that_it_gave(
    x: Tensor, policy: Any, around: int, inside: int
) -> None:
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    result, _ = run_checkpointed(x, reentrant=False, around=around, inside=inside, context_fn=contexts)
    assert equal(result, run_plain(x, 3 if inside else None))


@pytest.mark.parametrize("policy", [save_activations, save_all_else])
@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("kernels", ["numba", "plain torch"])
def test_what_is_found_out_of_an_activation_is_no_part_of_a_selective_checkpoint(
    x: Tensor, policy: Any, bits: int, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernels == "plain torch":
        monkeypatch.setitem(_dispatch._found, ("cpu", "_numba"), _dispatch.Backend(None, "a test"))
    monkeypatch.setattr(_policy, "_plans", {})  # the first forward asks how the activations are coded, the second not
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    result, _ = run_checkpointed(x, reentrant=False, inside=bits, context_fn=contexts)
    assert equal(result, run_plain(x, bits))


@pytest.mark.usefixtures("registered_for_one_test_only")
@pytest.mark.parametrize("settings", [{}, {"exact": True}, {"recompute": True}, {"engine": "fused"}])
@pytest.mark.parametrize("act", ["a composite", "a registered function"])
def test_nor_is_what_is_found_out_of_what_is_written_in_primitives(act: str, settings: Any) -> None:
    class Composite(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(x)

    run = fewbit.register_module(Composite, "silu")() if act == "a composite" else fewbit.register(odd)
    scales = nn.Parameter(torch.rand(8)), nn.Parameter(torch.rand(8))
    first, last = nn.Linear(16, 16), nn.Linear(16, 16)
    factories = [torch.ops.aten.cat.default, torch.ops.aten.zeros.default, torch.ops.aten.linspace.default]
    contexts = functools.partial(create_selective_checkpoint_contexts, factories)

    def block(x: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", fewbit.FewbitWarning)
            with fewbit.scope(min_bytes=0, **settings):
                h = run(first(x)) * torch.cat(scales) + torch.zeros(16) + torch.linspace(0, 1, 16)
                return last(h)

    x = torch.randn(4, 16, requires_grad=True)
    checkpointed = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
    results = [
        torch.autograd.grad(y.square().sum(), [x, *scales, *first.parameters()]) for y in (checkpointed, block(x))
    ]
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def odd(x: Tensor) -> Tensor:
    return x * torch.tanh(x)


def test_pack_hooks_without_a_module_of_their_own_are_others_hooks(x: Tensor) -> None:
    leaf = x.clone().requires_grad_()
    with quiet(2), saved_tensors_hooks(Tensor.cpu, Tensor.cpu):  # type: ignore[arg-type]
        y = F.gelu(leaf)
    (grad,) = torch.autograd.grad(y.sum(), leaf)
    assert torch.equal(grad, torch.autograd.grad(F.gelu(leaf).sum(), leaf)[0])


@pytest.mark.skipif(not RESPECTS, reason="this torch hands what selective checkpointing keeps to no saved-tensor hooks")
@pytest.mark.parametrize("policy", [save_matmuls, save_activations, save_all_else])
@pytest.mark.parametrize("engine", ["hooks", "fused"])
@pytest.mark.parametrize("recompute", [False, True])
def test_our_hooks_are_not_handed_what_selective_checkpointing_keeps(
    x: Tensor, policy: Any, engine: str, recompute: bool
) -> None:
    opened = fewbit.scope(bits=3, min_bytes=0, engine=engine, recompute=recompute)
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    handed: list[Tensor] = []

    def run(respect: bool) -> list[Tensor]:
        def block(h: Tensor) -> Tensor:
            with opened:  # to keep noise, which is filled in place, stock refuses
                return net(h) if policy is save_all_else else F.dropout(net(h), 0.5)

        net = model()
        torch.manual_seed(0)
        with saved_tensors_hooks(lambda t: handed.append(t) or t, lambda t: t):  # those that are meant
            y = checkpoint(block, x, use_reentrant=False, context_fn=contexts, respect_saved_tensors_hooks=respect)
        y.square().mean().backward()
        return gradients(net)

    expected, before = run(respect=False), len(handed)
    assert equal(run(respect=True), expected)
    assert len(handed) > 2 * before


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("backward_inside", [True, False])
def test_checkpoint_sequential_codes_the_last_segment_that_it_does_not_checkpoint(
    x: Tensor, reentrant: bool, backward_inside: bool
) -> None:
    net = model()
    with few(8) as memory:
        loss = checkpoint_sequential(net, 3, x, use_reentrant=reentrant).square().mean()
        if backward_inside:
            loss.backward()
    if not backward_inside:
        loss.backward()
    for result, expected in zip(gradients(net), run_plain(x, None), strict=True):
        torch.testing.assert_close(result, expected, rtol=0.1, atol=2e-5)
    assert {row.activation for row in memory.report().rows if row.bits} == {"gelu", "tanh"}


def test_checkpoint_early_stop_off_and_determinism_check_find_nothing_to_complain_of(x: Tensor) -> None:
    for options in ({"determinism_check": "default"}, {"early_stop": False}):
        for around, inside in ((2, 0), (2, 3)):
            result, _ = run_checkpointed(x, reentrant=False, around=around, inside=inside, **options)
            assert equal(result, run_plain(x, 3 if inside else None))


# Other saved-tensor hooks (H7)


@pytest.mark.parametrize("inside", [True, False], ids=["inside the scope", "outside of the scope"])
def test_save_on_cpu(x: Tensor, inside: bool) -> None:
    net = model()
    contexts = [few(3), save_on_cpu()]
    if not inside:
        contexts.reverse()
    else:
        contexts[0]._warned = True
    with contexts[0], contexts[1]:
        loss = net(x).square().mean()
    loss.backward()
    assert equal(gradients(net), run_plain(x, None if inside else 3))


def test_the_users_hooks_around_a_part_of_the_scope_keep_that_part_exact(x: Tensor) -> None:
    packed = []
    with few(3) as memory:
        a = F.gelu(x)
        with saved_tensors_hooks(lambda t: packed.append(t.shape) or t.detach(), lambda t: t):
            b = F.silu(x)
            with few(2):  # and a scope inside those hooks codes again, and hands them the codes
                c = torch.tanh(x)
        d = F.mish(x)
    (a + b + c + d).sum().backward()
    assert packed == [x.shape, (x.numel() * 2 // 8,)]
    assert {row.activation: row.bits for row in memory.report().rows} == {"gelu": 3, "silu": None, "mish": 3}


def test_hooks_disabled_with_a_message_stay_disabled(x: Tensor) -> None:
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"), quiet() as memory:
        y = F.gelu(x)
        y.sum().backward()
    assert {row.bits for row in memory.report().rows} <= {None}


# Hugging Face


def hugging_face(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A tiny model with random weights, and a batch whose loss it returns."""
    import transformers as hf

    torch.manual_seed(2)
    ids = torch.randint(5, 90, (4, 12))
    small = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    wide = {"intermediate_size": 64}
    if name == "bert":
        return hf.BertForMaskedLM(hf.BertConfig(**small, **wide)), {"input_ids": ids, "labels": ids}
    if name == "roberta":
        config = hf.RobertaConfig(**small, **wide, max_position_embeddings=40)
        return hf.RobertaForSequenceClassification(config), {"input_ids": ids, "labels": ids[:, 0] % 2}
    if name == "gpt2":
        config = hf.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=2, n_positions=40)
        return hf.GPT2LMHeadModel(config), {"input_ids": ids, "labels": ids}
    if name == "llama":
        return hf.LlamaForCausalLM(hf.LlamaConfig(**small, **wide)), {"input_ids": ids, "labels": ids}
    if name == "t5":
        config = hf.T5Config(vocab_size=99, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
        config.decoder_start_token_id = 0
        return hf.T5ForConditionalGeneration(config), {"input_ids": ids, "labels": ids}
    del small["vocab_size"]
    config = hf.ViTConfig(**small, **wide, image_size=16, patch_size=4, num_labels=3)
    return hf.ViTForImageClassification(config), {
        "pixel_values": torch.randn(4, 3, 16, 16),
        "labels": ids[:, 0] % 3,
    }


def train(name: str, checkpointing: bool, how: str, steps: int = 3) -> tuple[list[float], list[Tensor]]:
    """The losses of a few steps, and the gradients of the first."""
    net, batch = hugging_face(name)
    net.train()
    if checkpointing:
        net.gradient_checkpointing_enable()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    losses, first = [], []
    torch.manual_seed(3)
    opened = quiet(3)
    with contextlib.ExitStack() as stack:
        if how == "enable":
            stack.enter_context(fewbit.enable(bits=3, min_bytes=0))
        for _ in range(steps):
            optimizer.zero_grad()
            with opened if how == "scope" else contextlib.nullcontext():
                loss = net(**batch, **({"use_cache": False} if name in ("gpt2", "llama", "t5") else {})).loss
            loss.backward()
            first = first or gradients(net)
            optimizer.step()
            losses.append(loss.item())
    if how == "scope" and not checkpointing and name != "gpt2":  # gpt2's activation is written in primitives
        assert opened.report().freed_bytes > 0
    return losses, first


@functools.cache
def stock(name: str, checkpointing: bool) -> tuple[list[float], list[Tensor]]:
    return train(name, checkpointing, "stock")


@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("how", ["scope", "enable"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2", "llama", "t5", "vit"])
def test_hugging_face_models_train(name: str, checkpointing: bool, how: str) -> None:
    pytest.importorskip("transformers")
    losses, first = train(name, checkpointing, how)
    expected_losses, expected = stock(name, checkpointing)
    assert losses[0] == expected_losses[0]  # bit for bit
    assert losses[-1] == pytest.approx(expected_losses[-1], rel=0.02)
    a, b = (torch.cat([g.flatten() for g in gs]) for gs in (first, expected))
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.99
    if checkpointing and name not in ("bert", "roberta"):  # their heads, which are not checkpointed, are coded
        assert equal(first, expected)


# torch.compile (H5)


def compiled_gradients(net: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor, scope: Any) -> list[Tensor]:
    net.zero_grad()
    with scope:
        loss = run(x).square().mean()
    loss.backward()
    return gradients(net)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.filterwarnings("ignore")  # Dynamo's and inductor's own
@pytest.mark.parametrize("fullgraph", [False, True], ids=["", "fullgraph"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_compiled_model_has_stocks_gradients_or_the_coded_ones(backend: str, fullgraph: bool, x: Tensor) -> None:
    net = model(1)
    exact, coded = run_plain_of(net, x, None), run_plain_of(net, x, in_a_graph(backend))
    compiled = torch.compile(net, backend=backend, fullgraph=fullgraph)
    first = compiled_gradients(net, compiled, x, quiet(2))
    again = compiled_gradients(net, compiled, x, quiet(2))
    outside = compiled_gradients(net, compiled, x, contextlib.nullcontext())
    assert close(first, exact) or close(first, coded)
    assert equal(again, first)
    assert close(outside, exact)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_model_compiled_outside_before_runs_under_a_scope(backend: str, x: Tensor) -> None:
    net = model(1)
    exact, coded = run_plain_of(net, x, None), run_plain_of(net, x, in_a_graph(backend))
    compiled = torch.compile(net, backend=backend)
    outside = compiled_gradients(net, compiled, x, contextlib.nullcontext())
    under = compiled_gradients(net, compiled, x, quiet(2))
    outside_again = compiled_gradients(net, compiled, x, contextlib.nullcontext())
    assert close(outside, exact)
    assert close(under, exact) or close(under, coded)
    assert equal(outside_again, outside)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_nested_scopes_around_a_compiled_model_do_not_crash_dynamo(backend: str, x: Tensor) -> None:
    net = model(1)
    exact, coded = run_plain_of(net, x, None), run_plain_of(net, x, in_a_graph(backend))
    compiled = torch.compile(net, backend=backend, fullgraph=True)
    with quiet(4):
        result = compiled_gradients(net, compiled, x, quiet(2))
    assert close(result, exact) or close(result, coded)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_scope_inside_the_compiled_function_breaks_the_graph_and_nothing_else(backend: str, x: Tensor) -> None:
    net = model(1)
    exact, coded = run_plain_of(net, x, None), run_plain_of(net, x, 2)

    def forward(h: Tensor) -> Tensor:
        with quiet(2):
            return net(h)

    result = compiled_gradients(net, torch.compile(forward, backend=backend), x, contextlib.nullcontext())
    assert close(result, exact) or close(result, coded)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.filterwarnings("ignore")
def test_activations_outside_the_compiled_part_are_coded_as_ever(x: Tensor) -> None:
    compiled = torch.compile(model(1), backend="aot_eager")
    with few(2) as memory:
        y = F.mish(compiled(F.silu(x * 1)) * 1)
    y.sum().backward()
    assert {"silu", "mish"} <= {row.activation for row in memory.report().rows if row.bits == 2}


class NormedUnit(nn.Module):
    """Its input's norm is asked for twice, and so is computed again for two; the other norm is run again."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = nn.LayerNorm(16), nn.RMSNorm(16)
        self.gate, self.up, self.down = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.last(self.down(F.gelu(self.gate(h)) * self.up(h)))


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", [{"bits": 3}, {"exact": True, "recompute": True}], ids=str)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_backward_under_compiled_autograd_gives_the_gradients_that_it_gave(
    backend: str, settings: dict[str, Any], x: Tensor
) -> None:
    from torch._dynamo import compiled_autograd

    def run(backward_in: Any) -> list[Tensor]:
        net.zero_grad()
        forget_what_was_learned()
        with fewbit.scope(min_bytes=0, **settings):
            loss = net(x).square().mean()
        with backward_in:
            loss.backward()
        return gradients(net)

    net = NormedUnit()
    expected = run(contextlib.nullcontext())
    for _ in range(2):
        assert equal(run(compiled_autograd._enable(torch.compile(backend=backend))), expected)


def in_a_graph(backend: str) -> Any:
    """The bits that the model's activations have where it is compiled: the output of gelu is kept by the next layer."""
    return 2 if backend == "eager" else {"gelu": None, "tanh": 2}


def run_plain_of(net: nn.Module, x: Tensor, bits: Any) -> list[Tensor]:
    return compiled_gradients(net, net, x, quiet(bits))


def close(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) > 0 and all(torch.allclose(s, t, rtol=1e-4, atol=1e-6) for s, t in zip(a, b, strict=True))


# autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ["gelu", "tanh", "relu", "softplus", "logsigmoid", "mish"])
def test_autocast_forward_is_bit_equal_and_gradients_are_close(activation: str, dtype: torch.dtype, x: Tensor) -> None:
    function = {"gelu": F.gelu, "tanh": torch.tanh, "relu": F.relu, "softplus": F.softplus}.get(activation)
    function = function or {"logsigmoid": F.logsigmoid, "mish": F.mish}[activation]
    weight = torch.randn(16, 16, requires_grad=True)

    def run(scope: Any) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", dtype=dtype), scope:
            y = function(F.linear(x, weight) * 0.25)
        (slope,) = torch.autograd.grad(y.float().sum(), weight)
        return y, slope

    (y, slope), (expected_y, expected) = run(few(6)), run(contextlib.nullcontext())
    assert (y.dtype, slope.dtype) == (expected_y.dtype, expected.dtype)
    assert torch.equal(y, expected_y)
    torch.testing.assert_close(slope, expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))


# Threads (H8, R12)


def in_threads(*functions: Callable[[], None]) -> None:
    errors: list[BaseException] = []

    def guarded(function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(f,)) for f in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def train_on(
    net: nn.Module, opened: fewbit.scope, x: Tensor, meet: Callable[[], object] = lambda: None
) -> list[Tensor]:
    """The gradients of the last of some training steps."""
    for _ in range(20):
        net.zero_grad()
        meet()
        with opened:
            loss = net(x.detach()).square().mean()
        loss.backward()
    return gradients(net)


def test_threads_train_at_once_each_with_the_bits_of_its_scope(x: Tensor) -> None:
    expected = {bits: train_on(model(), few(bits), x) for bits in (1, 4)}
    nets = {bits: model() for bits in (1, 4)}  # here: threads share the generator that draws the weights
    meet = threading.Barrier(2, timeout=30)
    results: dict[int, list[Tensor]] = {}

    def work(bits: int) -> None:
        results[bits] = train_on(nets[bits], few(bits), x, meet.wait)

    in_threads(*(functools.partial(work, bits) for bits in expected))
    assert all(equal(results[bits], expected[bits]) for bits in expected)


def test_threads_train_at_once_with_one_scope(x: Tensor) -> None:
    net = model()
    net(x.detach()).square().mean().backward()
    exact = torch.cat([gradient.flatten() for gradient in gradients(net)])
    opened, meet = few(2), threading.Barrier(2, timeout=30)
    results: list[list[Tensor]] = []
    nets = [model(), model()]
    in_threads(*(lambda net=net: results.append(train_on(net, opened, x, meet.wait)) for net in nets))
    for result in results:  # coded, or learned already: which of the two depends on how the threads interleave
        few_bits = torch.cat([gradient.flatten() for gradient in result])
        assert F.cosine_similarity(few_bits, exact, dim=0) > 0.95


def test_a_thread_started_under_enable_or_a_scope_is_exact(x: Tensor) -> None:
    seen = []
    with fewbit.enable(bits=2, min_bytes=0), few(3):
        assert is_coded(x)
        in_threads(lambda: seen.append((is_coded(x), fewbit.active(), torch._C._len_torch_function_stack())))
    assert seen == [(False, None, 0)]


def test_replicas_on_threads_are_coded_by_a_scope_inside_their_forward(x: Tensor) -> None:
    class Replica(nn.Module):  # what nn.DataParallel's threads run
        @fewbit.scope(bits=3, min_bytes=0)
        def forward(self, h: Tensor) -> bool:
            return is_coded(h)

    seen: list[bool] = []
    in_threads(*[lambda: seen.append(Replica()(x))] * 2)
    assert seen == [True, True]


class Items(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> Tensor:
        h = torch.full((16,), float(i), requires_grad=True)
        F.gelu(h).sum().backward()  # a worker that uses autograd
        return F.gelu(h.detach())


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # fork, with threads about
@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_loader_with_workers_runs_under_a_scope(workers: int, x: Tensor) -> None:
    with few(3) as memory:
        loader = torch.utils.data.DataLoader(Items(), batch_size=4, num_workers=workers, timeout=60 if workers else 0)
        batches = list(loader)
        F.silu(x)
    assert torch.equal(torch.cat(batches)[:, 0], F.gelu(torch.arange(8.0)))
    assert "silu" in {row.activation for row in memory.report().rows}


# What is left behind (interleaving, other modes, exceptions, hooks)


def test_asyncio_tasks_that_interleave_leave_nothing_behind(x: Tensor) -> None:
    before = torch_state()

    async def task(bits: int, pauses: int) -> None:
        with quiet(bits):
            for _ in range(pauses):
                assert is_coded(x)  # it is about the thread: some task's scope is in force
                await asyncio.sleep(0)

    async def main() -> None:
        await asyncio.gather(task(1, 5), task(2, 2), task(3, 4), task(4, 1))

    asyncio.run(main())
    assert torch_state() == before
    assert not is_coded(x)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (0, 2, 1), (1, 2, 0), (2, 0, 1)])
def test_generators_with_open_scopes_closed_in_any_order_leave_nothing_behind(
    order: tuple[int, ...], x: Tensor
) -> None:
    before = torch_state()

    def steps(bits: int) -> Iterator[bool]:
        with quiet(bits):
            while True:
                yield is_coded(x)

    generators = [steps(bits) for bits in (1, 2, 3)]
    assert all(next(g) for g in generators)
    for i in order:
        assert is_coded(x)
        generators[i].close()
    assert torch_state() == before
    assert not is_coded(x)


@pytest.mark.parametrize("line", range(4))
def test_the_garbage_collector_may_leave_a_scope_while_another_is_left(line: int, x: Tensor) -> None:
    before = torch_state()

    def steps(held: list[Any]) -> Iterator[None]:
        with quiet(2):
            yield

    def left_suspended() -> None:
        held: list[Any] = []
        generator = steps(held)
        next(generator)
        held.append(generator)  # a cycle

    gc.collect()
    left_suspended()
    opened = quiet(3)
    opened.__enter__()
    seen = 0

    def trace(frame: Any, event: str, argument: Any) -> Any:
        def at_each_line(frame: Any, event: str, argument: Any) -> Any:
            nonlocal seen
            if event == "line":
                if seen == line:
                    gc.collect()
                seen += 1
            return at_each_line

        return at_each_line if frame.f_code is _stack.remove.__code__ and not seen else None

    others = sys.gettrace()
    sys.settrace(trace)
    try:
        opened.__exit__(None, None, None)
    finally:
        sys.settrace(others)
    gc.collect()
    assert seen >= 4
    assert fewbit.active() is None
    assert torch_state() == before


class Counting(TorchFunctionMode):
    """Another library's mode."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("other", [lambda: torch.device("cpu"), Counting], ids=["torch.device", "a mode"])
@pytest.mark.parametrize("inside", [True, False])
def test_another_mode_inside_or_outside_of_the_scope(other: Callable[[], Any], inside: bool, x: Tensor) -> None:
    before = torch_state()
    mode = other()
    with few(2), mode if inside else contextlib.nullcontext():
        with mode if not inside else contextlib.nullcontext():
            assert is_coded(x)
        assert is_coded(x)
    assert torch_state() == before


@pytest.mark.parametrize("other", [lambda: torch.device("cpu"), Counting], ids=["torch.device", "a mode"])
def test_another_mode_entered_inside_and_left_after_the_scope_stays_in_force(
    other: Callable[[], Any], x: Tensor
) -> None:
    before = torch_state()
    opened, mode = quiet(2), other()
    opened.__enter__()
    mode.__enter__()
    assert is_coded(x)
    opened.__exit__(None, None, None)
    assert not is_coded(x)
    assert torch._C._len_torch_function_stack() == before[0] + 1
    assert type(torch._C._get_function_stack_at(before[0])) in (Counting, DeviceContext)
    mode.__exit__(None, None, None)
    assert torch_state() == before


def test_another_mode_sees_every_call_once(x: Tensor) -> None:
    outer, inner = Counting(), Counting()
    with outer, few(2), inner:
        F.gelu(x)
    assert (outer.calls.count(F.gelu), inner.calls.count(F.gelu)) == (1, 1)


def test_set_default_device_inside_a_scope_stays_set(x: Tensor) -> None:
    before = torch_state()
    try:
        with quiet(2):
            torch.set_default_device("meta")
            assert is_coded(x)
        assert torch.empty(1).device.type == "meta"
        assert not is_coded(x)
    finally:
        torch.set_default_device(None)
    assert torch.empty(1).device.type == "cpu"
    while torch._C._len_torch_function_stack() > before[0]:
        torch._C._pop_torch_function_stack()


def test_a_default_device_changes_no_code_and_no_table(x: Tensor) -> None:
    expected = run_plain(x, 5)
    with torch.device("meta"), few(5):
        y = F.elu(x, alpha=1.3)  # with a codebook and tables that are computed now
        F.hardtanh(x.bfloat16(), -0.3, 0.7).sum().backward()
    y.sum().backward()
    assert x.grad.device.type == "cpu"
    assert equal(run_plain(x, 5), expected)


def test_disable_torch_function_around_a_call_keeps_it_exact(x: Tensor) -> None:
    with few(2):
        with torch._C.DisableTorchFunction():
            assert not is_coded(x)
        assert is_coded(x)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_exception_leaves_nothing_behind(error: type[BaseException], where: str, x: Tensor) -> None:
    before = torch_state()

    def fail(_: Any) -> None:
        raise error

    with pytest.raises(error), few(2):
        y = F.gelu(x * 1)
        if where == "forward":
            fail(y)
        y.register_hook(fail)
        y.sum().backward()
    assert torch_state() == before
    assert not is_coded(x)


def test_a_recognised_call_that_fails_leaves_no_hooks_behind(x: Tensor) -> None:
    before = torch_state()
    with quiet(2):
        for wrong in (lambda: F.gelu(x, approximate="so"), lambda: F.elu(x, 1, 2, 3, 4), lambda: F.gelu(), F.silu):
            with pytest.raises((RuntimeError, TypeError)):
                wrong()
        with pytest.raises(RuntimeError, match="leaf Variable"):
            F.relu(x, inplace=True)
        assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
        assert is_coded(x)
    assert torch_state() == before


def test_a_failing_call_says_what_it_says_without_a_scope(x: Tensor) -> None:
    def message(*args: Any, **kwargs: Any) -> str:
        with pytest.raises((RuntimeError, TypeError)) as caught:
            F.gelu(*args, **kwargs)
        return f"{caught.type.__name__}: {caught.value}"

    expected = message(x, approximate="so"), message(), message(x, 3), message("x")
    with quiet(2):
        assert (message(x, approximate="so"), message(), message(x, 3), message("x")) == expected


def run_with_hook(x: Tensor, hook: Callable[[], Any]) -> list[Any]:
    """Run `hook` in a backward; what it returned."""
    seen: list[Any] = []
    y = F.gelu(x * 1)
    y.register_hook(lambda _: seen.append(hook()))
    y.sum().backward()
    return seen


@pytest.mark.parametrize("around", [contextlib.nullcontext, lambda: few(3)], ids=["", "under a scope"])
def test_enabling_inside_a_backward_hook_is_refused(around: Callable[[], Any], x: Tensor) -> None:
    """Autograd restores the thread's modes when its node is done, so it would not hold."""
    before = torch_state()

    def hook() -> None:
        try:
            fewbit.enable(bits=2, min_bytes=0)
        except fewbit.FewbitError:
            return
        fewbit.disable()
        pytest.fail("enable() inside a backward was not refused")

    with around():
        run_with_hook(x, hook)
        assert is_coded(x) == (fewbit.active() is not None)
    assert torch_state() == before


def test_disabling_inside_a_backward_hook_holds_and_the_next_scope_leaves_nothing_behind(x: Tensor) -> None:
    before = torch_state()
    fewbit.enable(bits=2, min_bytes=0)
    run_with_hook(x, fewbit.disable)
    assert fewbit.active() is None
    assert not is_coded(x)
    try:
        with few(2):
            assert is_coded(x)
        assert torch_state() == before
    finally:
        while torch._C._len_torch_function_stack() > before[0]:
            torch._C._pop_torch_function_stack()


def test_a_scope_inside_a_backward_hook_codes_what_the_hook_calls(x: Tensor) -> None:
    before = torch_state()

    def hook() -> bool:
        with torch.enable_grad(), few(2):
            return is_coded(x)

    assert run_with_hook(x, hook) == [True]
    with few(3):
        assert run_with_hook(x, hook) == [True]
        assert is_coded(x)
    assert torch_state() == before


@pytest.mark.parametrize(
    "settings", [{"bits": 3}, {"bits": 3, "engine": "fused"}, {"exact": True, "recompute": True}], ids=str
)
@pytest.mark.parametrize(
    "around",
    [torch.inference_mode, functools.partial(torch.autograd.graph.disable_saved_tensors_hooks, "there must be none")],
    ids=["inference_mode", "disable_saved_tensors_hooks"],
)
def test_a_backward_runs_where_nothing_can_be_recorded(
    around: Callable[[], Any], settings: dict[str, Any], x: Tensor
) -> None:
    net = nn.Sequential(nn.Linear(16, 16), nn.RMSNorm(16), nn.SiLU(), nn.Linear(16, 16), Softly(), nn.Linear(16, 4))

    def trained(around: Callable[[], Any]) -> list[Tensor]:
        forget_what_was_learned()
        for _ in range(4):  # from the third on from outputs that are kept
            net.zero_grad()
            with fewbit.scope(min_bytes=0, **settings):
                loss = net(x.detach()).square().sum()
            with around():
                loss.backward()
        return [g + 0 for g in gradients(net)]

    assert equal(trained(around), trained(contextlib.nullcontext))


class Softly(nn.Module):
    """Run again as a whole, where all is exact."""

    def forward(self, h: Tensor) -> Tensor:
        return h * torch.sigmoid(1.702 * h)


fewbit.register_module(Softly, "quick_gelu")
