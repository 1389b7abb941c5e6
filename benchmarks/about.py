"""What a benchmark's figures depend on: the machine, the versions, the day."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from collections.abc import Iterable
from pathlib import Path

import torch

import fewbit_hooks as fewbit


def about(packages: Iterable[str] = ()) -> dict[str, str]:
    """The columns `machine`, `versions` and `date` of a CSV.

    Args:
        packages: others whose versions matter.
    """
    return {"machine": machine(), "versions": versions(packages), "date": datetime.date.today().isoformat()}


def machine() -> str:
    """The GPU's name, or the processor's and the threads that are used."""
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread" + ("" if threads == 1 else "s")


def versions(packages: Iterable[str]) -> str:
    """Python, torch, the packages that are installed, and this library."""
    parts = [f"python {platform.python_version()}", f"torch {torch.__version__}"]
    for name in packages:
        try:
            parts.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join([*parts, f"fewbit_hooks {fewbit.__version__}"])
