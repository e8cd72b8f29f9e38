#!/usr/bin/env python3
"""What nvcc made of the CUDA kernels for each GPU architecture, without a GPU: `make cuda-report`.

Compiles and links fastres._cuda as an installation would, into build/cuda/lib, and disassembles it. The table says for
every kernel: registers of a thread, bytes of its stack, shared memory, and how many accesses to global memory take 16
bytes. Faults, which fail the report, stand below their row: anything on the stack or spilled, more registers than leave
room for two blocks on a multiprocessor, activations accessed less than 16 bytes at a time in a kernel of wide accesses.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from cuda_tools import ROOT, run, toolkit

#: Registers that a thread may use: 128 leave room for two blocks of 256 threads on a multiprocessor.
CEILINGS = {
    "statistics_kernel": 96,
    "apply_kernel": 128,
    "backward_reduce_kernel": 128,
    "backward_apply_kernel": 128,
    "persistent_kernel": 128,
    "persistent_backward_kernel": 128,
    "join_kernel": 128,
    "join_backward_reduce_kernel": 128,
    "join_backward_apply_kernel": 128,
    "elementwise_kernel": 64,
    "maxpool_kernel": 128,
    "maxpool_backward_reduce_kernel": 128,
    "maxpool_backward_apply_kernel": 128,
    "update_running_stats_kernel": 40,
}
NARROW_CEILING = 72
#: Accesses of a wide kernel to activations, in loops unrolled as they are: loads, stores; fp32 needs two for 8 values.
WIDE = {
    "statistics_kernel": (4, 0),
    "apply_kernel": (4, 2),
    "backward_reduce_kernel": (4, 2),
    "backward_apply_kernel": (4, 2),
    "persistent_kernel": (6, 2),
    "persistent_backward_kernel": (4, 3),
    "join_kernel": (4, 2),
    "join_backward_reduce_kernel": (6, 0),
    "join_backward_apply_kernel": (3, 2),
    "elementwise_kernel": (4, 2),
    "maxpool_kernel": (3, 1),
    "maxpool_backward_reduce_kernel": (2, 0),
    "maxpool_backward_apply_kernel": (2, 1),
}
_NAME = re.compile(
    r"\d+([a-z_]+_kernel)(?:I(f|6__half|13__nv_bfloat16)(?:Lb([01])E)?(?:Li(\d+)E)?(?:NS\d_\d([A-Z]\w+?)E)?)?"
)
_DTYPES = {"f": "fp32", "6__half": "fp16", "13__nv_bfloat16": "bf16", None: ""}


@dataclass
class Code:
    """One kernel for one architecture."""

    architecture: str
    name: str
    dtype: str
    channels_last: bool | None
    width: int
    variant: str  # another template argument
    registers: int = 0
    stack: int = 0
    shared: int = 0
    spills: int = 0  # instructions that access local memory
    loads: int = 0  # of 16 bytes; one of 32 counts twice
    stores: int = 0

    def faults(self) -> Iterator[str]:
        if self.stack or self.spills:
            yield f"{self.stack} bytes of stack, {self.spills} accesses to local memory"
        ceiling = CEILINGS[self.name] if self.width > 1 else min(CEILINGS[self.name], NARROW_CEILING)
        if self.registers > ceiling:
            yield f"{self.registers} registers, more than {ceiling}"
        if self.width > 1:
            words = 2 if self.dtype == "fp32" else 1
            loads, stores = (words * count for count in WIDE[self.name])
            if self.loads < loads or self.stores < stores:
                yield f"{self.loads} loads and {self.stores} stores of 16 bytes, not {loads} and {stores}"

    def __str__(self) -> str:
        layout = {None: "", True: "NHWC", False: "NCHW"}[self.channels_last]
        form = f"{self.dtype} {layout} {self.width if self.width > 1 else ''} {self.variant}"
        return (
            f"{self.architecture:8}{self.name:32}{form:20}{self.registers:5}{self.stack:6}{self.shared:7}"
            f"{self.loads:5}{self.stores:5}"
        )


def tool(name: str) -> str:
    """cuobjdump or nvdisasm: of the toolkit, or those that Triton brings."""
    places = [str((toolkit() or Path()) / "bin")]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin:
        places.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    found = shutil.which(name, path=os.pathsep.join([*places, os.environ.get("PATH", "")]))
    if found is None:
        raise RuntimeError(f"{name} is neither in the CUDA toolkit nor in Triton")
    return found


def named(mangled: str, architecture: str) -> Code:
    found = _NAME.search(mangled)
    if found is None or found[1] not in CEILINGS:
        raise RuntimeError(f"the kernel {mangled} is not known to this report")
    name, dtype, layout, width, variant = found.groups()
    return Code(architecture, name, _DTYPES[dtype], layout and layout == "1", int(width or 1), variant or "")


def examine(cubin: Path) -> list[Code]:
    """Every kernel of a cubin."""
    codes = {}
    usage = run([tool("cuobjdump"), "-res-usage", str(cubin)])
    architecture = re.search(r"arch = (sm_\w+)", usage) or re.search(r"(sm_\w+)", f"{usage} {cubin.name}")
    where = architecture[1] if architecture else "?"
    for mangled, resources in re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", usage):
        code = named(mangled, where)
        numbers = {key: int(value) for key, value in re.findall(r"(\w+)(?:\[0\])?:(\d+)", resources)}
        code.registers, code.stack, code.shared = numbers["REG"], numbers["STACK"], numbers["SHARED"]
        codes[mangled] = code
    parts = re.split(r"^\s*\.section\s+\.text\.(\S+?),", run([tool("nvdisasm"), "-c", str(cubin)]), flags=re.M)
    for mangled, text in zip(parts[1::2], parts[2::2], strict=True):
        code = codes[mangled]
        code.spills = len(re.findall(r"\b(?:LDL|STL)\b", text))
        for kind in ("LDG", "STG"):
            wide = len(re.findall(rf"\b{kind}\.E[.\w]*\.128\b", text))
            wide += 2 * len(re.findall(rf"\b{kind}\.E[.\w]*\.256\b", text))
            setattr(code, "loads" if kind == "LDG" else "stores", wide)
    return list(codes.values())


def build(architectures: str | None) -> Path:
    """fastres._cuda as an installation compiles and links it, without the kernels for CPUs."""
    environment = os.environ | {"FASTRES_BUILD_EXT": "0", "FASTRES_CUDA": "1"}
    if architectures is not None:  # not by the caller's environment: scripts/dev.py would build the installation anew
        environment["FASTRES_CUDA_ARCHS"] = architectures
    place = ROOT / "build" / "cuda" / "lib"
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(place)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stderr[-4000:]}\ncuda-report: fastres._cuda does not compile")
    return place / "fastres" / "_cuda.abi3.so"


def cubins(binary: Path, folder: Path) -> list[Path]:
    """The machine code in a binary, one file for each source and architecture."""
    subprocess.run([tool("cuobjdump"), "-xelf", "all", str(binary)], cwd=folder, check=True, capture_output=True)
    return sorted(folder.glob("*.cubin"))


def report(binary: Path) -> int:
    """Prints the table, and returns the number of faults."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        found = [code for codes in pool.map(examine, cubins(binary, Path(folder))) for code in codes]
    failed = 0
    print("target  kernel                          form                 regs stack shared  loads, stores of 16 bytes")
    for code in sorted(found, key=str):
        print(code)
        for fault in code.faults():
            print(f"        FAULT: {fault}")
            failed += 1
    architectures = sorted({code.architecture for code in found})
    missing = {code.name for code in found} ^ set(CEILINGS)
    if missing:
        print(f"FAULT: {', '.join(sorted(missing))}: not in the binary")
    print(f"{len(found)} kernels for {', '.join(architectures)}: {failed} faults")
    return failed + len(missing)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", type=Path, help="of fastres._cuda, instead of compiling it")
    parser.add_argument("--architectures", metavar="LIST", help='such as "80 90a" (default: as an installation)')
    chosen = parser.parse_args()
    start = time.monotonic()
    if toolkit() is None:
        sys.exit("cuda-report: there is no CUDA toolkit")
    binary = chosen.binary or build(chosen.architectures)
    print(f"compiled and linked in {time.monotonic() - start:.0f} s, {binary.stat().st_size >> 10} KB", flush=True)
    sys.exit(report(binary) > 0)


if __name__ == "__main__":
    main()
