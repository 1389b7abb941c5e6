"""Recipes: origins, anchors and what is computed again from them."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fewbit_hooks as fewbit
from fewbit_hooks import _recipes
from fewbit_hooks._hooks import Kept
from fewbit_hooks._recipes import DEPTH, Computed, Geometry, Leaf, Recipe
from fewbit_hooks._replay import Autocast, replay


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """No test leaves an origin to the next; none finds one."""
    assert not _recipes._known.origins
    yield
    _recipes.forget()


@pytest.fixture
def x() -> Tensor:
    """A tensor of a graph, which some node keeps."""
    return anchored(torch.randn(8, 8, requires_grad=True) * 1.0)


def anchored(t: Tensor) -> Tensor:
    """The tensor, kept as long as it lives."""
    t.kept = Kept(t, "a node")
    _recipes.anchor(t, t.kept)
    return t


def noted(run: Callable[..., Tensor], *sources: Tensor) -> Tensor:
    y = run(*sources)
    _recipes.note(y, run, sources)
    return y


def recipe_of(t: Tensor) -> Recipe | None:
    origin = _recipes.find(t)
    return origin.recipe() if origin is not None else None


def value_of(t: Tensor) -> Tensor:
    recipe = recipe_of(t)
    assert recipe is not None
    return recipe.value()


# geometry


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t,
        lambda t: t.t(),
        lambda t: t[2:5],
        lambda t: t[:, ::3],
        lambda t: t.view(4, 16),
        lambda t: t[1].expand(5, 8),
        lambda t: t.unfold(1, 4, 2),
        lambda t: t[0, 0],
        lambda t: t[3:3],
    ],
)
def test_a_geometry_finds_the_view_in_another_storage_of_the_kind(view: Callable[[Tensor], Tensor]) -> None:
    t = torch.randn(8, 8)
    found = Geometry(view(t)).of(t.clone())
    assert torch.equal(found, view(t))
    assert (found.stride(), found.storage_offset()) == (view(t).stride(), view(t).storage_offset())


def test_geometries_differ_by_dtype_and_offset() -> None:
    t = torch.zeros(8, 8)
    assert Geometry(t) == Geometry(torch.ones(8, 8))
    assert Geometry(t) != Geometry(t.double())
    assert Geometry(t[:4]) != Geometry(t[4:])


# origins and anchors


def test_what_is_computed_from_an_anchor_has_a_recipe_of_one_step(x: Tensor) -> None:
    y = noted(torch.exp, x)
    assert torch.equal(value_of(y), y)
    assert value_of(y) is not y


def test_what_is_computed_from_something_that_nobody_keeps_has_none() -> None:
    h = torch.randn(8, 8, requires_grad=True) * 1.0
    assert recipe_of(noted(torch.exp, h)) is None


def test_a_parameter_needs_no_anchor(x: Tensor) -> None:
    weight = nn.Parameter(torch.randn(8))
    y = noted(torch.mul, x, weight)
    assert torch.equal(value_of(y), y)


def test_a_chain_is_followed_to_its_bound_and_no_further(x: Tensor) -> None:
    y = x
    for _ in range(DEPTH):
        y = noted(torch.sin, y)
    assert torch.equal(value_of(y), y)
    assert recipe_of(noted(torch.sin, y)) is None


@pytest.mark.parametrize(
    "view", [lambda t: t.t(), lambda t: t[:, :4], lambda t: t[3:].clone()[1:], lambda t: t[2].expand(8, 8)]
)
def test_a_source_that_is_a_view_is_rebuilt(view: Callable[[Tensor], Tensor], x: Tensor) -> None:
    y = noted(torch.exp, x)
    v = view(y)
    z = noted(torch.sin, v)
    if recipe_of(z) is not None:  # a copy has no origin
        assert torch.equal(value_of(z), z)
    assert (recipe_of(z) is None) == (v.untyped_storage()._cdata != y.untyped_storage()._cdata)


def test_transposed_factors_of_a_square_product_are_not_mixed_up(x: Tensor) -> None:
    a, b = noted(torch.exp, x), noted(torch.sin, x)
    z = noted(torch.mul, a, b.t())
    assert torch.equal(value_of(z), z)


def test_a_view_of_an_anchor_is_rebuilt(x: Tensor) -> None:
    y = noted(torch.exp, x.t()[1:])
    assert torch.equal(value_of(y), y)


def test_a_freed_source_is_not_taken_for_what_lies_at_its_address_now() -> None:
    results = []
    for _ in range(100):
        h = torch.randn(8, 8, requires_grad=True) * 1.0
        results.append(noted(torch.exp, h))
        del h
        other = torch.randn(8, 8, requires_grad=True) * 1.0
        anchored(other)
        results.append(other)  # stays
    assert [recipe_of(y) for y in results] == [None] * 200


def test_an_anchor_that_is_gone_is_none(x: Tensor) -> None:
    h = x * 2.0
    anchored(h)
    y = noted(torch.exp, h)
    del h
    gc.collect()
    assert recipe_of(y) is None


def test_what_was_changed_in_place_since_has_no_recipe(x: Tensor) -> None:
    y = noted(torch.exp, x)
    with torch.no_grad():
        y.mul_(2.0)
    assert _recipes.find(y) is None


def test_what_is_made_of_a_source_that_is_changed_in_place_has_no_recipe(x: Tensor) -> None:
    y = noted(torch.exp, x)
    x.add_(1.0)
    assert recipe_of(y) is None


def test_what_is_detached_has_no_recipe(x: Tensor) -> None:
    y = noted(torch.exp, x)
    assert recipe_of(y.view(64)) is not None
    assert recipe_of(y.detach()) is None
    assert recipe_of(y.detach().requires_grad_()) is None


@pytest.mark.parametrize("what", ["result", "source"])
def test_a_tensor_whose_memory_was_given_away_has_no_recipe(what: str, x: Tensor) -> None:
    y = noted(torch.exp, x)
    _recipes.expose((y if what == "result" else x).untyped_storage())
    assert recipe_of(y) is None


def test_what_shares_the_storage_of_its_source_is_not_noted(x: Tensor) -> None:
    y = noted(lambda t: t.view(64), x)
    assert _recipes.find(y) is None


def test_origins_hold_no_tensor(x: Tensor) -> None:
    h = x * 2.0
    anchored(h)
    y = noted(torch.exp, h)
    dead = weakref.ref(h), weakref.ref(y)
    gc.disable()
    try:
        del h, y
        assert [ref() for ref in dead] == [None, None]
    finally:
        gc.enable()


def test_registries_stay_bounded_when_tensors_come_and_go(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_recipes, "KNOWN", 64)
    _recipes._known.purge_at = 64
    for _ in range(1000):
        y = noted(torch.exp, x)
        anchored(y)
    assert len(_recipes._known.origins) + len(_recipes._known.anchors) <= 128


def test_each_thread_has_its_own(x: Tensor) -> None:
    y = noted(torch.exp, x)
    found = []
    thread = threading.Thread(target=lambda: found.append(_recipes.find(y)))
    thread.start()
    thread.join()
    assert found == [None]
    assert _recipes.find(y) is not None


# leaves


def test_a_leaf_that_was_changed_says_so_and_what_to_do() -> None:
    t = torch.zeros(2, 3)
    leaf = Leaf(t, t._version)
    assert torch.equal(leaf.value(), t)
    t.add_(1.0)
    with pytest.raises(
        fewbit.FewbitError, match=r"shape \[2, 3\].*at version 1, expected 0.*out-of-place.*scope\(bits=None\)"
    ):
        leaf.value()


def test_a_leaf_keeps_no_graph(x: Tensor) -> None:
    y = noted(torch.exp, x)
    parts = recipe_of(y)._parts
    assert [type(part) for part in parts] == [Leaf]
    assert all(part.value().grad_fn is None for part in parts)


# recipes


def counted(calls: list[int]) -> Callable[[Tensor], Tensor]:
    def run(t: Tensor) -> Tensor:
        calls.append(1)
        return torch.exp(t)

    return run


class Ask(torch.autograd.Function):
    """A node that asks for values in backward."""

    @staticmethod
    def forward(ctx, x: Tensor, recipe: Recipe, times: int) -> Tensor:
        ctx.ask = recipe, times
        return x * 1.0

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        recipe, times = ctx.ask
        for _ in range(times):
            recipe.value()
        return grad, None, None


def backward_that_asks(recipe: Recipe, times: int) -> None:
    Ask.apply(torch.zeros(1, requires_grad=True), recipe, times).sum().backward()


def test_several_users_compute_it_once_and_nobody_holds_it_after(x: Tensor) -> None:
    calls: list[int] = []
    y = noted(counted(calls), x)
    recipe, before = recipe_of(y), len(calls)
    for _ in range(3):
        recipe.add_user()
    backward_that_asks(recipe, 3)
    assert len(calls) - before == 1
    assert recipe._result is None


def test_a_single_user_has_nothing_held_for_it(x: Tensor) -> None:
    recipe = recipe_of(noted(torch.exp, x))
    recipe.add_user()
    held = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, t: Tensor) -> Tensor:
            return t * 1.0

        @staticmethod
        def backward(ctx, grad: Tensor) -> Tensor:
            recipe.value()
            held.append(recipe._result)
            return grad

    Look.apply(torch.zeros(1, requires_grad=True)).sum().backward()
    assert held == [None]


def test_a_user_that_never_asks_leaves_nothing_held_after_the_backward(x: Tensor) -> None:
    calls: list[int] = []
    recipe = recipe_of(noted(counted(calls), x))
    before = len(calls)
    for _ in range(3):
        recipe.add_user()
    for backwards in (1, 2):
        backward_that_asks(recipe, 2)
        assert recipe._result is None
        assert len(calls) - before == backwards


def test_outside_of_a_backward_nothing_is_held(x: Tensor) -> None:
    recipe = recipe_of(noted(torch.exp, x))
    recipe.add_user()
    recipe.add_user()
    recipe.value()
    assert recipe._result is None


def test_in_a_compiled_backward_which_tells_nobody_of_its_end_nothing_is_held(
    x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    y = noted(counted(calls), x)
    recipe, before = recipe_of(y), len(calls)
    for _ in range(3):
        recipe.add_user()
    monkeypatch.setattr("torch._dynamo.compiled_autograd.in_compiled_autograd_region", True)
    backward_that_asks(recipe, 2)
    assert len(calls) - before == 2


def test_what_two_ask_for_is_one_recipe(x: Tensor) -> None:
    y = noted(torch.exp, x)
    assert recipe_of(y) is recipe_of(y.view(64))


def test_a_recipe_in_a_recipe_counts_as_its_user(x: Tensor) -> None:
    y = noted(torch.exp, x)
    outer = recipe_of(noted(torch.sin, y))
    (part,) = outer._parts
    assert isinstance(part, Computed)
    assert part.recipe._users == 1


def test_what_comes_back_with_other_strides_is_an_error(x: Tensor) -> None:
    y = x.exp()
    _recipes.note(y, lambda t: t.exp().t(), [x])
    with pytest.raises(fewbit.FewbitError, match=r"strides \(1, 8\), it had \(8, 1\)"):
        value_of(y)


def test_a_value_is_had_on_any_thread(x: Tensor) -> None:
    y = noted(torch.exp, x)
    recipe, found = recipe_of(y), []
    threads = [threading.Thread(target=lambda: found.append(recipe.value())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(torch.equal(v, y) for v in found)


def test_a_value_has_no_graph_and_no_mode_sees_it_computed(x: Tensor) -> None:
    y = noted(torch.exp, x)
    recipe = recipe_of(y)
    seen = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        value = recipe.value()
    assert torch.exp not in seen
    assert value.grad_fn is None
    assert not value.requires_grad


# replay


@pytest.mark.parametrize("forward", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_what_is_computed_again_has_the_forwards_autocast(forward: bool, backward: bool, x: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=forward):
        y = noted(torch.mm, x, x)
        recipe = recipe_of(y)
    with torch.autocast("cpu", torch.bfloat16, enabled=backward):
        value = recipe.value()
    assert value.dtype == (torch.bfloat16 if forward else torch.float32)
    assert torch.equal(value, y)


def test_replay_gives_autocast_and_grad_mode_back() -> None:
    with torch.autocast("cpu", torch.float16), torch.no_grad():
        before = Autocast.of("cpu")
        with replay(Autocast("cpu", True, torch.bfloat16), grad=True):
            assert torch.get_autocast_dtype("cpu") == torch.bfloat16
            assert torch.is_grad_enabled()
        assert Autocast.of("cpu") == before
        assert not torch.is_grad_enabled()


def test_replay_leaves_no_cast_of_a_weight_to_a_forward_around_it() -> None:
    weight, x = nn.Parameter(torch.randn(8, 8)), torch.randn(8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        with replay(Autocast("cpu", True, torch.float16), grad=False):
            F.linear(x, weight)
        assert F.linear(x, weight).requires_grad


def test_forgetting_empties_both_registries(x: Tensor) -> None:
    noted(torch.exp, x)
    _recipes.forget()
    assert not _recipes._known.origins
    assert not _recipes._known.anchors
