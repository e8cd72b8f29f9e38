#!/usr/bin/env bash
# One session on a machine with a CUDA device: compiles the CUDA kernels for it where there is nvcc, tests everything that
# runs there, then the next units of benchmarks/gpu.py, within one time limit. Installs nothing; needs PyTorch, Triton,
# NumPy and pytest.
#
#     scripts/gpu_session.sh [UNIT...]          units of benchmarks/gpu.py; none: all that are missing, in order of value
#     OUT=folder SECONDS_MAX=590 TESTS_MAX=150 PYTHON=python3.12 scripts/gpu_session.sh networks/resnet50
#     TESTS_MAX=0 scripts/gpu_session.sh        no tests
#     BUILD_MAX=300 scripts/gpu_session.sh      seconds for compiling (16 processors need less than 60)
#     REHEARSE=1 scripts/gpu_session.sh         the same without a device, up to the first launch: tests are collected, units
#                                               run tiny on the CPU (scripts/gpu_rehearsal.sh does more)
#
# The defaults fit 15 minutes of a device: a first run of 10 minutes, then `TESTS_MAX=0 SECONDS_MAX=230` for the next units.
#
# Everything lands in $OUT (default: build/gpu): build.log, tests.log, sanitizer.log, bench.log, gpu-<device>.json and its
# charts. Results that benchmarks/results has already are copied there first, and so go on. What is compiled lands in
# build/session and is used again. The exit code is 1 if the build, a test, a sanitizer or fastres failed.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} out=${OUT:-build/gpu} limit=${SECONDS_MAX:-590} tests=${TESTS_MAX:-150}
rehearse=${REHEARSE:+1}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
# Triton's kernels are compiled once for all tests and contenders, so set-up times are those with a warm cache.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/fastres-triton}
export FASTRES_BENCH_TRITON=$TRITON_CACHE_DIR
built=build/session
mkdir -p "$out" "$built"
cp -n benchmarks/results/gpu-*.json "$out"/ 2>/dev/null
status=0

"$python" -c "import torch; print(torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else 'no CUDA device')"

# The CUDA kernels, for this device only.
nvcc=$(for home in "${CUDA_HOME:-}" "${CUDA_PATH:-}" /usr/local/cuda; do ls "$home/bin/nvcc" 2>/dev/null; done | head -n 1)
nvcc=${nvcc:-$(command -v nvcc)}
arch=${FASTRES_CUDA_ARCHS:-$("$python" -c "import torch; print('%d%d' % torch.cuda.get_device_capability())" 2>/dev/null)}
if [ -z "$nvcc" ]; then
  echo "=== CUDA kernels: not compiled: no nvcc (CUDA_HOME, CUDA_PATH, /usr/local/cuda, the PATH)"
elif [ -z "$arch" ]; then
  echo "=== CUDA kernels: not compiled: no CUDA device"
else
  sources=$(cat setup.py csrc/checks.h csrc/cuda/* | cksum)" $arch $("$python" -c "import torch; print(torch.__version__)")"
  if [ "$sources" != "$(cat "$built/sources" 2>/dev/null)" ] || [ ! -f "$built/lib/fastres/_cuda.abi3.so" ]; then
    FASTRES_BUILD_EXT=0 FASTRES_CUDA=1 FASTRES_CUDA_ARCHS=$arch timeout -k 5 "${BUILD_MAX:-120}" "$python" setup.py -q \
      build_ext --build-lib "$built/lib" --build-temp "$built/temp" >"$out/build.log" 2>&1 \
      && echo "$sources" >"$built/sources" || status=1
  fi
  # Beside the package, where it is looked for.
  [ $status -eq 0 ] && cp "$built/lib/fastres/_cuda.abi3.so" fastres/
  printf '=== CUDA kernels: %s after %d s\n' \
    "$([ $status -eq 0 ] && echo "compiled for sm_$arch" || echo "FAILED: see build.log")" $SECONDS
fi

kernel_tests() {  # not what needs no device: what compiles for other GPUs, and what follows addresses and launches
  ls tests/test_cuda_kernels.py tests/test_cuda_persistent.py tests/test_triton_*.py | grep -Ev 'compile|addresses|launch'
}

# sanitize TOOL [ARGUMENT...]: the program that checks every kernel, under a tool of compute-sanitizer.
sanitize() {
  timeout -k 5 60 "$sanitizer" --tool "$1" --error-exitcode 9 "$built/check" "${@:2}" >"$out/sanitizer.part" 2>&1
  local code=$?
  cat "$out/sanitizer.part" >>"$out/sanitizer.log"
  # On some virtualised GPUs it refuses before the program runs.
  if grep -q "Device not supported" "$out/sanitizer.part"; then
    echo "=== compute-sanitizer $1: does not serve this device"
  elif [ $code -eq 0 ] && grep -q "all kernels are right" "$out/sanitizer.part"; then
    echo "=== compute-sanitizer $1: $(grep -E "ERROR SUMMARY|RACECHECK SUMMARY" "$out/sanitizer.part" | tail -n 1)"
  else
    echo "=== compute-sanitizer $1: FAILED with exit status $code: see sanitizer.log" && status=1
  fi
  rm -f "$out/sanitizer.part"
}

if [ -n "$rehearse" ]; then
  "$python" -m pytest -q --collect-only -p no:cacheprovider $(kernel_tests) tests/test_gpu*.py >"$out/tests.log" 2>&1 || status=1
  echo "=== tests: $(tail -n 1 "$out/tests.log")"
elif [ "$tests" -gt 0 ]; then
  # The kernels against float64, case by case, compiled by many processes where pytest-xdist is there; then what only a
  # device can show, alone. An interrupt at the limit lets pytest say what it has seen.
  start=$SECONDS failed=0
  many=$("$python" -c "import xdist" 2>/dev/null && echo "-n 8")
  test_with() { timeout -s INT -k 10 "$1" "$python" -m pytest -q --tb=short --maxfail=20 -p no:cacheprovider "${@:2}"; }
  {
    test_with $((tests * 2 / 3)) $many $(kernel_tests) || failed=1
    left=$((tests - SECONDS + start))
    test_with $((left > 30 ? left : 30)) tests/test_gpu*.py || failed=1
  } >"$out/tests.log" 2>&1
  grep -E '^(FAILED|ERROR|[0-9]+ (passed|failed)|=+ .*(passed|failed|error))' "$out/tests.log" | tail -n 40
  printf '=== tests: %s after %d s\n' "$([ $failed -eq 0 ] && echo passed || echo FAILED or out of time)" $SECONDS
  [ $failed -eq 0 ] || status=1
fi

left=$((limit - SECONDS - 15))  # what is left for the last unit to end, and for the charts
if [ $left -gt 0 ]; then
  minutes=$(awk "BEGIN { print $left / 60 }")
  timeout -k 5 $((left + 10)) "$python" benchmarks/gpu.py "$@" ${rehearse:+--device cpu --quick --again} \
    --minutes "$minutes" --out "$out" 2>&1 | tee "$out/bench.log" || status=1
fi

# At last, in what time is left: they are many times slower than the kernels.
if [ "$tests" -gt 0 ]; then
  sanitizer=$(command -v compute-sanitizer || ls "$(dirname "${nvcc:-/}")/compute-sanitizer" 2>/dev/null)
  left=$((limit - SECONDS))
  if [ -z "$sanitizer" ] || [ ! -f "$built/lib/fastres/_cuda.abi3.so" ]; then
    echo "=== compute-sanitizer: left out: $([ -n "$sanitizer" ] && echo "the kernels are not compiled" || echo "not installed")"
  elif [ -z "$rehearse" ] && [ $left -lt 60 ]; then
    echo "=== compute-sanitizer: left out: $left s are left"
  else
    : >"$out/sanitizer.log"
    objects=$(for source in csrc/cuda/*.cu; do echo "$built/temp/${source%.cu}.o"; done)
    if ! timeout "${BUILD_MAX:-120}" "$nvcc" -std=c++17 -I csrc/cuda tests/cuda_on_cpu/main.cpp $objects -o "$built/check" >>"$out/sanitizer.log" 2>&1; then
      echo "=== compute-sanitizer: the program does not compile: see sanitizer.log" && status=1
    elif [ -n "$rehearse" ]; then
      echo "=== compute-sanitizer: the program compiles"
    else
      sanitize memcheck
      sanitize racecheck few
    fi
  fi
fi
ls -l "$out"
exit $status
