#!/usr/bin/env bash
# One session on a machine with a CUDA device: the tests of everything that runs there, then the next units of
# benchmarks/gpu.py, within one time limit. Builds and installs nothing; needs PyTorch, Triton, NumPy and pytest.
#
#     scripts/gpu_session.sh [UNIT...]          units of benchmarks/gpu.py; none: all that are missing, in order of value
#     OUT=folder SECONDS_MAX=590 TESTS_MAX=200 PYTHON=python3.12 scripts/gpu_session.sh networks/resnet50
#     TESTS_MAX=0 scripts/gpu_session.sh        no tests
#
# Everything lands in $OUT (default: build/gpu): tests.log, bench.log, gpu-<device>.json and its charts. Results that
# benchmarks/results has already are copied there first, and so go on. The exit code is 1 if a test or fastres failed.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} out=${OUT:-build/gpu} limit=${SECONDS_MAX:-590} tests=${TESTS_MAX:-200}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
# Triton's kernels are compiled once for all tests and contenders, so set-up times are those with a warm cache.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/fastres-triton}
export FASTRES_BENCH_TRITON=$TRITON_CACHE_DIR
mkdir -p "$out"
cp -n benchmarks/results/gpu-*.json "$out"/ 2>/dev/null
status=0

"$python" -c "import torch; print(torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else 'no CUDA device')"
if [ "$tests" -gt 0 ]; then
  # The kernels against float64, case by case, compiled by many processes where pytest-xdist is there; then what only a
  # device can show, alone. An interrupt at the limit lets pytest say what it has seen.
  many=$("$python" -c "import xdist" 2>/dev/null && echo "-n 8")
  test_with() { timeout -s INT -k 10 "$1" "$python" -m pytest -q --tb=short --maxfail=20 -p no:cacheprovider "${@:2}"; }
  {
    # Not what needs none: what compiles for other GPUs, and what follows addresses and launches.
    test_with $((tests * 2 / 3)) $many $(ls tests/test_triton_*.py | grep -Ev 'compile|addresses|launch') || status=1
    test_with $((tests - SECONDS > 30 ? tests - SECONDS : 30)) tests/test_gpu.py || status=1
  } >"$out/tests.log" 2>&1
  grep -E '^(FAILED|ERROR|[0-9]+ (passed|failed)|=+ .*(passed|failed|error))' "$out/tests.log" | tail -n 40
  printf '=== tests: %s after %d s\n' "$([ $status -eq 0 ] && echo passed || echo FAILED or out of time)" $SECONDS
fi

left=$((limit - SECONDS - 15))  # what is left for the last unit to end, and for the charts
if [ $left -gt 0 ]; then
  minutes=$(awk "BEGIN { print $left / 60 }")
  timeout -k 5 $((left + 10)) "$python" benchmarks/gpu.py "$@" --minutes "$minutes" --out "$out" 2>&1 | tee "$out/bench.log" || status=1
fi
ls -l "$out"
exit $status
