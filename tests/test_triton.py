"""How Triton's kernels are run, and that they compile for a GPU. What they compute is tested in `test_kernels.py`."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

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
few = ["bf16"], (3, 4)
for build in [*builds(BYTES, (1, 3, 5, 8)), *builds(*few, n="i64"), *builds(*few, n="")]:
    compiled = compile_for(build, 80)
    ptx = compiled.asm["ptx"]
    if build.name in ("encode_thresholds", "forward", "multiply") and "n" in build.types:
        assert "ld.global.v" in ptx, build  # 16 bytes at a time
    if build.dtype == "bf16":
        assert not compiled.metadata.shared, build  # no element changes places on its way
        # rounded to the nearest, by the hardware
        assert build.name not in ("forward", "multiply") or "cvt.rn.bf16" in ptx, build
"""


def test_every_kernel_compiles_for_a_gpu_without_one(tmp_path) -> None:
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
        pytest.skip(f"triton {triton.__version__} takes signatures in another form")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)  # the benchmark, which knows them all, is on it
    run = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
