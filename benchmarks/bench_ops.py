"""What coding costs beside the activation itself: ns an element, and the ratio to gelu's own forward and backward.

    python benchmarks/bench_ops.py [--quick] [--csv PATH]

All runs of a row share one process and are interleaved, so that whatever else the machine does hits them alike;
figures are medians. Runs on the first CUDA device where there is one, else on the CPU.

On CUDA, where Triton works, there are three rows for each dtype and number of bits, by backend: plain torch, Triton's
kernels, and the fused engine, whose encode makes gelu's output, too, and whose decode is the whole backward. Each row
says what fraction of the device's copy bandwidth encode and decode reach: the bytes that must be read and written, over
the time, over the same of a copy of the tensor.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

import fewbit_hooks as fewbit
from about import about
from fewbit_hooks import ops
from fewbit_hooks.ops import _torch

COLUMNS = ("bits", "dtype", "elements", "backend", "encode", "decode", "gelu f+b", "ratio", "encode bw", "decode bw")
Runs = dict[str, Callable[[], object]]


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """One run, by the device's own clock."""
    if device.type == "cuda":
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def backends(device: torch.device) -> list[str]:
    """What can code there."""
    found = ["torch"]
    if device.type == "cuda":
        found += ["triton"] * (ops.backend(device).kernels is not None)
        found += ["fused"] * (ops.fused_backend(device).kernels is not None)
    return found


def make_runs(backend: str, bits: int, x: torch.Tensor, grad: torch.Tensor) -> Runs:
    """Encoding and decoding by one backend."""
    codebook = fewbit.codebook("gelu", bits)
    coder = ops.Thresholds(codebook.boundaries, codebook.folded)
    values, layout = (
        torch.linspace(-1, 1, 1 << bits, device=x.device),
        ops.Layout.of(x),
    )  # any values take the same time
    if backend == "fused":
        kernels = ops.fused_backend(x.device).kernels
        no_parameters = torch.zeros(1, device=x.device)
        _, packed = kernels.forward("gelu", x, bits, coder, no_parameters)
        return {
            "encode": lambda: kernels.forward("gelu", x, bits, coder, no_parameters),
            "decode": lambda: kernels.backward(grad, packed, bits, values, layout),
        }
    kernels = _torch if backend == "torch" else ops.backend(x.device).kernels
    table, packed = ops.rows(values.to(x.dtype), bits), _torch.encode(x, bits, coder)
    return {
        "encode": lambda: kernels.encode(x, bits, coder),
        "decode": lambda: kernels.decode(packed, table, bits, layout),
    }


def measure(bits: int, dtype: torch.dtype, elements: int, device: torch.device, repeats: int) -> list[tuple]:
    """For each backend the median ns an element, the ratio, and the fractions of copy bandwidth."""
    x = torch.randn(elements, device=device).to(dtype).requires_grad_()
    grad = torch.randn(elements, device=device).to(dtype)
    into = torch.empty_like(grad)
    runs: Runs = {"gelu f+b": lambda: torch.autograd.grad(F.gelu(x), x, grad), "copy": lambda: into.copy_(grad)}
    for backend in backends(device):
        made = make_runs(backend, bits, x.detach(), grad)
        runs |= {f"{backend} {name}": run for name, run in made.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            times[name].append(seconds(run, device))
    ns = {name: statistics.median(each[1:]) / elements * 1e9 for name, each in times.items()}  # the first warms up
    rows = []
    for backend in backends(device):
        encode, decode, gelu = ns[f"{backend} encode"], ns[f"{backend} decode"], ns["gelu f+b"]
        moved = dtype.itemsize * (2 if backend == "fused" else 1) + bits / 8  # bytes an element, in each direction
        per_ns = 2 * dtype.itemsize / ns["copy"]
        rows.append(
            (backend, encode, decode, gelu, (encode + decode) / gelu, *(moved / t / per_ns for t in (encode, decode)))
        )
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2^16 and 2^18 elements in place of 2^22 and 2^24")
    parser.add_argument("--csv", metavar="PATH", help="write the table there too")
    arguments = parser.parse_args(argv)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known = about(("triton",))
    print(f"machine  {known['machine']}\nversions {known['versions']}\nbackend  {ops.backend(device)}")
    print("ns an element; ratio = (encode + decode) / (gelu f+b); bw: fraction of the bandwidth of a copy\n")
    print("{:>4}  {:>8}  {:>8}  {:>7}  {:>7}  {:>7}  {:>8}  {:>9}  {:>9}  {:>9}".format(*COLUMNS))

    table = []
    for exponent in (16, 18) if arguments.quick else (24, 28) if device.type == "cuda" else (22, 24):
        for dtype in (torch.float32, torch.bfloat16):
            for bits in range(1, 9):
                for row in measure(bits, dtype, 1 << exponent, device, repeats=3 if arguments.quick else 9):
                    backend, *figures = row
                    name = str(dtype).removeprefix("torch.")
                    encode, decode, gelu, *fractions = figures
                    said = f"{encode:>7.3f}  {decode:>7.3f}  {gelu:>8.3f}  {'  '.join(f'{v:>9.2f}' for v in fractions)}"
                    print(f"{bits:>4}  {name:>8}  {f'2^{exponent}':>8}  {backend:>7}  {said}", flush=True)
                    table.append((bits, name, 1 << exponent, backend, *(round(v, 4) for v in figures), *known.values()))

    if arguments.csv:
        with open(arguments.csv, "w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow((*COLUMNS, *known))
            writer.writerows(table)


if __name__ == "__main__":
    main()
