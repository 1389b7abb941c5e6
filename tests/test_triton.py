"""Triton's kernels against plain torch, byte for byte.

They are run by Triton's interpreter on the CPU, or on a CUDA device where there is one. That they compile for a GPU is
tested without one, too.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

import fewbit_hooks as fewbit
from fewbit_hooks import ops
from fewbit_hooks.ops import _beside, _dispatch, _layout, _torch

from .hard_cases import BITS, DTYPES, boundaries_for, hard_values, random_codes, views

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


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_are_those_of_plain_torch(dtype: torch.dtype, bits: int, folded: bool) -> None:
    boundaries = boundaries_for(bits, folded)
    coder, x = ops.Thresholds(boundaries, folded), hard_values(boundaries, dtype)
    assert len(x) > 4096
    assert torch.equal(_triton.encode(there(x), bits, coder).cpu(), _torch.encode(x, bits, coder))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("n", SIZES)
def test_any_number_of_elements_is_coded_and_comes_back(n: int, bits: int) -> None:
    coder = ops.Thresholds(boundaries_for(bits))
    for dtype in DTYPES:
        x = 3 * torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype)
        values = torch.randn(1 << bits).to(dtype)
        packed = _torch.encode(x, bits, coder)
        assert torch.equal(_triton.encode(there(x), bits, coder).cpu(), packed)
        table, layout = ops.rows(values, bits), ops.Layout.of(there(x))
        decoded = _triton.decode(packed.to(DEVICE), table.to(DEVICE), bits, layout)
        assert equal_bits(decoded, _torch.decode(packed, table, bits, ops.Layout.of(x)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("boundary", [0.1, -0.1, 1e-50, -1e-50, 1e300, -1e300, 1e-40, 3.0])
def test_boundaries_that_are_no_float32_numbers_are_applied_exactly(boundary: float, dtype: torch.dtype) -> None:
    coder = ops.Thresholds([boundary])
    with np.errstate(over="ignore", under="ignore"):
        near = np.float32(boundary)
        around = [np.nextafter(near, np.float32(-np.inf)), near, np.nextafter(near, np.float32(np.inf))]
    x = torch.tensor([*map(float, around), 0.0, -0.0, 1e-45, -1e-45, np.inf, -np.inf, np.nan]).to(dtype)
    codes = torch.from_numpy(1 - (x.double().numpy() <= boundary).astype(np.uint8))
    assert torch.equal(_triton.encode(there(x), 1, coder).cpu(), ops.pack_bits(codes, 1))


@pytest.mark.parametrize("bits", [1, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", views())
def test_any_strides_are_encoded_and_come_back_dense(
    name: str, dtype: torch.dtype, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_layout, "CHUNK", 512)
    monkeypatch.setattr(_layout, "CHUNK_CUDA", 512)
    x = views()[name]
    if dtype != torch.float32:
        base = x if x._base is None else x._base
        x = base.to(dtype).as_strided(x.shape, x.stride(), x.storage_offset())
    coder, table = ops.Thresholds(boundaries_for(bits)), ops.rows(torch.linspace(-4, 4, 1 << bits).to(dtype), bits)
    packed = _torch.encode(x, bits, coder)
    assert torch.equal(_triton.encode(there(x), bits, coder).cpu(), packed)
    decoded = _triton.decode(packed.to(DEVICE), table.to(DEVICE), bits, ops.Layout.of(there(x)))
    expected = _torch.decode(packed, table, bits, ops.Layout.of(x))
    assert decoded.stride() == expected.stride()
    assert torch.equal(decoded.cpu(), expected)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("n", SIZES)
def test_packed_codes_are_those_of_plain_torch(n: int, bits: int) -> None:
    codes = random_codes(n, bits)
    packed = _triton.encode(there(codes), bits, _torch.as_they_are)
    assert torch.equal(packed.cpu(), _torch.pack_bits(codes, bits))
    layout = ops.Layout.of(there(codes))
    assert torch.equal(_triton.decode(packed, _torch.code_rows(bits, DEVICE), bits, layout).cpu(), codes)


@pytest.mark.parametrize("n", SIZES)
def test_boolean_masks_and_predicates_take_a_bit(n: int) -> None:
    mask = random_codes(n, 1).bool()
    packed = _triton.encode(there(mask), 1, ops.not_zero)
    assert torch.equal(packed.cpu(), _torch.encode(mask, 1, ops.not_zero))
    both = ops.rows(torch.tensor([False, True], device=DEVICE), 1)
    assert torch.equal(_triton.decode(packed, both, 1, ops.Layout.of(there(mask))).cpu(), mask)
    x = torch.randn(n)
    assert torch.equal(_triton.encode(there(x), 1, lambda c: c > 0).cpu(), _torch.encode(x, 1, lambda c: c > 0))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bool, torch.uint8, torch.int64])
def test_a_mask_of_two_values_is_told_by_its_bits(dtype: torch.dtype) -> None:
    x = torch.tensor([0, 1, 1, 0, 1, 0, 0, 0, 1] * 9).to(dtype)
    if dtype.is_floating_point:
        x[::7] = -0.0
    packed = _triton.encode(there(x), 1, ops.not_zero)
    assert torch.equal(packed.cpu(), _torch.encode(x, 1, ops.not_zero))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [1, 8])
def test_a_lookup_gives_each_value_the_code_in_its_place(bits: int, dtype: torch.dtype) -> None:
    codes = random_codes(1 << 16, bits)
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype)[3:]
    packed = _triton.encode(there(x), bits, ops.Lookup(codes.to(DEVICE)))
    assert torch.equal(packed.cpu(), _torch.encode(x, bits, ops.Lookup(codes)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_special_stand_ins_keep_their_bits(bits: int, dtype: torch.dtype) -> None:
    special = torch.tensor([float("nan"), -0.0, float("inf"), -float("inf"), 1.0, 5e-324, 1e-45, -6e-8], dtype=dtype)
    bytes_of = torch.cat([special] * 32)[: 1 << bits].contiguous().view(torch.uint8)
    bytes_of[0] = 1  # a signalling NaN
    stand_ins = bytes_of.view(dtype)
    packed = ops.pack_bits((torch.arange(1024) % (1 << bits)).to(torch.uint8), bits)
    table, layout = ops.rows(stand_ins, bits), ops.Layout((1024,), (1,), dtype, DEVICE)
    decoded = _triton.decode(packed.to(DEVICE), table.to(DEVICE), bits, layout)
    assert equal_bits(decoded, stand_ins[torch.arange(1024) % (1 << bits)])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.uint8])
def test_rows_of_small_integers_are_converted(dtype: torch.dtype) -> None:
    packed, table = (
        ops.pack_bits(random_codes(1001, 1), 1),
        ops.rows(torch.tensor([3, -100 % 128], dtype=torch.int8), 1),
    )
    layout = ops.Layout((1001,), (1,), dtype, DEVICE)
    decoded = _triton.decode(packed.to(DEVICE), table.to(DEVICE), 1, layout)
    assert equal_bits(decoded, _torch.decode(packed, table, 1, layout._replace(device=torch.device("cpu"))))


@pytest.mark.parametrize("output", DTYPES)
@pytest.mark.parametrize("sides", [1, 2])
def test_decoding_beside_an_output_is_that_of_plain_torch(sides: int, output: torch.dtype) -> None:
    y = torch.cat([torch.randn(1000).to(output), hard_values(np.array([1.0]), output)[:40]])[:1033]
    # float64 numbers that rounding by way of float32 takes to another float16 number than rounding at once
    y[7] = 1 + 2**-11 + 2**-40
    packed = ops.pack_bits(random_codes(len(y), 1), 1) if sides == 2 else None
    for dtype in DTYPES:
        table = torch.arange(sides << 16).to(dtype)
        expected = _beside.decode_beside(y, packed, table, ops.Layout.of(y.to(dtype)))
        there_packed = packed.to(DEVICE) if packed is not None else None
        decoded = _triton.decode_beside(there(y), there_packed, table.to(DEVICE), ops.Layout.of(y.to(DEVICE, dtype)))
        assert equal_bits(decoded, expected)


def test_an_output_of_other_strides_is_read_in_the_order_of_the_result() -> None:
    y, table = torch.randn(40, 30), torch.arange(65536).float()
    for output in (y, y[:, ::2], y.t(), y[:1].expand(40, 30)):
        layout = ops.Layout.of(torch.empty(output.shape[::-1]).t())
        expected = _beside.decode_beside(output, None, table, layout)
        decoded = _triton.decode_beside(there(output), None, table.to(DEVICE), layout._replace(device=DEVICE))
        assert decoded.stride() == expected.stride()
        assert torch.equal(decoded.cpu(), expected)


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
        f"Triton's kernels do not work on {DEVICE}: {why}; it is coded in plain torch, more slowly."
    ]
    assert torch.equal(packed, _torch.encode(x, 1, coder))
    assert str(ops.backend(DEVICE)) == f"plain torch: {why}"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.encode(x, 1, coder)


@pytest.mark.usefixtures("dispatched")
def test_where_triton_is_not_installed_plain_torch_serves_and_the_doctor_says_so(monkeypatch) -> None:
    monkeypatch.setattr(_dispatch, "triton_is_installed", lambda: False)
    assert str(ops.backend(DEVICE)) == "plain torch: triton is not installed"
    assert ops.encode(torch.ones(8, device=DEVICE), 1, ops.Thresholds([0.0])).tolist() == [255]


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fewbit_hooks.ops import _triton as T, _triton_fused as F

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
