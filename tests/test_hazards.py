"""The hazards of saved-tensor hooks (H1 to H15), and the rules that the library made of them (R1 to R13).

Each test is something that goes wrong, silently as often as not, when hooks are used in the obvious way. Checkpointing,
compilation, threads and other libraries (H5 to H8, H15) have `test_interop.py`.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

import fewbit_hooks as fewbit
from fewbit_hooks._hooks import Kept, Packed

from .conftest import quiet

ALL = {a.name: a for a in fewbit.activations()}
PARAMETERS = {name: dict(a.parameters) for name, a in ALL.items()} | {"clamp": {"min": -1.0, "max": 1.0}}

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
"""All of torch.jit is deprecated, and torch's own forward-mode AD loads some of it."""

IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh_": torch.tanh_,
    "sigmoid_": torch.sigmoid_,
    "relu_": torch.relu_,
    "silu_": lambda h: F.silu(h, inplace=True),
    "elu_": lambda h: F.elu(h, inplace=True),
    "hardswish_": lambda h: F.hardswish(h, inplace=True),
    "hardtanh_": lambda h: F.hardtanh(h, inplace=True),
}


def call(name: str) -> Callable[[Tensor], Tensor]:
    """An activation with its default parameters, or one of the in-place forms."""
    if name in IN_PLACE:
        return IN_PLACE[name]
    return lambda h: ALL[name].function(h, **PARAMETERS[name])


def gradient(function: Callable[[Tensor], Tensor], x: Tensor, bits: int | None = 3) -> Tensor:
    """The gradient of the sum of function(x), under a scope (`bits=None` is stock's)."""
    x = x.detach().requires_grad_()
    with fewbit.scope(bits=bits, min_bytes=0):
        y = function(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    return slope


def data(y: Tensor, name: str = "_raw_saved_self") -> Any:
    """What autograd really holds in a node."""
    return getattr(y.grad_fn, name).data


def reasons(memory: fewbit.scope) -> set[str]:
    return {row.reason for row in memory.report().rows}


@pytest.fixture
def x() -> Tensor:
    return torch.randn(64, 33, requires_grad=True)


# H1: a tensor that passes a hook loses autograd's check that nobody overwrote it


def test_h1_autograd_still_checks_what_the_scope_has_no_business_with(x: Tensor) -> None:
    with fewbit.scope(bits=3, min_bytes=0):
        b = F.gelu(x)
        y = b * b
        b.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("name", ["gelu", "silu", "softplus", "hardswish", "logsigmoid", "relu6", "hardtanh"])
def test_h1_codes_are_snapshots_an_input_overwritten_later_does_not_matter(name: str, x: Tensor) -> None:
    with fewbit.scope(bits=3, min_bytes=0):
        h = x * 1
        y = call(name)(h)
        h.add_(1)
    y.sum().backward()
    assert torch.equal(x.grad, gradient(call(name), x))


@pytest.mark.parametrize("name", ["tanh", "sigmoid", "relu"])
def test_h1_codes_are_snapshots_an_output_overwritten_later_does_not_matter(name: str, x: Tensor) -> None:
    with fewbit.scope(bits=3, min_bytes=0):
        y = call(name)(x * 1)
        y.mul_(2)
    y.sum().backward()
    assert torch.equal(x.grad, 2 * gradient(call(name), x))


def test_h1_a_kept_tensor_is_checked_as_autograd_would_have() -> None:
    small = torch.randn(1, 64, requires_grad=True)
    h = small * 1
    with pytest.warns(fewbit.FewbitWarning, match="no smaller"), fewbit.scope(bits=3, min_bytes=0):
        y = F.gelu(h.expand(64, 64))  # its storage is smaller than its codes
    assert isinstance(data(y), Kept)
    y.sum().backward(retain_graph=True)
    torch.testing.assert_close(small.grad, 64 * gradient(F.gelu, small, bits=None))
    h.add_(1)
    with pytest.raises(fewbit.FewbitRuntimeError, match=r"gelu needs .* modified by an inplace operation"):
        y.sum().backward()


def test_h1_a_call_kept_by_the_settings_has_no_hooks_and_stocks_own_check(x: Tensor) -> None:
    with fewbit.scope(bits={"silu": 3}, min_bytes=0):
        h = x * 1
        y = F.gelu(h)
        F.silu(h)
        h.add_(1)
    assert isinstance(data(y), Tensor)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# H2: pack must not modify its input


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_h2_packing_changes_neither_input_nor_version_nor_output(name: str, dtype: torch.dtype, x: Tensor) -> None:
    h = x.detach().to(dtype).requires_grad_()
    before, version = h.detach().clone(), h._version
    expected = call(name)(h)
    with fewbit.scope(bits=2, min_bytes=0):
        y = call(name)(h)
    assert h._version == version
    assert torch.equal(h, before)
    assert torch.equal(y, expected)


# H3: a packed object that holds the node's own output is a cycle that nothing collects


@contextlib.contextmanager
def no_gc() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.parametrize("name", [*ALL, *IN_PLACE])
def test_h3_a_forward_without_backward_leaves_nothing_alive(name: str, x: Tensor) -> None:
    call(name)(x * 1)
    with no_gc(), fewbit.scope(bits=3, min_bytes=0):
        h = x * 1
        y = call(name)(h)
        storages = [StorageWeakRef(h.untyped_storage()), StorageWeakRef(y.untyped_storage())]
        del h, y
        assert all(s.expired() for s in storages)


@pytest.mark.parametrize("name", ["hardtanh", "hardshrink", "relu6", "softshrink"])
def test_h3_a_kept_tensor_is_detached_and_makes_no_cycle(name: str) -> None:
    x = torch.full((64, 64), math.nan, requires_grad=True)
    with no_gc():
        with pytest.warns(fewbit.FewbitWarning, match="NaN"), fewbit.scope(bits=3, min_bytes=0):
            y = call(name)(x * 1)
        assert isinstance(data(y), Kept)
        assert data(y).tensor.grad_fn is None
        storage = StorageWeakRef(y.untyped_storage())
        del y
        assert storage.expired()


@pytest.mark.parametrize("name", [*ALL, *IN_PLACE])
def test_h3_a_packed_object_refers_to_no_tensor_that_carries_a_gradient(name: str, x: Tensor) -> None:
    packed = []
    with fewbit.scope(bits=3, min_bytes=0):
        y = call(name)(x * 1)
    nodes = [y.grad_fn]
    while nodes:
        node = nodes.pop()
        packed += [getattr(node, n).data for n in dir(node) if n.startswith("_raw_saved_")]
        nodes += [n for n, _ in node.next_functions if n is not None]
    packed = [p for p in packed if isinstance(p, (Packed, Kept))]
    assert packed
    for p in packed:
        assert [t for t in gc.get_referents(p) if isinstance(t, Tensor) and t.requires_grad] == []


# H4: grad-like transforms of torch.func raise under hooks

TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "grad": lambda f, v: torch.func.grad(lambda t: f(t).sum())(v),
    "grad_and_value": lambda f, v: torch.func.grad_and_value(lambda t: f(t).sum())(v),
    "vjp": lambda f, v: torch.func.vjp(f, v)[1](torch.ones_like(v)),
    "jacrev": lambda f, v: torch.func.jacrev(f)(v),
    "jacfwd": lambda f, v: torch.func.jacfwd(f)(v),
    "hessian": lambda f, v: torch.func.hessian(lambda t: f(t).sum())(v),
    "vmap": lambda f, v: torch.func.vmap(f)(v),
    "vmap of grad": lambda f, v: torch.func.vmap(torch.func.grad(lambda t: f(t).sum()))(v),
    "grad of grad": lambda f, v: torch.func.grad(lambda t: torch.func.grad(lambda s: f(s).sum())(t).sum())(v),
}


@pytest.mark.parametrize("name", ["gelu", "tanh", "relu", "softsign"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_h4_torch_func_gives_what_stock_gives_and_the_report_says_so(transform: str, name: str) -> None:
    v = torch.randn(4, 8)
    expected = TRANSFORMS[transform](call(name), v)
    with pytest.warns(fewbit.FewbitWarning, match="torch.func"), fewbit.scope(bits=1, min_bytes=0) as memory:
        result = TRANSFORMS[transform](call(name), v)
    torch.testing.assert_close(result, expected, rtol=0, atol=0)
    assert reasons(memory) == {"inside a torch.func transform"}


@pytest.mark.parametrize("transform", ["grad", "vjp", "hessian"])
def test_h4_a_scope_opened_inside_the_transformed_function_keeps_exact_too(transform: str) -> None:
    v = torch.randn(4, 8)

    def inside(t: Tensor) -> Tensor:
        with fewbit.scope(bits=1, min_bytes=0):
            return F.gelu(t)

    with pytest.warns(fewbit.FewbitWarning, match="torch.func"):
        result = TRANSFORMS[transform](inside, v)
    torch.testing.assert_close(result, TRANSFORMS[transform](F.gelu, v), rtol=0, atol=0)


def test_h4_vmap_of_what_requires_grad_has_stocks_gradient(x: Tensor) -> None:
    expected = gradient(torch.vmap(F.gelu), x, bits=None)
    with pytest.warns(fewbit.FewbitWarning, match="torch.func"):
        assert torch.equal(gradient(torch.vmap(F.gelu), x, bits=1), expected)


def test_h4_coding_goes_on_behind_a_transform(x: Tensor) -> None:
    with fewbit.scope(bits=3, min_bytes=0):
        torch.func.grad(lambda t: F.gelu(t).sum())(x.detach())
        assert isinstance(data(F.gelu(x)), Packed)


@pytest.mark.parametrize("name", ["gelu", "tanh", "relu", "softsign"])
def test_h4_forward_mode_is_stocks(name: str) -> None:
    v, tangent = torch.randn(2, 64)

    def forward_mode() -> Tensor:
        with torch.autograd.forward_ad.dual_level():
            y = call(name)(torch.autograd.forward_ad.make_dual(v, tangent))
            return torch.autograd.forward_ad.unpack_dual(y).tangent

    expected = forward_mode()
    with pytest.warns(fewbit.FewbitWarning), fewbit.scope(bits=1, min_bytes=0):
        assert torch.equal(forward_mode(), expected)


@pytest.mark.parametrize("name", ["gelu", "tanh", "relu"])
def test_h4_forward_mode_of_a_tensor_that_requires_grad_is_stocks(name: str, x: Tensor) -> None:
    tangent = torch.randn_like(x)

    def forward_mode() -> Tensor:
        with torch.autograd.forward_ad.dual_level():
            y = call(name)(torch.autograd.forward_ad.make_dual(x, tangent))
            return torch.autograd.forward_ad.unpack_dual(y).tangent.detach()

    expected = forward_mode()
    with pytest.warns(fewbit.FewbitWarning), fewbit.scope(bits=1, min_bytes=0):
        assert torch.equal(forward_mode(), expected)


# H7, R6: the innermost hooks win, and the others see nothing


def test_h7_hooks_entered_inside_the_scope_get_the_true_tensor(x: Tensor) -> None:
    seen: list[Tensor] = []
    with (
        pytest.warns(fewbit.FewbitWarning, match="inside other saved-tensor hooks"),
        fewbit.scope(bits=1, min_bytes=0) as memory,
        saved_tensors_hooks(lambda t: seen.append(t.detach()) or t.detach(), lambda t: t),
    ):
        y = F.gelu(x)
    y.sum().backward()
    assert torch.equal(seen[0], x)
    assert torch.equal(x.grad, gradient(F.gelu, x, bits=None))
    assert reasons(memory) == {"inside other saved-tensor hooks"}


def test_h7_hooks_entered_outside_the_scope_see_the_other_tensors_and_the_codes_of_the_activations(x: Tensor) -> None:
    seen: list[Tensor] = []
    theirs = saved_tensors_hooks(lambda t: seen.append(t.detach()) or t.detach(), lambda t: t)
    with theirs, fewbit.scope(bits=3, min_bytes=0):
        h = x * 2
        y = F.gelu(h)
        z = y * y
    assert isinstance(data(y), Packed)
    codes, *others = seen
    assert (codes.dtype, codes.shape) == (torch.uint8, (h.numel() * 3 // 8,))
    assert len(others) == 2
    assert all(torch.equal(t, y) for t in others)
    z.sum().backward()
    torch.testing.assert_close(x.grad, 2 * (2 * y).detach() * gradient(F.gelu, h))


# H9, R5: the second derivative cannot be had from codes


@pytest.mark.parametrize("name", ["gelu", "tanh", "relu", "softsign", "logsigmoid"])
def test_h9_double_backward_says_which_activation_and_what_to_do(name: str, x: Tensor) -> None:
    with fewbit.scope(bits=3, min_bytes=0):
        y = call(name)(x * 1)
    with pytest.raises(fewbit.FewbitError, match=rf"create_graph=True\) through {name}.*scope\(bits=None\)"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@pytest.mark.parametrize("keep", ["nested scope", "mapping"])
def test_h9_a_gradient_penalty_works_in_a_region_kept_exact(keep: str, x: Tensor) -> None:
    def penalty(inner: Any) -> Tensor:
        leaf = x.detach().requires_grad_()
        with inner:
            y = F.silu(leaf)
        (slope,) = torch.autograd.grad(y.sum(), leaf, create_graph=True)
        slope.square().sum().backward()
        return leaf.grad

    expected = penalty(contextlib.nullcontext())
    with fewbit.scope(bits=None if keep == "nested scope" else {"gelu": 3}, min_bytes=0) as memory:
        inner = fewbit.scope(bits=None) if keep == "nested scope" else contextlib.nullcontext()
        F.gelu(x)
        result = penalty(inner)
        memory._warned = True  # with bits=None there is nothing to compress
    assert torch.equal(result, expected)


def test_h9_backward_with_create_graph_inside_a_scope_of_exact_forward_is_stocks(x: Tensor) -> None:
    y = F.silu(x)
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (expected,) = torch.autograd.grad(slope.sum(), x)
    y = F.silu(x)
    with fewbit.scope(bits=None):
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        (result,) = torch.autograd.grad(slope.sum(), x)
    assert torch.equal(result, expected)


# H10, R4: unpack is called more than once, in any order, on any thread, at any time


def test_h10_reading_a_saved_tensor_outside_a_backward_works_twice(x: Tensor) -> None:
    with fewbit.scope(bits=3, min_bytes=0):
        y = F.gelu(x)
        inside = y.grad_fn._saved_self
    first, second = y.grad_fn._saved_self, y.grad_fn._saved_self
    assert torch.equal(first, second)
    assert torch.equal(first, inside)
    assert first.unique().numel() <= 8
    y.sum().backward()
    assert torch.equal(x.grad, gradient(F.gelu, x))


@pytest.mark.parametrize("name", ["gelu", "tanh", "relu", "softsign", "logsigmoid", "silu_"])
def test_h10_two_backwards_through_a_retained_graph_are_equal(name: str, x: Tensor) -> None:
    with fewbit.scope(bits=3, min_bytes=0):
        y = call(name)(x * 1).sum()
    (first,) = torch.autograd.grad(y, x, retain_graph=True)
    (second,) = torch.autograd.grad(y, x)
    assert torch.equal(first, second)


def test_h10_a_second_backward_without_retain_graph_is_stocks_error(x: Tensor) -> None:
    with fewbit.scope(bits=3, min_bytes=0):
        y = F.gelu(x).sum()
    y.backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()


def test_h10_two_losses_may_be_differentiated_in_either_order(x: Tensor) -> None:
    functions = F.gelu, torch.tanh
    results = []
    for order in (0, 1), (1, 0):
        with fewbit.scope(bits=3, min_bytes=0):
            losses = [f(x * 1).sum() for f in functions]
        slopes = {i: torch.autograd.grad(losses[i], x)[0] for i in order}
        results.append(slopes)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert torch.equal(results[0][0], gradient(F.gelu, x))


def test_h10_backward_runs_on_another_thread(x: Tensor) -> None:
    with fewbit.scope(bits=3, min_bytes=0):
        y = F.gelu(x).sum()
        thread = threading.Thread(target=y.backward)
        thread.start()
        thread.join()
    assert torch.equal(x.grad, gradient(F.gelu, x))


def test_h10_two_threads_unpack_one_graph_at_once(x: Tensor) -> None:
    with fewbit.scope(bits=3, min_bytes=0):
        y = F.gelu(x).sum()
    slopes: list[Tensor] = []
    threads = [
        threading.Thread(target=lambda: slopes.append(torch.autograd.grad(y, x, retain_graph=True)[0]))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(slopes) == 4
    assert all(torch.equal(s, gradient(F.gelu, x)) for s in slopes)


# H11: pack does not know its operation


def test_h11_only_recognised_calls_are_coded_even_where_they_save_the_same_tensor(x: Tensor) -> None:
    with fewbit.scope(bits=1, min_bytes=0):
        h = x * 1
        y, z = F.gelu(h), h * h
        exponential = h.exp()
    assert isinstance(data(y), Packed)
    assert data(z) is h or torch.equal(data(z), h)
    assert isinstance(data(exponential, "_raw_saved_result"), Tensor)
    (slope,) = torch.autograd.grad(z.sum(), h)
    assert torch.equal(slope, 2 * h)


def test_h11_two_activations_of_one_tensor_each_have_their_own_gradient(x: Tensor) -> None:
    with fewbit.scope(bits=3, min_bytes=0):
        h = x * 1
        y, z = F.gelu(h), F.silu(h)
        (y.sum() + z.sum()).backward()
    torch.testing.assert_close(x.grad, gradient(F.gelu, x) + gradient(F.silu, x))


# H12, R9: what unpack returns has the saved tensor's shape, strides, dtype and device

LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "contiguous": lambda: torch.randn(4, 6, 5, 7),
    "channels_last": lambda: torch.randn(4, 6, 5, 7).to(memory_format=torch.channels_last),
    "channels_last_3d": lambda: torch.randn(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d),
    "transposed": lambda: torch.randn(33, 65).t(),
    "permuted": lambda: torch.randn(3, 5, 7).permute(2, 0, 1),
    "every other": lambda: torch.randn(64, 66)[:, ::2],
    "offset": lambda: torch.randn(4097)[1:],
    "flipped": lambda: torch.randn(65).flip(0),
    "no elements": lambda: torch.randn(0, 5),
    "0-d": lambda: torch.randn(()),
    "one element": lambda: torch.randn(1),
    "expanded": lambda: torch.randn(64, 1).expand(64, 2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_h12_any_layout_and_dtype_comes_back_as_it_was(layout: str, dtype: torch.dtype) -> None:
    v = LAYOUTS[layout]()
    v = torch.empty_strided(v.shape, v.stride(), dtype=dtype).copy_(v) if layout != "expanded" else v.to(dtype)
    v.requires_grad_()
    stock = F.gelu(v)
    opened = fewbit.scope(bits=3, min_bytes=0)
    opened._warned = True  # one without elements has nothing to compress
    with opened:
        y = F.gelu(v)
    saved = y.grad_fn._saved_self
    assert torch.equal(y, stock)
    assert (saved.shape, saved.dtype, saved.device) == (v.shape, v.dtype, v.device)
    if v.is_contiguous() or v.is_contiguous(memory_format=torch.preserve_format) or layout.startswith("channels"):
        assert saved.stride() == v.stride()
    y.backward(torch.ones_like(y))
    assert v.grad.shape == v.shape
    levels = fewbit.codebook("gelu", 3).derivative(v.detach().double())
    torch.testing.assert_close(v.grad.double(), levels, rtol=0, atol={2: 6e-3, 4: 1e-5, 8: 1e-5}[v.element_size()])


@pytest.mark.slow
def test_h12_more_than_2_to_the_31_elements() -> None:
    v = torch.zeros(2**31 + 9, dtype=torch.bfloat16)
    v[-9:] = torch.linspace(-4, 4, 9)
    v.requires_grad_()
    with fewbit.scope(bits=2):
        y = F.gelu(v)
    y[-9:].sum().backward()
    levels = fewbit.codebook("gelu", 2).derivative(v.detach()[-9:])
    torch.testing.assert_close(v.grad[-9:], levels, rtol=0, atol=6e-3)


# H13: backward after the scope is gone


def test_h13_backward_runs_after_the_scope_has_been_deleted(x: Tensor) -> None:
    opened = fewbit.scope(bits=3, min_bytes=0)
    with opened:
        y = F.gelu(x)
    alive = weakref.ref(opened)
    del opened
    gc.collect()
    assert alive() is None  # the graph holds codes, and nothing of the scope
    y.sum().backward()
    assert torch.equal(x.grad, gradient(F.gelu, x))


def test_h13_backward_runs_inside_another_scope_and_is_not_touched_by_it(x: Tensor) -> None:
    with fewbit.scope(bits=3, min_bytes=0):
        y = F.gelu(x)
    opened = fewbit.scope(bits=1, min_bytes=0)
    opened._warned = True
    with opened:
        y.sum().backward()
    assert torch.equal(x.grad, gradient(F.gelu, x))


# H14, R8, R11: what is no plain floating-point tensor that requires a backward


class Wrapped(torch.Tensor):
    """The simplest subclass, as a user writes it."""


def test_h14_a_tensor_subclass_is_kept_with_stocks_result(x: Tensor) -> None:
    def run() -> tuple[Tensor, Tensor]:
        w = x.detach().as_subclass(Wrapped).requires_grad_()
        y = F.gelu(w)
        (slope,) = torch.autograd.grad(y.sum(), w)
        return y, slope

    expected = run()
    with pytest.warns(fewbit.FewbitWarning, match="a Wrapped"), fewbit.scope(bits=1, min_bytes=0):
        result = run()
    assert [type(t) for t in result] == [type(t) for t in expected]
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_h14_a_two_tensor_wrapper_subclass_is_kept(x: Tensor) -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    w = TwoTensor(x.detach(), x.detach() + 1).requires_grad_()
    with pytest.warns(fewbit.FewbitWarning, match="a TwoTensor"), fewbit.scope(bits=1, min_bytes=0):
        F.gelu(w).sum().backward()
    assert torch.equal(w.grad.a, gradient(F.gelu, x, bits=None))


def test_h14_fake_tensors_pass(x: Tensor) -> None:
    with FakeTensorMode():
        h = torch.empty(64, 64, requires_grad=True)
        with pytest.warns(fewbit.FewbitWarning, match="FakeTensor"), fewbit.scope(bits=3, min_bytes=0):
            F.gelu(h).sum().backward()
    assert h.grad.shape == (64, 64)


def test_h14_inside_a_fake_tensor_mode_tensors_made_outside_pass(x: Tensor) -> None:
    opened = fewbit.scope(bits=3, min_bytes=0)
    opened._warned = True
    with opened, FakeTensorMode(allow_non_fake_inputs=True):
        y = F.gelu(x)
    assert y.shape == x.shape


SETTINGS = [{"bits": 3}, {"bits": None}, {"exact": True}, {"exact": True, "recompute": True}]


class EveryKind(nn.Module):
    """An activation, a norm, a product, masks and a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(16, 16), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        y = F.dropout(F.relu(self.norm(F.gelu(self.linear(x))) * x), 0.1)
        return torch.where(y > 0, y, x).softmax(-1)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_h14_fake_tensors_of_symbolic_shapes_pass_and_count_for_no_bytes(settings: dict[str, Any]) -> None:
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    model = EveryKind()
    fake = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=False, allow_non_fake_inputs=True)
    h = fake.from_tensor(torch.randn(8, 16, requires_grad=True))
    memory = quiet(**settings)
    with fake, memory:
        y = model(h)
    assert isinstance(y.shape[0], torch.SymInt)
    report = memory.report()
    assert {row.activation for row in report.rows} == {"gelu", "relu", "dropout", "where"}
    assert (report.original_bytes, report.stored_bytes) == (0, 0)
    assert "gelu" in str(report)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_h14_make_fx_with_symbolic_shapes_records_what_it_did(settings: dict[str, Any]) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    model, x = EveryKind(), torch.randn(8, 16)

    def step(t: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(model(t).sum(), list(model.parameters()))

    trace = make_fx(step, tracing_mode="symbolic", _allow_non_fake_inputs=True)
    stock = [node.target for node in trace(x).graph.nodes]
    with quiet(**settings):
        graph = trace(x).graph
    assert [node.target for node in graph.nodes] == stock


def test_h14_meta_tensors_are_kept() -> None:
    h = torch.empty(64, 64, device="meta", requires_grad=True)
    with pytest.warns(fewbit.FewbitWarning, match="device meta"), fewbit.scope(bits=3, min_bytes=0):
        F.gelu(h).sum().backward()
    assert h.grad.shape == h.shape


@pytest.mark.parametrize("function", [torch.tanh, torch.sigmoid])
def test_h14_complex_tensors_are_kept(function: Callable[[Tensor], Tensor]) -> None:
    h = torch.randn(64, dtype=torch.complex64)

    def run() -> Tensor:
        leaf = h.clone().requires_grad_()
        function(leaf).abs().sum().backward()
        return leaf.grad

    expected = run()
    with pytest.warns(fewbit.FewbitWarning, match="dtype complex64"), fewbit.scope(bits=1, min_bytes=0):
        assert torch.equal(run(), expected)


def test_h14_integer_and_boolean_tensors_pass(x: Tensor) -> None:
    with fewbit.scope(bits=1, min_bytes=0):
        assert torch.equal(torch.relu(torch.arange(-3, 3)), torch.tensor([0, 0, 0, 0, 1, 2]))
        assert torch.equal(torch.tanh(torch.tensor([True])), torch.tensor([1.0]).tanh())
        F.gelu(x)


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
def test_h14_sparse_tensors_are_kept() -> None:
    values = torch.tensor([[0.0, 2.0], [-3.0, 0.0]])

    def run() -> Tensor:
        leaf = values.clone().requires_grad_()
        torch.relu(leaf.to_sparse()).to_dense().sum().backward()
        return leaf.grad

    expected = run()
    with pytest.warns(fewbit.FewbitWarning, match="layout sparse_coo"), fewbit.scope(bits=1, min_bytes=0):
        assert torch.equal(run(), expected)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_h14_nested_tensors_are_kept(layout: torch.layout) -> None:
    def run() -> list[Tensor]:
        leaves = [torch.linspace(-2, 2, 3 * n).view(n, 3).requires_grad_() for n in (2, 4)]
        y = F.gelu(torch.nested.as_nested_tensor(leaves, layout=layout))
        sum(t.sum() for t in y.unbind()).backward()
        return [leaf.grad for leaf in leaves]

    expected = run()
    with pytest.warns(fewbit.FewbitWarning, match=r"[Nn]ested"), fewbit.scope(bits=1, min_bytes=0):
        result = run()
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_r8_parameters_are_kept_because_the_model_keeps_them_anyway() -> None:
    p = nn.Parameter(torch.randn(64))
    with pytest.warns(fewbit.FewbitWarning, match="a parameter"), fewbit.scope(bits=1, min_bytes=0):
        F.softplus(p).sum().backward()
    assert torch.equal(p.grad, gradient(F.softplus, p, bits=None))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_r8_no_grad_and_inference_mode_are_left_alone(mode: Any, x: Tensor) -> None:
    with mode(), fewbit.scope(bits=1, min_bytes=0) as memory:
        y = F.gelu(x)
    assert not y.requires_grad
    assert memory.report().rows == ()


def test_r8_a_region_of_no_grad_inside_the_scope_is_left_alone(x: Tensor) -> None:
    with fewbit.scope(bits=3, min_bytes=0) as memory:
        with torch.no_grad():
            F.gelu(x)
        F.gelu(x.detach())
        F.silu(x)
    assert [row.activation for row in memory.report().rows] == ["silu"]


def test_r8_inference_tensors_pass() -> None:
    with torch.inference_mode():
        h = torch.randn(64)
    opened = fewbit.scope(bits=1, min_bytes=0)
    opened._warned = True
    with opened:
        assert torch.equal(F.gelu(h), F.gelu(h.clone()))


def test_r8_tensors_smaller_than_min_bytes_pass_with_stocks_gradient(x: Tensor) -> None:
    with fewbit.scope(bits=1, min_bytes=x.nbytes + 1) as memory:
        y = F.gelu(x)
        F.gelu(torch.cat([x, x]))
    assert isinstance(data(y), Tensor)
    assert reasons(memory) == {"smaller than min_bytes", ""}


# R1, R2: nothing silently wrong; NaN and infinity get where they got


def test_r2_what_is_kept_is_in_the_report_with_its_bytes_and_the_reason(x: Tensor) -> None:
    with fewbit.scope(bits={"gelu": 3}, min_bytes=0) as memory:
        kept = [F.gelu(x * 1), F.silu(x * 1), F.prelu(x * 1, torch.tensor([0.1], requires_grad=True))]
    rows = {row.activation: row for row in memory.report().rows}
    assert (rows["gelu"].bits, rows["gelu"].reason) == (3, "")
    assert (rows["silu"].bits, rows["silu"].reason) == (None, "no bits are given for silu")
    assert "true input" in rows["prelu"].reason
    assert [rows[name].original_bytes for name in ("gelu", "silu", "prelu")] == [x.nbytes] * 3
    del kept


@pytest.mark.parametrize("name", ["gelu", "silu", "tanh", "relu", "softplus"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_r2_nan_and_infinity_in_a_pre_activation_reach_the_loss(name: str, value: float, x: Tensor) -> None:
    h = x.detach().clone()
    h[3, 5] = value
    expected = call(name)(h).sum()
    with fewbit.scope(bits=3, min_bytes=0):
        loss = call(name)(h.requires_grad_()).sum()
    assert torch.equal(loss.isnan(), expected.isnan())
    assert torch.equal(loss.isinf(), expected.isinf())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_r2_a_gradient_scaler_still_finds_what_is_not_finite(value: float) -> None:
    model = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    before = [p.detach().clone() for p in model.parameters()]
    inputs = torch.randn(16, 8)
    inputs[2, 3] = value
    with fewbit.scope(bits=3, min_bytes=0):
        loss = model(inputs).square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**7  # halved: the step was skipped
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_r2_a_scaled_loss_that_overflows_float16_is_found() -> None:
    weight = torch.randn(8, 8, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    with fewbit.scope(bits=3, min_bytes=0):
        y = F.gelu((torch.randn(64, 8) @ weight).half())
    scaler.scale(y.float().sum() * 1e3).backward()
    before = weight.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**15
    assert torch.equal(weight, before)


def test_r2_an_incoming_gradient_of_nan_or_infinity_passes_through(x: Tensor) -> None:
    grad = torch.ones_like(x)
    grad[0, 0], grad[0, 1] = math.nan, math.inf
    with fewbit.scope(bits=3, min_bytes=0):
        y = F.gelu(x)
    y.backward(grad)
    assert x.grad[0, 0].isnan()
    assert not x.grad[0, 1].isfinite()
    assert x.grad[1:].isfinite().all()


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")
def test_r2_anomaly_mode_works_and_names_the_forward(x: Tensor) -> None:
    with torch.autograd.detect_anomaly(), fewbit.scope(bits=3, min_bytes=0):
        F.gelu(x).sum().backward()
        assert torch.equal(x.grad, gradient(F.gelu, x))
        y = (F.gelu(x.detach().requires_grad_()) * math.nan).sum()
        with pytest.raises(RuntimeError, match="returned nan"), pytest.warns(UserWarning, match="Error detected in"):
            y.backward()


# R3, R8: other machinery that records calls


def test_jit_trace_records_what_it_did() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.Tanh())
    v = torch.randn(4, 8)
    opened = fewbit.scope(bits=1, min_bytes=0)
    with pytest.warns(fewbit.FewbitWarning, match="being traced"), opened:
        traced = torch.jit.trace(model, v)
    assert {n.kind() for n in traced.inlined_graph.nodes()} >= {"aten::gelu", "aten::tanh"}
    assert torch.equal(traced(v), model(v))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.usefixtures("registered_for_one_test_only")
def test_export_records_what_it_did(strict: bool) -> None:
    class Softly(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(1.702 * x)

    fewbit.register_module(Softly, "quick_gelu")
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), Softly(), nn.Linear(8, 8), nn.ReLU())
    v = torch.randn(4, 8)
    expected = [str(n.target) for n in torch.export.export(model, (v,), strict=strict).graph.nodes]
    opened = fewbit.scope(bits=1, min_bytes=0)
    opened._warned = True
    with opened:
        program = torch.export.export(model, (v,), strict=strict)
    assert [str(n.target) for n in program.graph.nodes] == expected
    assert torch.equal(program.module()(v), model(v))


def test_make_fx_records_the_forward_it_did(x: Tensor) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    expected = make_fx(F.gelu)(x.detach()).code
    opened = fewbit.scope(bits=1, min_bytes=0)
    opened._warned = True
    with opened:
        assert make_fx(F.gelu)(x.detach()).code == expected


def test_symbolic_trace_records_what_it_did() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU())
    opened = fewbit.scope(bits=1, min_bytes=0)
    opened._warned = True
    with opened:
        code = torch.fx.symbolic_trace(model).code
    assert code == torch.fx.symbolic_trace(model).code


# R10: parameters are part of the key


def test_r10_the_same_function_with_other_parameters_has_other_codes(x: Tensor) -> None:
    for beta in (0.5, 1.0, 3.0):
        slope = gradient(lambda h, beta=beta: F.softplus(h, beta=beta), x)
        levels = fewbit.codebook("softplus", 3, beta=beta).derivative(x.detach())
        torch.testing.assert_close(slope, levels, rtol=0, atol=5e-6)


def test_r10_a_tensor_as_parameter_is_kept(x: Tensor) -> None:
    with pytest.warns(fewbit.FewbitWarning, match="is a Tensor"):
        slope = gradient(lambda h: torch.clamp(h, torch.tensor(-0.5), torch.tensor(0.5)), x)
    assert torch.equal(slope, gradient(lambda h: torch.clamp(h, -0.5, 0.5), x, bits=None))


# R13, and what a user saves


def test_r13_errors_say_what_was_given_and_what_is_allowed() -> None:
    with pytest.raises(fewbit.FewbitError, match="bits must be an integer from 1 to 8, got 0"):
        fewbit.scope(bits=0)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_report_and_a_codebook_are_copied_and_pickled(copied: Callable[[Any], Any], x: Tensor) -> None:
    with fewbit.scope(bits=3, min_bytes=0) as memory:
        F.gelu(x)
    report, book = memory.report(), fewbit.codebook("gelu", 3)
    assert copied(report) == report
    other = copied(book)
    assert (other.name, other.bits) == ("gelu", 3)
    assert (other.levels == book.levels).all()


def test_a_deep_copied_model_decorated_by_a_scope_still_works(x: Tensor) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scope = fewbit.scope(bits=3, min_bytes=0)

        def forward(self, h: Tensor) -> Tensor:
            with self.scope:
                return F.gelu(h)

    model = copy.deepcopy(Model())
    assert isinstance(data(model(x)), Packed)
