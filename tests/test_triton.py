"""How Triton's kernels are run, and that they compile for a GPU. What they compute is tested in `test_kernels.py`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .conftest import rows_of

_triton = pytest.importorskip("fewbit_hooks.ops._triton", reason="triton is not installed")

# the interpreter computes in numpy, which warns where a GPU does not
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


def test_the_kernels_are_run_by_the_interpreter_exactly_where_there_is_no_gpu() -> None:
    import triton

    assert isinstance(_triton._pack, triton.runtime.JITFunction) == (DEVICE.type == "cuda")


COMPILE = """
from count_instructions import BYTES, builds, compile_for
from fewbit_hooks.ops import _triton

assert not _triton.INTERPRETED
coding = ("encode_thresholds", "decode", "multiply")
large = [build for build in builds(BYTES, (3, 4), n="i64") if build.name in coding]
for build in [*builds(BYTES, (1, 3, 5, 8)), *large, *builds(["bf16"], (3, 4, 8), n="")]:
    compiled = compile_for(build, 80)
    ptx = compiled.asm["ptx"]
    if build.name in ("encode_thresholds", "forward", "multiply") and "n" in build.types:
        assert "ld.global.v" in ptx, build  # 16 bytes at a time
    if build.dtype == "bf16":
        assert not compiled.metadata.shared, build  # no element changes places on its way
        # rounded to the nearest, by the hardware
        assert build.name not in ("forward", "multiply") or "cvt.rn.bf16" in ptx, build
"""


CODING = ("encode_thresholds", "decode", "multiply")
BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "count_instructions.py"


def without_interpreter(cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python where Triton compiles."""
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
        pytest.skip(f"triton {triton.__version__} takes signatures in another form")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)  # the benchmark, which knows all kernels, is on it
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False)


def test_every_kernel_compiles_for_a_gpu_without_one(tmp_path) -> None:
    run = without_interpreter(tmp_path, "-c", COMPILE)
    assert run.returncode == 0, run.stderr[-2000:]


def test_what_the_kernels_ask_of_a_gpu_is_counted_without_one(tmp_path) -> None:
    run = without_interpreter(tmp_path, str(BENCHMARK), "--quick", "--csv", str(tmp_path / "counts.csv"), *CODING)
    assert run.returncode == 0, run.stderr[-2000:]
    counts = rows_of(tmp_path / "counts.csv")
    assert {row["kernel"] for row in counts} == set(CODING)
    for row in counts:
        assert 0 < float(row["a_byte"]) == pytest.approx(float(row["instructions"]) / float(row["bytes"]), abs=0.06)
        assert int(row["registers"]) > 0
        assert int(row["shared"]) == int(row["spilled"]) == 0


def test_the_page_says_what_was_counted() -> None:
    counts = {
        (row["kernel"], row["variant"]): row
        for row in rows_of(BENCHMARK.parent / "results" / "instructions-sm90.csv")
        if row["dtype"] == "bf16" and row["bits"] in ("0", "3")
    }
    page = (BENCHMARK.parents[1] / "docs" / "engines.md").read_text()
    for key in (
        ("encode_thresholds", ""), ("decode", ""), ("multiply", ""), ("multiply_beside", "with sides"),
        ("forward", "gelu"), ("gated_forward", "silu"), ("gated_backward", "silu"),
    ):  # fmt: skip
        moved, count, a_byte = (float(counts[key][column]) for column in ("bytes", "instructions", "a_byte"))
        assert f"| {round(moved, 1):g} | {count:.0f} | {a_byte:.1f} |" in page, key
