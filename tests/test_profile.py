"""What autograd keeps, whose it is, and what few bits would free: every number counted again from outside."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fewbit_hooks as fewbit
from fewbit_hooks import FewbitError, FewbitTypeError, Profile, ProfileRow, _profile_command, _profile_models, _stack
from fewbit_hooks._recorder import Recorder

from . import tiny_models
from .conftest import held_for_backward

KIB = 1024


def tiny_bert() -> tuple[nn.Module, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.BertConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, vocab_size=500
    )
    batch = {"input_ids": torch.randint(4, 500, (4, 64)), "labels": torch.tensor([0, 1, 0, 1])}
    return transformers.BertForSequenceClassification(config).train(), batch


def tiny_vit() -> tuple[nn.Module, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.ViTConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, image_size=64, patch_size=8
    )
    batch = {"pixel_values": torch.randn(4, 3, 64, 64), "labels": torch.tensor([0, 1, 0, 1])}
    return transformers.ViTForImageClassification(config).bfloat16().train(), {
        key: value.bfloat16() if value.is_floating_point() else value for key, value in batch.items()
    }


def conv_net() -> tuple[nn.Module, Tensor]:
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.SiLU()]
    return nn.Sequential(*layers, nn.Dropout(), nn.Flatten(), nn.Linear(8 * 13 * 13, 4)), torch.randn(4, 3, 32, 32)


def mlp() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 8)), torch.randn(128, 64)


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    output = model(**batch) if isinstance(batch, dict) else model(batch)
    loss: Tensor = getattr(output, "loss", output)
    return loss.mean()


def row(profile: Profile, operation: str, module: str = "") -> ProfileRow:
    (found,) = [r for r in profile.rows if r.operation == operation and module in r.module]
    return found


MODELS = [mlp, conv_net, tiny_bert, tiny_vit]


@pytest.mark.parametrize("make", MODELS)
def test_the_total_is_what_the_graph_holds(make: Any) -> None:
    model, batch = make()
    profile = fewbit.profile(model, batch)
    held = held_for_backward(loss_of(model, batch), [*model.parameters(), *model.buffers()])
    assert profile.nbytes == sum(held.values())
    assert sum(r.storages for r in profile.rows) == len(held)


@pytest.mark.parametrize("make", MODELS)
def test_the_forward_and_the_gradients_are_bit_for_bit_what_they_were(make: Any) -> None:
    model, batch = make()
    seen: list[list[Tensor]] = []

    def step() -> None:
        torch.manual_seed(1)
        loss = loss_of(model, batch)
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        seen.append([loss.detach(), *(g for g in gradients if g is not None)])

    step()
    fewbit.profile(step)
    assert len(seen[0]) == len(seen[1])
    assert all(map(torch.equal, *seen))


def test_a_graph_that_the_step_hands_out_still_has_its_gradients() -> None:
    model, batch = tiny_bert()  # which keeps buffers, the position ids
    losses: list[Tensor] = []
    fewbit.profile(lambda: losses.append(loss_of(model.eval(), batch)) or losses[0])
    gradients = torch.autograd.grad(losses[0], list(model.parameters()))
    exact = torch.autograd.grad(loss_of(model, batch), list(model.parameters()))
    assert all(map(torch.equal, gradients, exact))


def test_generators_and_buffers_are_given_back_and_gradients_not_touched() -> None:
    model, x = conv_net()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    state = torch.get_rng_state()
    fewbit.profile(model, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_in_place_check_is_kept() -> None:
    kept: list[Tensor] = []

    def step() -> Tensor:
        h = nn.Linear(8, 8)(torch.randn(4, 8))
        kept.append(F.gelu(h).sum())
        h.detach().add_(1)
        return kept[0]

    fewbit.profile(step)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept[0].backward()


def test_rows_name_operation_module_and_dtype() -> None:
    model, batch = tiny_vit()
    profile = fewbit.profile(model, batch)
    gelu = row(profile, "gelu", "layers.1.mlp")
    assert (gelu.module, gelu.dtype) == ("vit.layers.1.mlp.activation_fn", "bfloat16")
    assert gelu.nbytes == 4 * 65 * 512 * 2
    assert profile.own_bytes > 0


def test_sharing_is_named() -> None:
    model, batch = tiny_vit()
    query = row(fewbit.profile(model, batch), "linear", "layers.0.attention.q_proj")
    assert [module for _, module in query.shared_with] == [
        "vit.layers.0.attention.k_proj",
        "vit.layers.0.attention.v_proj",
    ]
    relu, x = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 8)), torch.randn(128, 64)
    shared = row(fewbit.profile(relu, x), "relu")
    assert shared.shared_with == (("linear", "2"),)
    assert shared.few_bits == "kept: somebody else keeps it"


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.square = x * x
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * ctx.square * grad


def test_custom_functions_are_named_as_what_cannot_be_looked_into() -> None:
    linear = nn.Linear(64, 256)
    profile = fewbit.profile(lambda: Cube.apply(Cube.apply(linear(torch.randn(128, 64)))))
    assert profile.opaque == {"Cube": (2, 2 * 128 * 256 * 4)}
    assert "cannot look into Cube (2 nodes)" in str(profile)
    assert row(profile, "Cube").storages == 2


class RecordsItself(torch.autograd.Function):
    """Its forward records a graph of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        with torch.enable_grad():
            y = (x.detach().requires_grad_().exp() * 2).sum()
        ctx.save_for_backward(x, y.detach())
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


def test_what_a_custom_function_saves_is_told_from_what_is_saved_beside_it() -> None:
    linear = nn.Linear(64, 256)

    def step() -> Tensor:
        x = Cube.apply(linear(torch.randn(128, 64)))
        with torch._C.DisableTorchFunction():  # calls that no mode sees
            x = x.sigmoid() * x.exp()
        return RecordsItself.apply(x).sin()

    profile = fewbit.profile(step)
    assert {name: nodes for name, (nodes, _) in profile.opaque.items()} == {"Cube": 1, "RecordsItself": 1}
    assert {r.operation: r.storages for r in profile.rows if r.module != "Linear"} == {
        "Cube": 1,
        "RecordsItself": 2,
        "sin": 1,
        "(no torch call)": 2,
    }


def test_what_is_inside_a_checkpoint_is_said_not_to_be_seen() -> None:
    model, x = mlp()
    profile = fewbit.profile(lambda: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).sum())
    assert any("torch.utils.checkpoint" in note for note in profile.notes)


def test_a_graph_that_is_dropped_is_not_counted() -> None:
    model, x = mlp()
    once = fewbit.profile(lambda: model(x))

    def twice() -> Tensor:
        model(torch.randn(128, 64))
        return model(x)

    assert fewbit.profile(twice).nbytes == once.nbytes


class NormalisesAWeight(nn.Module):
    """As DeBERTa does that of its positions: the Embedding's own forward never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.norm = nn.Embedding(128, 64), nn.LayerNorm(64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.positions.weight)


def test_a_parameter_whose_module_does_not_run_is_the_models_own() -> None:
    model, x = NormalisesAWeight(), torch.randn(128, 64)
    profile = fewbit.profile(lambda: model(x))
    held = held_for_backward(model(x).mean(), model.parameters())
    assert profile.nbytes == sum(held.values())
    assert profile.own_bytes == 4 * (128 * 64 + 2 * 64)


def test_a_step_that_calls_backward_is_profiled_up_to_there() -> None:
    model, x = mlp()
    profile = fewbit.profile(lambda: model(x).sum().backward())
    assert profile.nbytes == fewbit.profile(model, x).nbytes


def test_a_scope_that_is_open_does_not_change_what_is_counted() -> None:
    model, x = mlp()
    with fewbit.scope(bits=3):
        model(x)
        assert fewbit.profile(model, x).nbytes == fewbit.profile(model, x).nbytes == (128 * (64 + 256 * 2)) * 4


def test_a_scope_inside_the_step_acts_until_it_is_left() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    model, batch = tiny_models.tiny("gpt2", "sdpa", torch.bfloat16)
    acting: list[bool] = []

    def step() -> Tensor:
        acting.append(isinstance(_stack.acting(), Recorder))
        with fewbit.scope(bits=3, min_bytes=0):
            acting.append(isinstance(_stack.acting(), _stack.Entry))
            loss = tiny_models.loss_of(model, batch)
        acting.append(isinstance(_stack.acting(), Recorder))
        return loss

    assert fewbit.profile(step).nbytes < fewbit.profile(lambda: tiny_models.loss_of(model, batch)).nbytes
    with fewbit.scope(bits=None):
        fewbit.profile(step)
        acting.append(isinstance(_stack.acting(), _stack.Entry))
    assert len(acting) == 7
    assert all(acting)
    assert _stack.acting() is None


def test_nothing_to_profile_is_an_error() -> None:
    model, x = mlp()
    with pytest.raises(FewbitTypeError, match="needs a graph"):
        fewbit.profile(model.requires_grad_(False), x)


# Predictions. 128 x 256 float32 elements: 128 KiB, 4 KiB at 1 bit, 12 KiB at 3 bits.


def predictions(*layers: nn.Module, frozen: bool = False) -> dict[str, tuple[int, int]]:
    """What a scope frees and stores at Linear(64, 256), `layers`, Linear(256, 8)."""
    last = nn.Linear(256, 8).requires_grad_(not frozen)
    profile = fewbit.profile(nn.Sequential(nn.Linear(64, 256), *layers, last), torch.randn(128, 64))
    return {p.setting: (p.freed_bytes // KIB, p.stored_bytes // KIB) for p in profile.predictions}


def test_what_another_node_keeps_is_left_alone() -> None:
    assert set(predictions(nn.ReLU()).values()) == {(0, 0)}
    assert set(predictions(nn.Tanh()).values()) == {(0, 0)}


def test_beside_a_kept_output_a_bit_or_none_is_stored() -> None:
    for layer, stored in (nn.GELU(), 4), (nn.SiLU(), 4), (nn.Mish(), 4), (nn.Hardswish(), 4), (nn.ELU(), 0):
        for setting, numbers in predictions(layer).items():
            expected = (0, 0) if setting == "exact" else (128, 0 if "recompute" in setting else stored)
            assert numbers == expected, (layer, setting)


def test_where_only_the_activation_keeps_it_its_codes_take_the_bits_given() -> None:
    assert predictions(nn.GELU(), frozen=True) == {
        "1 bit": (128, 4),
        "2 bits": (128, 8),
        "3 bits": (128, 12),
        "4 bits": (128, 16),
        "exact": (0, 0),
        "3 bits, recompute": (128, 12),
        "exact, recompute": (0, 0),
    }


def test_two_valued_activations_and_masks_take_one_bit_exactly() -> None:
    assert set(predictions(nn.LeakyReLU(), frozen=True).values()) == {(128, 4)}
    assert set(predictions(nn.LeakyReLU()).values()) == {(128, 0)}  # its output, which is kept, says as much
    assert set(predictions(nn.Dropout(0.5)).values()) == {(128, 4)}
    # dropout keeps no values: relu's output is relu's alone
    assert set(predictions(nn.ReLU(), nn.Dropout(0.5), frozen=True).values()) == {(256, 8)}


def test_calls_that_share_a_storage_free_it_together_or_not_at_all() -> None:
    class Twice(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            return F.gelu(h) + F.leaky_relu(h)

    found = predictions(Twice(), frozen=True)
    assert found["3 bits"] == (128, 12 + 4)
    assert found["exact"] == (0, 0)  # gelu stays, and so does what leaky_relu shares with it


def test_what_is_small_or_the_users_own_is_kept() -> None:
    x = torch.randn(128, 256, requires_grad=True)
    assert fewbit.profile(lambda: F.gelu(x)).predictions[2].freed_bytes == 0
    assert fewbit.profile(lambda: F.gelu(2 * x)).predictions[2].freed_bytes == 128 * KIB
    assert fewbit.profile(lambda: F.gelu(2 * x), min_bytes=2**20).predictions[2].freed_bytes == 0


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("make", [nn.GELU, nn.SiLU, nn.Softplus, nn.LeakyReLU, nn.Hardtanh])
def test_a_scope_frees_and_stores_what_was_predicted(make: type[nn.Module], bits: int) -> None:
    model = nn.Sequential(nn.Linear(64, 256), make(), nn.Linear(256, 8).requires_grad_(False))
    x = torch.randn(128, 64)
    predicted = fewbit.profile(model, x).predictions[bits - 1]
    with fewbit.scope(bits=bits) as memory:
        loss = model(x).mean()
    report = memory.report()
    assert (report.freed_bytes, report.stored_bytes) == (predicted.freed_bytes, predicted.stored_bytes)
    loss.backward()


@pytest.mark.parametrize("bits", [1, 3])
@pytest.mark.parametrize("make", [tiny_bert, tiny_vit])
def test_a_scope_that_has_learned_frees_what_was_predicted(make: Any, bits: int) -> None:
    model, batch = make()
    own = [*model.parameters(), *model.buffers()]
    profile = fewbit.profile(model, batch)
    predicted = profile.nbytes - profile.predictions[bits - 1].held_bytes
    memory = fewbit.scope(bits=bits)
    for _ in range(3):
        with memory:
            loss = loss_of(model, batch)
        loss.backward()
    with memory:
        loss = loss_of(model, batch)
    freed = profile.nbytes - sum(held_for_backward(loss, own).values())
    assert freed == pytest.approx(predicted, rel=0.01)


# Predictions for whole models, against what a scope that has learned holds, counted from outside.

SETTINGS: dict[str, dict[str, Any]] = {
    "1 bit": {"bits": 1},
    "2 bits": {"bits": 2},
    "3 bits": {"bits": 3},
    "4 bits": {"bits": 4},
    "exact": {"exact": True},
    "3 bits, recompute": {"bits": 3, "recompute": True},
    "exact, recompute": {"exact": True, "recompute": True},
}


def check_predictions(model: nn.Module, loss: Callable[[], Tensor]) -> Profile:
    """To 0.2 % of what stock holds: numbers that take part in an operation are not counted, 8 bytes each."""
    own = [*model.parameters(), *model.buffers()]
    profile = fewbit.profile(loss, min_bytes=0)
    stock = sum(held_for_backward(loss(), own).values())
    assert profile.nbytes == pytest.approx(stock, rel=0.002)
    for prediction in profile.predictions:
        memory = fewbit.scope(min_bytes=0, **SETTINGS[prediction.setting])
        for _ in range(3):
            with memory:
                result = loss()
            result.backward()
            del result
        with memory:
            result = loss()
        held = sum(held_for_backward(result, own, tables=False).values())
        assert prediction.held_bytes == pytest.approx(held, abs=0.002 * stock), prediction.setting
        assert (
            prediction.held_bytes == stock - prediction.freed_bytes + prediction.stored_bytes + profile.nbytes - stock
        )
    return profile


NOTHING = pytest.mark.filterwarnings("ignore:fewbit_hooks.scope compressed nothing")  # exact=True, mostly


@NOTHING
@pytest.mark.parametrize("name", [*tiny_models.MODELS, "roberta, eager attention", "llama, autocast"])
def test_a_scope_that_has_learned_holds_what_was_predicted(name: str) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    name, _, how = name.partition(", ")
    attention, dtype = ("eager", torch.float32) if how else ("sdpa", torch.bfloat16)
    model, batch = tiny_models.tiny(name, attention, dtype)

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            return tiny_models.loss_of(model, batch)

    check_predictions(model, loss)
    model.zero_grad()


class Adapted(nn.Module):
    """A frozen layer with an adapter in float32, as PEFT writes it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.dropout = nn.Dropout(0.1)
        self.a = nn.Linear(layer.in_features, 4, bias=False)
        self.b = nn.Linear(4, layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.b(self.a(self.dropout(x.to(torch.float32)))).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_on_a_frozen_model_are_predicted(dtype: torch.dtype) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    model = tiny_models.llama("sdpa")[0].to(dtype).requires_grad_(False).train()
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear and name.endswith("_proj"):
                setattr(parent, name, Adapted(layer))
    batch = tiny_models.tiny("llama", "sdpa", dtype)[1]
    profile = check_predictions(model, lambda: tiny_models.loss_of(model, batch))
    if dtype == torch.float32:
        return
    # the adapters' inputs, in float32, were the most of it
    assert profile.predictions[-1].held_bytes < 0.5 * profile.nbytes


class OneActivationTwice(nn.Module):
    """At one place its output is kept by a Linear, at the other by nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act = nn.Linear(64, 64), nn.GELU()
        self.second, self.frozen = nn.Linear(64, 64), nn.Linear(64, 64).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(self.act(self.second(self.act(self.first(x)))))


class ChangesTheOutput(nn.Module):
    """So that it cannot be relied upon, and is not what a recipe would give."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.last = nn.SiLU(), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(x)
        y += 1
        return self.last(y)


class Exposes(nn.Module):
    """Gives the memory of the output away."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.last = nn.SiLU(), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(x)
        y.detach().numpy()
        return self.last(y)


class OwnMask(nn.Module):
    """A mask that is made for a single call, and one that two share."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        shared = x > 1
        y = x.masked_fill(x < 0, 0.0).masked_fill(shared, 1.0)
        return self.last(y).masked_fill(shared, 0.0)


class DropoutBehind(nn.Module):
    """Of an activation's output only what dropout made of it is kept; the second time, that cannot be helped."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.act, self.dropout = (
            nn.Linear(64, 64),
            nn.Linear(64, 8),
            nn.GELU(),
            nn.Dropout(0.1),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(self.dropout(self.act(x)))
        return self.second(self.dropout(self.act(h)).square())


class SkipConnection(nn.Module):
    """The activation's input is kept by another node, its output by a product and by something that recomputes not."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.norm, self.last = nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(x)
        return self.last(self.norm(y) * x) + y.square().mean()


class MakesItsActivation(nn.Module):
    """Of a module that is another one at each step, a scope learns where it is made."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(nn.GELU()(x))


class DropsAGraph(nn.Module):
    """What is made of the activation is only looked at, as codes of a quantizer are."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.codes, self.last = nn.GELU(), nn.Linear(64, 8), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x) * self.codes(self.act(2 * x)).argmax(dim=1, keepdim=True)


class CopiesATranspose(nn.Module):
    """A convolution keeps its padded input, which is the activation's output with two dimensions exchanged."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.last = nn.SiLU(), nn.Conv1d(64, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.pad(self.act(x).T, (2, 0)))


PARTS = [
    OneActivationTwice,
    ChangesTheOutput,
    Exposes,
    OwnMask,
    DropoutBehind,
    SkipConnection,
    MakesItsActivation,
    DropsAGraph,
    CopiesATranspose,
]


@NOTHING
@pytest.mark.parametrize("part", PARTS)
def test_what_is_shared_changed_or_exposed_is_predicted(part: type[nn.Module]) -> None:
    model, x = nn.Sequential(nn.Linear(64, 64), part()), torch.randn(128, 64)
    check_predictions(model, lambda: model(x).square().mean())


def test_rows_say_what_is_computed_again() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    model, batch = tiny_models.tiny("llama", "sdpa", torch.bfloat16)
    profile = fewbit.profile(lambda: tiny_models.loss_of(model, batch), recompute=True, min_bytes=0)
    said = {(r.operation, r.module.rpartition(".")[2]): r.few_bits for r in profile.merged() if r.freed_bytes}
    assert said["rms_norm", "input_layernorm"] == "computed again from its input"
    assert said["linear", "down_proj"] == said["linear", "q_proj"] == "computed again"
    assert row(profile, "silu", "layers.0").few_bits == "kept: its output is computed again from it"
    without = fewbit.profile(lambda: tiny_models.loss_of(model, batch), min_bytes=0)
    assert row(without, "silu", "layers.0").few_bits == "1 bit beside the output"
    assert all(r.few_bits == "" for r in without.rows if r.operation == "rms_norm")


def test_a_composite_is_one_operation() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    for name, operation, module in (
        ("gpt2", "gelu", "h.0.mlp.act"),
        ("clip", "quick_gelu", "layers.0.mlp.activation_fn"),
    ):
        model, batch = tiny_models.tiny(name, "sdpa", torch.bfloat16)
        found = row(fewbit.profile(lambda: tiny_models.loss_of(model, batch), min_bytes=0), operation, module)  # noqa: B023
        assert found.storages > 1
        assert found.few_bits == "1 bit beside the output"
        assert found.freed_bytes == found.nbytes


class TanhGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x**3)))


class Twice(nn.Module):
    """Another node keeps the activation's input as well."""

    def __init__(self) -> None:
        super().__init__()
        self.act = TanhGELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x) + x.square()


@pytest.mark.parametrize("setting", [{"bits": 1}, {"bits": 3}, {"exact": True}], ids=str)
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("act", [TanhGELU, Twice])
def test_a_composite_is_predicted_as_the_one_node_that_it_runs_as(
    act: type[nn.Module], frozen: bool, setting: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TanhGELU, "forward", TanhGELU.forward)  # given back afterwards
    fewbit.register_module(TanhGELU, "gelu", approximate="tanh")
    last = nn.Linear(256, 8).requires_grad_(not frozen)
    model, x = nn.Sequential(nn.Linear(64, 256), act(), last), torch.randn(512, 64)
    profile = fewbit.profile(model, x)
    predicted = profile.predictions[setting.get("bits", 5) - 1]
    own = list(model.parameters())
    assert profile.nbytes == pytest.approx(sum(held_for_backward(model(x).mean(), own).values()), rel=0.001)
    memory = fewbit.scope(**setting)
    for _ in range(3):
        with memory:
            loss = model(x).mean()
            torch.autograd.grad(loss, loss)
    assert sum(held_for_backward(loss, own).values()) == pytest.approx(predicted.held_bytes, rel=0.02)
    assert {r.operation for r in profile.rows if r.module.endswith(("1", "act"))} == {"gelu"}


# What is printed, and the command.


def test_the_text_merges_like_layers_and_ends_with_the_predictions() -> None:
    model, batch = tiny_bert()
    lines = str(fewbit.profile(model, batch)).splitlines()
    (gelu,) = [line for line in lines if line.startswith("gelu")]
    assert gelu.split()[1:4] == ["bert.encoder.layer.*.intermediate.intermediate_act_fn", "float32", "2"]
    assert [line.split("  ")[0] for line in lines[-8:-1]] == list(SETTINGS)


def test_the_dict_is_json_and_adds_up() -> None:
    model, batch = tiny_bert()
    profile = fewbit.profile(model, batch)
    read = json.loads(json.dumps(profile.to_dict()))
    assert read["nbytes"] == profile.nbytes == sum(r["nbytes"] for r in read["rows"])
    assert read["predictions"][4]["setting"] == "exact"


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model, x = conv_net()
    fewbit.profile(model, x).plot(tmp_path / "profile.png")
    assert (tmp_path / "profile.png").stat().st_size > 10_000


def command(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    _profile_command.add_parser(parser.add_subparsers(required=True))
    options = parser.parse_args(["profile", *arguments])
    status: int = options.run(options)
    return status


def made_here() -> tuple[nn.Module, Tensor]:
    return mlp()


@pytest.mark.parametrize("name", ["roberta-base", "vit-base", "t5-small"])
def test_the_command_profiles_a_model_by_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    assert command(name, "--batch", "1", "--length", "16", "--image", "32", "--layers", "1", "--json") == 0
    assert json.loads(capsys.readouterr().out)["nbytes"] > 0


def test_the_command_profiles_a_function_s_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert command("tests.test_profile:made_here", "--markdown", "--plot", str(tmp_path / "p.png")) == 0
    assert "| gelu | * | float32 | 1 | 128 KiB |" in capsys.readouterr().out
    assert (tmp_path / "p.png").exists()


def test_every_published_name_is_one_that_transformers_knows() -> None:
    auto = pytest.importorskip("transformers.models.auto.configuration_auto", reason="transformers is not installed")
    assert {model_type for model_type, _ in _profile_models.PUBLISHED.values()} <= set(auto.CONFIG_MAPPING_NAMES)


def test_the_command_takes_recompute(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("tests.test_profile:made_here", "--recompute") == 0
    assert "kept: its output is computed again from it" in capsys.readouterr().out


def test_wrong_names_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    with pytest.raises(FewbitError, match=r"no model 'robert'\. Known: roberta-base, "):
        command("robert")
    with pytest.raises(FewbitError, match=r"It must be package\.module:function"):
        command("tests.test_profile:nothing")
    with pytest.raises(FewbitError, match="stages of layers"):
        command("resnet-50", "--layers", "2")
    monkeypatch.setitem(sys.modules, "transformers.models.auto.configuration_auto", None)
    with pytest.raises(FewbitError, match="needs transformers: pip install transformers"):
        command("roberta-base")
