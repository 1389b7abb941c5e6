"""What a training step costs under a scope: its time and the bytes held for backward, as ratios to stock PyTorch.

    python benchmarks/bench_step.py [--quick] [--threads N] [--device cuda] [--dtype bfloat16] [--rows TEXT]
                                    [--csv PATH] [MODEL ...]

Models come from their configurations, with random weights, in training mode. A step is forward and backward. The
scope is used again and again, as in a training loop, and has learned before anything is measured. The ways to run a
step share one process and take turns, in a random order; each step is compared with the stock step of its own round.
`time` is the median of these ratios, with the quartiles: `stock again` says what 1.00 looks like on this machine. `cpu`
is the same for processor time, which other processes disturb less. `held` is what the forward allocates and what is
alive when the backward begins, asked of PyTorch's allocator. On a GPU `peak` is what a step allocates at most, beside
what was there before. Compiled rows draw their random numbers as eager ones do, so that gradients can be compared.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import functools
import gc
import importlib.util
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler says when it starts and stops

import torch
import torch._dynamo
import torch._functorch.config
import transformers as hf
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import create_selective_checkpoint_contexts

import fewbit_hooks as fewbit
from about import about

FIGURES = ("seconds", "time", "lower", "upper", "cpu", "held_bytes", "held", "gradients", "peak_bytes")
COLUMNS = ("model", "dtype", "row", *FIGURES, "machine", "versions", "date")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Of parameters and floating-point inputs."""
LEARN = 3
"""Steps after which a scope has learned what others keep."""
GRAPHS = 64
"""Of a function that all rows share, before Dynamo leaves it to Python: each row's copy of the model has one or two."""


@dataclass(frozen=True)
class Case:
    """A model, a batch for it, and how many rounds make a steady median."""

    build: Callable[[], tuple[nn.Module, dict[str, Tensor]]]
    rounds: int


def images(config: Any, size: int) -> tuple[nn.Module, dict[str, Tensor]]:
    config.num_labels = 10
    model = hf.AutoModelForImageClassification.from_config(config)
    return model, {"pixel_values": torch.randn(8, 3, size, size), "labels": torch.randint(10, (8,))}


def text(model: Any, batch: int, length: int, **labels: Tensor) -> tuple[nn.Module, dict[str, Tensor]]:
    tokens = torch.randint(5, model.config.vocab_size, (batch, length))
    return model, {"input_ids": tokens, **(labels or {"labels": tokens})}


def roberta(layers: int, hidden: int, batch: int, length: int) -> tuple[nn.Module, dict[str, Tensor]]:
    config = hf.RobertaConfig(
        vocab_size=1000,
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_attention_heads=hidden // 64,
    )
    model = hf.RobertaForSequenceClassification(config)
    return text(model, batch, length, labels=torch.randint(2, (batch,)))


def gpt2() -> tuple[nn.Module, dict[str, Tensor]]:
    config = hf.GPT2Config(vocab_size=1000, n_layer=4, attn_pdrop=0.0, use_cache=False)
    return text(hf.GPT2LMHeadModel(config), 2, 256)


def llama() -> tuple[nn.Module, dict[str, Tensor]]:
    config = hf.LlamaConfig(
        vocab_size=1000, num_hidden_layers=4, hidden_size=768, intermediate_size=2048, num_attention_heads=12
    )
    return text(hf.LlamaForCausalLM(config), 2, 256)


def lora(model: nn.Module, batch: dict[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor]]:
    """Adapters on all linear layers, with dropout; the rest is frozen."""
    import peft

    config = peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear")
    return peft.get_peft_model(model, config), batch


MODELS = {
    "resnet-50": Case(lambda: images(hf.ResNetConfig(), 160), 9),
    # by default every convolution keeps a padded copy, and not the output of the ReLU6 before it
    "mobilenet-v2": Case(lambda: images(hf.MobileNetV2Config(), 160), 13),
    "mobilenet-v2-224": Case(lambda: images(hf.MobileNetV2Config(), 224), 13),
    "mobilenet-v2-unpadded": Case(lambda: images(hf.MobileNetV2Config(tf_padding=False), 160), 13),
    "roberta-2-layers": Case(lambda: roberta(2, 768, 8, 128), 9),
    "llama-4-layers": Case(llama, 9),
    "llama-4-layers-lora": Case(lambda: lora(*llama()), 9),
    "gpt2-4-layers": Case(gpt2, 9),
    "vit-4-layers": Case(lambda: images(hf.ViTConfig(num_hidden_layers=4, image_size=160), 160), 9),
    "launch-bound": Case(lambda: roberta(6, 384, 1, 16), 100),  # where the time is that of Python and of launches
}
QUICK = {"launch-bound": Case(lambda: roberta(2, 384, 1, 16), 100)}
"""What `--quick` runs where no model is named: fewer layers take less time to compile."""


def available() -> list[str]:
    """The models, without those that need a package which is not installed."""
    return [name for name in MODELS if not name.endswith("-lora") or importlib.util.find_spec("peft")]


Way = Callable[[nn.Module], tuple[nn.Module, AbstractContextManager[Any]]]
"""A way to run a step: the model to run, which may be a changed copy of the given one, and what its forward runs in."""


MATRIX_PRODUCTS = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
]
"""What selective checkpointing keeps: all that takes long."""


def checkpointed(model: nn.Module, **settings: Any) -> nn.Module:
    """torch.utils.checkpoint around every block, as transformers has it; the model itself where it has not."""
    if getattr(model, "supports_gradient_checkpointing", False):
        model = copy.deepcopy(model)
        model.gradient_checkpointing_enable({"use_reentrant": False, **settings})  # type: ignore[operator]
    return model


def selectively_checkpointed(model: nn.Module) -> nn.Module:
    """The same, but that what takes long is kept."""
    return checkpointed(model, context_fn=functools.partial(create_selective_checkpoint_contexts, MATRIX_PRODUCTS))


def compiled(model: nn.Module, scope: fewbit.scope | None = None, *, budget: float = 1.0) -> Any:
    """The model compiled by Inductor, and what its forward runs in.

    Args:
        budget: so much of what it would keep is kept, and the rest computed again.
    """
    options: dict[str, Any] = {"fallback_random": True}
    if budget < 1.0:
        # as it is by default; Dynamo takes graphs of copies from each other where their options are the same
        options["triton.unique_kernel_names"] = torch._inductor.config.triton.unique_kernel_names
    made = torch.compile(copy.deepcopy(model), options=options)
    return made, within(lambda: torch._functorch.config.patch(activation_memory_budget=budget), scope)


class within(contextlib.ExitStack):
    """A scope inside another context, which is made anew each time that this is entered."""

    def __init__(self, around: Callable[[], AbstractContextManager[Any]], scope: fewbit.scope | None) -> None:
        super().__init__()
        self._around = around
        self._scope = scope or contextlib.nullcontext()

    def __enter__(self) -> Any:
        self.enter_context(self._around())
        return self.enter_context(self._scope)


ROWS: dict[str, Way] = {
    "stock": lambda model: (model, contextlib.nullcontext()),
    "stock again": lambda model: (model, contextlib.nullcontext()),
    "scope(bits=3)": lambda model: (model, fewbit.scope(bits=3)),
    "scope(bits=3, engine='fused')": lambda model: (model, fewbit.scope(bits=3, engine="fused")),
    "scope(exact=True)": lambda model: (model, fewbit.scope(exact=True)),
    "scope(bits=3, recompute=True)": lambda model: (model, fewbit.scope(bits=3, recompute=True)),
    "scope(exact=True, recompute=True)": lambda model: (model, fewbit.scope(exact=True, recompute=True)),
    "checkpoint per block": lambda model: (checkpointed(model), contextlib.nullcontext()),
    "selective checkpoint": lambda model: (selectively_checkpointed(model), contextlib.nullcontext()),
    "compiled": compiled,
    "compiled, scope(bits=3)": lambda model: compiled(model, fewbit.scope(bits=3)),
    "compiled, scope(exact=True)": lambda model: compiled(model, fewbit.scope(exact=True)),
    "compiled, budget 0.5": lambda model: compiled(model, budget=0.5),
    "compiled, budget 0.5, scope(bits=3)": lambda model: compiled(model, fewbit.scope(bits=3), budget=0.5),
}
"""The first is what the others are compared with."""

OFFLOADED = functools.partial(torch.autograd.graph.save_on_cpu, pin_memory=True)
ROWS_ON_A_GPU: dict[str, Way] = {
    "save_on_cpu": lambda model: (model, OFFLOADED()),
    "save_on_cpu, scope(bits=3)": lambda model: (model, within(OFFLOADED, fewbit.scope(bits=3))),
}
"""What makes a difference only there."""


class Runner:
    """One row of one model."""

    def __init__(self, way: Way, model: nn.Module, batch: dict[str, Tensor]) -> None:
        self.model, self._context = way(model)
        self.batch = batch
        self._device = next(model.parameters()).device

    def forward(self) -> Tensor:
        with self._context:
            loss: Tensor = self.model(**self.batch).loss
        return loss

    def seconds(self) -> tuple[float, float]:
        """Wall-clock and processor time of a step."""
        self.model.zero_grad(set_to_none=True)
        self._wait()
        begin, cpu = time.perf_counter(), time.process_time()
        self.forward().backward()
        self._wait()
        return time.perf_counter() - begin, time.process_time() - cpu

    def peak(self) -> int:
        """Bytes that a step allocates at most on a GPU, beside what was there; 0 elsewhere."""
        if self._device.type != "cuda":
            return 0
        self.model.zero_grad(set_to_none=True)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.forward().backward()
        return torch.cuda.max_memory_allocated() - before

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def held(self) -> int:
        """Bytes that the forward allocates and that live on after it, beside the loss: asked of the allocator, for what
        a scope does may depend on modes that look on."""
        if self._device.type == "cuda":
            before = torch.cuda.memory_allocated()
            loss = self.forward()
            held = torch.cuda.memory_allocated() - before
        else:
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
                loss = self.forward()
            held = sum(event.self_cpu_memory_usage for event in seen.events() or ())
        held -= loss.untyped_storage().nbytes()
        loss.backward()
        return held

    def gradients(self) -> list[Tensor]:
        """Those of a step with a fixed seed."""
        self.model.zero_grad(set_to_none=True)
        torch.manual_seed(0)
        self.forward().backward()
        return [p.grad.clone() for p in self.model.parameters() if p.grad is not None]


def does_something(row: str, runner: Runner, model: nn.Module) -> bool:
    """Whether a row is not stock by another name: a model that transformers does not checkpoint."""
    return "checkpoint" not in row or runner.model is not model


def difference(gradients: list[Tensor], stock: list[Tensor]) -> float:
    """Relative L2 distance of two gradients."""
    pairs = [(a.float(), b.float()) for a, b in zip(gradients, stock, strict=True)]
    return float(sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)) ** 0.5


def there(case: Case, device: str, dtype: torch.dtype, times: int = 1) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model, in training mode, and its batch, so many times."""
    model, batch = case.build()
    batch = {
        name: t.repeat_interleave(times, 0).to(device, dtype if t.is_floating_point() else None)
        for name, t in batch.items()
    }
    return model.train().to(device, dtype), batch


def measure(
    case: Case, rounds: int, rows: dict[str, Way], device: str, dtype: torch.dtype, times: int = 1
) -> dict[str, dict[str, float]]:
    """The figures of a model, by row and column."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = GRAPHS
    model, batch = there(case, device, dtype, times)
    runners = {name: Runner(way, model, batch) for name, way in rows.items()}
    runners = {name: runner for name, runner in runners.items() if does_something(name, runner, model)}
    for runner in runners.values():
        for _ in range(LEARN):
            runner.seconds()
    stock, *_ = runners.values()
    exact = stock.gradients()
    figures = {
        name: {
            "held_bytes": runner.held(),
            "gradients": difference(runner.gradients(), exact),
            "peak_bytes": runner.peak(),
        }
        for name, runner in runners.items()
    }
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in runners}
    order, chance = list(runners), random.Random(0)
    gc.collect()
    gc.disable()  # its pauses hit a row at random
    for _ in range(rounds):
        chance.shuffle(order)  # no row has always the same before it, whose caches it finds
        for name in order:
            taken[name].append(runners[name].seconds())
    gc.enable()
    for name, row in figures.items():
        pairs = list(zip(taken[name], taken["stock"], strict=True))
        wall = [mine[0] / stock[0] for mine, stock in pairs]
        row["seconds"] = statistics.median(mine[0] for mine, _ in pairs)
        row["lower"], row["time"], row["upper"] = statistics.quantiles(wall, n=4) if rounds > 1 else wall * 3
        row["cpu"] = statistics.median(mine[1] / stock[1] for mine, stock in pairs)
        row["held"] = row["held_bytes"] / figures["stock"]["held_bytes"]
    return figures


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MODELS)}; all where none is given")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a twentieth of the rounds, and two layers of launch-bound alone if no model is named",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch; all of them where not given")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of the parameters (default: float32)")
    parser.add_argument("--rows", metavar="TEXT", help="only the first rows, and those whose names contain this")
    parser.add_argument("--eager", action="store_true", help="none that are compiled, which takes minutes for each")
    parser.add_argument("--times", type=int, default=1, metavar="N", help="the batch so many times (default: 1)")
    parser.add_argument("--csv", metavar="PATH", help="write the table there too")
    arguments = parser.parse_args(argv)
    for name in arguments.models:
        if name not in MODELS:
            parser.error(f"no model {name!r}; there are {', '.join(MODELS)}")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    rows = ROWS if arguments.device == "cpu" else {**ROWS, **ROWS_ON_A_GPU}
    if arguments.rows:
        rows = {name: way for name, way in rows.items() if name.startswith("stock") or arguments.rows in name}
    if arguments.eager:
        rows = {name: way for name, way in rows.items() if not name.startswith("compiled")}

    known = about(("numba", "transformers", "peft"))
    print(f"machine  {known['machine']}\nversions {known['versions']}")
    print(f"dtype    {arguments.dtype}")
    print("time, cpu and held are ratios to stock; gradients: relative distance from stock's\n")
    print(
        "{:<21} {:<33} {:>8}  {:>21}  {:>6}  {:>9}  {:>6}  {:>9}".format(
            "model", "row", "ms", "time (quartiles)", "cpu", "held MiB", "held", "gradients"
        )
    )

    table = []
    cases = MODELS if arguments.models or not arguments.quick else QUICK
    for name in arguments.models or (available() if cases is MODELS else cases):
        case = cases[name]
        rounds = -(-case.rounds // 20) if arguments.quick else case.rounds
        dtype = DTYPES[arguments.dtype]
        for row, f in measure(case, rounds, rows, arguments.device, dtype, arguments.times).items():
            spread = f"{f['time']:.3f} ({f['lower']:.3f}-{f['upper']:.3f})"
            held = f"{f['held_bytes'] / 2**20:>9.2f}  {f['held']:>6.3f}"
            print(
                f"{name:<21} {row:<33} {f['seconds'] * 1e3:>8.1f}  {spread:>21}  {f['cpu']:>6.3f}  {held}  "
                f"{f['gradients']:>9.1e}",
                flush=True,
            )
            figures = [f[column] if isinstance(f[column], int) else float(f"{f[column]:.6g}") for column in FIGURES]
            table.append((name, arguments.dtype, row, *figures, *known.values()))
        if arguments.csv:  # after each model: they take minutes
            with open(arguments.csv, "w", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(COLUMNS)
                writer.writerows(table)


if __name__ == "__main__":
    main()
