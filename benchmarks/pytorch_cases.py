"""PyTorch's own test cases under a scope: every operation of `op_db` and every module of `module_db`.

    python benchmarks/pytorch_cases.py [--every N] [--csv PATH]

Each sample is run forward and backward in float32, twice without a scope and once in each setting, with the same seed,
and compared bit for bit. What may come out:

    equal         outputs and gradients are stock's
    approximate   outputs are; gradients are not, and an activation was coded to 8 bits
    raises        as stock does, with the same type
    noise         stock differs from itself: memory that is not initialised, sums in any order
    wrong         anything else

`docs/make.py` puts the counts into docs/coverage.md.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db
from torch.utils._pytree import tree_leaves, tree_map

import fewbit_hooks as fewbit
from about import about

SETTINGS: dict[str, dict[str, Any]] = {
    "bits=8": {"bits": 8},
    "exact=True": {"exact": True},
    "exact=True, recompute=True": {"exact": True, "recompute": True},
}
OUTCOMES = ("equal", "approximate", "raises", "noise", "wrong")
COLUMNS = ("suite", "setting", "run", *OUTCOMES, "machine", "versions", "date")
CLOSE = 0.02
"""Of the largest gradient, or of 1: at 8 bits a derivative's error is far smaller; that of a wrong tensor is not."""

Run = Callable[[], tuple[list[Tensor], list[Tensor | None]]]


@dataclass
class Counts:
    """Of one suite in one setting."""

    outcomes: Counter[str] = field(default_factory=Counter)
    approximate: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def fresh(value: Any) -> Any:
    """The value with copies of its tensors, as leaves."""

    def copied(t: Any) -> Any:
        return t.detach().clone().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t

    return tree_map(copied, value)


def forward_and_backward(function: Callable[..., Any], inputs: Any, parameters: Sequence[Tensor] = ()) -> Any:
    """The outputs, and the gradients of all leaves."""
    torch.manual_seed(0)
    args, kwargs = fresh(inputs)
    leaves = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.requires_grad]
    out = [t for t in tree_leaves(function(*args, **kwargs)) if isinstance(t, Tensor)]
    roots = [t for t in out if t.requires_grad]
    gradients: list[Tensor | None] = []
    if roots:
        weights = [torch.linspace(-1, 2, t.numel()).view(t.shape).to(t.dtype) for t in roots]
        leaves += [p for p in parameters if p.requires_grad]
        gradients = list(torch.autograd.grad(roots, leaves, weights, allow_unused=True))
    return [t.detach() for t in out], gradients


def same(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> bool:
    """Bit for bit, but for the bits of a NaN."""
    return len(a) == len(b) and all(
        (x is None and y is None)
        or (x is not None and y is not None and x.shape == y.shape and x.dtype == y.dtype and _equal(x, y))
        for x, y in zip(a, b, strict=True)
    )


def _equal(x: Tensor, y: Tensor) -> bool:
    if x.layout is not torch.strided:
        return bool(torch.equal(x.to_dense(), y.to_dense()))
    return bool(torch.allclose(x, y, rtol=0, atol=0, equal_nan=True)) if x.dtype != torch.bool else torch.equal(x, y)


def near(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> bool:
    """Within the bound above."""
    return all(
        x is None
        or y is None
        or bool(((x - y).abs() <= CLOSE * max(1.0, float(y.abs().max()))).all() | y.isnan().any())
        for x, y in zip(a, b, strict=True)
    )


def look(run: Run, settings: dict[str, Any], stock: Any, again: Any) -> tuple[str, set[str]]:
    """What comes out in a setting, and the activations that were coded."""
    handle = fewbit.enable(min_bytes=0, **settings)
    try:
        found = attempt(run)
        rows = handle.report().rows
    finally:
        handle.remove()
    coded = {row.activation for row in rows if (row.bits or 0) > 1}
    if isinstance(stock, Exception) or isinstance(found, Exception):
        return ("raises" if type(stock) is type(found) else "wrong"), coded
    if not (same(stock[0], again[0]) and same(stock[1], again[1])):
        return "noise", coded
    if not same(found[0], stock[0]):
        return "wrong", coded
    if same(found[1], stock[1]):
        return "equal", coded
    return ("approximate" if settings.get("bits") and near(found[1], stock[1]) else "wrong"), coded


def attempt(run: Run) -> Any:
    """What a run gives, or raises."""
    try:
        return run()
    except Exception as error:
        return error


def operations(every: int) -> Iterator[tuple[str, Run]]:
    """The samples of op_db that have a backward in float32."""
    for op in op_db[::every]:
        if not op.supports_autograd or torch.float32 not in op.supported_backward_dtypes("cpu"):
            continue
        torch.manual_seed(0)
        for sample in op.sample_inputs("cpu", torch.float32, requires_grad=True):
            inputs = (sample.input, *sample.args), sample.kwargs
            yield op.formatted_name, lambda op=op, inputs=inputs: forward_and_backward(op.get_op(), inputs)


def modules(every: int) -> Iterator[tuple[str, Run]]:
    """The samples of module_db, in training and in evaluation."""
    for info in module_db[::every]:
        for training in (True, False):
            torch.manual_seed(0)
            for sample in info.module_inputs_func(
                info, device="cpu", dtype=torch.float32, requires_grad=True, training=training
            ):
                if sample.forward_input is None:
                    continue
                made = sample.constructor_input
                with contextlib.suppress(Exception):
                    torch.manual_seed(1)
                    module = info.module_cls(*made.args, **made.kwargs).float().train(training)
                    inputs = sample.forward_input.args, sample.forward_input.kwargs
                    yield info.name, lambda module=module, inputs=inputs: _run_module(module, inputs)


def _run_module(module: torch.nn.Module, inputs: Any) -> Any:
    mine = copy.deepcopy(module)  # running statistics change, and lazy modules become others
    return forward_and_backward(mine, inputs, [p for p in mine.parameters() if not is_lazy(p)])


def count(cases: Iterator[tuple[str, Run]]) -> dict[str, Counts]:
    """By setting."""
    counts = {name: Counts() for name in SETTINGS}
    for name, run in cases:
        stock, again = attempt(run), attempt(run)
        for setting, settings in SETTINGS.items():
            outcome, coded = look(run, settings, stock, again)
            if outcome == "wrong" and not isinstance(stock, Exception) and _is_noisy(run, stock):
                outcome = "noise"
            counts[setting].outcomes[outcome] += 1
            if outcome == "approximate":
                counts[setting].approximate.update(coded)
            if outcome == "wrong":
                counts[setting].wrong.append(name)
    return counts


def _is_noisy(run: Run, stock: Any) -> bool:
    """Whether stock differs from itself now and then."""
    runs = [run() for _ in range(100)]  # all held: LAPACK's sums depend on where in memory their arguments lie
    return not all(same(outputs, stock[0]) and same(gradients, stock[1]) for outputs, gradients in runs)


SUITES = {"op_db": operations, "module_db": modules}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every N-th operation and module")
    parser.add_argument("--csv", metavar="PATH", help="write the counts there too")
    arguments = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    known = about()
    table, failed = [], False
    for suite, cases in SUITES.items():
        for setting, counts in count(cases(arguments.every)).items():
            total = sum(counts.outcomes.values())
            numbers = {outcome: counts.outcomes[outcome] for outcome in OUTCOMES}
            table.append({"suite": suite, "setting": setting, "run": total, **numbers, **known})
            said = ", ".join(f"{number} {outcome}" for outcome, number in numbers.items() if number)
            print(f"{suite}, {setting}: {total} samples: {said}")
            for title, names in (("approximate", counts.approximate), ("wrong", Counter(counts.wrong))):
                if names:
                    print(f"    {title}: " + ", ".join(f"{name} {number}" for name, number in sorted(names.items())))
            failed |= bool(counts.wrong)
    if arguments.csv:
        with open(arguments.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
