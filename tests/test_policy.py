"""Which calls are compressed with how many bits, and which are kept."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fewbit_hooks as fewbit
from fewbit_hooks import _policy


def outcome(memory: fewbit.scope) -> dict[str, tuple[int | None, str]]:
    return {row.activation: (row.bits, row.reason if row.bits is None else "") for row in memory.report().rows}


class Chain(nn.Module):
    """One of the parts after the other."""

    def __init__(self, parts: nn.ModuleDict) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.children():
            x = part(x)
        return x


def wrapped(name: str, net: nn.Module) -> nn.Module:
    return Chain(nn.ModuleDict({name: net}))


def four(x: Tensor) -> list[Tensor]:
    return [F.gelu(x * 1), F.silu(x * 1), F.relu(x * 1), F.hardtanh(x * 1)]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(64, 64, requires_grad=True)


def test_a_number_is_for_the_smooth_ones_and_the_two_valued_take_one(x: Tensor) -> None:
    with fewbit.scope(bits=np.int64(5), min_bytes=0) as memory:
        kept = four(x)
    assert outcome(memory) == {"gelu": (5, ""), "silu": (5, ""), "relu": (1, ""), "hardtanh": (1, "")}
    assert kept


def test_a_mapping_gives_each_its_own_and_the_rest_its_default(x: Tensor) -> None:
    with fewbit.scope(bits={"gelu": 2, "relu": None, "default": 4}, min_bytes=0) as memory:
        kept = four(x)
    assert outcome(memory) == {
        "gelu": (2, ""),
        "silu": (4, ""),
        "relu": (None, "no bits are given for relu"),
        "hardtanh": (1, ""),
    }
    assert kept


def test_a_mapping_without_a_default_keeps_the_smooth_ones_that_it_does_not_name(x: Tensor) -> None:
    with fewbit.scope(bits={"gelu": 2}, min_bytes=0) as memory:
        kept = four(x)
    assert outcome(memory)["silu"] == (None, "no bits are given for silu")
    assert outcome(memory)["relu"] == (1, "")
    assert kept


def test_a_mapping_is_copied(x: Tensor) -> None:
    bits = {"gelu": 2}
    opened = fewbit.scope(bits=bits, min_bytes=0)
    bits["gelu"] = 9
    with opened as memory:
        kept = F.gelu(x * 1)
    assert outcome(memory)["gelu"] == (2, "")
    assert kept.requires_grad


def test_a_callable_sees_name_and_tensor(x: Tensor) -> None:
    seen = []

    def bits(name: str, tensor: Tensor) -> int | None:
        seen.append((name, tuple(tensor.shape)))
        return {"gelu": 2, "silu": None}.get(name, 1)

    with fewbit.scope(bits=bits, min_bytes=0) as memory:
        kept = four(x)
    assert seen == [(name, (64, 64)) for name in ("gelu", "silu", "relu", "hardtanh")]
    assert outcome(memory)["gelu"] == (2, "")
    assert outcome(memory)["silu"] == (None, "no bits are given for silu")
    assert kept


@pytest.mark.parametrize("answer", [0, 9, 2.5, "3", True])
def test_a_wrong_answer_of_a_callable_is_an_error(x: Tensor, answer: object) -> None:
    with (
        pytest.raises(fewbit.FewbitError, match="the callable's answer for 'gelu' must be an integer from 1 to 8, got"),
        fewbit.scope(bits=lambda name, tensor: answer, min_bytes=0),
    ):
        F.gelu(x)


def test_exact_true_codes_only_what_is_lossless(x: Tensor) -> None:
    with fewbit.scope(exact=True, min_bytes=0) as memory:
        kept = four(x)
    assert outcome(memory)["gelu"] == (None, "exact=True, and its derivative is not two-valued")
    assert outcome(memory)["relu"] == (1, "")
    assert kept


def test_min_bytes_counts_bytes_of_the_tensor() -> None:
    for dtype, elements in ((torch.float32, 16384), (torch.bfloat16, 32768)):
        for n, bits in ((elements, 3), (elements - 1, None)):
            with fewbit.scope(min_bytes=65536) as memory:
                kept = [
                    F.gelu(torch.zeros(n, dtype=dtype, requires_grad=True) * 1),
                    F.relu(torch.ones(99999).requires_grad_() * 1),
                ]
            assert outcome(memory)["gelu"][0] == bits
            assert kept


def test_what_needs_no_gradient_is_not_even_counted(x: Tensor) -> None:
    with fewbit.scope(bits=None, min_bytes=0) as memory:
        F.gelu(torch.randn(64, 64))
        with torch.no_grad():
            F.gelu(x)
        with torch.inference_mode():
            F.gelu(x)
    assert memory.report().rows == ()


def test_parameters_are_kept() -> None:
    scale = nn.Parameter(torch.randn(64, 64))
    with pytest.warns(fewbit.FewbitWarning, match="a parameter"), fewbit.scope(min_bytes=0) as memory:
        y = F.softplus(scale)
    assert outcome(memory)["softplus"] == (None, "a parameter: the model keeps it anyway")
    assert y.requires_grad


def test_codes_that_would_be_no_smaller_are_not_made() -> None:
    x = torch.randn(1, requires_grad=True)
    with pytest.warns(fewbit.FewbitWarning, match="no smaller"), fewbit.scope(bits=8, min_bytes=0) as memory:
        y = F.gelu((x * 1).expand(1000))
    assert outcome(memory)["gelu"] == (None, "codes would be no smaller than its storage")
    y.sum().backward()
    expected = torch.autograd.grad(F.gelu(x).sum() * 1000, x)[0]
    torch.testing.assert_close(x.grad, expected)


class TestExclude:
    @pytest.fixture
    def model(self) -> nn.Module:
        return nn.ModuleDict(
            {
                "encoder": nn.Sequential(nn.Linear(64, 64), nn.GELU()),
                "head": nn.Sequential(nn.Linear(64, 64), nn.SiLU()),
            }
        )

    def kept(self, model: nn.Module, exclude: object) -> set[str]:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.parts = model

            def forward(self, x: Tensor) -> Tensor:
                return self.parts["head"](self.parts["encoder"](x))

        with fewbit.scope(bits=3, min_bytes=0, exclude=exclude) as memory:
            y = Model()(torch.randn(64, 64))
            F.tanh(y)
        assert y.requires_grad
        return {name for name, (bits, reason) in outcome(memory).items() if reason == "excluded" and bits is None}

    @pytest.mark.parametrize(
        ("exclude", "kept"),
        [
            ((), set()),
            ("parts.head", {"silu"}),
            (["parts.head.*"], {"silu"}),
            (["*.1"], {"gelu", "silu"}),
            (["parts"], {"gelu", "silu"}),
            ([nn.GELU], {"gelu"}),
            ([nn.ModuleDict], set()),
            ([nn.Sequential], {"gelu", "silu"}),
            ([lambda module: isinstance(module, nn.SiLU)], {"silu"}),
            pytest.param(
                ["nothing", nn.ReLU],
                set(),
                marks=pytest.mark.filterwarnings("ignore:exclude='nothing' names no module of Model"),
            ),
        ],
    )
    def test_a_module_and_all_inside_it_are_left_alone(self, model: nn.Module, exclude: object, kept: set[str]) -> None:
        assert self.kept(model, exclude) == kept

    def test_a_name_that_no_module_has_is_warned_of_once(self, model: nn.Module) -> None:
        scope = fewbit.scope(bits=3, min_bytes=0, exclude=["1.encodr", "1.head.*", nn.ReLU])
        net = nn.Sequential(nn.Identity(), Chain(model))
        train = scope(lambda: net(torch.randn(64, 64)).sum().backward())
        with pytest.warns(fewbit.FewbitWarning, match=r"exclude='1.encodr' names no module of Sequential"):
            train()
        train()  # a second warning would be an error

    def test_where_no_model_was_seen_no_name_is_warned_of(self, x: Tensor) -> None:
        with fewbit.scope(bits=3, min_bytes=0, exclude="head"):
            F.gelu(x).sum().backward()

    @pytest.mark.parametrize(
        "wrap",
        [
            nn.DataParallel,
            lambda net: wrapped("_orig_mod", net),
            lambda net: wrapped("_fsdp_wrapped_module", nn.DataParallel(net)),
            lambda net: nn.DataParallel(wrapped("_checkpoint_wrapped_module", net)),
        ],
        ids=["DataParallel", "compiled", "FSDP", "checkpoint"],
    )
    @pytest.mark.parametrize(
        ("exclude", "kept"), [("encoder", {"gelu"}), ("*.1", {"gelu", "silu"}), ("head.1", {"silu"})]
    )
    def test_a_name_is_that_of_the_module_in_a_wrapper(
        self, model: nn.Module, wrap: Callable[[nn.Module], nn.Module], exclude: str, kept: set[str]
    ) -> None:
        net = wrap(Chain(model))
        with fewbit.scope(bits=3, min_bytes=0, exclude=exclude) as memory:
            y = F.tanh(net(torch.randn(64, 64)))
        assert y.requires_grad
        assert {name for name, (bits, _) in outcome(memory).items() if bits is None} == kept

    @pytest.mark.parametrize("exclude", ["encoder", "decoder"])
    def test_a_module_that_several_call_is_left_alone_in_those_that_are(self, exclude: str) -> None:
        class Half(nn.Module):
            def __init__(self, act: nn.Module) -> None:
                super().__init__()
                self.fc, self.act = nn.Linear(16, 16), act

            def forward(self, x: Tensor) -> Tensor:
                out: Tensor = self.act(self.fc(x)).square()
                return out

        act = nn.SiLU()
        net = nn.Sequential(OrderedDict(encoder=Half(act), decoder=Half(act)))
        with fewbit.scope(bits=1, min_bytes=0, exclude=exclude) as memory:
            net.encoder(torch.randn(32, 16)).sum().backward()  # by itself, where it has no name
            net(torch.randn(32, 16))
        found = {row.bits: (row.calls, row.reason) for row in memory.report().rows}
        assert found == {1: (1, ""), None: (1, "excluded")}

    @pytest.mark.filterwarnings("ignore:fewbit_hooks.scope compressed nothing")
    @pytest.mark.parametrize(("exclude", "kept"), [("act", 2), ("first.1", 2), ("ac?", 1)])
    def test_a_modules_own_name_names_it_whoever_calls_it(self, exclude: str, kept: int) -> None:
        act = nn.SiLU()
        net = nn.Sequential(OrderedDict(act=act, first=nn.Sequential(nn.Linear(16, 16), act)))
        with fewbit.scope(bits=1, min_bytes=0, exclude=exclude) as memory:
            net(torch.randn(32, 16, requires_grad=True))
        assert sum(row.calls for row in memory.report().rows if row.reason == "excluded") == kept

    def test_a_predicate_may_go_by_the_mode(self) -> None:
        net = nn.Sequential(nn.Linear(16, 16), nn.SiLU())
        scope = fewbit.scope(bits=1, min_bytes=0, exclude=lambda module: not module.training)
        for training in (True, False, True):
            with scope as memory:
                y = net.train(training)(torch.randn(32, 16))
            assert [row.reason for row in memory.report().rows] == ([""] if training else ["excluded"])
            y.sum().backward()


def test_codebooks_of_several_parameters_are_used_for_each(x: Tensor) -> None:
    books = [fewbit.codebook("gelu", 8), fewbit.codebook("gelu", 7, approximate="tanh"), fewbit.codebook("elu", 6)]
    bare = dataclasses.replace(books[2], parameters={})  # a parameter that is not named has its default
    for given in ([*books[:2], bare], [bare, *books[1::-1]]):
        with fewbit.scope(bits=1, min_bytes=0, codebooks=given) as memory:
            F.gelu(x)
            F.gelu(x, approximate="tanh")
            F.elu(x)
        assert [row.bits for row in memory.report().rows] == [8, 7, 6]
    with pytest.raises(fewbit.FewbitValueError, match="two are of elu with the same parameters"):
        fewbit.scope(codebooks=[books[2], bare])
    with pytest.raises(fewbit.FewbitValueError, match="elu has no parameter 'slope'"):
        fewbit.scope(codebooks=dataclasses.replace(bare, parameters={"slope": 1.0}))


def test_codebooks_given_are_used_for_their_activation_and_parameters(x: Tensor) -> None:
    own = fewbit.codebook("gelu", 4, weight="normal")
    with fewbit.scope(bits=3, min_bytes=0, codebooks=[own]):
        y = F.gelu(x)
        tanh_form = F.gelu(x, approximate="tanh")
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, own.derivative(x.detach()), rtol=0, atol=5e-6)
    (grad,) = torch.autograd.grad(tanh_form.sum(), x)
    expected = fewbit.codebook("gelu", 3, approximate="tanh").derivative(x.detach())
    torch.testing.assert_close(grad, expected, rtol=0, atol=5e-6)


def levelled(name: str, *levels: float, **parameters: float) -> fewbit.Codebook:
    return fewbit.Codebook(name, 1, [0.0], levels, 0.0, False, parameters, "by hand", (-10.0, 10.0))


@pytest.mark.parametrize(
    ("book", "level"),
    [
        (levelled("gelu", -0.2, 1.0), "-0.2"),
        (levelled("silu", 0.0, 1.5), "1.5"),
        (levelled("elu", 0.5, 1.0, alpha=0.25), "0.5"),  # it jumps from 0.25 to 1
    ],
    ids=lambda given: getattr(given, "name", None),
)
def test_a_level_that_the_derivative_never_takes_is_refused(book: fewbit.Codebook, level: str) -> None:
    for engine in ("hooks", "fused"):  # one of which would take the nearest that there is, and the other the level
        with pytest.raises(fewbit.FewbitValueError, match=f"derivative of {book.name} is nowhere {level}, which is a"):
            fewbit.scope(codebooks=[book], engine=engine)


@pytest.mark.parametrize("name", [a.name for a in fewbit.activations() if not a.exact])
def test_the_derivative_takes_the_levels_of_every_optimal_codebook(name: str) -> None:
    given = {"elu": [{"alpha": 0.5}], "softplus": [{"beta": 5.0, "threshold": 1.0}, {"beta": 1000.0}]}.get(name, [])
    for parameters in ({}, *given):
        for weight in ("uniform", ("normal", 3.0, 0.1), ([1, 5, 2], [-4.0, -3.0, -2.9, 3.0])):
            books = [fewbit.codebook(name, bits, weight=weight, **parameters) for bits in (1, 2, 5)]
            for book in books:
                fewbit.scope(codebooks=book)  # does not raise


def test_parameters_that_change_at_every_call_do_not_cost_a_codebook_each(
    x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = _policy.OWN_CODEBOOKS
    monkeypatch.setattr(_policy, "_plans", {})
    monkeypatch.setattr(_policy, "_own_parameters", {})
    with fewbit.scope(bits=1, min_bytes=0) as memory:
        kept = [F.celu(x * 1, alpha=1.5 + i / 64) for i in range(limit + 3)]
    rows = {row.bits: row for row in memory.report().rows}
    assert (rows[1].calls, rows[None].calls) == (limit, 3)
    assert rows[None].reason == f"more than {limit} combinations of celu's parameters"
    assert kept


def test_plans_of_ever_new_limits_are_forgotten(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_policy, "MAX_PLANS", 8)
    monkeypatch.setattr(_policy, "_plans", {})
    with fewbit.scope(min_bytes=0):
        for i in range(30):
            torch.clamp(x * 1, -1, i / 30)
    assert len(_policy._plans) <= 8
