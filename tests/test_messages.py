"""The wording of errors: what was given, what is allowed, what now."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fewbit_hooks as fewbit

MESSAGES = [
    ({"bits": 0}, ValueError, "bits must be an integer from 1 to 8, got 0"),
    ({"bits": 9}, ValueError, "bits must be an integer from 1 to 8, got 9"),
    ({"bits": 2.5}, TypeError, "bits must be an integer from 1 to 8, got 2.5"),
    ({"bits": "3"}, TypeError, "bits must be an integer from 1 to 8, got '3'"),
    ({"bits": True}, TypeError, "bits must be an integer from 1 to 8, got True"),
    ({"bits": [3]}, TypeError, "bits must be an integer from 1 to 8, got [3]"),
    ({"bits": nn.ReLU()}, TypeError, "bits must be an integer from 1 to 8, got ReLU()"),
    ({"bits": {"gelu": 9}}, ValueError, "bits['gelu'] must be an integer from 1 to 8, got 9"),
    ({"bits": {"default": "3"}}, TypeError, "bits['default'] must be an integer from 1 to 8, got '3'"),
    ({"min_bytes": -1}, ValueError, "min_bytes must be an integer of 0 or more, got -1"),
    ({"min_bytes": 1.5}, TypeError, "min_bytes must be an integer of 0 or more, got 1.5"),
    ({"min_bytes": True}, TypeError, "min_bytes must be an integer of 0 or more, got True"),
    ({"exact": 1}, TypeError, "exact must be True or False, got 1"),
    ({"engine": "triton"}, ValueError, "engine must be 'hooks', 'fused' or 'auto', got 'triton'"),
    (
        {"exclude": [3]},
        TypeError,
        "exclude takes names of modules (glob patterns), nn.Module classes and predicates, got 3",
    ),
    *[
        (
            {"exclude": exclude},
            TypeError,
            "exclude takes names of modules (glob patterns), nn.Module classes and predicates, got ReLU()",
        )
        for exclude in (nn.ReLU(), [nn.ReLU()])
    ],
    ({"codebooks": [3]}, TypeError, "codebooks takes Codebook objects, got 3"),
    ({"codebooks": "gelu"}, TypeError, "codebooks takes Codebook objects, got 'gelu'"),
    (
        {"codebooks": {"silu": fewbit.codebook("gelu", 3)}},
        ValueError,
        "codebooks: 'silu' maps to a codebook of 'gelu'",
    ),
]


@pytest.mark.parametrize(("arguments", "kind", "message"), MESSAGES, ids=lambda value: str(value)[:40])
def test_a_wrong_argument_of_a_scope(arguments, kind, message: str) -> None:
    for make in (fewbit.scope, fewbit.enable):
        with pytest.raises(fewbit.FewbitError) as raised:
            make(**arguments)
        assert isinstance(raised.value, kind)
        assert str(raised.value) == message
        assert fewbit.active() is None


def test_an_unknown_name_in_a_mapping_lists_the_known_ones() -> None:
    with pytest.raises(fewbit.FewbitError, match=r"no activation 'gleu'. Known activations: .*gelu.*register"):
        fewbit.scope(bits={"gleu": 3})


def test_what_an_engine_needs_and_does_not_find_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewbit_hooks.ops.is_installed", lambda package: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for make in (fewbit.scope, fewbit.enable):
        with pytest.raises(fewbit.FewbitError) as raised:
            make(engine="fused")
        assert str(raised.value) == (
            "engine='fused' needs the package triton on CUDA, which is not installed. Install it (pip install triton), "
            "or use 'auto' or 'hooks'."
        )
        assert fewbit.active() is None
    fewbit.scope(engine="auto")


def test_double_backward_names_the_activation_and_the_remedy() -> None:
    x = torch.randn(100, requires_grad=True)
    with fewbit.scope(min_bytes=0):
        y = torch.nn.functional.silu(x).sum()
    with pytest.raises(fewbit.FewbitError) as raised:
        torch.autograd.grad(y, x, create_graph=True)
    assert str(raised.value) == (
        "double backward (create_graph=True) through silu, whose saved tensor was replaced by few-bit codes: "
        "its second derivative cannot be had from them. Run the forward of that region under "
        "`with fewbit_hooks.scope(bits=None):` to keep it exact."
    )


def test_a_kept_tensor_changed_in_place_names_the_activation_and_the_remedy() -> None:
    h = torch.full((64,), float("nan"), requires_grad=True) * 1  # NaN: hardtanh is kept
    with pytest.warns(fewbit.FewbitWarning, match="holds NaN"), fewbit.scope(min_bytes=0):
        y = nn.functional.hardtanh(h)
    h.zero_()
    with pytest.raises(RuntimeError) as raised:
        y.sum().backward()
    assert isinstance(raised.value, fewbit.FewbitError)
    assert str(raised.value) == (
        "a tensor that hardtanh needs for its gradient, of shape [64], has been modified by an inplace operation: "
        "it is at version 1, expected 0. "
        "Replace the inplace operation by its out-of-place form, or clone the tensor first."
    )


def test_a_scope_that_decorates_without_parentheses_says_what_is_missing() -> None:
    @fewbit.scope
    def step(batch: object) -> object:
        return batch

    with pytest.raises(fewbit.FewbitError) as raised:
        step(torch.zeros(2, 3))
    assert str(raised.value) == (
        "a scope decorates functions, got a tensor of shape [2, 3]; the decorator is @scope(), with parentheses"
    )


def test_the_repr_of_a_scope_says_what_is_not_the_default() -> None:
    assert repr(fewbit.scope()) == "fewbit_hooks.scope(bits=3, min_bytes=65536)"
    given = fewbit.scope(exact=True, recompute=True, engine="fused", exclude="head")
    assert repr(given) == (
        "fewbit_hooks.scope(bits=3, min_bytes=65536, exact=True, recompute=True, engine='fused', exclude=('head',))"
    )
