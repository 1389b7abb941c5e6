"""Coding elements: the numpy oracle, the slow twins, every layout, and nothing of the tensor's own size."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fewbit_hooks import ops
from fewbit_hooks._float16 import scale_for_cut, snap
from fewbit_hooks.ops import _dispatch, _layout

from .conftest import torch_threads
from .hard_cases import BITS, DTYPES, boundaries_for, hard_values, random_codes, views

SIZES = [0, 1, 7, 8, 9, 1023, 1024]


@pytest.fixture(autouse=True, params=["plain torch", "numba"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What codes on the CPU."""
    if request.param == "numba":
        pytest.importorskip("numba", reason="numba is not installed")
        monkeypatch.setattr(_dispatch, "_found", {})
        assert str(ops.backend(torch.device("cpu"))) == "numba"
    else:
        plain = _dispatch.Backend(None, "as a test has it")
        monkeypatch.setattr(_dispatch, "_found", {("cpu", "_numba"): plain})


@pytest.fixture(autouse=True)
def all_threads() -> Iterator[None]:
    """Coding shares its work out among threads."""
    with torch_threads(os.cpu_count() or 1):
        yield


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_layout, "CHUNK", 64)
    monkeypatch.setattr(_layout, "CHUNK_CUDA", 64)


def packed_by_numpy(codes: Tensor, bits: int) -> Tensor:
    stream = np.unpackbits(codes.numpy()[:, None], axis=1, count=bits, bitorder="little")
    return torch.from_numpy(np.packbits(stream, bitorder="little"))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("n", SIZES)
def test_packed_codes_are_those_of_the_numpy_oracle(n: int, bits: int) -> None:
    codes = random_codes(n, bits)
    packed = ops.pack_bits(codes, bits)
    assert packed.numel() == -(-n * bits // 8) == ops.packed_bytes(n, bits)
    assert torch.equal(packed, packed_by_numpy(codes, bits))
    assert torch.equal(ops.unpack_bits(packed, bits, n), codes)


@given(bits=st.integers(1, 8), data=st.binary(max_size=200), skip=st.integers(0, 9))
def test_any_codes_from_any_offset_come_back(bits: int, data: bytes, skip: int) -> None:
    codes = (torch.tensor(list(data), dtype=torch.uint8) & ((1 << bits) - 1))[skip:]
    packed = ops.pack_bits(codes, bits)
    assert torch.equal(packed, packed_by_numpy(codes, bits))
    assert torch.equal(ops.unpack_bits(packed, bits, codes.numel()), codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("n", [63, 64, 65, 127, 128, 129, 1000])
@pytest.mark.usefixtures("small_chunks")
def test_chunks_leave_no_seam_in_the_bytes(n: int, bits: int) -> None:
    codes = random_codes(n, bits)
    packed = ops.pack_bits(codes, bits)
    assert torch.equal(packed, packed_by_numpy(codes, bits))
    assert torch.equal(ops.unpack_bits(packed, bits, n), codes)


@pytest.mark.parametrize("n", SIZES)
def test_a_boolean_mask_takes_a_bit_an_element_and_comes_back_boolean(n: int) -> None:
    mask = random_codes(n, 1).bool()
    packed = ops.pack_bits(mask, 1)
    assert torch.equal(packed, packed_by_numpy(mask.to(torch.uint8), 1))
    both = ops.rows(torch.tensor([False, True]), 1)
    assert torch.equal(ops.decode(packed, both, 1, ops.Layout.of(mask)), mask)


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_fast_coder_agrees_with_its_slow_twin_and_with_numpy(dtype: torch.dtype, bits: int, folded: bool) -> None:
    boundaries = boundaries_for(bits, folded)
    coder = ops.Thresholds(boundaries, folded)
    x = hard_values(boundaries, dtype)
    assert torch.equal(coder(x), coder.bucketize(x))
    exact = x.double().numpy()
    by_numpy = np.searchsorted(boundaries, np.abs(exact) if folded else exact, side="left")
    assert torch.equal(coder(x), torch.from_numpy(by_numpy.astype(np.uint8)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("boundaries", [boundaries_for(3), np.array([-0.3, 0.1, 1 / 3])], ids=["cuts", "no cuts"])
def test_all_sixteen_bit_values_get_the_right_code(dtype: torch.dtype, boundaries: np.ndarray[Any, Any]) -> None:
    x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    coder = ops.Thresholds(boundaries)
    assert torch.equal(coder(x), coder.bucketize(x))


@pytest.mark.parametrize(
    "boundaries",
    [snap([-3.0, -1.96, -0.98, 0.0, 0.98, 1.96, 3.0], scale_for_cut(3.0)), [0.1, 0.2], [1e5], [1e-9]],
    ids=["jump", "no cuts", "too large", "too small"],
)
def test_float32_is_exact_on_a_jump_and_where_no_table_can_be(boundaries: np.ndarray[Any, Any]) -> None:
    boundaries = np.asarray(boundaries)
    coder = ops.Thresholds(boundaries)
    x = hard_values(boundaries, torch.float32)
    by_numpy = np.searchsorted(boundaries, x.double().numpy(), side="left").astype(np.uint8)
    assert torch.equal(coder(x), torch.from_numpy(by_numpy))
    assert torch.equal(coder.bucketize(x), torch.from_numpy(by_numpy))


def test_bucketize_is_only_called_where_there_is_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    cuts, no_cuts = ops.Thresholds(boundaries_for(3)), ops.Thresholds([0.1, 0.2])
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        cuts(torch.zeros(8, dtype=dtype))  # makes the tables
    called: list[torch.dtype] = []
    monkeypatch.setattr(ops.Thresholds, "bucketize", lambda self, chunk: called.append(chunk.dtype))
    for dtype in DTYPES:
        cuts(torch.zeros(8, dtype=dtype))
    assert called == [torch.float64]
    no_cuts(torch.zeros(8))
    assert called == [torch.float64, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.usefixtures("small_chunks")
def test_decoding_gives_every_element_its_stand_in(n: int, bits: int, dtype: torch.dtype) -> None:
    x = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype)
    coder = ops.Thresholds(boundaries_for(bits))
    stand_ins = torch.linspace(-4, 4, 1 << bits).to(dtype)
    decoded = ops.decode(ops.encode(x, bits, coder), ops.rows(stand_ins, bits), bits, ops.Layout.of(x))
    assert decoded.dtype == dtype
    assert torch.equal(decoded, stand_ins[coder.bucketize(x).long()])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_special_stand_ins_keep_their_bits(bits: int, dtype: torch.dtype) -> None:
    special = torch.tensor([float("nan"), -0.0, float("inf"), -float("inf"), 1.0, 5e-324, 1e-45, -6e-8], dtype=dtype)
    bytes_of = torch.cat([special] * 32)[: 1 << bits].contiguous().view(torch.uint8)
    bytes_of[0] = 1  # a signalling NaN, which arithmetic of any kind would turn into a quiet one
    stand_ins = bytes_of.view(dtype)
    codes = torch.arange(1024) % (1 << bits)
    layout = ops.Layout((1024,), (1,), dtype, codes.device)
    decoded = ops.decode(ops.pack_bits(codes.to(torch.uint8), bits), ops.rows(stand_ins, bits), bits, layout)
    assert torch.equal(decoded.view(torch.uint8), stand_ins[codes].view(torch.uint8))


@pytest.mark.parametrize("bits", [1, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", views())
@pytest.mark.usefixtures("small_chunks")
def test_any_strides_are_encoded_and_come_back_dense(name: str, dtype: torch.dtype, bits: int) -> None:
    x = views()[name]
    if dtype != torch.float32:  # convert what lies underneath: a conversion of the view would lose its strides
        x = (
            x._base.to(dtype).as_strided(x.shape, x.stride(), x.storage_offset())
            if x._base is not None
            else x.to(dtype)
        )
    coder = ops.Thresholds(boundaries_for(bits))
    stand_ins = torch.linspace(-4, 4, 1 << bits).to(dtype)
    expected = stand_ins[coder.bucketize(x.reshape(-1)).long()].view(x.shape)

    packed, layout = ops.encode(x, bits, coder), ops.Layout.of(x)
    decoded = ops.decode(packed, ops.rows(stand_ins, bits), bits, layout)

    assert packed.numel() == ops.packed_bytes(x.numel(), bits)
    assert torch.equal(decoded, expected)
    assert decoded.stride() == (x.stride() if x.is_contiguous() else torch.empty_like(x).stride())
    dense = x if decoded.stride() == x.stride() else torch.empty_like(x).copy_(x)
    in_memory = dense.as_strided((dense.numel(),), (1,))
    assert torch.equal(packed, packed_by_numpy(coder.bucketize(in_memory), bits))


@given(
    shape=st.lists(st.integers(1, 6), max_size=4),
    strides=st.lists(st.integers(0, 9), min_size=4, max_size=4),
    offset=st.integers(0, 5),
)
def test_any_strides_at_all(shape: list[int], strides: list[int], offset: int) -> None:
    x = torch.arange(200.0).as_strided(shape, strides[: len(shape)], offset)
    expected = torch.empty_like(x).copy_(x) if not x.is_contiguous() else x
    flat = torch.cat([chunk for _, chunk in _layout.chunks(x)])
    assert torch.equal(flat, expected.as_strided((x.numel(),), (1,)))


@pytest.mark.usefixtures("small_chunks")
def test_chunks_of_a_dense_tensor_are_views_and_all_but_the_last_are_full() -> None:
    for name, x in views().items():
        pieces = list(_layout.chunks(x))
        assert [start for start, _ in pieces] == list(range(0, x.numel(), 64)), name
        assert all(len(piece) == min(64, x.numel() - start) and piece.is_contiguous() for start, piece in pieces), name
    x = views()["channels last"]
    storage = x.untyped_storage().data_ptr()
    assert all(piece.untyped_storage().data_ptr() == storage for _, piece in _layout.chunks(x))


@pytest.mark.parametrize("n", [0, 1, 7, 8, 1023, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.uint8])
def test_rows_of_small_integers_decode_to_the_same_values(n: int, dtype: torch.dtype) -> None:
    packed, values = ops.pack_bits(random_codes(n, 1), 1), torch.tensor([3, 100], dtype=torch.int8)
    layout = ops.Layout((n,), (1,), dtype, torch.device("cpu"))
    decoded = ops.decode(packed, ops.rows(values, 1), 1, layout)
    assert torch.equal(decoded, ops.decode(packed, ops.rows(values.to(dtype), 1), 1, layout))


def test_a_tensor_that_requires_grad_is_encoded_outside_the_graph() -> None:
    x = torch.randn(100, requires_grad=True)
    seen: list[bool] = []

    def positive(chunk: Tensor) -> Tensor:
        seen.append(chunk.requires_grad)
        return chunk > 0

    packed = ops.encode(x, 1, positive)
    values = torch.tensor([0.0, 1.0], requires_grad=True)
    decoded = ops.decode(packed, ops.rows(values, 1), 1, ops.Layout.of(x))
    assert seen == [False]
    assert not decoded.requires_grad
    assert torch.equal(decoded, (x > 0).float())


def test_defaults_of_dtype_and_device_change_nothing() -> None:
    x = torch.randn(1000)
    expected = ops.encode(x, 3, ops.Thresholds(boundaries_for(3)))
    values = torch.linspace(-1, 1, 8)
    decoded = ops.decode(expected, ops.rows(values, 3), 3, ops.Layout.of(x))
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert torch.equal(ops.encode(x, 3, ops.Thresholds(boundaries_for(3))), expected)
            assert torch.equal(ops.decode(expected, ops.rows(values, 3), 3, ops.Layout.of(x)), decoded)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.usefixtures("small_chunks")
def test_a_lookup_gives_each_value_the_code_in_its_place(dtype: torch.dtype) -> None:
    codes = random_codes(1 << 16, 8)
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype)
    assert torch.equal(ops.encode(x, 8, ops.Lookup(codes)), codes)
    assert torch.equal(ops.encode(x[1::3], 8, ops.Lookup(codes)), codes[1::3])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("small_chunks")
def test_a_nan_is_found_anywhere_and_infinities_are_none(dtype: torch.dtype) -> None:
    x = torch.randn(300).to(dtype)
    x[3], x[4] = float("inf"), -float("inf")
    assert not ops.has_nan(x)
    assert not ops.has_nan(x[:0])
    x[290] = float("nan")
    assert ops.has_nan(x)
    assert ops.has_nan(x[::2].requires_grad_())
    assert not ops.has_nan(x[1::2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("small_chunks")
def test_what_is_not_finite_is_found_anywhere(dtype: torch.dtype) -> None:
    x = torch.randn(300).to(dtype)
    x[7] = torch.finfo(dtype).max
    assert ops.is_finite(x)
    assert ops.is_finite(x[:0])
    for value in (float("nan"), float("inf"), -float("inf")):
        x[290] = value
        assert not ops.is_finite(x)
        assert not ops.is_finite(x[::2].requires_grad_())
        assert ops.is_finite(x[1::2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 7, 1023])
def test_comparisons_by_numpy_are_those_of_torch(n: int, dtype: torch.dtype) -> None:
    x = torch.randn(n).to(dtype)
    x[: n // 4 : 3], x[1 : n // 4 : 3], x[2 : n // 4 : 3] = float("nan"), float("inf"), 0.5
    for predicate in (
        lambda v: v > 0.5,
        lambda v: (v >= -0.1) & (v <= 0.5),
        lambda v: ~((v <= -0.1) | (v >= 0.5)),
        lambda v: v != v,
    ):
        assert torch.equal(ops.compare(predicate, x), predicate(x.double()))


class NoWaiting(TorchDispatchMode):
    """Forbids what makes the host wait for a CUDA device."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique", "argwhere")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.WAITS, name
        if name == "index":
            assert all(index is None or index.dtype != torch.bool for index in args[1]), "boolean indexing"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [1, 3, 4, 8])
@pytest.mark.usefixtures("small_chunks")
def test_coding_never_makes_the_host_wait(bits: int, dtype: torch.dtype) -> None:
    x = torch.randn(1001).to(dtype)
    coder, values = ops.Thresholds(boundaries_for(bits)), torch.linspace(-1, 1, 1 << bits).to(dtype)
    with NoWaiting():
        for view in (x, x[::2]):
            packed = ops.encode(view, bits, coder)
            ops.decode(packed, ops.rows(values, bits), bits, ops.Layout.of(view))


MEMORY_SCRIPT = """
import sys, torch
from fewbit_hooks import ops
from fewbit_hooks._float16 import snap

def peak():
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

x = torch.ones(2**24, 4)  # 256 MiB
coder = ops.Thresholds(snap([-2, -1, -0.5, 0, 0.5, 1, 2]) if sys.argv[2] == "table" else [-2, -1, -0.3, 0, 0.3, 1, 2])
x = {"dense": x, "transposed": x.t(), "sliced": x[:, 1:], "expanded": x[:, :1].expand(2**24, 4)}[sys.argv[1]]
table = ops.rows(torch.linspace(-1, 1, 8), 3)
ops.decode(ops.encode(x[:1000], 3, coder), table, 3, ops.Layout.of(x[:1000]))
before = peak()
packed = ops.encode(x, 3, coder)
after_encode = peak()
y = ops.decode(packed, table, 3, ops.Layout.of(x))
print(after_encode - before - packed.nbytes / 2**20, peak() - after_encode - y.nbytes / 2**20)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from Linux's /proc")
@pytest.mark.parametrize(
    ("strides", "coder"),
    [("dense", "table"), ("dense", "bucketize"), ("transposed", "table"), ("sliced", "table"), ("expanded", "table")],
)
def test_no_temporary_has_the_size_of_the_tensor(strides: str, coder: str) -> None:
    # glibc gives what is freed back at once: what it keeps for later is no temporary
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    script = [sys.executable, "-c", MEMORY_SCRIPT, strides, coder]
    run = subprocess.run(script, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    beyond_codes, beyond_output = map(float, run.stdout.split())  # MiB; a copy of a tensor has 192 or 256
    assert beyond_codes < 48
    assert beyond_output < 48


def test_importing_ops_does_not_import_triton() -> None:
    script = "import sys, fewbit_hooks.ops; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_what_is_coded_while_the_kernels_are_looked_at_is_coded_in_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    # the garbage collector may find a scope in a generator at any time, which looks at its masks
    monkeypatch.setattr(_dispatch, "_found", {})
    monkeypatch.setattr(_dispatch, "_lock", type(_dispatch._lock)())
    said: list[str] = []

    def check(kernels: Any, device: torch.device) -> None:
        said.append(ops.backend(device).said)

    monkeypatch.setitem(_dispatch._CHECKS, "_numba", (check, ""))
    look = threading.Thread(target=ops.backend, args=(torch.device("cpu"),), daemon=True)
    look.start()
    look.join(timeout=60)
    assert not look.is_alive()
    assert said in ([], ["it is just being looked at"])  # where numba is not installed nothing is checked
    assert ops.backend(torch.device("cpu")).said in ("numba", "numba is not installed")


def test_sixteen_bits_are_compared_in_float32_on_every_device() -> None:
    # CUDA would round the number to 16 bits
    compared = []
    ops.compare(lambda v: compared.append(v.dtype) or v > 0.1, torch.zeros(3, dtype=torch.bfloat16, device="meta"))
    assert compared == [torch.float32]
