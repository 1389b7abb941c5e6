"""What coding costs beside the activation itself: ns an element, and the ratio to gelu's own forward and backward.

    python benchmarks/bench_ops.py [--quick] [--csv PATH]

All runs of a row share one process and are interleaved, so that whatever else the machine does hits them alike;
figures are medians. Runs on the first CUDA device where there is one, else on the CPU.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

import fewbit_hooks as fewbit
from fewbit_hooks import ops

COLUMNS = ("bits", "dtype", "elements", "encode", "decode", "gelu f+b", "ratio")


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


def measure(bits: int, dtype: torch.dtype, elements: int, device: torch.device, repeats: int) -> dict[str, float]:
    """Median ns an element of encode, decode, and gelu forward + backward."""
    x = torch.randn(elements, device=device).to(dtype).requires_grad_()
    grad = torch.randn(elements, device=device).to(dtype)
    codebook = fewbit.codebook("gelu", bits)
    coder = ops.Thresholds(codebook.boundaries, codebook.folded)
    rows = ops.rows(torch.linspace(-1, 1, 1 << bits, device=device).to(dtype), bits)  # any values take the same time
    layout, packed = ops.Layout.of(x), ops.encode(x, bits, coder)
    runs: dict[str, Callable[[], object]] = {
        "encode": lambda: ops.encode(x, bits, coder),
        "decode": lambda: ops.decode(packed, rows, bits, layout),
        "gelu f+b": lambda: torch.autograd.grad(F.gelu(x), x, grad),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            times[name].append(seconds(run, device))
    return {name: statistics.median(each[1:]) / elements * 1e9 for name, each in times.items()}  # the first warms up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2^20 and 2^22 elements in place of 2^22 and 2^24")
    parser.add_argument("--csv", metavar="PATH", help="write the table there too")
    arguments = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chip = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"machine  {platform.platform()}, {platform.machine()}, {chip}")
    print(f"versions python {platform.python_version()}, torch {torch.__version__}, fewbit_hooks.ops in plain torch")
    print("ns an element; ratio = (encode + decode) / (gelu f+b)\n")
    print("{:>4}  {:>8}  {:>8}  {:>7}  {:>7}  {:>8}  {:>6}".format(*COLUMNS))

    table = []
    for exponent in (20, 22) if arguments.quick else (22, 24):
        for dtype in (torch.float32, torch.bfloat16):
            for bits in range(1, 9):
                ns = measure(bits, dtype, 1 << exponent, device, repeats=5 if arguments.quick else 9)
                encode, decode, gelu = ns["encode"], ns["decode"], ns["gelu f+b"]
                name, ratio = str(dtype).removeprefix("torch."), (encode + decode) / gelu
                figures = f"{encode:>7.3f}  {decode:>7.3f}  {gelu:>8.3f}  {ratio:>6.2f}"
                print(f"{bits:>4}  {name:>8}  {f'2^{exponent}':>8}  {figures}", flush=True)
                table.append((bits, name, 1 << exponent, *(round(v, 4) for v in (encode, decode, gelu, ratio))))

    if arguments.csv:
        with open(arguments.csv, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows(table)


if __name__ == "__main__":
    main()
