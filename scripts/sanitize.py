#!/usr/bin/env python3
"""Compiles the kernels with a sanitizer, in a copy of the sources, and runs their tests.

    make test-sanitize [KIND=undefined | address] [ARGS="pytest arguments"]

Without KIND both at once.

Only undefined behaviour and memory errors of csrc/ are found: PyTorch itself is not instrumented.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Not the networks: their convolutions take minutes here and have no geometry that the others lack.
NETWORKS = ("test_convolution_nets.py", "test_convolution_threads.py")
TESTS = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("test_kernels_cpu*.py", "test_conv*.py", "test_program.py")
    for path in (ROOT / "tests").glob(pattern)
    if path.name not in NETWORKS
)
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",  # Python and PyTorch leak at exit
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
}
CHECK = """
from fastres.kernels import extension
print(extension.load_error() or f"kernels loaded: {extension.isa()}", flush=True)
raise SystemExit(not extension.available())
"""


def copy_sources(target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    built = shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__")
    for name in ("csrc", "fastres", "tests"):
        shutil.copytree(ROOT / name, target / name, ignore=built)
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, target / name)


def avx512() -> bool:
    """Whether the processor has it, or may have it: what it cannot run need not be compiled."""
    found = Path("/proc/cpuinfo")
    return not found.exists() or "avx512f" in found.read_text()


def preload(compiler: str) -> str:
    """The libraries that must come before all others; libstdc++ too, so that exceptions are intercepted."""
    names = ("libasan.so", "libstdc++.so")
    found = [
        subprocess.run([compiler, f"-print-file-name={n}"], capture_output=True, text=True).stdout.strip()
        for n in names
    ]
    if not os.path.isabs(found[0]):
        sys.exit(f"sanitize: {compiler} has no libasan")
    return " ".join(found)


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in ("undefined", "address", "address,undefined"):
        sys.exit(__doc__)
    kind, arguments = sys.argv[1], sys.argv[2:]
    target = ROOT / "build" / f"sanitize-{kind}"
    copy_sources(target)
    environment = os.environ | {"FASTRES_SANITIZE": kind}
    if not avx512():
        environment["CXXFLAGS"] = f"{os.environ.get('CXXFLAGS', '')} -DFASTRES_AVX512=0"
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    built = subprocess.run(build, cwd=target, env=environment, capture_output=True, text=True)
    if built.returncode or not any(target.glob("fastres/_C*")):
        sys.exit(f"{built.stdout}{built.stderr}\nsanitize: the kernels do not compile")
    environment |= OPTIONS
    if "address" in kind:
        environment["LD_PRELOAD"] = preload(os.environ.get("CXX", "g++"))
    for command in (["-c", CHECK], ["-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", *(arguments or TESTS)]):
        done = subprocess.run([sys.executable, *command], cwd=target, env=environment)
        if done.returncode:
            sys.exit(done.returncode if done.returncode > 0 else 1)


if __name__ == "__main__":
    main()
