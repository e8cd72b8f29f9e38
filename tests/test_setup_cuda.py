"""The CUDA half of an installation: compiled where there is nvcc, or the reason kept; why its kernels do not serve."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from _cuda import cuda_tools
from test_setup import build_info, clean_environment, needs_compiler, setup, tree  # noqa: F401
from torch._subclasses.fake_tensor import FakeTensorMode

import fastres
from fastres import doctor
from fastres.kernels import cuda, extension, table

needs_nvcc = pytest.mark.skipif(cuda_tools.toolkit() is None, reason="there is no CUDA toolkit")

KERNEL = """
__global__ void fill(float* p) { *p = 1.0f; }
cudaError_t launch(float* p) { fill<<<1, 1>>>(p); return cudaGetLastError(); }
"""
MODULE = """
#include <Python.h>
#include <cuda_runtime.h>
#include "checks.h"
cudaError_t launch(float* p);
static int64_t run() { return launch(nullptr); }
STABLE_TORCH_LIBRARY(fastres_cuda, m) { m.def("run() -> int"); }
STABLE_TORCH_LIBRARY_IMPL(fastres_cuda, CompositeExplicitAutograd, m) { m.impl("run", TORCH_BOX(&run)); }
extern "C" PyObject* PyInit__cuda(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1};
  return PyModule_Create(&definition);
}
"""


@pytest.fixture
def cuda_tree(tree):  # noqa: F811
    """A checkout with a short CUDA extension too."""
    (tree / "csrc" / "cuda").mkdir()
    (tree / "csrc" / "cuda" / "kernel.cu").write_text(KERNEL)
    (tree / "csrc" / "cuda" / "module.cpp").write_text(MODULE)
    (tree / "csrc" / "checks.h").write_text((cuda_tools.ROOT / "csrc" / "checks.h").read_text())
    return tree


def load_error(tree):  # noqa: F811
    """What a PyTorch with CUDA would say of the binary."""
    code = "import torch; torch.version.cuda = '13.0'\n"
    code += "from fastres.kernels import extension; print(extension.cuda_load_error())"
    environment = clean_environment(PYTHONPATH=str(tree))
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@needs_compiler
@needs_nvcc
def test_compiles_with_nvcc(cuda_tree):
    """Without the kernels for CPUs, which take longer."""
    setup(cuda_tree, "build_ext", "--inplace", FASTRES_BUILD_EXT="0", FASTRES_CUDA="1", FASTRES_CUDA_ARCHS="80 90a")
    assert sorted(p.name for p in cuda_tree.glob("fastres/*.so")) == ["_cuda.abi3.so"]
    info = build_info(cuda_tree)
    assert not info["compiled"] and info["cuda"]["compiled"] and info["cuda"]["error"] is None
    assert info["cuda"]["architectures"] == ["80", "90a"] and info["cuda"]["torch"] == torch.__version__
    binary = (cuda_tree / "fastres" / "_cuda.abi3.so").read_bytes()
    assert b"libcudart.so" not in binary and b"libtorch.so" in binary


@needs_compiler
@needs_nvcc
def test_failed_build_keeps_the_reason(cuda_tree):
    (cuda_tree / "csrc" / "cuda" / "kernel.cu").write_text("int f() { return nothing_of_this_name; }\n")
    setup(cuda_tree, "build_ext", "--inplace", FASTRES_CUDA_ARCHS="80")
    info = build_info(cuda_tree)
    assert info["compiled"] and not info["cuda"]["compiled"] and "nothing_of_this_name" in info["cuda"]["error"]
    assert "fastres._cuda is not there: nvcc failed" in load_error(cuda_tree)
    with pytest.raises(AssertionError, match="FASTRES_CUDA=1, but nvcc failed"):
        setup(cuda_tree, "build_ext", "--inplace", FASTRES_BUILD_EXT="0", FASTRES_CUDA="1", FASTRES_CUDA_ARCHS="80")


@pytest.mark.parametrize("variable", ["FASTRES_CUDA", "FASTRES_BUILD_EXT"])
def test_left_out_when_asked_for(cuda_tree, variable):
    (cuda_tree / "fastres" / "_cuda.abi3.so").write_bytes(b"of yesterday")
    setup(cuda_tree, "build_ext", "--inplace", **{"FASTRES_BUILD_EXT": "0", variable: "0"})
    assert "FASTRES_CUDA=0 or FASTRES_BUILD_EXT=0" in build_info(cuda_tree)["cuda"]["error"]
    assert not list(cuda_tree.glob("fastres/_cuda*"))


def test_binary_that_does_not_load(cuda_tree):
    (cuda_tree / "fastres" / "_cuda.abi3.so").write_bytes(b"not a library")
    assert load_error(cuda_tree).startswith("fastres._cuda does not load: ImportError")


@needs_compiler
def test_binary_for_another_torch(cuda_tree):
    """It needs a function that this one has not: one line says so, and everything else works."""
    source = cuda_tree / "other.cpp"
    source.write_text(
        'extern "C" int aoti_torch_of_tomorrow(); extern "C" int PyInit__cuda() { return aoti_torch_of_tomorrow(); }'
    )
    binary = cuda_tree / "fastres" / "_cuda.abi3.so"
    subprocess.run(["c++", "-shared", "-fPIC", str(source), "-o", str(binary)], check=True)
    about = {"cuda": {"compiled": True, "error": None, "torch": "9.9.0"}}
    (cuda_tree / "fastres" / "_build_info.json").write_text(json.dumps(about))
    said = load_error(cuda_tree)
    assert said.startswith(
        f"fastres._cuda does not load (built for torch 9.9.0, this is {torch.__version__}): ImportError"
    )
    assert "undefined symbol: aoti_torch_of_tomorrow" in said and len(said.splitlines()) == 1


@pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch has CUDA")
def test_not_loaded_without_cuda_in_pytorch():
    assert extension.cuda_load_error() == "this PyTorch is built without CUDA" == cuda.unavailable()


def test_reasons_of_devices(monkeypatch):
    """A driver that is too old, an architecture without a kernel: that device's calls go to the next kernel."""
    errors = {0: None, 1: "cuda:1 (sm_75): no kernel image is available for execution on the device"}
    monkeypatch.setattr(extension, "cuda_error", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda.unavailable() == "no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(cuda, "device_error", errors.get)
    assert cuda.unavailable() is None

    class On:
        """A tensor's traits, on a device that is not there."""

        dtype, is_cuda = torch.float32, True

        def __init__(self, index):
            self.device = torch.device("cuda", index)

        def numel(self):
            return 1

    assert cuda.why_not(On(0)) is None and "sm_75" in cuda.why_not(On(1))
    errors[0] = "cuda:0 (sm_75): CUDA driver version is insufficient for CUDA runtime version"
    assert cuda.unavailable() == f"{errors[0]}; {errors[1]}"


@pytest.mark.parametrize(
    "error",
    [
        "CUDA driver version is insufficient for CUDA runtime version",
        "no kernel image is available for execution on the device",
    ],
)
def test_doctor_says_why_and_the_next_kernel_serves(monkeypatch, error):
    """A driver older than the binary, an architecture without a kernel."""
    properties = SimpleNamespace(name="Tesla T4", major=7, minor=5, total_memory=2**34)
    monkeypatch.setattr(extension, "cuda_error", None)
    monkeypatch.setattr(torch.ops, "fastres_cuda", SimpleNamespace(error=lambda index: error), raising=False)
    monkeypatch.setattr(cuda, "device_error", cuda.device_error.__wrapped__)
    for name, value in (("is_available", True), ("device_count", 1), ("get_device_capability", (7, 5))):
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    reason = f"cuda:0 (sm_75): {error}"
    (line,) = (line for line in doctor.text(doctor.examine()).splitlines() if line.split()[:2] == ["bn_act", "cuda"])
    assert f"cuda not: {reason}" in line and "reference" in line
    with FakeTensorMode(), fastres.use_kernels("cuda", "reference"):
        assert table.select("bn_act", (torch.empty(2, 8, 4, 4, device="cuda"),)).name == "reference"
    with FakeTensorMode(), fastres.use_kernels("cuda"), pytest.raises(RuntimeError, match=r"cuda: cuda:0 \(sm_75\)"):
        table.select("bn_act", (torch.empty(2, 8, 4, 4, device="cuda"),))
