"""Triton's kernels against plain torch, byte for byte.

They are run by Triton's interpreter on the CPU, or on a CUDA device where there is one. That they compile for a GPU is
tested without one, too.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch import Tensor

import fewbit_hooks as fewbit
from fewbit_hooks import ops
from fewbit_hooks.ops import _dispatch, _torch

_triton = pytest.importorskip("fewbit_hooks.ops._triton", reason="triton is not installed")

# the interpreter computes in numpy, which warns where a GPU does not
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
SIZES = [0, 1, 7, 8, 9, 1023, 4097]


def there(x: Tensor) -> Tensor:
    """`x` on the device of the kernels, with the strides that it has."""
    if x.device == DEVICE:
        return x
    base = x if x._base is None else x._base
    return base.to(DEVICE).as_strided(x.shape, x.stride(), x.storage_offset())


def equal_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(
        a.cpu().reshape(-1).view(torch.uint8), b.cpu().reshape(-1).view(torch.uint8)
    )


def test_the_kernels_are_run_by_the_interpreter_exactly_where_there_is_no_gpu() -> None:
    import triton

    assert isinstance(_triton._pack, triton.runtime.JITFunction) == (DEVICE.type == "cuda")


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CUDA device that nothing was coded on yet."""
    monkeypatch.setattr(_dispatch, "DEVICE_TYPES", frozenset({"cuda", "cpu"}))
    monkeypatch.setattr(_dispatch, "_found", {})


@pytest.mark.usefixtures("dispatched")
def test_where_it_works_the_kernels_are_used_and_a_step_is_what_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(50, 41, device=DEVICE)
    layers = [torch.nn.Linear(41, 64), torch.nn.GELU(), torch.nn.Dropout(0.5), torch.nn.Linear(64, 64), torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers).to(DEVICE)

    def gradient() -> Tensor:
        torch.manual_seed(0)
        model.zero_grad()
        with fewbit.scope(min_bytes=0):
            loss = model(x).square().mean()
        loss.backward()
        return model[0].weight.grad.clone()

    launched = []
    encode = _triton.encode
    monkeypatch.setattr(_triton, "encode", lambda x, *rest: launched.append(x.dtype) or encode(x, *rest))
    with_kernels = gradient()
    assert launched
    monkeypatch.setattr(_dispatch, "DEVICE_TYPES", frozenset())
    assert torch.equal(with_kernels, gradient())


def _wrong(*given: object) -> Tensor:
    return torch.zeros(264, dtype=torch.uint8, device=DEVICE)


def _raises(*given: object) -> Tensor:
    raise RuntimeError("no C compiler\nand much more")


@pytest.mark.usefixtures("dispatched")
@pytest.mark.parametrize(
    ("broken", "why"),
    [(_wrong, "ArithmeticError: its codes are not those of plain torch"), (_raises, "RuntimeError: no C compiler")],
)
def test_where_it_does_not_work_plain_torch_serves_and_a_warning_says_why_once(
    broken, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_triton, "encode", broken)
    x, coder = torch.randn(100, device=DEVICE), ops.Thresholds([0.0])
    with pytest.warns(fewbit.FewbitWarning) as warned:
        packed = ops.encode(x, 1, coder)
    assert [str(w.message) for w in warned] == [
        f"The kernels of triton do not work on {DEVICE}: {why}; it is coded in plain torch, more slowly."
    ]
    assert torch.equal(packed, _torch.encode(x, 1, coder))
    assert str(ops.backend(DEVICE)) == f"plain torch: {why}"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.encode(x, 1, coder)


@pytest.mark.usefixtures("dispatched")
def test_where_triton_is_not_installed_plain_torch_serves_and_the_doctor_says_so(monkeypatch) -> None:
    monkeypatch.setattr(_dispatch, "is_installed", lambda package: False)
    assert str(ops.backend(DEVICE)) == "plain torch: triton is not installed"
    assert ops.encode(torch.ones(8, device=DEVICE), 1, ops.Thresholds([0.0])).tolist() == [255]


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fewbit_hooks.ops import _triton as T, _triton_fused as F, _triton_gated as G

def build(kernel, constants, **types):
    names, pointers = kernel.arg_names, [name for name, kind in types.items() if kind[0] == "*"]
    source = ASTSource(
        kernel, {name: types.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in {**constants, "GROUPS": T.GROUPS}.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in [*pointers, "n"]},
    )
    ptx = triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["ptx"]
    return ptx

for kind in ("fp16", "bf16", "fp32", "fp64"):
    limits = "*fp64" if kind == "fp64" else "*fp32"
    size = {"fp16": "*i16", "bf16": "*i16", "fp32": "*i32", "fp64": "*i64"}[kind]
    for bits in (1, 3, 5, 8):
        sizes = dict(n="i64" if bits == 3 else "i32", n_bytes="i64" if bits == 3 else "i32")
        constants = dict(BITS=bits, FOLDED=bits == 3)
        ptx = build(T._encode_thresholds, constants, x="*" + kind, packed="*u8", boundaries=limits, **sizes)
        assert "ld.global.v" in ptx  # 16 bytes at a time
        build(T._decode, dict(BITS=bits), packed="*u8", values=size, out=size, n=sizes["n"], stride="i32")
        build(F._backward, dict(BITS=bits), grad="*" + kind, packed="*u8", levels=limits, out="*" + kind, n=sizes["n"])
    build(T._encode_not_zero, {}, x=size, packed="*u8", n="i32", n_bytes="i32")
    build(T._decode, dict(BITS=1), packed="*u8", values="*i8", out="*" + kind, n="i32", stride="i32")
    output = "*i16" if kind == "bf16" else "*" + kind
    build(T._decode_beside, dict(SIDES=True), output=output, packed="*u8", table=size, out=size, n="i32")
    for name in ("gelu", "gelu_tanh", "silu", "mish", "elu", "softplus", "tanh", "sigmoid", "hardswish"):
        constants = dict(NAME=name, BITS=3, FOLDED=name == "tanh")
        ptx = build(F._forward, constants, x="*" + kind, y="*" + kind, packed="*u8",
                    boundaries=limits, parameters=limits, n="i32", n_bytes="i32")
        assert kind != "bf16" or "cvt.rn.bf16" in ptx  # rounded to the nearest, by the hardware
        name, data = dict(NAME=name), dict(gate="*" + kind, up="*" + kind, out="*" + kind, parameters=limits, n="i32")
        build(G._gated_forward, name, **data)
        data |= dict(grad=data["gate"], d_gate=data["gate"], d_up=data["gate"])
        build(G._gated_backward, name, **{key: kind for key, kind in data.items() if key != "out"})
build(T._decode_beside, dict(SIDES=False), output="*fp32", packed="*u8", table="*i32", out="*i32", n="i32")
build(T._encode_lookup, dict(BITS=1), x="*i16", packed="*u8", table="*u8", n="i32", n_bytes="i32")
build(T._pack, dict(BITS=1), codes="*u8", packed="*u8", n="i32", n_bytes="i32")
assert not F.INTERPRETED
"""


def test_every_kernel_compiles_for_a_gpu_without_one(tmp_path) -> None:
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
        pytest.skip(f"triton {triton.__version__} takes signatures in another form")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    run = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
