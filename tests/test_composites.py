"""Modules that compute an activation or a norm from primitives: by class, without touching what is the user's."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import subprocess
import sys
import threading
import types
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fewbit_hooks as fewbit
from fewbit_hooks import _built_in, _composites, _policy

from .conftest import Names, held_for_backward, quiet, treatment

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
activations = pytest.importorskip("transformers.activations")
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm  # noqa: E402
from transformers.models.llama.modeling_llama import LlamaRMSNorm  # noqa: E402
from transformers.models.mistral.modeling_mistral import MistralRMSNorm  # noqa: E402
from transformers.models.t5.modeling_t5 import T5LayerNorm  # noqa: E402

BUILT_IN_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "NewGELUActivation": activations.NewGELUActivation,
    "FastGELUActivation": activations.FastGELUActivation,
    "QuickGELUActivation": activations.QuickGELUActivation,
    "AccurateGELUActivation": activations.AccurateGELUActivation,
    "GELUActivation": lambda: activations.GELUActivation(use_gelu_python=True),
}
NORMS: dict[str, Callable[[], nn.Module]] = {
    "LlamaRMSNorm": lambda: LlamaRMSNorm(32),
    "MistralRMSNorm": lambda: MistralRMSNorm(32),
    "T5LayerNorm": lambda: T5LayerNorm(32),
    "GemmaRMSNorm": lambda: GemmaRMSNorm(32),
}


class Primitive(nn.Module):
    """Anything that keeps more than its input."""

    scale = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(x.sin() * self.scale) * x


fewbit.register_module(Primitive)


@pytest.fixture
def x() -> Tensor:
    return (torch.randn(16, 32) * 2).requires_grad_()


def opened(**settings: Any) -> fewbit.scope:
    made = fewbit.scope(min_bytes=0, **settings)
    made._warned = True
    return made


def exact() -> fewbit.scope:
    return opened(exact=True, recompute=True)


def is_whole(y: Tensor) -> bool:
    """The module was treated as a whole."""
    return treatment(y) != "stock"


@pytest.mark.parametrize(
    "settings",
    [{}, {"exact": True}, {"exclude": Primitive}, {"exact": True, "recompute": True}, {"bits": {"gelu": None}}],
    ids=str,
)
@pytest.mark.parametrize("module", [Primitive, activations.NewGELUActivation])
def test_a_mode_of_the_users_sees_the_primitives(module: type[nn.Module], settings: dict[str, Any], x: Tensor) -> None:
    known = {"sin", "exp"} if module is Primitive else {"tanh", "pow"}
    outer, inner = Names(), Names()
    with outer, opened(**settings), inner:
        for _ in range(3):  # what is learned changes how it is run
            module()(x).sum().backward()
    assert known <= outer.names
    assert known <= inner.names


def results(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and gradients."""
    y = module(x * 1.0)
    wanted = [x, *(p for p in module.parameters() if p.requires_grad)]
    return [y.detach(), *torch.autograd.grad(y.square().sum(), wanted)]


def all_equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


def reasons(scope: fewbit.scope) -> set[str]:
    return {row.reason for row in scope.report().rows}


# the built-in table


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BUILT_IN_ACTIVATIONS)
def test_an_activation_run_again_is_bit_equal(name: str, dtype: torch.dtype) -> None:
    module, x = BUILT_IN_ACTIVATIONS[name](), torch.randn(16, 32, dtype=dtype, requires_grad=True)
    stock = results(module, x)
    with exact():
        assert is_whole(module(x * 1.0))
        assert all_equal(results(module, x), stock)


@pytest.mark.parametrize("name", BUILT_IN_ACTIVATIONS)
def test_an_activation_keeps_three_bits_of_its_input_and_gets_the_codebooks_level(name: str, x: Tensor) -> None:
    module = BUILT_IN_ACTIVATIONS[name]()
    with torch.no_grad():
        stock = module(x)
    with opened(bits=3) as memory:
        h = x.clone()
        y = module(h)
    (row,) = memory.report().rows
    assert torch.equal(y, stock)
    assert row.stored_bytes == x.numel() * 3 // 8
    assert sum(held_for_backward(y, tables=False).values()) == row.stored_bytes
    of, parameters = {"QuickGELUActivation": ("quick_gelu", {}), "GELUActivation": ("gelu", {})}.get(
        name, ("gelu", {"approximate": "tanh"})
    )
    level = fewbit.codebook(of, 3, **parameters).derivative(x.detach())
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(slope, level.to(slope.dtype), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_a_norm_is_one_node_and_bit_equal(name: str, dtype: torch.dtype) -> None:
    module, x = NORMS[name]().to(dtype), torch.randn(16, 32, dtype=dtype, requires_grad=True)
    nn.init.uniform_(module.weight, 0.5, 1.5)
    stock = results(module, x)
    with exact():
        assert is_whole(module(x * 1.0))
        assert all_equal(results(module, x), stock)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_what_follows_a_norm_keeps_nothing_and_all_is_counted(name: str, dtype: torch.dtype, frozen: bool) -> None:
    norm = NORMS[name]()
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    net = nn.Sequential(nn.Linear(32, 32), norm.requires_grad_(not frozen), nn.Linear(32, 32)).to(dtype)
    x = torch.randn(4096, 32, dtype=dtype)
    wanted = [p for p in net.parameters() if p.requires_grad]

    def run() -> tuple[int, list[Tensor]]:
        y = net(x)
        held = sum(held_for_backward(y, [x, *net.parameters()]).values())
        return held, list(torch.autograd.grad(y.float().square().sum(), wanted))

    stock, expected = run()
    with exact() as memory:
        held, gradients = run()
    assert all_equal(gradients, expected)
    one, numbers = (
        4096 * 32 * dtype.itemsize,
        (4096 + 32) * 4,
    )  # the norm's input, and what it keeps of each row and column
    assert one <= held <= one + numbers
    # the second layer's input, and what the norm keeps; but not the norm's input, where its node is stock's
    counted = memory.report().original_bytes
    assert counted == pytest.approx(stock if held == one else stock - one, abs=numbers)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("settings", [{}, {"exact": True}, {"exact": True, "recompute": True}], ids=str)
@pytest.mark.parametrize("name", BUILT_IN_ACTIVATIONS)
def test_the_report_frees_what_is_held_less(name: str, settings: dict[str, Any], frozen: bool) -> None:
    net = nn.Sequential(
        nn.Linear(32, 64), BUILT_IN_ACTIVATIONS[name](), nn.Linear(64, 32).requires_grad_(not frozen)
    )  # some keep their input, and some not even that
    x = torch.randn(4096, 32)
    known = [x, *net.parameters()]
    stock = sum(held_for_backward(net(x), known).values())
    memory = opened(**settings)
    for _ in range(4):  # what is learned changes what is kept
        with memory:
            y = net(x)
        held = sum(held_for_backward(y, known, tables=False).values())
        report = memory.report()
        assert report.freed_bytes - report.stored_bytes == pytest.approx(stock - held, abs=64)
        y.sum().backward()
        del y


def test_a_norm_is_left_as_it_is_without_recompute(x: Tensor) -> None:
    with opened(bits=3):
        assert not is_whole(LlamaRMSNorm(32)(x * 1.0))


def test_a_gelu_that_is_one_node_already_is_left_to_the_mode(x: Tensor) -> None:
    with opened(bits=3) as memory:
        y = activations.GELUActivation()(x * 1.0)
    assert y.grad_fn.name() == "GeluBackward0"
    assert [(row.activation, row.bits) for row in memory.report().rows] == [("gelu", 3)]


@pytest.mark.parametrize("name", ["GELUActivation", "NewGELUActivation"])
def test_what_is_smaller_than_min_bytes_is_counted_once(name: str, x: Tensor) -> None:
    with pytest.warns(fewbit.FewbitWarning, match="smaller"), fewbit.scope(min_bytes=x.nbytes + 1) as memory:
        getattr(activations, name)()(x)
    (row,) = memory.report().rows
    assert (row.activation, row.calls, row.original_bytes) == ("gelu", 1, x.nbytes)


def test_every_rms_norm_of_a_dozen_models_is_found_and_bit_equal(x: Tensor) -> None:
    import importlib

    found = 0
    for model in ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "olmo2", "phi3", "cohere", "granite", "glm"):
        modeling = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
        norms = [cls for name, cls in vars(modeling).items() if name.endswith("RMSNorm") and inspect.isclass(cls)]
        for cls in norms:
            module = cls(32)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            stock = results(module, x)
            with exact():
                assert is_whole(module(x * 1.0)), cls
                assert all_equal(results(module, x), stock), cls
            found += 1
    assert found >= 9


def test_timms_classes_are_found_where_timm_is_imported(monkeypatch: pytest.MonkeyPatch, x: Tensor) -> None:
    import types

    class QuickGELU(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(1.702 * x)

    class RmsNorm(LlamaRMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)) * self.weight

    for name, cls in (("timm.layers.activations", QuickGELU), ("timm.layers.norm", RmsNorm)):
        module = types.ModuleType(name)
        cls.__module__ = name
        setattr(module, cls.__name__, cls)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(_built_in.find_built_in, "_visited", set())
    with exact():
        assert is_whole(QuickGELU()(x * 1.0))
        assert is_whole(RmsNorm(32)(x * 1.0))


def test_entering_a_scope_imports_nothing() -> None:
    code = (
        "import sys, torch, fewbit_hooks as fewbit\n"
        "before = set(sys.modules)\n"
        "with fewbit.scope(recompute=True) as s: s._warned = True\n"
        "new = {m.split('.')[0] for m in set(sys.modules) - before}\n"
        "assert not new & {'transformers', 'timm', 'peft'}, new\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# what is the user's


def test_outside_of_a_scope_the_original_runs(x: Tensor) -> None:
    module = LlamaRMSNorm(32)
    with exact():
        pass
    assert not is_whole(module(x * 1.0))
    assert inspect.signature(LlamaRMSNorm.forward) == inspect.signature(LlamaRMSNorm.forward._fewbit_original)


def test_a_forward_is_replaced_once() -> None:
    for _ in range(3):
        with exact():
            fewbit.register_module(Primitive)
    original = Primitive.forward._fewbit_original
    assert not hasattr(original, "_fewbit_original")


def test_an_instance_with_a_forward_of_its_own_is_left_alone_and_reported(x: Tensor) -> None:
    module = activations.NewGELUActivation()
    inner = module.forward
    module.forward = lambda h: inner(h)  # as accelerate's hooks do it
    with opened(bits=1) as memory:
        assert not is_whole(module(x * 1.0))
    assert ("gelu", None, _composites.OWN_FORWARD) in [(r.activation, r.bits, r.reason) for r in memory.report().rows]


def test_a_norm_whose_instance_has_a_forward_of_its_own_is_left_alone_and_reported(x: Tensor) -> None:
    module = LlamaRMSNorm(32)
    inner = module.forward
    module.forward = lambda h: inner(h)
    with exact() as memory:
        assert not is_whole(module(x * 1.0))
    assert _composites.OWN_FORWARD in reasons(memory)


def test_hooks_of_accelerate_leave_the_gradient_as_it_is(x: Tensor) -> None:
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")
    module = LlamaRMSNorm(32)
    stock = results(module, x)
    hooks.add_hook_to_module(module, hooks.ModelHook())
    with exact() as memory:
        assert all_equal(results(module, x), stock)
    assert _composites.OWN_FORWARD in reasons(memory)


def test_a_subclass_that_calls_the_forward_above_is_bit_equal(x: Tensor) -> None:
    class Scaled(LlamaRMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return super().forward(hidden_states * 0.5) * 3.0

    module = Scaled(32)
    stock = results(module, x)
    with exact():
        assert all_equal(results(module, x), stock)


def test_a_registered_class_on_a_registered_class_is_one_node_and_recorded_once(x: Tensor) -> None:
    class Twice(Primitive):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).sin() * 3.0

    module = fewbit.register_module(Twice)()
    stock = results(module, x)
    with exact() as memory:
        assert all_equal(results(module, x), stock)  # the backward runs inside the scope
    assert [(row.activation, row.calls) for row in memory.report().rows] == [("Twice", 1)]
    assert memory.report().steps == 1


def test_a_subclass_that_computes_something_else_is_not_taken_for_the_activation(x: Tensor) -> None:
    class Half(activations.NewGELUActivation):
        def forward(self, input: Tensor) -> Tensor:
            return 0.5 * input.sin() * input.cos()

    stock = results(Half(), x)
    with opened(bits=1):
        assert all_equal(results(Half(), x), stock)


def test_a_module_registered_as_what_it_does_not_compute_is_left_alone_and_reported(x: Tensor) -> None:
    class Not(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 0.5 * x.sin() * x.cos()

    module = fewbit.register_module(Not, "gelu")()
    stock = results(module, x)
    with opened(bits=1) as memory:
        assert all_equal(results(module, x), stock)
    assert reasons(memory) == {_composites.OTHER_FUNCTION.format("gelu")}


def test_a_module_that_cannot_be_tried_in_float64_is_left_alone_and_reported(x: Tensor) -> None:
    class Picky(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.dtype == torch.float64:
                raise TypeError("no kernel for float64")
            return F.silu(x) * 1.0

    module = fewbit.register_module(Picky, "silu")()
    x = x.detach().float().requires_grad_()
    stock = results(module, x)
    with opened(bits=1) as memory:
        assert all_equal(results(module, x), stock)
    assert reasons(memory) == {_composites.NO_PROBE.format("no kernel for float64")}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("how", ["old weight_norm", "parametrized", "attribute"])
def test_a_weight_that_is_computed_from_others_gets_its_gradient(how: str, x: Tensor) -> None:
    module = LlamaRMSNorm(32)
    sources = []
    if how == "old weight_norm":
        nn.utils.weight_norm(module, "weight", dim=None)
    elif how == "parametrized":
        nn.utils.parametrizations.weight_norm(module, "weight", dim=None)
    else:
        sources = [torch.ones(32, requires_grad=True)]
        del module.weight
        module.weight = sources[0] * 1.0
    wanted = [x, *sources, *module.parameters()]

    def run() -> list[Tensor]:
        return list(torch.autograd.grad(module(x * 1.0).square().sum(), wanted, retain_graph=True))

    stock = run()
    with exact():
        assert all_equal(run(), stock)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda self, x: torch.rsqrt(x.exp().sin().mean(-1, keepdim=True) + 2.0), _composites.NO_NODE),
        (lambda self, x: (x.exp().sin() * x, x), _composites.NO_NODE),
        (lambda self, x: x.view_as(x), _composites.NO_NODE),
        (lambda self, x: x.mul_(2.0).exp().sin(), _composites.NO_NODE),
        (lambda self, x: x.view(2, -1, 32).exp().sin().view_as(x) * x, "could not be tried on a small input"),
    ],
    ids=["shape", "two", "view", "in place", "no small input"],
)
def test_what_cannot_be_one_node_is_left_alone_and_reported(forward: Any, reason: str, x: Tensor) -> None:
    module = fewbit.register_module(type("Odd", (nn.Module,), {"forward": forward}))()

    def run() -> list[Tensor]:
        y = module(x * 1.0)
        y = y[0] if isinstance(y, tuple) else y
        return [y.detach(), *torch.autograd.grad(y.sum(), x)]

    stock = run()
    with exact() as memory:
        assert all_equal(run(), stock)
    assert any(reason in row.reason for row in memory.report().rows)


def test_functional_call_with_other_tensors_gives_them_their_gradients(x: Tensor) -> None:
    module, weight = LlamaRMSNorm(32), torch.rand(32, requires_grad=True)

    def run() -> list[Tensor]:
        y = torch.func.functional_call(module, {"weight": weight * 2.0}, (x * 1.0,))
        return list(torch.autograd.grad(y.square().sum(), [x, weight]))

    stock = run()
    with exact():
        assert all_equal(run(), stock)


def test_a_keyword_argument_is_as_good(x: Tensor) -> None:
    module = LlamaRMSNorm(32)
    stock = module(x * 1.0)
    with exact():
        y = module(hidden_states=x * 1.0)
    assert is_whole(y)
    assert torch.equal(y, stock)


class Shifted(nn.Module):
    def forward(self, x: Tensor, shift: float = 0.0) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1.0) + shift


fewbit.register_module(Shifted)


@pytest.mark.parametrize(("args", "kwargs"), [((1.5,), {}), ((), {"shift": 1.5})])
def test_a_call_with_further_arguments_runs_as_it_is(args: Any, kwargs: Any, x: Tensor) -> None:
    module = Shifted()
    stock = module(x * 1.0, *args, **kwargs)
    with exact():
        y = module(x * 1.0, *args, **kwargs)
    assert not is_whole(y)
    assert torch.equal(y, stock)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_recorded(mode: Callable[[], Any], x: Tensor) -> None:
    with exact() as memory, mode():
        y = LlamaRMSNorm(32)(x)
    assert not y.requires_grad
    assert memory.report().rows == ()


def test_an_input_without_gradient_is_left_alone_and_the_weight_gets_its_own() -> None:
    module, x = LlamaRMSNorm(32), torch.randn(16, 32)
    stock = torch.autograd.grad(module(x).square().sum(), module.weight)
    with exact():
        loss = module(x).square().sum()
    assert torch.equal(torch.autograd.grad(loss, module.weight)[0], stock[0])


@pytest.mark.parametrize("rule", [LlamaRMSNorm, "0", lambda m: isinstance(m, LlamaRMSNorm)])
def test_an_excluded_module_is_left_alone(rule: Any, x: Tensor) -> None:
    model = nn.Sequential(LlamaRMSNorm(32), T5LayerNorm(32))
    with opened(exact=True, recompute=True, exclude=rule) as memory:
        y = model(x * 1.0)
    assert is_whole(y)
    assert [row.calls for row in memory.report().rows if row.how == "recomputed"] == [1]


def test_a_nested_scope_that_measures_leaves_modules_alone(x: Tensor) -> None:
    module = LlamaRMSNorm(32)
    with exact():
        with fewbit.scope(bits=None):
            assert not is_whole(module(x * 1.0))
        assert is_whole(module(x * 1.0))


def test_fewbit_disable_leaves_modules_alone(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWBIT_DISABLE", "1")
    with exact():
        assert not is_whole(LlamaRMSNorm(32)(x * 1.0))


def test_threads_with_different_scopes_each_have_their_own() -> None:
    module = activations.NewGELUActivation()
    seen: dict[str, str] = {}
    barrier = threading.Barrier(3)

    def work(name: str, scope: fewbit.scope | None) -> None:
        h = torch.randn(16, 32, requires_grad=True)
        if scope is None:
            barrier.wait()
            y = module(h * 1.0)
            barrier.wait()
        else:
            with scope:
                barrier.wait()
                y = module(h * 1.0)
                barrier.wait()
        seen[name] = treatment(y)

    jobs = {"few": opened(bits=2), "again": exact(), "none": None}
    threads = [threading.Thread(target=work, args=job) for job in jobs.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"few": "codes", "again": "again", "none": "stock"}


# what others do with a model


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.act, self.b = (
            LlamaRMSNorm(32),
            nn.Linear(32, 32),
            activations.NewGELUActivation(),
            nn.Linear(32, 32),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.act(self.a(self.norm(x))))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_model_with_such_modules_is_copied_and_pickled(copied: Callable[[Any], Any], x: Tensor) -> None:
    model = Small()
    with exact():
        stock = results(model, x)
        other = copied(model)
        assert all_equal(results(other, x), stock)
    assert type(other.norm) is LlamaRMSNorm


def test_such_classes_are_scripted_as_before(x: Tensor) -> None:
    with exact():
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.script is deprecated
        scripted = torch.jit.script(activations.NewGELUActivation())
    assert torch.equal(scripted(x), activations.NewGELUActivation()(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
def test_a_trace_of_the_model_records_the_primitives(x: Tensor) -> None:
    model = Small()
    with exact():
        traced = torch.jit.trace(model, x)
    assert "prim::PythonOp" not in {node.kind() for node in traced.inlined_graph.nodes()}
    assert torch.equal(traced(x), model(x))


@pytest.mark.parametrize("strict", [False, True])
def test_an_export_of_the_model_is_what_it_was(strict: bool, x: Tensor) -> None:
    model, x = Small(), x.detach()
    stock = [str(node.target) for node in torch.export.export(model, (x,), strict=strict).graph.nodes]
    with exact():
        program = torch.export.export(model, (x,), strict=strict)
    assert [str(node.target) for node in program.graph.nodes] == stock
    assert torch.equal(program.module()(x), model(x))


@pytest.mark.parametrize("settings", [{"exact": True, "recompute": True}, {"bits": None}], ids=["exact", "none"])
def test_a_compiled_model_runs_unbroken_and_as_stock(settings: dict[str, Any], x: Tensor) -> None:
    torch._dynamo.reset()
    model = Small()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

    def run() -> list[Tensor]:
        y = compiled(x)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])]

    stock = run()
    with opened(**settings):
        assert all_equal(run(), stock)
    torch._dynamo.reset()
    with opened(**settings):
        assert all_equal(run(), stock)  # traced under the scope


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_a_transform_of_torch_func_is_left_alone(transform: str, x: Tensor) -> None:
    module, h = LlamaRMSNorm(32), x.detach()

    def run() -> Tensor:
        if transform == "grad":
            return torch.func.grad(lambda v: module(v).square().sum())(h)
        if transform == "vmap":
            return torch.func.vmap(module)(h).detach()
        return torch.func.jvp(module, (h,), (h.cos(),))[1].detach()

    stock = run()
    with exact():
        assert torch.equal(run(), stock)


def test_no_registry_keeps_a_model_alive_in_an_open_scope(x: Tensor) -> None:
    with fewbit.enable(exact=True, recompute=True, min_bytes=0):
        model = Small()
        dead = [weakref.ref(m) for m in model.modules()]
        model(x)
        del model
        gc.collect()
        assert all(ref() is None for ref in dead)


# register_module


class Sharp(nn.Module):
    """silu, at first."""

    def __init__(self) -> None:
        super().__init__()
        self.beta = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid((self.beta if self.training else 3.0) * x)


class Given(nn.Module):
    """silu, of a buffer and a function that may be others later."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("beta", torch.ones(1))
        self.gate = torch.sigmoid

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.beta.to(x.dtype) * x)


@pytest.mark.parametrize(
    ("cls", "change"),
    [
        (Sharp, lambda m: setattr(m, "beta", 4.0)),
        (Sharp, lambda m: m.eval()),
        (Given, lambda m: m.load_state_dict({"beta": torch.full((1,), 2.5)})),
        (Given, lambda m: setattr(m, "beta", torch.full((1,), 2.5))),
        (Given, lambda m: setattr(m, "gate", torch.tanh)),
    ],
    ids=["number", "eval", "buffer loaded", "buffer set", "function"],
)
def test_an_instance_that_comes_to_compute_something_else_is_left_as_it_is(
    cls: type[nn.Module], change: Any, x: Tensor
) -> None:
    module = fewbit.register_module(cls, "silu")()
    with fewbit.scope(bits=2, min_bytes=0) as memory:
        module(x)
        change(module)
        (grad,) = torch.autograd.grad(module(x).sum(), x)
    assert [row.bits for row in memory.report().rows] == [2, None]
    assert torch.equal(grad, torch.autograd.grad(module(x).sum(), x)[0])


class Switched(nn.Module):
    """silu, as one node or of primitives."""

    def __init__(self) -> None:
        super().__init__()
        self.primitives = False

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x) if self.primitives else F.silu(x)


@pytest.mark.parametrize("min_bytes", [0, 1 << 30])
def test_an_instance_that_was_one_node_is_asked_again_when_it_changes(min_bytes: int, x: Tensor) -> None:
    module = fewbit.register_module(Switched, "silu")()
    with quiet(bits=3, min_bytes=min_bytes):
        assert {module(x * 1.0).grad_fn.name() for _ in range(3)} == {"SiluBackward0"}
    module.primitives = True
    with opened(bits=3):
        assert treatment(module(x * 1.0)) == "codes"


def test_an_instance_that_holds_more_than_constants_is_not_taken_for_another(x: Tensor) -> None:
    module = Sharp()
    for same in (2.0, "tanh", F.gelu, F.silu, torch.erf):
        module.__dict__["act"] = same
        assert ("act", same) in _composites._content(module)
    for more in (x, x.mul, lambda t: t * x, module.forward, {"x": x}):
        module.__dict__["act"] = more
        assert _composites._content(module) is None


@pytest.mark.parametrize("name", ["NewGELUActivation", "QuickGELUActivation", "GELUActivation"])
def test_instances_that_are_alike_are_asked_once(name: str, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[nn.Module] = []
    find_out = _composites._find_out
    monkeypatch.setattr(_composites, "_find_out", lambda c, module, t: asked.append(module) or find_out(c, module, t))
    monkeypatch.setattr(_composites, "_alike", {})
    for _ in range(3):
        with opened(bits=3):
            getattr(activations, name)()(x * 1.0)
    assert len(asked) == 1
    module = fewbit.register_module(Sharp, "silu")()
    for module.beta in (1.0, 4.0):  # a number tells them apart
        with quiet(bits=3, min_bytes=0) as memory:
            module(x)
    assert [row.bits for row in memory.report().rows] == [None]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3,), "takes a subclass of torch.nn.Module, got 3"),
        ((nn.Bilinear,), "must take one tensor"),
        ((nn.Tanh, "gleu"), "gleu"),
        ((nn.Tanh, "relu"), "exact at 1 bit"),
    ],
)
def test_register_module_says_what_is_wrong(arguments: Any, message: str) -> None:
    with pytest.raises(fewbit.FewbitError, match=message):
        fewbit.register_module(*arguments)


def test_register_module_without_activation_takes_no_parameters() -> None:
    with pytest.raises(fewbit.FewbitError, match="parameter of which activation"):
        fewbit.register_module(nn.Tanh, approximate="tanh")


def test_it_decorates_and_its_name_is_in_the_report(x: Tensor) -> None:
    @fewbit.register_module
    class Decorated(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.exp(x.sin()) * x

    class Named(Decorated):
        def forward(self, x: Tensor) -> Tensor:
            return F.normalize(x, dim=-1) * x

    fewbit.register_module(Named, name="unit")
    with exact() as memory:
        kept = Decorated()(x * 1.0), Named()(x * 1.0)
    assert [row.activation for row in memory.report().rows] == ["Decorated", "unit"]
    del kept


def test_a_subclass_that_inherits_the_forward_is_included(x: Tensor) -> None:
    class Inherits(Primitive):
        scale = 5.0

    stock = results(Inherits(), x)
    with exact():
        assert is_whole(Inherits()(x * 1.0))
        assert all_equal(results(Inherits(), x), stock)


class MemoryEfficientSwish(nn.Module):
    """As efficientnet_pytorch has it."""

    class Swish(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x * torch.sigmoid(x)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            s = torch.sigmoid(x)
            return grad * (s * (1 + x * (1 - s)))

    def forward(self, x: Tensor) -> Tensor:
        return self.Swish.apply(x)


def test_a_module_whose_node_no_mode_sees_is_coded_or_counted() -> None:
    fewbit.register_module(MemoryEfficientSwish, "silu")
    module, x = MemoryEfficientSwish(), torch.randn(64, 64, requires_grad=True)
    stock = module(x * 1)
    with quiet(bits=3) as memory:
        y = module(x * 1)
    (row,) = memory.report().rows
    assert (row.activation, row.bits, row.freed_bytes, row.stored_bytes) == ("silu", 3, x.nbytes, x.nbytes * 3 // 32)
    assert torch.equal(y, stock)
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, fewbit.codebook("silu", 3).derivative(x.detach()))
    with quiet(exact=True) as memory:
        y = module(x * 1)
    (row,) = memory.report().rows
    assert (row.activation, row.bits, row.reason) == ("silu", None, _policy.EXACT)
    assert torch.equal(*(torch.autograd.grad(result.sum(), x)[0] for result in (y, stock)))


def test_a_class_of_torch_that_a_package_gives_a_name_stays_as_it_is() -> None:
    name = "efficientnet_pytorch.utils"
    package = types.ModuleType(name)
    package.MemoryEfficientSwish = nn.SiLU  # type: ignore[attr-defined]
    _built_in._replace_in(name, package)
    assert not hasattr(nn.SiLU.forward, "_fewbit_original")
    own = type("MemoryEfficientSwish", (nn.SiLU,), {"forward": nn.SiLU.forward, "__module__": name})
    package.MemoryEfficientSwish = own  # type: ignore[attr-defined]
    _built_in._replace_in(name, package)
    assert hasattr(own.forward, "_fewbit_original")
    assert not hasattr(nn.SiLU.forward, "_fewbit_original")


def test_that_there_was_no_memory_to_try_a_module_is_no_fact_about_it(
    x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, computes = activations.NewGELUActivation(), _composites._computes
    monkeypatch.setattr(_composites, "_alike", {})

    def short_of_memory(*args: Any) -> bool:
        monkeypatch.setattr(_composites, "_computes", computes)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(_composites, "_computes", short_of_memory)
    with quiet(), pytest.raises(torch.OutOfMemoryError):
        module(x * 1.0)
    with quiet():
        assert treatment(module(x * 1.0)) == "codes"
