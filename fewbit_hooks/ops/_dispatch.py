"""Which backend codes a tensor: compiled kernels where they work, else plain torch.

On CUDA they are Triton's, on the CPU numba's.

NOTE [ Trust ]

Whether a package's kernels work on a device is asked once, when the first tensor there is coded, by a few hundred
values: the bytes and the values must be those of plain torch. A compiler can fail in any way (no C compiler, a GPU too
old, a driver too new), so whatever it raises counts as "does not work". Then plain torch serves that device, and a
FewbitWarning says why, once; so does `python -m fewbit_hooks doctor`. Where the package is not installed, nothing is
said but by the doctor.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _errors
from .._locks import lock
from . import _beside, _torch, _two_values
from ._coders import Coder, Thresholds
from ._devices import OUT_OF_MEMORY, capturing, waiting
from ._layout import Layout, computed_in

DEVICE_TYPES = frozenset({"cuda"})
"""Where Triton's kernels may run. Under Triton's interpreter (TRITON_INTERPRET=1) tests put "cpu" in."""


class Backend(NamedTuple):
    """What codes the tensors of a device.

    Attributes:
        kernels: the module of the kernels; None: plain torch.
        said: which package's they are; or why it is plain torch.
    """

    kernels: ModuleType | None
    said: str

    def __str__(self) -> str:
        return self.said if self.kernels is not None else f"plain torch: {self.said}"


_found: dict[tuple[torch.device | str, str], Backend] = {}
"""By device, the CPU as "cpu", and name of the module of kernels."""
_looking: set[tuple[torch.device | str, str]] = set()
_lock = lock()  # what the garbage collector finds meanwhile may code a tensor, too


def is_installed(package: str) -> bool:
    """Whether there is a package of that name; it is not imported."""
    return importlib.util.find_spec(package) is not None


def backend(device: torch.device) -> Backend:
    """What codes the tensors of this device; see the note above."""
    return _backend(device, "_triton" if device.type in DEVICE_TYPES else "_numba")


def fused_backend(device: torch.device) -> Backend:
    """The same for the kernels that compute activations, too: Triton's."""
    if device.type not in DEVICE_TYPES:
        return Backend(None, f"Triton's are for {', '.join(sorted(DEVICE_TYPES))}")
    plain = backend(device)
    return plain if plain.kernels is None else _backend(device, "_triton_fused")


def gated_backend(device: torch.device) -> Backend:
    """The same for those that compute products of gated units."""
    fused = fused_backend(device)
    return fused if fused.kernels is None else _backend(device, "_triton_gated")


def _kernels(t: Tensor) -> ModuleType | None:
    """The kernels that code a tensor; None: plain torch."""
    # (measured) in a step that has cooled the caches it takes 26 us to make a device, and ask for its type and hash
    found = _found.get(("cpu", "_numba")) if t.is_cpu and "cpu" not in DEVICE_TYPES else None
    return (backend(t.device) if found is None else found).kernels


def _backend(device: torch.device, name: str) -> Backend:
    key = device if device.type != "cpu" else "cpu", name
    found = _found.get(key)
    if found is not None:
        return found
    if capturing(device):
        return Backend(None, "a CUDA graph is being captured, and the first look makes the host wait: another time")
    with _lock:
        if key in _looking:
            return Backend(None, "it is just being looked at")
        if key not in _found:
            _looking.add(key)
            try:
                _found[key] = _look(device, name)
            finally:
                _looking.discard(key)
        return _found[key]


def _look(device: torch.device, name: str) -> Backend:
    package = name.split("_")[1]
    if package == "numba" and device.type != "cpu":
        return Backend(None, f"there are no kernels for {device.type}")
    if not is_installed(package):
        return Backend(None, f"{package} is not installed")
    check, instead = _CHECKS[name]
    try:
        with waiting(device):
            kernels = importlib.import_module(f".{name}", __package__)
            check(kernels, device)
    except OUT_OF_MEMORY:
        raise  # the kernels are asked again
    except Exception as error:  # see the note above
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        warnings.warn(
            f"The kernels of {package} do not work on {device}: {why}; {instead}.", _errors.FewbitWarning, stacklevel=5
        )
        return Backend(None, why)
    return Backend(kernels, package)


def _check(kernels: ModuleType, device: torch.device) -> None:
    """Code some values; raises unless every byte is that of plain torch."""
    bits, coder = 3, Thresholds([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0])
    table = _torch.rows(torch.linspace(-1, 1, 1 << bits, device="cpu"), bits)
    for n in (701, 704):  # not a whole number of groups of 8, and one
        x = torch.linspace(-4, 4, n, device="cpu")
        x[::50], x[1::50] = torch.nan, 0.5
        packed = _torch.encode(x, bits, coder)
        values = _torch.decode(packed, table, bits, Layout.of(x))
        there = x.to(device)
        packed_there = kernels.encode(there, bits, coder)
        values_there = kernels.decode(packed_there, table.to(device), bits, Layout.of(there))
        if not torch.equal(packed_there.cpu(), packed):
            raise ArithmeticError("its codes are not those of plain torch")
        if not torch.equal(values_there.cpu(), values):
            raise ArithmeticError("its decoded values are not those of plain torch")
        if hasattr(kernels, "multiply"):
            product = kernels.multiply(values_there, packed_there, table.to(device), bits, Layout.of(there))
            if not torch.equal(product.cpu(), values * values):
                raise ArithmeticError("its products are not those of plain torch")


def _check_fused(kernels: ModuleType, device: torch.device) -> None:
    """Compute gelu of some values; raises unless it and its codes are what they should be."""
    bits, thresholds = 3, Thresholds([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0])
    x = torch.linspace(-4, 4, 701, device="cpu")
    packed, there = _torch.encode(x, bits, thresholds), x.to(device)
    y, packed_there, _ = kernels.forward("gelu", there, bits, thresholds, torch.zeros(1, device=device))
    if not torch.allclose(y, torch.nn.functional.gelu(there), rtol=0, atol=2e-6):
        raise ArithmeticError("its gelu is not that of PyTorch")
    if not torch.equal(packed_there.cpu(), packed):
        raise ArithmeticError("its codes are not those of plain torch")


def _check_gated(kernels: ModuleType, device: torch.device) -> None:
    """Compute products of silu; raises unless they and their gradients are what they should be."""
    gate, up = torch.linspace(-4, 4, 701, device=device), torch.linspace(3, -2, 701, device=device)
    none = torch.zeros(1, device=device)
    s = torch.sigmoid(gate)
    if not torch.allclose(kernels.forward("silu", none, gate, up), gate * s * up, rtol=0, atol=2e-6):
        raise ArithmeticError("its product is not that of PyTorch")
    d_gate, d_up = kernels.backward("silu", none, up, gate, up)
    expected = up * up * s * (1 + gate * (1 - s)), up * gate * s
    if not (torch.allclose(d_gate, expected[0], atol=1e-5) and torch.allclose(d_up, expected[1], atol=1e-5)):
        raise ArithmeticError("its gradients are not those of PyTorch")


_CHECKS: dict[str, tuple[Callable[[ModuleType, torch.device], None], str]] = {
    "_numba": (_check, "it is coded in plain torch, more slowly"),
    "_triton": (_check, "it is coded in plain torch, more slowly"),
    "_triton_fused": (_check_fused, "engine='fused' does without them"),
    "_triton_gated": (_check_gated, "engine='fused' makes products of gated units without them"),
}
"""For each module of kernels what asks whether they work, and what is done where they do not."""


def encode(x: Tensor, bits: int, coder: Coder) -> Tensor:
    """The packed codes of the elements of `x`, in the memory order of `Layout.of(x)`.

    >>> encode(torch.tensor([-1.0, 2.0, 0.0, 3.0]), 1, lambda chunk: chunk > 0)
    tensor([10], dtype=torch.uint8)

    Args:
        x: any shape, strides, dtype and device.
        bits: 1 to 8.
        coder: gives a chunk's codes, each below 2**bits; `Thresholds`, `Between`, or a predicate.

    Returns:
        1-D uint8 tensor of `packed_bytes(x.numel(), bits)` elements.
    """
    kernels = _kernels(x)
    packed: Tensor = (_torch if kernels is None else kernels).encode(x, bits, coder)
    return packed


def encode_flagged(x: Tensor, bits: int, thresholds: Thresholds, *, or_infinite: bool) -> tuple[Tensor, Tensor]:
    """`encode`, and `not_a_number`, of a tensor that is read once where kernels do both: Triton's.

    >>> codes, flag = encode_flagged(torch.tensor([1.0, torch.nan]), 1, Thresholds([0.0]), or_infinite=True)
    >>> codes, flag
    (tensor([3], dtype=torch.uint8), tensor(nan))
    """
    kernels = _kernels(x)
    if kernels is not None and hasattr(kernels, "encode_flagged"):
        both: tuple[Tensor, Tensor] = kernels.encode_flagged(x, bits, thresholds, or_infinite=or_infinite)
        return both
    return encode(x, bits, thresholds), _torch.not_a_number(x, or_infinite=or_infinite)


def decode(packed: Tensor, rows: Tensor, bits: int, layout: Layout) -> Tensor:
    """A tensor of the given layout that holds each code's stand-in.

    Args:
        packed: what `encode` returned.
        rows: what `rows` made of the stand-ins.
        bits: as for `encode`.
        layout: `Layout.of(x)`, with the dtype and device of the stand-ins.
    """
    kernels = _kernels(packed)
    out: Tensor = (_torch if kernels is None else kernels).decode(packed, rows, bits, layout)
    return out


def decode_beside(output: Tensor, packed: Tensor | None, table: Tensor, layout: Layout) -> Tensor:
    """A tensor of the given layout that holds, for each element, the table's entry at its output and its bit.

    Args:
        output, packed, table, layout: as for `_beside.decode_beside`.
    """
    kernels = _kernels(output)
    out: Tensor = (_beside if kernels is None else kernels).decode_beside(output, packed, table, layout)
    return out


def _multiplying(kernels: ModuleType | None) -> ModuleType | None:
    """The kernels, where they multiply: Triton's."""
    return kernels if hasattr(kernels, "multiply") else None


def multiplied_in(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which `multiply` and `multiply_beside` take what they multiply by, and compute."""
    return dtype if _multiplying(backend(device).kernels) is None else computed_in(dtype)


def multiply(grad: Tensor, packed: Tensor, rows: Tensor, bits: int, layout: Layout) -> Tensor:
    """`grad` times what each code stands for, in the given layout, rounded once.

    >>> rows = _torch.rows(torch.tensor([0.0, 0.5, 1.0, 1.5]), 2)
    >>> grad, codes = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3, 1, 0], dtype=torch.uint8)
    >>> multiply(grad, pack_bits(codes, 2), rows, 2, Layout.of(grad))
    tensor([1.5000, 1.0000, 0.0000])

    Args:
        grad: of the layout's shape and dtype; any strides.
        packed, bits: as for `decode`.
        rows: what `rows` made of the factors, in the dtype `multiplied_in`.
    """
    kernels = _multiplying(_kernels(packed))
    if kernels is not None:
        out: Tensor = kernels.multiply(grad, packed, rows, bits, layout)
        return out
    # (measured, CPU, 2 cores) one loop of numba's for both, on one core, is slower from 2**20 elements on
    return decode(packed, rows, bits, layout).mul_(grad)


def multiply_beside(grad: Tensor, output: Tensor, packed: Tensor | None, table: Tensor, layout: Layout) -> Tensor:
    """`grad` times the table's entry at each output and its bit, in the given layout, rounded once.

    Args:
        grad: as for `multiply`.
        output, packed: as for `decode_beside`.
        table: the same, in the dtype `multiplied_in`.
    """
    kernels = _multiplying(_kernels(output))
    if kernels is not None:
        out: Tensor = kernels.multiply_beside(grad, output, packed, table, layout)
        return out
    return decode_beside(output, packed, table, layout).mul_(grad)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes, or booleans, as they are.

    >>> pack_bits(torch.tensor([1, 2, 3], dtype=torch.uint8), 3)  # 0b011'010'001
    tensor([209,   0], dtype=torch.uint8)
    """
    return encode(codes, bits, _torch.as_they_are)


def unpack_bits(packed: Tensor, bits: int, n: int) -> Tensor:
    """The n codes that `pack_bits` packed, as uint8.

    >>> unpack_bits(torch.tensor([209, 0], dtype=torch.uint8), 3, 3)
    tensor([1, 2, 3], dtype=torch.uint8)
    """
    kernels = _kernels(packed)
    if kernels is None:
        return _torch.unpack_bits(packed, bits, n)
    layout = Layout((n,), (1,), torch.uint8, packed.device)
    codes: Tensor = kernels.decode(packed, _torch.code_rows(bits, packed.device), bits, layout)
    return codes


def encode_two_values(x: Tensor) -> tuple[Tensor, int] | None:
    """A mask's packed bits, and the bits of its second value; None if `x` has more values than 0 and that, bit for bit.

    >>> encode_two_values(torch.tensor([0, 7, 7])), encode_two_values(torch.tensor([0.0, 1.25, -0.0]))
    ((tensor([6], dtype=torch.uint8), 7), None)

    In a boolean tensor there are no more. Of any other, the answer makes the host wait for the device.
    """
    if x.dtype == torch.bool:
        return encode(x, 1, _two_values.not_zero), 1
    kernels = _kernels(x)
    found: tuple[Tensor, int] | None = (_two_values if kernels is None else kernels).encode_two_values(x)
    return found


def second_value(x: Tensor) -> int | None:
    """The bits of a mask's second value, as `encode_two_values` finds it.

    >>> second_value(torch.tensor([0, 7, 0])), second_value(torch.tensor([0.0, 1.25, -0.0]))
    (7, None)
    """
    if x.dtype == torch.bool:
        return 1
    found = encode_two_values(x)
    return None if found is None else found[1]
