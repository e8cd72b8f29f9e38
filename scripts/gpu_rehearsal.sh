#!/usr/bin/env bash
# Rehearses a session on a GPU where there is none, in the software of that machine, up to the first launch: so that a lent
# device measures, and does not find typing errors.
#
#     scripts/gpu_rehearsal.sh                                makes build/rehearsal/venv by python3.12 (6 GB)
#     PYTHON=/path/to/bin/python scripts/gpu_rehearsal.sh     an environment that is there, as it is
#     PACKAGES="torch==2.13.0 triton==3.9.0 ..." scripts/gpu_rehearsal.sh
#
# It needs what the session needs and no more: PyTorch with CUDA, Triton, NumPy, pytest; nvcc for the CUDA kernels. What it does:
#   environment  the versions; a PyTorch with CUDA and without a device
#   session      scripts/gpu_session.sh itself: the CUDA kernels compiled for the device, all its tests collected, every kind of
#                unit of benchmarks/gpu.py run tiny on the CPU, the program for compute-sanitizer compiled
#   binding      the compiled kernels load into this PyTorch and register their ops; the kernel table asks them and gets reasons
#   launches     Triton's launches of whole training steps on tensors without data; kernels in its interpreter; what needs a
#                device is skipped and says so
#   compile      every Triton kernel that runs by default, compiled for the device by this Triton
#   units        what benchmarks/gpu.py would measure on a device, in this order
# Logs: $OUT (default: build/rehearsal). The exit code is 1 if a step failed; nothing is ever launched on a device.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-build/rehearsal} target=${TARGET:-sm_90}
packages=${PACKAGES:-torch==2.11.0 triton==3.6.0 numpy<2.4 pytest setuptools<82}
mkdir -p "$out"
if [ -z "${PYTHON:-}" ]; then
  PYTHON=$out/venv/bin/python
  if [ ! -x "$PYTHON" ]; then
    python3.12 -m venv "$out/venv" && (set -f; "$PYTHON" -m pip install -q $packages) || exit 1
  fi
fi
export PYTHON CUDA_VISIBLE_DEVICES= PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
failed=()

# step NAME COMMAND...: with its output in a log; its last lines if it fails.
step() {
  local name=$1 start=$SECONDS
  if "${@:2}" >"$out/$name.log" 2>&1; then
    printf '=== %-12s passed in %d s\n' "$name" $((SECONDS - start))
  else
    printf '=== %-12s FAILED in %d s: %s\n' "$name" $((SECONDS - start)) "$out/$name.log"
    tail -n 25 "$out/$name.log"
    failed+=("$name")
  fi
}

environment() {
  "$PYTHON" - <<'END'
import importlib.util, platform, sys
import numpy, torch, triton

print("Python", platform.python_version(), "torch", torch.__version__, "triton", triton.__version__, "numpy", numpy.__version__)
if torch.version.cuda is None or torch.cuda.is_available():
    sys.exit("this must be a PyTorch with CUDA that sees no device")
extra = [n for n in ("xdist", "hypothesis", "rich", "matplotlib", "PIL", "sklearn", "torchvision") if importlib.util.find_spec(n)]
print("beside what a session needs there is:", ", ".join(extra) or "nothing")
END
}

session() {
  REHEARSE=1 OUT=$out/session FASTRES_CUDA_ARCHS=${target#sm_}a BUILD_MAX=1800 SECONDS_MAX=7200 scripts/gpu_session.sh || return 1
  # Units go on when a contender fails: cuDNN's fused convolutions do, on a CPU. Nothing else may.
  ! grep -E "failed: |^Traceback" "$out/session/bench.log" | grep -v "aten::cudnn_convolution"
}

binding() {
  "$PYTHON" - <<'END'
import torch
from torch._subclasses import FakeTensorMode
import fastres
from fastres.kernels import cuda, extension, table

assert extension.cuda_load_error() is None, extension.cuda_load_error()
assert cuda.unavailable() == "no CUDA device", cuda.unavailable()
ops = [name for name in dir(torch.ops.fastres_cuda) if not name.startswith("_")]
for (op, device), row in table.TABLE.items():
    names = [kernel.name for kernel in row if kernel.name.startswith("cuda")]
    print(f"{op} on {device}: {names}" if names else "", end="\n" if names else "")
for op in ("bn_act", "bn_act_persistent", "bn_add_bn_act", "add_act", "bn_act_maxpool", "update_all_running_stats_"):
    print(getattr(torch.ops.fastres_cuda, op).default._schema)
with FakeTensorMode():
    x = torch.empty(2, 8, 4, 4, device="cuda")
    print("a call goes to", table.select("bn_act", (x, *[None] * 5, True, 1e-5, True, True)).name)
print(torch.ops.fastres_cuda.error(0) if torch.cuda.is_available() else "no device")
END
}

launches() {
  "$PYTHON" -m pytest -q -p no:cacheprovider -rs tests/test_gpu.py tests/test_triton_launch.py tests/test_choices.py \
    tests/test_triton_batch_norm.py -k "not 2_to_31 or gpu"
}

step environment environment
cat "$out/environment.log"
step session session
step binding binding
step launches launches
step compile "$PYTHON" scripts/kernel_report.py --targets "$target" --depths 50 --dtypes bf16 \
  --launchers batch_norm elementwise join pool algebraic
step units "$PYTHON" benchmarks/gpu.py --device cpu --list --out "$out/none"
echo "Nothing was launched on a device. There, scripts/gpu_session.sh compiles the kernels, runs $(
  grep -Eo '[0-9]+ tests collected' "$out/session/tests.log" || echo 'its tests'
), measures these units in this order, and checks the kernels by compute-sanitizer:"
grep about "$out/units.log" | head -n 20
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
