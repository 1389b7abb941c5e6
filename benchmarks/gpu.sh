#!/bin/sh
# Runs the tests that need a GPU, then the benchmarks, and leaves CSVs. Needs torch with CUDA, pytest and transformers; nothing is installed.
#
#     sh benchmarks/gpu.sh [FOLDER [PART ...]]
#
# FOLDER: where the CSVs go; $OUT, else benchmarks/results. PART: of tests, kernels, ops, step, batch, paper and compiled; all of them, in
# this order, where none is given. Each part runs even if one before it failed; the exit status is that of the last failure.
set -u
cd "$(dirname "$0")/.."
out=${1:-${OUT:-benchmarks/results}}
[ $# -gt 0 ] && shift
parts=${*:-tests kernels ops step batch paper compiled}
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

gpu=$(python3 -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-").lower())') || {
    echo "benchmarks/gpu.sh: torch finds no CUDA device" >&2
    exit 1
}
status=0
# pyproject.toml has a setting of pytest-timeout's, which need not be there
export PYTEST_ADDOPTS="${PYTEST_ADDOPTS:-} -W ignore::pytest.PytestConfigWarning"

both_dtypes() { # in bfloat16 first: it is what the targets are for
    name=$1
    shift
    for dtype in bfloat16 float32; do
        python3 "benchmarks/bench_$name.py" --device cuda --dtype $dtype --csv "$out/$name-$dtype-$gpu.csv" "$@" || status=$?
    done
}

# 1,500 tests, each of which compiles a kernel
many=$(python3 -c 'import xdist' 2>/dev/null && echo "-n 8")

for part in $parts; do
    case $part in
    tests)
        python3 -m pytest -q -m gpu -p no:cacheprovider tests/test_gpu.py || status=$?
        python3 -m fewbit_hooks doctor || status=$?
        ;;
    kernels) # their own tests run on the device, and not by Triton's interpreter, where there is one
        python3 -m pytest -q -p no:cacheprovider $many tests/test_triton.py tests/test_kernels.py tests/test_fused.py tests/test_gated.py || status=$?
        ;;
    ops) python3 benchmarks/bench_ops.py --csv "$out/ops-$gpu.csv" || status=$? ;;
    step) both_dtypes step --eager --times 8 ;; # batches for a CPU would time the launches; it needs transformers
    compiled) # three compilations of minutes for each
        for model in roberta-2-layers vit-4-layers; do
            python3 benchmarks/bench_step.py $model --rows compiled --device cuda --dtype bfloat16 --times 8 \
                --csv "$out/compiled-$model-$gpu.csv" || status=$?
        done
        ;;
    batch) both_dtypes batch ;; # it needs transformers, too
    paper) python3 benchmarks/bench_batch.py --device cuda --paper || status=$? ;;
    *)
        echo "benchmarks/gpu.sh: no part '$part'; there are tests, kernels, ops, step, batch, paper and compiled" >&2
        exit 2
        ;;
    esac
done
echo "CSVs in $out"
exit "$status"
