"""The CUDA half of an installation: compiled where there is nvcc, or the reason kept; why its kernels do not serve."""

import subprocess
import sys

import pytest
import torch
from _cuda import cuda_tools
from test_setup import build_info, clean_environment, needs_compiler, setup, tree  # noqa: F401

from fastres.kernels import cuda, extension

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
