"""Compiled kernels against plain torch, byte for byte: Triton's and numba's.

Triton's are run by Triton's interpreter on the CPU, or on a CUDA device where there is one.
"""

from __future__ import annotations

import gc
import importlib
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

import fewbit_hooks as fewbit
from fewbit_hooks import ops
from fewbit_hooks._standins import all_values
from fewbit_hooks.ops import _beside, _dispatch, _layout, _torch, _two_values

from .conftest import forget_what_was_learned, torch_threads
from .hard_cases import BITS, DTYPES, boundaries_for, hard_values, random_codes, views

# the interpreter computes in numpy, which warns where a GPU does not
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
SIZES = [0, 1, 7, 8, 9, 1023, 1024, 4097]


class Kernels:
    """A package's kernels, and the device that they are for."""

    def __init__(self, package: str) -> None:
        self.package = package
        self.module: ModuleType = importlib.import_module(f"fewbit_hooks.ops._{package}")
        self.device = torch.device("cuda:0" if package == "triton" and torch.cuda.is_available() else "cpu")

    def there(self, x: Tensor) -> Tensor:
        """`x` on the device of the kernels, with the strides that it has."""
        if x.device == self.device:
            return x
        base = x if x._base is None else x._base
        return base.to(self.device).as_strided(x.shape, x.stride(), x.storage_offset())

    def encode(self, x: Tensor, bits: int, coder: ops.Coder) -> Tensor:
        """The codes, brought back."""
        packed: Tensor = self.module.encode(self.there(x), bits, coder)
        return packed.cpu()

    def decode(self, packed: Tensor, rows: Tensor, bits: int, layout: ops.Layout) -> Tensor:
        """The values, brought back."""
        out: Tensor = self.module.decode(
            self.there(packed), self.there(rows), bits, layout._replace(device=self.device)
        )
        return out.cpu()

    def decode_beside(self, output: Tensor, packed: Tensor | None, table: Tensor, layout: ops.Layout) -> Tensor:
        """The values, brought back."""
        packed = None if packed is None else self.there(packed)
        layout = layout._replace(device=self.device)
        out: Tensor = self.module.decode_beside(self.there(output), packed, self.there(table), layout)
        return out.cpu()

    def multiply(self, grad: Tensor, packed: Tensor, rows: Tensor, bits: int, layout: ops.Layout) -> Tensor:
        """The products, brought back."""
        layout = layout._replace(device=self.device)
        out: Tensor = self.module.multiply(self.there(grad), self.there(packed), self.there(rows), bits, layout)
        return out.cpu()

    def multiply_beside(
        self, grad: Tensor, output: Tensor, packed: Tensor | None, table: Tensor, layout: ops.Layout
    ) -> Tensor:
        """The products, brought back."""
        packed, layout = None if packed is None else self.there(packed), layout._replace(device=self.device)
        out: Tensor = self.module.multiply_beside(
            self.there(grad), self.there(output), packed, self.there(table), layout
        )
        return out.cpu()


@pytest.fixture(params=["triton", "numba"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    pytest.importorskip(request.param, reason=f"{request.param} is not installed")
    return Kernels(request.param)


def equal_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_are_those_of_plain_torch(kernels: Kernels, dtype: torch.dtype, bits: int, folded: bool) -> None:
    boundaries = boundaries_for(bits, folded)
    coder, x = ops.Thresholds(boundaries, folded), hard_values(boundaries, dtype)
    assert len(x) > 4096
    assert torch.equal(kernels.encode(x, bits, coder), _torch.encode(x, bits, coder))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("n", SIZES)
def test_any_number_of_elements_is_coded_and_comes_back(kernels: Kernels, n: int, bits: int) -> None:
    coder = ops.Thresholds(boundaries_for(bits))
    for dtype in DTYPES:
        x = 3 * torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype)
        values = torch.randn(1 << bits).to(dtype)
        packed = _torch.encode(x, bits, coder)
        assert torch.equal(kernels.encode(x, bits, coder), packed)
        table, layout = ops.rows(values, bits), ops.Layout.of(x)
        decoded = kernels.decode(packed, table, bits, layout)
        assert equal_bits(decoded, _torch.decode(packed, table, bits, ops.Layout.of(x)))


@pytest.mark.parametrize("offset", range(8))
@pytest.mark.parametrize("bits", BITS)
def test_codes_may_lie_at_any_address(kernels: Kernels, bits: int, offset: int) -> None:
    n = 4096
    packed = ops.pack_bits(random_codes(n, bits), bits)
    moved = torch.cat([torch.full((offset,), 255, dtype=torch.uint8), packed])[offset:]
    table = ops.rows(torch.randn(1 << bits), bits)
    layout = ops.Layout.of(torch.empty(n))
    assert equal_bits(kernels.decode(moved, table, bits, layout), _torch.decode(packed, table, bits, layout))


@pytest.mark.parametrize("or_infinite", [True, False])
@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_flag_is_nan_exactly_where_an_element_is(dtype: torch.dtype, folded: bool, or_infinite: bool) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    triton, bits = Kernels("triton"), 3
    coder = ops.Thresholds(boundaries_for(bits, folded), folded)
    for n in (1, 8, 9, 2048, 4097):
        finite = torch.full((n,), torch.finfo(dtype).max, dtype=dtype)
        for value in (1.0, torch.nan, -torch.nan, torch.inf, -torch.inf):
            for at in {0, n // 2, n - 1}:
                x = finite.clone()
                x[at] = value
                packed, flag = triton.module.encode_flagged(triton.there(x), bits, coder, or_infinite=or_infinite)
                assert torch.equal(packed.cpu(), _torch.encode(x, bits, coder))
                assert flag.shape == ()
                assert flag.dtype == _layout.computed_in(dtype)
                expected = x.isnan().any() or (or_infinite and x.isinf().any())
                assert flag.isnan().item() == ops.not_a_number(x, or_infinite=or_infinite).isnan().item() == expected
                assert expected or flag == 0


def test_a_flag_is_of_all_pieces_of_a_tensor_with_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    triton, coder = Kernels("triton"), ops.Thresholds(boundaries_for(3))
    monkeypatch.setattr(_layout, "CHUNK", 64)
    monkeypatch.setattr(_layout, "CHUNK_CUDA", 64)
    for at in (0, 70, 199):
        x = torch.zeros(400)[::2]
        x[at] = torch.nan
        packed, flag = triton.module.encode_flagged(triton.there(x), 3, coder, or_infinite=True)
        assert flag.isnan()
        assert torch.equal(packed.cpu(), _torch.encode(x, 3, coder))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("boundary", [0.1, -0.1, 1e-50, -1e-50, 1e300, -1e300, 1e-40, 3.0])
def test_boundaries_that_are_no_float32_numbers_are_applied_exactly(
    kernels: Kernels, boundary: float, dtype: torch.dtype
) -> None:
    coder = ops.Thresholds([boundary])
    with np.errstate(over="ignore", under="ignore"):
        near = np.float32(boundary)
        around = [np.nextafter(near, np.float32(-np.inf)), near, np.nextafter(near, np.float32(np.inf))]
    x = torch.tensor([*map(float, around), 0.0, -0.0, 1e-45, -1e-45, np.inf, -np.inf, np.nan]).to(dtype)
    codes = torch.from_numpy(1 - (x.double().numpy() <= boundary).astype(np.uint8))
    assert torch.equal(kernels.encode(x, 1, coder), ops.pack_bits(codes, 1))


@pytest.mark.parametrize("boundary", [-0.7517916, 0.1, 1e-50, -1e300, 3.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_above_a_boundary_is_told_exactly(kernels: Kernels, dtype: torch.dtype, boundary: float) -> None:
    x = hard_values(np.array([boundary]), dtype)
    for n in (len(x), len(x) // 8 * 8):
        above = ops.pack_bits(x[:n].double() > boundary, 1)
        assert torch.equal(kernels.encode(x[:n], 1, ops.Between(boundary, open_low=True)), above)
        assert torch.equal(_torch.encode(x[:n], 1, ops.Between(boundary, open_low=True)), above)
    views = x[: n // 2 * 2].view(2, -1).t(), x[::3]
    for view in views:
        coder = ops.Between(boundary, open_low=True)
        assert torch.equal(kernels.encode(view, 1, coder), _torch.encode(view, 1, coder))


@pytest.mark.parametrize("nan", [False, True])
@pytest.mark.parametrize(("open_low", "open_high"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_between_two_numbers_is_told_exactly(
    kernels: Kernels, dtype: torch.dtype, open_low: bool, open_high: bool, nan: bool
) -> None:
    for low, high in ((-0.7517916, 1e-50), (0.0, 0.1), (-np.inf, 0.0), (0.1, np.inf), (0.5, 0.5), (np.inf, -np.inf)):
        x = hard_values(np.array([low, high]), dtype)
        exact = x.double()
        above = exact > low if open_low else exact >= low
        within = exact < high if open_high else exact <= high
        expected = torch.where(x.isnan(), nan, above & within)
        coder = ops.Between(low, high, open_low=open_low, open_high=open_high, nan=nan)
        assert x.isnan().any()
        assert torch.equal(kernels.encode(x, 1, coder), ops.pack_bits(expected, 1))
        assert torch.equal(_torch.encode(x, 1, coder), ops.pack_bits(expected, 1))


@pytest.mark.parametrize("bits", [1, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", views())
def test_any_strides_are_encoded_and_come_back_dense(
    kernels: Kernels, name: str, dtype: torch.dtype, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_layout, "CHUNK", 512)
    monkeypatch.setattr(_layout, "CHUNK_CUDA", 512)
    x = views()[name]
    if dtype != torch.float32:
        base = x if x._base is None else x._base
        x = base.to(dtype).as_strided(x.shape, x.stride(), x.storage_offset())
    coder, table = ops.Thresholds(boundaries_for(bits)), ops.rows(torch.linspace(-4, 4, 1 << bits).to(dtype), bits)
    packed = _torch.encode(x, bits, coder)
    assert torch.equal(kernels.encode(x, bits, coder), packed)
    decoded = kernels.decode(packed, table, bits, ops.Layout.of(x))
    expected = _torch.decode(packed, table, bits, ops.Layout.of(x))
    assert decoded.stride() == expected.stride()
    assert torch.equal(decoded, expected)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("n", SIZES)
def test_packed_codes_are_those_of_plain_torch(kernels: Kernels, n: int, bits: int) -> None:
    codes = random_codes(n, bits)
    packed = kernels.encode(codes, bits, _torch.as_they_are)
    assert torch.equal(packed, _torch.encode(codes, bits, _torch.as_they_are))
    layout = ops.Layout.of(codes)
    assert torch.equal(kernels.decode(packed, _torch.code_rows(bits, torch.device("cpu")), bits, layout), codes)


@pytest.mark.parametrize("n", SIZES)
def test_boolean_masks_and_predicates_take_a_bit(kernels: Kernels, n: int) -> None:
    mask = random_codes(n, 1).bool()
    packed = kernels.encode(mask, 1, ops.not_zero)
    assert torch.equal(packed, _torch.encode(mask, 1, ops.not_zero))
    both = ops.rows(torch.tensor([False, True]), 1)
    assert torch.equal(kernels.decode(packed, both, 1, ops.Layout.of(mask)), mask)
    x = torch.randn(n)
    assert torch.equal(kernels.encode(x, 1, lambda c: c > 0), _torch.encode(x, 1, lambda c: c > 0))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bool, torch.uint8, torch.int64])
def test_a_mask_of_two_values_is_told_by_its_bits(kernels: Kernels, dtype: torch.dtype) -> None:
    x = torch.tensor([0, 1, 1, 0, 1, 0, 0, 0, 1] * 9).to(dtype)
    if dtype.is_floating_point:
        x[::7] = -0.0
    packed = kernels.encode(x, 1, ops.not_zero)
    assert torch.equal(packed, _torch.encode(x, 1, ops.not_zero))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [1, 8])
def test_a_lookup_gives_each_value_the_code_in_its_place(kernels: Kernels, bits: int, dtype: torch.dtype) -> None:
    codes = random_codes(1 << 16, bits)
    codes[0] = (1 << bits) - 1  # not 0, as what lies past the end has
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype)[3:]
    packed = kernels.encode(x, bits, ops.Lookup(codes.to(kernels.device)))
    assert torch.equal(packed, _torch.encode(x, bits, ops.Lookup(codes)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_special_stand_ins_keep_their_bits(kernels: Kernels, bits: int, dtype: torch.dtype) -> None:
    special = torch.tensor([float("nan"), -0.0, float("inf"), -float("inf"), 1.0, 5e-324, 1e-45, -6e-8], dtype=dtype)
    bytes_of = torch.cat([special] * 32)[: 1 << bits].contiguous().view(torch.uint8)
    bytes_of[0] = 1  # a signalling NaN
    stand_ins = bytes_of.view(dtype)
    packed = ops.pack_bits((torch.arange(1024) % (1 << bits)).to(torch.uint8), bits)
    table, layout = ops.rows(stand_ins, bits), ops.Layout((1024,), (1,), dtype, torch.device("cpu"))
    decoded = kernels.decode(packed, table, bits, layout)
    assert equal_bits(decoded, stand_ins[torch.arange(1024) % (1 << bits)])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.uint8])
def test_rows_of_small_integers_are_converted(kernels: Kernels, dtype: torch.dtype) -> None:
    packed, table = (
        ops.pack_bits(random_codes(1001, 1), 1),
        ops.rows(torch.tensor([3, -100 % 128], dtype=torch.int8), 1),
    )
    layout = ops.Layout((1001,), (1,), dtype, torch.device("cpu"))
    decoded = kernels.decode(packed, table, 1, layout)
    assert equal_bits(decoded, _torch.decode(packed, table, 1, layout._replace(device=torch.device("cpu"))))


@pytest.mark.parametrize("output", DTYPES)
@pytest.mark.parametrize("sides", [1, 2])
def test_decoding_beside_an_output_is_that_of_plain_torch(kernels: Kernels, sides: int, output: torch.dtype) -> None:
    y = torch.cat([torch.randn(1000).to(output), hard_values(np.array([1.0]), output)[:40]])[:1033]
    # float64 numbers that rounding by way of float32 takes to another float16 number than rounding at once
    y[7] = 1 + 2**-11 + 2**-40
    packed = ops.pack_bits(random_codes(len(y), 1), 1) if sides == 2 else None
    for dtype in DTYPES:
        table = torch.arange(sides << 16).to(dtype)
        looked_up = torch.bfloat16 if output == torch.bfloat16 else torch.float16
        # which NaN a conversion makes differs from device to device: all have one entry, as in every table of ours
        table[all_values(looked_up).isnan().repeat(sides)] = 7
        expected = _beside.decode_beside(y, packed, table, ops.Layout.of(y.to(dtype)))
        decoded = kernels.decode_beside(y, packed, table, ops.Layout.of(y.to(dtype)))
        assert equal_bits(decoded, expected)


def test_an_output_of_other_strides_is_read_in_the_order_of_the_result(kernels: Kernels) -> None:
    y, table = torch.randn(40, 30), torch.arange(65536).float()
    for output in (y, y[:, ::2], y.t(), y[:1].expand(40, 30)):
        layout = ops.Layout.of(torch.empty(output.shape[::-1]).t())
        expected = _beside.decode_beside(output, None, table, layout)
        decoded = kernels.decode_beside(output, None, table, layout)
        assert decoded.stride() == expected.stride()
        assert torch.equal(decoded, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_whose_sign_is_a_bit_of_the_tensor_are_read_with_it(kernels: Kernels, dtype: torch.dtype) -> None:
    for x in (torch.randn(64).to(dtype), torch.randn(8, 16).to(dtype).t()):
        negative = torch._neg_view(kernels.there(x))
        for bits, coder in ((3, ops.Thresholds(boundaries_for(3))), (1, ops.Between(0.1, open_low=True))):
            assert torch.equal(kernels.module.encode(negative, bits, coder).cpu(), _torch.encode(-x, bits, coder))
        table, layout = torch.arange(65536).float(), ops.Layout.of(x.float())
        assert torch.equal(
            kernels.decode_beside(negative, None, table, layout), _beside.decode_beside(-x, None, table, layout)
        )


def test_a_gradient_whose_sign_is_a_bit_of_the_tensor_is_read_with_it(multiplying: Kernels) -> None:
    codes, grad = random_codes(64, 3), multiplying.there(torch.randn(64))
    packed, rows, layout = ops.pack_bits(codes, 3), ops.rows(torch.randn(8), 3), ops.Layout.of(grad)
    table, y = torch.randn(65536), torch.randn(64)
    negative = torch._neg_view(grad)
    for g in (negative, negative[::2].repeat(2)):
        expected = multiplying.multiply(g.resolve_neg(), packed, rows, 3, layout)
        assert torch.equal(multiplying.multiply(g, packed, rows, 3, layout), expected)
        expected = multiplying.multiply_beside(g.resolve_neg(), y, None, table, layout)
        assert torch.equal(multiplying.multiply_beside(g, y, None, table, layout), expected)


@pytest.fixture
def multiplying() -> Kernels:
    """Those of Triton: numba's need not multiply (`_dispatch.multiply` says why)."""
    pytest.importorskip("triton", reason="triton is not installed")
    return Kernels("triton")


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_with_what_codes_stand_for_are_rounded_once(
    multiplying: Kernels, dtype: torch.dtype, bits: int
) -> None:
    exact = ops.computed_in(dtype)
    values = torch.randn(1 << bits).to(exact)
    for n in SIZES:
        codes, grad = random_codes(n, bits), torch.randn(n).to(dtype)
        packed, layout = ops.pack_bits(codes, bits), ops.Layout.of(grad)
        product = multiplying.multiply(grad, packed, ops.rows(values, bits), bits, layout)
        assert equal_bits(product, (grad.to(exact) * values[codes.long()]).to(dtype))


@pytest.mark.parametrize("sides", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_beside_an_output_are_rounded_once(multiplying: Kernels, dtype: torch.dtype, sides: int) -> None:
    exact = ops.computed_in(dtype)
    table = torch.randn(sides << 16).to(exact)
    for n in SIZES:
        y, grad = torch.randn(n).to(dtype), torch.randn(n).to(dtype)
        packed = ops.pack_bits(random_codes(n, 1), 1) if sides == 2 else None
        layout = ops.Layout.of(y)._replace(dtype=exact)
        factors = _beside.decode_beside(y, packed, table, layout)
        product = multiplying.multiply_beside(grad, y, packed, table, ops.Layout.of(grad))
        assert equal_bits(product, (grad.to(exact) * factors).to(dtype))


def test_a_gradient_of_other_strides_is_read_in_the_order_of_the_codes(multiplying: Kernels) -> None:
    x, y = torch.randn(40, 30).t(), torch.randn(30, 40)
    values, codes = torch.randn(8), random_codes(x.numel(), 3)
    packed, layout = ops.pack_bits(codes, 3), ops.Layout.of(x)
    expected = _torch.decode(packed, ops.rows(values, 3), 3, layout)
    for grad in (y, y.t().contiguous().t(), y[:1].expand(30, 40)):
        product = multiplying.multiply(grad, packed, ops.rows(values, 3), 3, layout)
        assert product.stride() == x.stride()
        assert torch.equal(product, grad * expected)
        table = torch.randn(65536)
        product = multiplying.multiply_beside(grad, x, None, table, layout)
        assert product.stride() == x.stride()
        assert torch.equal(product, grad * _beside.decode_beside(x, None, table, layout))


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mask_is_told_and_packed_as_by_plain_torch(kernels: Kernels, dtype: torch.dtype, n: int) -> None:
    noise = torch.nn.functional.dropout(torch.ones(n, dtype=dtype), 0.3, True)
    masks = [noise, torch.zeros_like(noise), torch.ones_like(noise), -noise, -torch.ones_like(noise)]
    for at in (0, n // 2, n - 1):  # a third value at the beginning, in the middle, in the last bits
        for value in (-0.0, 7.0, float("nan")):
            masks.append(noise.clone())
            masks[-1][at : at + 1] = value
    for mask in masks:
        expected = _two_values.encode_two_values(mask)
        found = kernels.module.encode_two_values(kernels.there(mask))
        assert (found is None) == (expected is None)
        if expected is not None:
            assert found[1] == expected[1]
            assert torch.equal(found[0].cpu(), expected[0])


@pytest.fixture
def many_pieces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Numba's loops of any length are shared out among eight threads of torch's."""
    numba = pytest.importorskip("fewbit_hooks.ops._numba", reason="numba is not installed")
    monkeypatch.setattr(numba, "FEW", 0)
    monkeypatch.setattr(_layout, "CHUNK", 512)
    with torch_threads(8):
        yield


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.usefixtures("many_pieces")
def test_threads_leave_no_seam(bits: int) -> None:
    numba, coder = Kernels("numba"), ops.Thresholds(boundaries_for(bits))
    for n in (31, 32, 33, 511, 1000):
        x = torch.randn(n)
        packed = numba.encode(x, bits, coder)
        assert torch.equal(packed, _torch.encode(x, bits, coder))
        table, layout = ops.rows(torch.randn(1 << bits), bits), ops.Layout.of(x)
        assert equal_bits(numba.decode(packed, table, bits, layout), _torch.decode(packed, table, bits, layout))


@pytest.mark.usefixtures("many_pieces")
def test_threads_leave_no_seam_in_masks_and_beside_an_output() -> None:
    numba = Kernels("numba")
    for n in (31, 32, 33, 511, 1000):
        mask = torch.nn.functional.dropout(torch.ones(n), 0.3, True)
        packed, other = numba.module.encode_two_values(mask)
        assert other == _two_values.encode_two_values(mask)[1]
        assert torch.equal(packed, _torch.encode(mask, 1, ops.not_zero))
        table, y = torch.arange(2 << 16).float(), torch.randn(n)
        expected = _beside.decode_beside(y, packed, table, ops.Layout.of(y))
        assert equal_bits(numba.decode_beside(y, packed, table, ops.Layout.of(y)), expected)
        mask[-1] = 7.0  # in the last thread's piece
        assert numba.module.encode_two_values(mask) is None


@pytest.fixture
def not_yet_asked(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels are for their device, as Triton's are for CUDA, and nothing has been coded there yet."""
    types = {"cuda", kernels.device.type} if kernels.package == "triton" else {"cuda"}
    monkeypatch.setattr(_dispatch, "DEVICE_TYPES", frozenset(types))
    monkeypatch.setattr(_dispatch, "_found", {})


@pytest.mark.usefixtures("not_yet_asked")
def test_where_it_works_the_kernels_are_used_and_a_step_is_what_it_was(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = [torch.nn.Linear(41, 64), torch.nn.GELU(), torch.nn.Dropout(0.5), torch.nn.Linear(64, 64), torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(64, 64), torch.nn.SiLU()).to(kernels.device)
    x = torch.randn(48, 41, device=kernels.device)

    def gradients() -> list[Tensor]:
        """Of three steps: from codes, then beside the outputs that were learned to be kept."""
        forget_what_was_learned()
        scope, found = fewbit.scope(min_bytes=0), []
        for _ in range(3):
            torch.manual_seed(0)
            with scope:
                loss = model(x).square().mean()
                gc.collect()  # Triton's interpreter leaves a cycle that holds the kernel's arguments
            found += torch.autograd.grad(loss, model.parameters())
        return found

    coded = []
    encode = kernels.module.encode
    monkeypatch.setattr(kernels.module, "encode", lambda x, *rest: coded.append(x.dtype) or encode(x, *rest))
    with_kernels = gradients()
    assert coded
    assert str(ops.backend(kernels.device)) == kernels.package
    plain = _dispatch.Backend(None, "as a test has it")
    (key,) = _dispatch._found
    monkeypatch.setitem(_dispatch._found, key, plain)
    coded.clear()
    assert all(map(torch.equal, with_kernels, gradients()))
    assert not coded


@pytest.mark.usefixtures("not_yet_asked")
@pytest.mark.parametrize(
    "why", ["ArithmeticError: its codes are not those of plain torch", "RuntimeError: no compiler"]
)
def test_where_it_does_not_work_plain_torch_serves_and_a_warning_says_why_once(
    kernels: Kernels, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*given: object) -> Tensor:
        if why.startswith("RuntimeError"):
            raise RuntimeError("no compiler\nand much more")
        return torch.zeros(264, dtype=torch.uint8, device=kernels.device)

    monkeypatch.setattr(kernels.module, "encode", broken)
    x, coder = torch.randn(104, device=kernels.device), ops.Thresholds([0.0])
    with pytest.warns(fewbit.FewbitWarning) as warned:
        packed = ops.encode(x, 1, coder)
    assert [str(w.message) for w in warned] == [
        f"The kernels of {kernels.package} do not work on {kernels.device}: {why}; it is coded in plain torch, more "
        "slowly."
    ]
    assert torch.equal(packed, _torch.encode(x, 1, coder))
    assert str(ops.backend(kernels.device)) == f"plain torch: {why}"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.encode(x, 1, coder)


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="every 64-bit ARM converts float32 to float16"
)
def test_no_loop_is_compiled_for_a_processor_that_lacks_what_it_takes() -> None:
    pytest.importorskip("numba", reason="numba is not installed")
    script = """
import torch, warnings
from fewbit_hooks import ops
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    assert ops.encode(torch.ones(8), 1, ops.Thresholds([0.0])).tolist() == [255]
assert "does not convert float32 to float16; it is coded in plain torch" in str(warned[0].message), warned
"""
    environment = {**os.environ, "NUMBA_CPU_NAME": "generic"}
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, env=environment)


@pytest.mark.usefixtures("not_yet_asked")
def test_where_it_is_not_installed_plain_torch_serves_and_the_doctor_says_so(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_dispatch, "is_installed", lambda package: False)
    assert str(ops.backend(kernels.device)) == f"plain torch: {kernels.package} is not installed"
    assert ops.encode(torch.ones(8, device=kernels.device), 1, ops.Thresholds([0.0])).tolist() == [255]
