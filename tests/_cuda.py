"""The CUDA kernels without a GPU: compiled by g++ through tests/cuda_on_cpu/cuda_on_cpu.h, they serve CPU tensors."""

from __future__ import annotations

import functools
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import cuda_tools  # noqa: E402

import fastres  # noqa: E402
from fastres.kernels import cuda, table  # noqa: E402

#: Where tests of CUDA kernels run: on the GPU if there is one, else on the CPU.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

if DEVICE.type == "cuda" and cuda.unavailable():
    pytest.skip(f"the CUDA kernels cannot run: {cuda.unavailable()}", allow_module_level=True)
if DEVICE.type == "cpu" and cuda_tools.toolkit() is None:
    pytest.skip("there is no CUDA toolkit", allow_module_level=True)


@functools.cache
def load() -> None:
    """Registers torch.ops.fastres_cuda for CPU tensors."""
    torch_ = Path(torch.__file__).parent
    include = ["-isystem", str(torch_ / "include"), "-isystem", sysconfig.get_path("include")]
    include += ["-I", str(cuda_tools.ROOT / "csrc")]
    defines = ["-DTORCH_TARGET_VERSION=0x020b000000000000ULL", "-DPy_LIMITED_API=0x030a0000"]
    command = cuda_tools.on_cpu_command("none", *defines, *include)
    link = ["-shared", "-Wl,--no-as-needed", f"-L{torch_ / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    sources = [*cuda_tools.kernels(), *sorted(cuda_tools.SOURCES.glob("*.cpp"))]
    torch.ops.load_library(cuda_tools.build("on_cpu.so", command, sources, link))


@contextmanager
def cuda_kernels(*names: str) -> Iterator[None]:
    """In this context the kernels of these names ("cuda" if none is given) serve the ops, and no others; tensors are
    made on DEVICE."""
    names = names or ("cuda",)
    with pytest.MonkeyPatch.context() as patched, fastres.use_kernels(*names), DEVICE:
        if DEVICE.type == "cpu":
            load()
            for (op, device_type), row in [*table.TABLE.items()]:
                if device_type == "cuda":
                    served = [k for k in row if k.name in names]
                    patched.setitem(table.TABLE, (op, "cpu"), [_available(k) for k in served])
        yield


def _available(kernel: table.Kernel) -> table.Kernel:
    return table.Kernel(kernel.name, kernel.run, lambda: None, kernel.why_not)
