#!/bin/sh
# Runs the tests that need a GPU, then the benchmarks, and leaves CSVs. Needs torch with CUDA, pytest and transformers; nothing is installed.
#
#     sh benchmarks/gpu.sh [FOLDER]        # FOLDER: where the CSVs go; $OUT, else benchmarks/results
#
# Each benchmark runs even if one before it failed; the exit status is that of the first failure.
set -u
cd "$(dirname "$0")/.."
out=${1:-${OUT:-benchmarks/results}}
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

gpu=$(python3 -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-").lower())') || {
    echo "benchmarks/gpu.sh: torch finds no CUDA device" >&2
    exit 1
}
status=0
# pyproject.toml has a setting of pytest-timeout's, which need not be there
export PYTEST_ADDOPTS="${PYTEST_ADDOPTS:-} -W ignore::pytest.PytestConfigWarning"
python3 -m pytest -q -m gpu -p no:cacheprovider tests/test_gpu.py || status=$?
# the kernels' own tests run on the device, and not by Triton's interpreter, where there is one
python3 -m pytest -q -p no:cacheprovider tests/test_triton.py tests/test_kernels.py tests/test_fused.py tests/test_gated.py || status=$?
python3 -m fewbit_hooks doctor || status=$?
python3 benchmarks/bench_ops.py --csv "$out/ops-$gpu.csv" || status=$?
for name in step batch; do # they need transformers
    for dtype in bfloat16 float32; do
        python3 "benchmarks/bench_$name.py" --device cuda --dtype $dtype --csv "$out/$name-$dtype-$gpu.csv" || status=$?
    done
done
python3 benchmarks/bench_batch.py --device cuda --paper || status=$?
echo "CSVs in $out"
exit "$status"
