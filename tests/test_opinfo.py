"""PyTorch's own sample inputs (`op_db`) of every recognised op: as function, alias, method and in place."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import SampleInput

import fewbit_hooks as fewbit
from fewbit_hooks import _policy

# The parameters of each smooth activation, in PyTorch's order: once more, so that `_calls.py` is not its own judge.
PARAMETERS: dict[str, dict[str, Any]] = {
    "celu": {"alpha": 1.0},
    "elu": {"alpha": 1.0},
    "gelu": {"approximate": "none"},
    "softplus": {"beta": 1.0, "threshold": 20.0},
    "hardswish": {},
    "logsigmoid": {},
    "mish": {},
    "selu": {},
    "sigmoid": {},
    "silu": {},
    "softsign": {},
    "tanh": {},
    "tanhshrink": {},
}
EXACT = {"hardshrink", "hardsigmoid", "hardtanh", "leaky_relu", "relu", "relu6", "softshrink", "threshold"}
TENSORS_ALONE = {"clamp", "clamp_min", "clamp_max"}  # op_db's samples of these have tensor limits alone
KEPT = {
    "glu": "the gradient of glu's values needs the true gate",
    "prelu": "the gradient of prelu's weight needs the true input",
    **dict.fromkeys(TENSORS_ALONE, "an argument of clamp is a Tensor"),
}
NAMES = {*PARAMETERS, *EXACT, *KEPT}

OPS = {
    op.name.rpartition(".")[2]: op
    for op in op_db
    if op.name.removeprefix("nn.functional.") in NAMES and not op.variant_test_name
}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]

# Some samples have no elements, or limits that are tensors: then a scope has nothing to compress, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:fewbit_hooks.scope compressed nothing")

# |gradient / grad - level|. In float32 and float64 the stand-in is found in float64 and rounded once: the level is
# attained to 5e-7 (design.md). In the 16-bit dtypes the best of the dtype's own values is taken: next to 1, where f'
# may be as steep as 1, they lie 2**-10 (float16) and 2**-7 (bfloat16) apart, and the nearest is half of that away.
ATTAINED = {torch.float64: 5e-7, torch.float32: 5e-7, torch.float16: 5e-4, torch.bfloat16: 4e-3}
# The kernel's product, and the expected one here, are each rounded to the dtype: half an ulp each, relative eps / 2.
# And some kernels round f' itself, or a factor of it, before.
ROUNDED = {dtype: 2 * torch.finfo(dtype).eps for dtype in DTYPES}


def forms(op: Any, broadcasts: bool) -> Iterator[tuple[str, Callable[..., Tensor]]]:
    """All the ways to call the op that `op_db` knows of."""
    yield "function", op.get_op()
    yield from ((alias.name, alias.op) for alias in op.aliases)
    if (method := op.get_method()) is not None:
        yield "method", method
    if (inplace := op.get_inplace()) is not None and not broadcasts:
        # an in-place call on a leaf is an error in stock too
        yield "inplace", lambda x, *args, **kwargs: inplace(x.clone(), *args, **kwargs)


def run(function: Callable[..., Tensor], sample: Any) -> tuple[Tensor, list[Tensor], Tensor]:
    """Forward and backward: the result, the gradients of all the sample's tensors, and what came from behind."""
    leaves = [
        t for t in (sample.input, *sample.args, *sample.kwargs.values()) if isinstance(t, Tensor) and t.requires_grad
    ]
    y = function(sample.input, *sample.args, **sample.kwargs)
    grad = torch.linspace(-2.0, 3.0, y.numel(), dtype=torch.float64).reshape(y.shape).to(y.dtype)
    return y.detach(), list(torch.autograd.grad(y, leaves, grad)), grad


@functools.cache
def samples(name: str, dtype: torch.dtype) -> list[Any]:
    op = OPS[name]
    torch.manual_seed(0)  # make_tensor draws from the global generator
    given = [s for s in op.sample_inputs("cpu", dtype, requires_grad=True) if s.input.requires_grad]
    if name not in TENSORS_ALONE:
        return given
    numbers = [
        SampleInput(s.input, args=tuple(t if t is None else t.detach().double().mean().item() for t in s.args))
        for s in given
        if all(t is None or t.numel() for t in s.args)
    ]
    return given + numbers


def same(a: Tensor, b: Tensor) -> bool:
    """Bit-equal, with NaN equal to NaN."""
    return bool(torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num()))


def expected_slope(name: str, sample: Any, bits: int) -> Tensor:
    given = dict(zip(PARAMETERS[name], sample.args, strict=False)) | sample.kwargs
    given.pop("inplace", None)
    book = fewbit.codebook(name, bits, **(PARAMETERS[name] | given))
    return book.derivative(sample.input.detach())


def test_op_db_has_all_the_recognised_activations() -> None:
    assert {*OPS} == NAMES
    recognised = {a.name for a in fewbit.activations() if a.calls and a.calls[0] != a.name}  # not those of register()
    assert recognised == {*PARAMETERS} | EXACT | {"clamp"}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(
    ("name", "bits"),
    [(name, bits) for name in sorted(NAMES) for bits in (1, 3, 8) if bits == 3 or name in PARAMETERS],  # others take 1
)
def test_the_forward_is_stocks_and_the_gradient_is_the_codebooks_or_stocks(
    name: str, bits: int, dtype: torch.dtype
) -> None:
    op = OPS[name]
    for sample in samples(name, dtype):
        for form, function in forms(op, sample.broadcasts_input):
            y0, gradients0, grad = run(function, sample)
            with fewbit.scope(bits=bits, min_bytes=0) as memory:
                y, gradients, _ = run(function, sample)
            case = form, sample
            assert same(y, y0), case
            rows = memory.report().rows
            assert len(rows) == 1, case
            assert rows[0].activation == name.removesuffix("_min").removesuffix("_max"), case
            if name in EXACT | TENSORS_ALONE | {*KEPT}:
                assert all(same(g, g0) for g, g0 in zip(gradients, gradients0, strict=True)), case
            elif rows[0].bits is not None:
                expected = grad.double() * expected_slope(name, sample, bits).double()
                limit = grad.double().abs() * ATTAINED[dtype] + expected.abs() * ROUNDED[dtype]
                excess = (gradients[0].double() - expected).abs() - limit
                assert excess.max() <= 0, (case, f"exceeded by {excess.max()}")


@pytest.mark.parametrize("name", sorted(NAMES))
def test_what_is_kept_is_kept_for_a_known_reason(name: str) -> None:
    """The reason of every sample: an op that is not coded any more shows here."""
    op = OPS[name]
    for sample in samples(name, torch.float32):
        with fewbit.scope(bits=3, min_bytes=0) as memory:
            run(op.get_op(), sample)
        (row,) = memory.report().rows
        if sample.input.numel() == 0:
            assert (row.bits, row.reason) == (None, _policy.EMPTY)
        elif name in KEPT and (name not in TENSORS_ALONE or any(isinstance(limit, Tensor) for limit in sample.args)):
            assert (row.bits, row.reason) == (None, KEPT[name])
        else:
            assert row.bits == (1 if name in EXACT | TENSORS_ALONE else 3), (row.reason, sample)


if __name__ == "__main__":  # what of op_db is coded, and what is kept and why: python tests/test_opinfo.py
    total = collections.Counter[str]()
    for name, op in OPS.items():
        for dtype in DTYPES:
            for sample in samples(name, dtype):
                for _, function in forms(op, sample.broadcasts_input):
                    with fewbit.scope(bits=3, min_bytes=0) as memory:
                        run(function, sample)
                    total.update((row.reason if row.bits is None else "coded") for row in memory.report().rows)
    print(f"{len(OPS)} ops")
    for reason, count in total.most_common():
        print(f"{count:6d} {reason}")
