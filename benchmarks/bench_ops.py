"""What an operation takes under a scope, and what the coding alone does: ns an element, beside stock PyTorch.

    python benchmarks/bench_ops.py [--quick] [--bits N [N ...]] [--csv PATH] [OP ...]

All runs of an operation share one process and are interleaved, so that whatever else the machine does hits them alike;
figures are medians. Runs on the first CUDA device where there is one, else on the CPU. On CUDA the time is the
device's: what the host takes to launch is hidden behind a head start; and nothing of a tensor is in the cache when a
run begins. The ways:

    hooks, fused      the operation under `scope(engine=...)`, forward and backward; `ratio` is to stock's
    torch, numba,     the coding alone, encode and decode, by each backend that works there; `ratio` is to the
    triton            operation's own forward and backward in stock PyTorch
    kernels           the fused engine's two kernels without autograd: forward with codes, or the one bit beside a kept
                      output; and grad times level, or times f'

`gelu, kept` is a gelu whose output another node keeps (one bit beside it), `dropout` its mask, `silu, gated` the
product of silu and another tensor. `bytes` are those that must be read and written, an element, and `bw` is what
fraction of the bandwidth of a copy on that device they make.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fewbit_hooks as fewbit
from about import about
from fewbit_hooks import ops
from fewbit_hooks._inverse import find_inverse
from fewbit_hooks.ops import _beside, _torch, _two_values

OPS: dict[str, Callable[..., Tensor]] = {
    "gelu": F.gelu,
    "gelu tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "elu": F.elu,
    "selu": F.selu,
    "softplus": F.softplus,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "hardswish": F.hardswish,
    "relu": F.relu,
    "dropout": F.dropout,
    "gelu, kept": F.gelu,
    "silu, gated": lambda gate, up: F.silu(gate) * up,
}
GATED = "silu, gated"
ONE_BIT = frozenset({"relu", "dropout", "gelu, kept"})
COLUMNS = (
    "op", "bits", "dtype", "elements", "way", "forward", "backward", "stock", "ratio",
    "forward bytes", "backward bytes", "forward bw", "backward bw",
)  # fmt: skip


class Way(NamedTuple):
    """One way to make an operation, or to code for it: two runs, and the bytes that each must move an element."""

    name: str
    forward: Callable[[], object]
    backward: Callable[[], object]
    forward_bytes: float
    backward_bytes: float


HEAD_START = 2_000_000
"""Cycles that the device is kept busy before a run: about 1 ms, in which the host makes the launches."""


@functools.cache
def _flush(device: torch.device) -> Tensor:
    """More than any cache holds: written before a run, it leaves nothing of others there."""
    return torch.empty(2**28, dtype=torch.uint8, device=device)


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """One run, by the device's own clock."""
    if device.type == "cuda":
        _flush(device).zero_()
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(HEAD_START)
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


class Call:
    """An operation as a user makes it, in a scope or outside."""

    def __init__(self, op: str, x: Tensor, grad: Tensor, context: AbstractContextManager[object]) -> None:
        self._function, self._grad, self._context = OPS[op], grad, context
        inputs = (x, grad) if op == GATED else (x,)
        self._inputs = [t.detach().clone().requires_grad_() for t in inputs]

    def forward(self) -> None:
        """The graph is kept for `backward`."""
        with self._context:
            self._y = self._function(*self._inputs)

    def backward(self) -> None:
        """Once for each forward."""
        torch.autograd.grad(self._y, self._inputs, self._grad)
        del self._y


def calls(op: str, bits: int, x: Tensor, grad: Tensor) -> Iterator[Way]:
    """Stock, and the engines that serve the operation here."""
    size, code = x.element_size(), bits / 8
    noise = (1 if x.is_cuda else size) if op == "dropout" else 0  # which stock writes, and reads
    stock = Call(op, x, grad, contextlib.nullcontext())
    forward, backward = (5 * size, 9 * size) if op == GATED else (2 * size + noise, 3 * size)
    yield Way("stock", stock.forward, stock.backward, forward, backward)
    if op == "gelu, kept":
        return  # a scope learns of it within a model
    hooks = Call(op, x, grad, fewbit.scope(bits, min_bytes=0))
    yield Way("hooks", hooks.forward, hooks.backward, forward + size + code, backward + size + code)
    if op not in ONE_BIT and op != GATED and ops.multiplied_in(x.dtype, x.device) == ops.computed_in(x.dtype):
        fused = Call(op, x, grad, fewbit.scope(bits, min_bytes=0, engine="fused"))
        kernels = ops.fused_backend(x.device).kernels is not None
        forward, backward = (2 * size, 2 * size) if kernels else (forward + size, 4 * size)
        yield Way("fused", fused.forward, fused.backward, forward + code, backward + code)


def codings(op: str, bits: int, x: Tensor, grad: Tensor) -> Iterator[Way]:
    """Encoding and decoding by each backend that works here."""
    size, code, layout = x.element_size(), bits / 8, ops.Layout.of(x)
    found = ops.backend(x.device)
    backends = [("torch", None), *([(found.said, found.kernels)] if found.kernels is not None else [])]
    if op == "dropout" and x.is_cuda:
        mask = torch.rand_like(x) > 0.5
        packed, layout = _torch.encode(mask, 1, ops.not_zero), ops.Layout.of(mask)
        rows = ops.two_value_rows(1, torch.bool, x.device)
        for name, kernels in backends:
            encode = functools.partial((kernels or _torch).encode, mask, 1, ops.not_zero)
            decode = functools.partial((kernels or _torch).decode, packed, rows, 1, layout)
            yield Way(name, encode, decode, 1 + code, 1 + code)
    elif op == "dropout":
        noise = F.dropout(torch.ones_like(x))
        packed, other = _two_values.encode_two_values(noise)
        rows = ops.two_value_rows(other, x.dtype, x.device)
        for name, kernels in backends:
            encode = functools.partial((kernels or _two_values).encode_two_values, noise)
            decode = functools.partial((kernels or _torch).decode, packed, rows, 1, layout)
            yield Way(name, encode, decode, size + code, size + code)
    elif op == "gelu, kept":
        gelu = next(a for a in fewbit.activations() if a.name == "gelu")
        inverse = find_inverse(F.gelu, functools.partial(gelu.derivative, approximate="none"))
        output, packed = F.gelu(x), _torch.encode(x, 1, inverse.side)
        table = inverse.table(0, x.dtype, x.dtype, x.device)
        for name, kernels in backends:
            encode = functools.partial((kernels or _torch).encode, x, 1, inverse.side)
            decode = functools.partial((kernels or _beside).decode_beside, output, packed, table, layout)
            yield Way(name, encode, decode, size + code, 2 * size + code)
        if found.kernels is not None and hasattr(found.kernels, "multiply_beside"):
            encode = functools.partial(found.kernels.encode, x, 1, inverse.side)
            slopes = inverse.slopes(x.dtype, ops.multiplied_in(x.dtype, x.device), x.device)
            multiply = functools.partial(ops.multiply_beside, grad, output, packed, slopes, layout)
            yield Way("kernels", encode, multiply, size + code, 3 * size + code)
    elif op == GATED and (gated := ops.gated_backend(x.device).kernels) is not None:
        none = torch.zeros(1, device=x.device)
        forward = functools.partial(gated.forward, "silu", none, x, grad)
        backward = functools.partial(gated.backward, "silu", none, grad, x, grad)
        yield Way("kernels", forward, backward, 3 * size, 5 * size)
    elif op == "gelu":
        codebook = fewbit.codebook("gelu", bits)
        coder = ops.Thresholds(codebook.boundaries, codebook.folded)
        levels = torch.linspace(-1, 1, 1 << bits, device=x.device)  # any values take the same time
        rows, packed = ops.rows(levels.to(x.dtype), bits), _torch.encode(x, bits, coder)
        for name, kernels in backends:
            encode = functools.partial((kernels or _torch).encode, x, bits, coder)
            decode = functools.partial((kernels or _torch).decode, packed, rows, bits, layout)
            yield Way(name, encode, decode, size + code, size + code)
        if (fused := ops.fused_backend(x.device).kernels) is not None:
            forward = functools.partial(fused.forward, "gelu", x, bits, coder, torch.zeros(1, device=x.device))
            levels = ops.rows(levels.to(ops.computed_in(x.dtype)), bits)
            backward = functools.partial(ops.multiply, grad, packed, levels, bits, layout)
            yield Way("kernels", forward, backward, 2 * size + code, 2 * size + code)


def measure(op: str, bits: int, dtype: torch.dtype, elements: int, device: torch.device, repeats: int) -> list[tuple]:
    """For each way but stock: the figures of `COLUMNS`."""
    x, grad = (torch.randn(elements, device=device).to(dtype) for _ in range(2))
    into = torch.empty_like(x)
    stock, *ways = *calls(op, bits, x, grad), *codings(op, bits, x, grad)
    copy = Way("copy", lambda: into.copy_(x), lambda: into.copy_(grad), 2 * dtype.itemsize, 2 * dtype.itemsize)
    times: dict[str, list[tuple[float, float]]] = {way.name: [] for way in (copy, stock, *ways)}
    for _ in range(repeats + 1):
        for way in (copy, stock, *ways):
            times[way.name].append((seconds(way.forward, device), seconds(way.backward, device)))
    ns = {  # the first warms up
        name: [statistics.median(t[i] for t in each[1:]) / elements * 1e9 for i in (0, 1)]
        for name, each in times.items()
    }
    bandwidth = copy.forward_bytes / min(ns["copy"])  # bytes a ns
    rows = []
    for way in ways:
        forward, backward = ns[way.name]
        whole = sum(ns["stock"])
        fractions = way.forward_bytes / forward / bandwidth, way.backward_bytes / backward / bandwidth
        figures = (forward, backward, whole, (forward + backward) / whole, *way[3:], *fractions)
        rows.append((op, bits, str(dtype).removeprefix("torch."), elements, way.name, *(round(v, 4) for v in figures)))
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(OPS)}; all where none is given")
    parser.add_argument("--quick", action="store_true", help="2^16 elements in place of 2^22 and 2^24")
    parser.add_argument("--bits", nargs="+", type=int, choices=range(1, 9), metavar="N", help="gelu: 1-8, others: 3")
    parser.add_argument("--csv", metavar="PATH", help="write the table there too")
    arguments = parser.parse_args(argv)
    for op in arguments.ops:
        if op not in OPS:
            parser.error(f"no operation {op!r}; there are {', '.join(OPS)}")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known = about(("numba", "triton"))
    print(f"machine  {known['machine']}\nversions {known['versions']}\nbackend  {ops.backend(device)}")
    print("forward, backward (encode, decode), stock: ns an element; bw: fraction of the bandwidth of a copy\n")
    print(
        "{:<10}  {:>4}  {:>8}  {:>8}  {:>7}  {:>7}  {:>8}  {:>7}  {:>6}  {:>10}  {:>11}".format(
            *COLUMNS[:9], *COLUMNS[11:]
        )
    )

    table = []
    for exponent in (16,) if arguments.quick else (24, 28) if device.type == "cuda" else (22, 24):
        for op in arguments.ops or OPS:
            widths = [1] if op in ONE_BIT else arguments.bits or (range(1, 9) if op == "gelu" else [3])
            for dtype in (torch.float32, torch.bfloat16):
                for bits in widths:
                    for row in measure(op, bits, dtype, 1 << exponent, device, repeats=1 if arguments.quick else 9):
                        _, _, name, _, way, forward, backward, stock, ratio, _, _, *bw = row
                        print(
                            f"{op:<10}  {bits:>4}  {name:>8}  {f'2^{exponent}':>8}  {way:>7}  {forward:>7.3f}  "
                            f"{backward:>8.3f}  {stock:>7.3f}  {ratio:>6.2f}  {bw[0]:>10.2f}  {bw[1]:>11.2f}",
                            flush=True,
                        )
                        table.append((*row, *known.values()))

    if arguments.csv:
        with open(arguments.csv, "w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow((*COLUMNS, *known))
            writer.writerows(table)


if __name__ == "__main__":
    main()
