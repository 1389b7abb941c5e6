"""`python -m fewbit_hooks doctor`: the environment, the recognised activations, and whether coding works here."""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import os
import platform
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import __version__, ops
from ._activations import Activation, activations
from ._catalog import codebook
from ._codebook import Codebook
from ._policy import disabled
from ._scope import scope
from ._tables import align, human

TESTED = (2, 11), (2, 14)
"""The oldest and the newest torch with which all tests were run."""
ELEMENTS = 2**16 + 5  # not a whole number of bytes of codes
BITS = 3
TOLERANCE = 1e-6  # of the derivative at a stand-in, in float32; 5e-7 was measured for gelu


def doctor() -> int:
    """Print what there is and what works; 0 where everything does, else 1."""
    print("\n".join(align([[name, value, ""] for name, value in environment()])))
    print("\nRecognised activations, and their in-place and torch.ops.aten forms")
    print("exact: takes 1 bit, and the gradient is stock's; few-bit: takes 1 to 8\n")
    print(recognised())
    print("\nSelf-check: gelu with 3 bits, and what is exact\n")
    with _not_disabled():
        checks = [(device, *check) for device in devices() for check in self_check(device)]
    print("\n".join(align([[device, question, answer or "yes"] for device, question, answer in checks])))
    healthy = not any(answer for *_, answer in checks)
    print("\neverything works" if healthy else "\nsomething is wrong: please report this, with all of the above")
    return 0 if healthy else 1


def devices() -> list[str]:
    """What is looked at."""
    return ["cpu", *(["cuda:0"] if torch.cuda.is_available() else [])]


def environment() -> Iterator[tuple[str, str]]:
    """Names and values."""
    yield "fewbit_hooks", __version__
    yield "python", platform.python_version()
    yield "system", platform.platform()
    yield "torch", f"{torch.__version__}, {torch.get_num_threads()} threads{untested(torch.__version__)}"
    yield "numpy", np.__version__
    for package in ("numba", "triton", "transformers"):
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield package, "not installed"
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            yield f"cuda:{i}", f"{torch.cuda.get_device_name(i)}, CUDA {torch.version.cuda}"
    else:
        yield "cuda", "not available" if torch.version.cuda else "not available: this torch is built without it"
    for device in devices():
        yield f"coding on {device}", str(ops.backend(torch.device(device)))
        fused = ops.fused_backend(torch.device(device))
        yield f"fused on {device}", str(fused).replace("plain torch", "PyTorch's own kernels")
    value = os.environ.get("FEWBIT_DISABLE")
    said = "not set" if value is None else f"{value}: every scope is a no-op" if disabled() else value
    yield "FEWBIT_DISABLE", said


def untested(version: str) -> str:
    """What is to be said of a version of torch.

    >>> untested("2.13.0+cu130"), untested("2.99.0")
    ('', '; tested with 2.11 to 2.14')
    """
    major, minor = version.split(".")[:2]
    oldest, newest = TESTED
    if oldest <= (int(major), int(minor)) <= newest:
        return ""
    return f"; tested with {oldest[0]}.{oldest[1]} to {newest[0]}.{newest[1]}"


def recognised() -> str:
    """The table of activations."""
    table = [["activation", "parameters", "saves", "gradient", "calls"]]
    for a in activations():
        parameters = ", ".join(f"{key}={value}" for key, value in a.parameters.items())
        calls = [call for call in a.calls if not call.endswith("_") and not call.startswith("torch.ops.")]
        table.append([a.name, parameters or "-", a.saves, "exact" if a.exact else "few-bit", ", ".join(calls)])
    return "\n".join(align(table))


def self_check(device: str) -> Iterator[tuple[str, str]]:
    """Questions, each with what is wrong; nothing where the answer is yes."""
    x = torch.linspace(-8, 8, ELEMENTS, device=device)
    stock = F.gelu(x)
    leaf = x.clone().requires_grad_()
    with scope(BITS, min_bytes=0) as memory:
        y = F.gelu(leaf * 1)  # a copy that nobody else holds
    report = memory.report()
    (slope,) = torch.autograd.grad(y.sum(), leaf)

    yield "is the forward bit for bit stock's?", "" if torch.equal(y, stock) else "no"
    off = float((slope - codebook("gelu", BITS).derivative(x)).abs().max())
    yield "is the gradient the codebook's level?", "" if off <= TOLERANCE else f"no: off by {off:.2g}"
    flag = 4 if x.is_cuda else 0  # whether there was a NaN, in float32
    expected = math.ceil(BITS * ELEMENTS / 8) + flag
    found = report.stored_bytes, report.freed_bytes
    right = found == (expected, 4 * ELEMENTS)
    said = f"no: {human(found[0])} stored, expected {human(expected)}; {human(found[1])} freed"
    yield "are the bytes as predicted?", "" if right else said
    unlike = [a.name for a in activations() if a.exact and not _is_exact(a, device)]
    yield "are exact gradients stock's, where they jump, too?", f"no: {', '.join(unlike)}" if unlike else ""


@contextlib.contextmanager
def _not_disabled() -> Iterator[None]:
    """Whether it works is asked even where it is switched off."""
    disable = os.environ.pop("FEWBIT_DISABLE", None)
    try:
        yield
    finally:
        if disable is not None:
            os.environ["FEWBIT_DISABLE"] = disable


def _is_exact(activation: Activation, device: str) -> bool:
    """Whether the gradient under a scope is stock's, bit for bit, on both sides of where it jumps, and there."""
    given = {"min": -1.0, "max": 1.0} if activation.name == "clamp" else activation.parameters
    ties = torch.arange(-8, 8.5, 0.5, device=device)
    x = torch.cat([ties, *(ties.nextafter(torch.full_like(ties, side)) for side in (-math.inf, math.inf))])
    slopes: list[Tensor] = []
    for bits in (None, 1):
        leaf = x.clone().requires_grad_()
        with scope(bits, min_bytes=0):
            y = activation.function(leaf, **given)
        slopes += torch.autograd.grad(y.sum(), leaf)
    return torch.equal(*slopes)


def describe(book: Codebook) -> str:
    """A codebook as a person reads it.

    >>> import fewbit_hooks as fewbit
    >>> print(describe(fewbit.codebook("tanh", 1)))
    tanh, 1 bit: error 0.1584, the integral of (f'(x) - level)^2 over [-10, 10], weight uniform
    folded: the derivative is even, and the boundaries are on |x|
    code  |x| above    up to    level
       0    0.00000  1.06006  0.74117
       1    1.06006      inf  0.02397
    """
    parameters = ", ".join(f"{key}={value}" for key, value in book.parameters.items())
    name = f"{book.name}({parameters})" if parameters else book.name
    low, high = book.interval
    x = "|x|" if book.folded else "x"
    edges = [0.0 if book.folded else -math.inf, *book.boundaries, math.inf]
    table = [["code", f"{x} above", "up to", "level", ""]]
    for code, level in enumerate(book.levels):
        numbers = [f"{round(v, 5) + 0.0:.5f}" for v in (edges[code], edges[code + 1], level)]  # + 0.0: no -0.00000
        table.append([str(code), *numbers, ""])
    return "\n".join(
        [
            f"{name}, {book.bits} bit{'s' * (book.bits > 1)}: error {book.error:.4g}, the integral of "
            f"(f'(x) - level)^2 over [{low:g}, {high:g}], weight {book.weight}",
            f"{'folded: the derivative is even, and the' if book.folded else 'not folded: the'} boundaries are on {x}",
            *align(table, right=range(4)),
        ]
    )
