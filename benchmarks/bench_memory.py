"""What a training step keeps for backward: stock PyTorch, `exact=True`, 1 to 4 bits; and the error of the gradients.

    python benchmarks/bench_memory.py [--quick] [--csv PATH] [--models NAME ...]

For each model: full training and LoRA (peft, on every linear layer and convolution), float32 and bfloat16. Nothing is
downloaded: the models have their published widths, few layers and random weights. All bytes but those of the columns
from `native_op_bytes` on are counted from outside, by walking the graph of the loss (`held.py`), at the third step of
a scope, when it has learned what is kept anyway. `docs/make.py` makes docs/memory.md of the CSV.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gc
import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fewbit_hooks as fewbit
from about import about
from fewbit_hooks._mask_calls import MASKS
from fewbit_hooks._profile_models import Sizes, build
from held import held_for_backward

MODELS: dict[str, int | None] = {
    "roberta-base": 4,
    "gpt2": 4,
    "tinyllama-1.1b": 2,
    "t5-small": 4,
    "whisper-tiny": 4,
    "vit-base": 4,
    "clip-vit-base-patch32": 4,
    "convnext-tiny": None,
    "efficientnet-b0": None,
    "mobilenet-v2": None,
    "resnet-50": None,
}
"""Layers (of the encoder and of the decoder each); None: all of them."""
QUICK: dict[str, int | None] = {"vit-base": 1, "mobilenet-v2": None}
IMAGES = ("vit-base", "clip-vit-base-patch32", "convnext-tiny", "efficientnet-b0", "mobilenet-v2", "resnet-50")

SETTINGS: dict[str, dict[str, Any]] = {
    "exact": {"exact": True},
    "1 bit": {"bits": 1},
    "2 bits": {"bits": 2},
    "3 bits": {"bits": 3},
    "4 bits": {"bits": 4},
    "3 bits, recompute": {"bits": 3, "recompute": True},
    "exact, recompute": {"exact": True, "recompute": True},
}
LITTLE = 0.05
"""A setting that frees less than this share of the bytes has `little gain here` in its row."""

PARTS = ("native_op_bytes", "masks_bytes", "output_bit_bytes", "exact_bit_bytes", "codes_bytes", "recomputed_bytes")
COLUMNS = (
    "model",
    "layers",
    "batch",
    "training",
    "dtype",
    "setting",
    "held_bytes",  # for backward, in all
    "freed_bytes",  # stock's held less this one's
    "freed_share",
    "predicted_held_bytes",  # what fewbit.profile says without running a scope
    "gradient_error",  # of all gradients together, relative, against stock's with the same masks
    # whose the freed bytes are, codes taken off, by the scope's own report; they add up to freed_bytes
    "native_op_bytes",  # intermediates of an activation written in primitives, which never come to be
    "masks_bytes",  # of dropout and its like, at 1 bit
    "output_bit_bytes",  # the next layer keeps the output: from it, and at most 1 bit, comes the derivative
    "exact_bit_bytes",  # relu's kind, whose derivative has two values: 1 bit
    "codes_bytes",  # smooth activations, at the setting's bits
    "recomputed_bytes",  # computed again in backward from what is kept anyway
    "other_bytes",  # the rest: the tables that decode, and what the report does not know
    "note",
    "machine",
    "versions",
    "date",
)


@dataclass
class Case:
    """A model, built, and its batch."""

    name: str
    layers: int | None
    training: str
    dtype: torch.dtype
    model: nn.Module
    batch: Mapping[str, Any]

    @property
    def dtype_name(self) -> str:
        """`float32`."""
        return str(self.dtype).removeprefix("torch.")

    def loss(self) -> Tensor:
        """The forward; dropout draws the same masks each time."""
        torch.manual_seed(1)
        loss: Tensor = self.model(**self.batch).loss
        return loss

    def held(self, loss: Tensor) -> int:
        """Bytes that the graph of `loss` holds; parameters and buffers are the model's."""
        return sum(held_for_backward(loss, [*self.model.parameters(), *self.model.buffers()]).values())

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        """Of all parameters that are trained."""
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        return {name: grad for name, grad in zip(trained, found, strict=True) if grad is not None}


def make_case(name: str, layers: int | None, training: str, dtype: torch.dtype, *, quick: bool) -> Case:
    """Build it, with the same weights and batch whatever the dtype."""
    torch.manual_seed(0)
    images = name in IMAGES
    sizes = Sizes(
        batch=(2 if quick else 4) if images else (1 if quick else 2),
        length=128 if quick else 512,
        image=96 if quick and images else None,
        layers=layers,
        dtype=torch.float32,
    )
    model, batch = build(name, sizes)
    if training == "LoRA":
        model = with_adapters(model)
    batch = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}
    return Case(name, layers, training, dtype, model.to(dtype).train(), batch)


def with_adapters(model: nn.Module) -> nn.Module:
    """LoRA on each linear layer and each convolution (depthwise ones apart), all else frozen.

    The head of a classifier is new, and so is trained; that of a language model is not.
    """
    from peft import LoraConfig, get_peft_model

    kinds = {"Linear", "Conv1D", "Conv1d", "Conv2d"}  # Conv1D is transformers' own linear layer, in GPT-2
    head = model.get_output_embeddings()
    new = () if head is not None else ("classifier",)
    targets = [
        path
        for path, module in model.named_modules()
        if type(module).__name__ in kinds
        and getattr(module, "groups", 1) == 1
        and module is not head
        and not path.startswith(new)
    ]
    # B starts at zero, and with it A's gradient: after the first step neither is
    config = LoraConfig(r=8, lora_dropout=0.05, target_modules=targets, init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, config)
    for module in adapted.modules():  # MobileNetV2 and Whisper look these up at their convolutions
        if isinstance(conv := getattr(module, "base_layer", None), (nn.Conv1d, nn.Conv2d)):
            module.stride, module.kernel_size, module.dilation = conv.stride, conv.kernel_size, conv.dilation
    for part in new:
        getattr(model, part).requires_grad_(True)
    return adapted


def measure(case: Case) -> Iterator[dict[str, Any]]:
    """The rows of a case, stock's first. Stock's `gradient_error` is left out."""
    loss = case.loss()
    stock_bytes = case.held(loss)
    stock = case.gradients(loss)
    del loss
    yield {"setting": "stock", "held_bytes": stock_bytes, "gradients": stock}
    profile = fewbit.profile(case.loss)
    predicted = {prediction.setting: prediction.held_bytes for prediction in profile.predictions}
    for setting, options in SETTINGS.items():
        memory = fewbit.scope(**options)
        for _ in range(2):  # a scope learns from two steps that agree what is kept anyway
            with memory:
                loss = case.loss()
                torch.autograd.grad(loss, loss)  # a backward has begun: all that a scope wants to see of one
            del loss
        with memory:
            loss = case.loss()
        report = memory.report()
        held = case.held(loss)
        gradients = case.gradients(loss)
        del loss
        freed = stock_bytes - held
        parts = contributions(report, case)
        yield {
            "setting": setting,
            "held_bytes": held,
            "freed_bytes": freed,
            "freed_share": round(freed / stock_bytes, 5),
            "predicted_held_bytes": predicted[setting],
            "gradient_error": float(f"{relative_error(stock, gradients):.4g}"),
            **parts,
            "other_bytes": freed - sum(parts.values()),
            "note": "little gain here" if freed < LITTLE * stock_bytes else "",
        }


def contributions(report: fewbit.Report, case: Case) -> dict[str, int]:
    """Whose the freed bytes are, less what is stored for them, by the rows of the report."""
    parts = dict.fromkeys(PARTS, 0)
    activations = {activation.name for activation in fewbit.activations()}
    exact = {activation.name for activation in fewbit.activations() if activation.exact}
    for row in report.rows:
        net = row.freed_bytes - row.stored_bytes
        if row.activation in MASKS:
            parts["masks_bytes"] += net
            continue
        if row.how == "recomputed" and row.activation not in activations:
            parts["recomputed_bytes"] += net
            continue
        never_made = intermediates(row, case) if is_composite(case.model, row.module) else 0
        parts["native_op_bytes"] += never_made
        kind = "output_bit" if row.beside_output else "exact_bit" if row.activation in exact else "codes"
        parts[f"{kind}_bytes"] += net - never_made
    return parts


def is_composite(model: nn.Module, path: str) -> bool:
    """The module is of a class that computes an activation from primitives, and that a scope runs as one node."""
    modules = dict(model.named_modules())
    return path in modules and hasattr(type(modules[path]).forward, "_fewbit_original")


def intermediates(row: Any, case: Case) -> int:
    """What the primitives would have kept beside a tensor of the input's size, which codes or the output replace."""
    if not row.bits:  # the input itself is left
        return int(row.freed_bytes - row.stored_bytes)
    elements = 8 * row.stored_bytes // row.bits
    return max(0, int(row.freed_bytes - elements * case.dtype.itemsize))


def relative_error(exact: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The norm of the difference over that of the exact gradients, all together."""
    assert exact.keys() == other.keys()
    square = difference = 0.0
    for name, gradient in exact.items():
        a, b = gradient.float(), other[name].float()
        square += float(torch.linalg.vector_norm(a, dtype=torch.float64)) ** 2
        difference += float(torch.linalg.vector_norm(a - b, dtype=torch.float64)) ** 2
    return math.sqrt(difference / square)


def describe(batch: Mapping[str, Any]) -> str:
    """`2 x 512`, `4 x 3 x 224 x 224`: the largest tensor of the batch."""
    return " x ".join(map(str, max(batch.values(), key=lambda value: value.numel()).shape))


def run(models: Mapping[str, int | None], *, quick: bool = False) -> Iterator[dict[str, Any]]:
    """The rows of the table, printed as they come."""
    known = about(("transformers", "peft"))
    print(f"machine  {known['machine']}\nversions {known['versions']}\n")
    head = ("native", "masks", "output", "1 bit", "codes", "again", "other")
    start_of_head = f"{'model':<22}{'':<6}{'':<9}{'setting':<18}{'MiB':>8}{'freed':>8}{'error':>9}  "
    print(start_of_head + "".join(f"{word:>8}" for word in head))
    start = time.perf_counter()
    for name, layers in models.items():
        for training in ("full", "LoRA"):
            in_float32: dict[str, Tensor] = {}
            for dtype in (torch.float32, torch.bfloat16):
                case = make_case(name, layers, training, dtype, quick=quick)
                for figures in measure(case):
                    if gradients := figures.pop("gradients", None):
                        if dtype is torch.float32:
                            in_float32 = gradients
                        else:  # of stock in bfloat16 against stock in float32: the dtype's own
                            figures["gradient_error"] = float(f"{relative_error(in_float32, gradients):.4g}")
                        del gradients
                    row = {
                        "model": name,
                        "layers": layers or "all",
                        "batch": describe(case.batch),
                        "training": training,
                        "dtype": case.dtype_name,
                        **figures,
                        **known,
                    }
                    print(line(row), flush=True)
                    yield row
                del case
                gc.collect()
        print(f"{time.perf_counter() - start:.0f} s", flush=True)


def line(row: Mapping[str, Any]) -> str:
    """A row for people; contributions in percent of stock's bytes."""
    text = f"{row['model']:<22}{row['training']:<6}{row['dtype']:<9}{row['setting']:<18}"
    text += f"{row['held_bytes'] / 2**20:>8.1f}"
    error = f"{100 * row['gradient_error']:>7.2f} %" if "gradient_error" in row else f"{'':>9}"
    if row["setting"] == "stock":
        return f"{text}{'':>8}{error}".rstrip()
    stock = row["held_bytes"] + row["freed_bytes"]
    parts = "".join(f"{100 * row[part] / stock:>8.1f}" for part in (*PARTS, "other_bytes"))
    return f"{text}{100 * row['freed_share']:>6.1f} %{error}  {parts}  {row['note']}".rstrip()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{' and '.join(QUICK)} only, with small batches")
    parser.add_argument("--csv", metavar="PATH", help="write the table there")
    parser.add_argument("--models", nargs="+", choices=MODELS, metavar="NAME", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--threads", type=int, metavar="N", help="of torch; its own choice where left out")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    known = QUICK if arguments.quick else MODELS
    chosen = {name: known.get(name, MODELS[name]) for name in arguments.models or known}
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", fewbit.FewbitWarning)  # that nothing was compressed: the rows say it
        writer = None
        if arguments.csv:
            file = stack.enter_context(open(arguments.csv, "w", newline="", encoding="utf-8"))
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
        for row in run(chosen, quick=arguments.quick):
            if writer is not None:
                writer.writerow(row)
                file.flush()


if __name__ == "__main__":
    main()
