"""The scope as a user meets it: statement, decorator, nested, shared, held open."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fewbit_hooks as fewbit

from .conftest import held_for_backward


def gelu_bits(x: Tensor) -> int:
    """With how many bits a gelu called now is coded; 32 where it is not."""
    y = F.gelu(x * 1)
    data = y.grad_fn._raw_saved_self.data
    return data.bits if hasattr(data, "bits") else 32


@pytest.fixture
def x() -> Tensor:
    return torch.randn(64, 64, requires_grad=True)


def test_the_forward_is_bit_for_bit_what_it_was(mlp: nn.Module) -> None:
    x = torch.randn(32, 64)
    with fewbit.scope(bits=1, min_bytes=0):
        y = mlp(x)
    assert torch.equal(y, mlp(x))


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_gradient_is_grad_times_the_level(bits: int) -> None:
    x = torch.randn(10_001, requires_grad=True)
    grad = torch.randn_like(x)
    with fewbit.scope(bits=bits, min_bytes=0):
        y = F.gelu(x)
    y.backward(grad)
    expected = grad * fewbit.codebook("gelu", bits).derivative(x.detach())
    torch.testing.assert_close(x.grad, expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("inside", [True, False])
def test_backward_runs_inside_or_outside_of_the_scope(mlp: nn.Module, inside: bool) -> None:
    x = torch.randn(32, 64)
    with fewbit.scope(bits=3, min_bytes=0):
        loss = mlp(x).square().mean()
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    assert mlp[0].weight.grad.abs().sum() > 0


def test_what_the_graph_holds_shrinks_by_what_the_report_says(mlp: nn.Module) -> None:
    x = torch.randn(512, 64)
    stock = held_for_backward(mlp(x), mlp.parameters())
    with fewbit.scope(bits=3, min_bytes=0) as memory:
        y = mlp(x)
    few = held_for_backward(y, mlp.parameters())
    report = memory.report()
    assert report.original_bytes == 512 * 256 * 4
    assert report.stored_bytes == 512 * 256 * 3 // 8
    assert report.freed_bytes == report.original_bytes
    rows = 4096 * 16  # the decoding table, one for all calls
    assert sum(stock.values()) - sum(few.values()) == report.freed_bytes - report.stored_bytes - rows


def test_entering_returns_the_scope() -> None:
    opened = fewbit.scope(bits=None)
    with opened as memory:
        assert memory is opened
        assert fewbit.active() is opened
    assert fewbit.active() is None


def test_the_innermost_scope_wins(x: Tensor) -> None:
    seen = []
    with fewbit.scope(bits=3, min_bytes=0):
        seen.append(gelu_bits(x))
        with fewbit.scope(bits=5, min_bytes=0):
            seen.append(gelu_bits(x))
            with fewbit.scope(bits=None):
                seen.append(gelu_bits(x))
            seen.append(gelu_bits(x))
        seen.append(gelu_bits(x))
    seen.append(gelu_bits(x))
    assert seen == [3, 5, 32, 5, 3, 32]


def test_a_scope_can_be_entered_again_inside_itself_and_reused(x: Tensor) -> None:
    opened = fewbit.scope(bits=3, min_bytes=0)
    for _ in range(2):
        with opened:
            with opened:
                assert gelu_bits(x) == 3
            assert gelu_bits(x) == 3
        assert gelu_bits(x) == 32


def test_at_most_one_mode_is_on_the_stack(x: Tensor) -> None:
    before = torch._C._len_torch_function_stack()
    with fewbit.scope(bits=None), fewbit.scope(bits=None), fewbit.scope(bits=None):
        assert torch._C._len_torch_function_stack() == before + 1


def test_leaving_out_of_order_removes_the_own_entry(x: Tensor) -> None:
    outer, inner = fewbit.scope(bits=3, min_bytes=0), fewbit.scope(bits=5, min_bytes=0)
    outer.__enter__()
    assert gelu_bits(x) == 3
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert gelu_bits(x) == 5
    inner.__exit__(None, None, None)
    assert gelu_bits(x) == 32


def test_leaving_a_scope_that_is_not_open_says_so() -> None:
    with pytest.raises(fewbit.FewbitError, match="not open on this thread"):
        fewbit.scope().__exit__(None, None, None)


def test_an_exception_in_the_forward_leaves_nothing_behind(x: Tensor) -> None:
    with pytest.raises(KeyboardInterrupt), fewbit.scope(bits=3, min_bytes=0):
        F.gelu(x)
        raise KeyboardInterrupt
    assert gelu_bits(x) == 32


def test_it_decorates_a_function(x: Tensor) -> None:
    @fewbit.scope(bits=2, min_bytes=0)
    def step(x: Tensor, *, scale: float = 1.0) -> int:
        """A step."""
        return gelu_bits(x * scale)

    assert (step(x, scale=2.0), step(x), gelu_bits(x)) == (2, 2, 32)
    assert (step.__name__, step.__doc__) == ("step", "A step.")


def test_it_decorates_a_method(x: Tensor) -> None:
    class Trainer:
        @fewbit.scope(bits=2, min_bytes=0)
        def step(self, x: Tensor) -> int:
            return gelu_bits(x)

    assert Trainer().step(x) == 2


def test_it_decorates_a_function_that_calls_itself(x: Tensor) -> None:
    @fewbit.scope(bits=2, min_bytes=0)
    def count(n: int) -> int:
        return gelu_bits(x) + (count(n - 1) if n else 0)

    assert count(3) == 8


def test_a_decorated_generator_is_inside_only_while_its_own_code_runs(x: Tensor) -> None:
    closed = []

    @fewbit.scope(bits=2, min_bytes=0)
    def steps() -> Iterator[int]:
        try:
            sent = yield gelu_bits(x)
            yield sent + gelu_bits(x)
            yield gelu_bits(x)
        finally:
            closed.append(gelu_bits(x))

    generator = steps()
    assert next(generator) == 2
    assert gelu_bits(x) == 32
    assert generator.send(10) == 12
    generator.close()
    assert closed == [2]


def test_a_decorated_generator_passes_exceptions_and_its_return_value_on(x: Tensor) -> None:
    @fewbit.scope(bits=2, min_bytes=0)
    def steps() -> Iterator[int]:
        try:
            yield 1
        except ValueError:
            yield gelu_bits(x)
        return 7

    generator = steps()
    next(generator)
    assert generator.throw(ValueError()) == 2
    with pytest.raises(StopIteration) as stop:
        next(generator)
    assert stop.value.value == 7


def test_a_coroutine_function_and_a_class_are_refused() -> None:
    async def step() -> None: ...

    async def steps() -> Iterator[int]:
        yield 1

    class Step:
        __name__ = "step"

        async def __call__(self) -> None: ...

    for function in (step, steps, Step()):
        with pytest.raises(TypeError, match="coroutine function step"):
            fewbit.scope()(function)
    with pytest.raises(fewbit.FewbitError, match="decorate its forward"):
        fewbit.scope()(nn.Linear)
    with pytest.raises(fewbit.FewbitError, match="decorates functions, got 3"):
        fewbit.scope()(3)


def test_two_threads_use_one_scope_at_once(x: Tensor) -> None:
    opened = fewbit.scope(bits=3, min_bytes=0)
    both_inside, results = threading.Barrier(2, timeout=30), []

    def work() -> None:
        with opened:
            both_inside.wait()
            results.append(gelu_bits(x))
            both_inside.wait()
        results.append(gelu_bits(x))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [3, 3, 32, 32]
    assert opened.report().rows[0].calls == 2


def test_enable_holds_a_scope_open_until_disable(x: Tensor) -> None:
    handle = fewbit.enable(bits=4, min_bytes=0)
    assert fewbit.active() is handle.scope
    assert repr(handle) == "<Handle of fewbit_hooks.scope(bits=4, min_bytes=0)>"
    assert gelu_bits(x) == 4
    fewbit.disable()
    assert (fewbit.active(), gelu_bits(x)) == (None, 32)
    assert handle.report().stored_bytes == 64 * 64 * 4 // 8


def test_a_handle_removes_what_it_enabled_and_is_a_context_manager(x: Tensor) -> None:
    handle = fewbit.enable(bits=4, min_bytes=0)
    handle.remove()
    handle.remove()
    assert gelu_bits(x) == 32
    with fewbit.enable(bits=4, min_bytes=0):
        assert gelu_bits(x) == 4
    assert gelu_bits(x) == 32


def test_enabling_twice_and_disabling_when_not_enabled_are_errors() -> None:
    with fewbit.enable(), pytest.raises(fewbit.FewbitError, match="already enabled on this thread"):
        fewbit.enable()
    with pytest.raises(fewbit.FewbitError, match="not enabled on this thread"):
        fewbit.disable()


def test_a_thread_started_under_enable_sees_nothing_of_it(x: Tensor) -> None:
    seen = []
    with fewbit.enable(bits=4, min_bytes=0) as handle:

        def work() -> None:
            seen.append((fewbit.active(), gelu_bits(x)))
            with pytest.raises(fewbit.FewbitError, match="thread that called enable"):
                handle.remove()

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert seen == [(None, 32)]


def test_a_scope_inside_an_enabled_one_wins(x: Tensor) -> None:
    with fewbit.enable(bits=4, min_bytes=0):
        with fewbit.scope(bits=2, min_bytes=0):
            assert gelu_bits(x) == 2
        assert gelu_bits(x) == 4


def test_fewbit_disable_turns_every_scope_into_a_no_op(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWBIT_DISABLE", "1")
    modes = torch._C._len_torch_function_stack()
    with fewbit.scope(bits=3, min_bytes=0) as memory, fewbit.enable(bits=2, min_bytes=0):
        assert torch._C._len_torch_function_stack() == modes
        assert gelu_bits(x) == 32
        monkeypatch.delenv("FEWBIT_DISABLE")
        with fewbit.scope(bits=5, min_bytes=0):
            assert gelu_bits(x) == 5
    assert memory.report().rows == ()


def test_a_scope_that_compressed_nothing_warns_once_with_the_reason(mlp: nn.Module) -> None:
    opened = fewbit.scope(bits=3)
    with pytest.warns(fewbit.FewbitWarning, match=r"compressed nothing: smaller than min_bytes \(gelu\)"), opened:
        mlp(torch.randn(2, 64))
    with opened:  # filterwarnings = error: a second warning would fail
        mlp(torch.randn(2, 64))
    with pytest.warns(fewbit.FewbitWarning, match="no recognised activation was called"), fewbit.scope():
        pass


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_a_copied_scope_has_the_settings_and_books_of_its_own(x: Tensor, copied) -> None:
    opened = fewbit.scope(bits={"gelu": 2, "default": None}, min_bytes=0)
    with opened:
        gelu_bits(x)
    other = copied(opened)
    assert other.report().rows == ()
    with other:
        assert gelu_bits(x) == 2


def test_measuring_changes_nothing_and_counts_everything(mlp: nn.Module) -> None:
    x = torch.randn(32, 64)
    with fewbit.scope(bits=None, min_bytes=0) as memory:
        y = mlp(x)
    assert gelu_bits(x.requires_grad_()) == 32
    report = memory.report()
    assert (report.original_bytes, report.stored_bytes, report.freed_bytes) == (32 * 256 * 4, 0, 0)
    assert held_for_backward(y).keys()
