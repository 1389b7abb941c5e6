"""How Triton's kernels are run, and that they compile for a GPU. What they compute is tested in `test_kernels.py`."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

_triton = pytest.importorskip("fewbit_hooks.ops._triton", reason="triton is not installed")

# the interpreter computes in numpy, which warns where a GPU does not
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


def test_the_kernels_are_run_by_the_interpreter_exactly_where_there_is_no_gpu() -> None:
    import triton

    assert isinstance(_triton._pack, triton.runtime.JITFunction) == (DEVICE.type == "cuda")


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
        data = dict(grad="*" + kind, packed="*u8", out="*" + kind, n=sizes["n"])
        build(T._multiply, dict(BITS=bits), values=limits, stride="i32", **data)
    build(T._encode_above, {}, x="*" + kind, packed="*u8", limit=limits, n="i32", n_bytes="i32")
    build(T._encode_not_zero, {}, x=size, packed="*u8", n="i32", n_bytes="i32")
    build(T._decode, dict(BITS=1), packed="*u8", values="*i8", out="*" + kind, n="i32", stride="i32")
    output = "*i16" if kind == "bf16" else "*" + kind
    build(T._decode_beside, dict(SIDES=True), output=output, packed="*u8", table=size, out=size, n="i32")
    data = dict(grad="*" + kind, output=output, packed="*u8", table=limits, out="*" + kind, n="i32")
    build(T._multiply_beside, dict(SIDES=True), **data)
    for name in ("gelu", "gelu_tanh", "silu", "mish", "elu", "softplus", "tanh", "sigmoid", "hardswish"):
        constants = dict(NAME=name, BITS=3, FOLDED=name == "tanh")
        ptx = build(F._forward, constants, x="*" + kind, y="*" + kind, packed="*u8",
                    boundaries=limits, parameters=limits, n="i32", n_bytes="i32")
        assert kind != "bf16" or "cvt.rn.bf16" in ptx  # rounded to the nearest, by the hardware
        data = dict(gate="*" + kind, up="*" + kind, out="*" + kind, parameters=limits, n="i32", row="i32")
        for halves in (False, True):
            constants = dict(NAME=name, HALVES=halves)
            build(G._gated_forward, constants, **data)
            more = dict(grad=data["gate"], d_gate=data["gate"], d_up=data["gate"])
            build(G._gated_backward, constants, **{key: of for key, of in {**data, **more}.items() if key != "out"})
build(T._decode_beside, dict(SIDES=False), output="*fp32", packed="*u8", table="*i32", out="*i32", n="i32")
build(T._encode_lookup, dict(BITS=1), x="*i16", packed="*u8", table="*u8", n="i32", n_bytes="i32")
build(T._pack, dict(BITS=1), codes="*u8", packed="*u8", n="i32", n_bytes="i32")
assert not T.INTERPRETED
"""


def test_every_kernel_compiles_for_a_gpu_without_one(tmp_path) -> None:
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
        pytest.skip(f"triton {triton.__version__} takes signatures in another form")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    run = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
