"""Compiles csrc/cuda without a GPU: by nvcc for GPUs that are not there, or by g++ for the CPU (tests/cuda_on_cpu)."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc" / "cuda"
ON_CPU = ROOT / "tests" / "cuda_on_cpu"

# -O0: with -O1 the first takes four times as long to compile.
SANITIZERS = {
    "none": ["-O1"],
    "memory": ["-O0", "-fsanitize=address,undefined"],
    "threads": ["-O1", "-fsanitize=thread"],
}
# Kernels read 16 bytes of what are floats to C++; and what they round must not depend on the processor.
_ON_CPU_FLAGS = ["-std=c++20", "-fno-strict-aliasing", "-ffp-contract=off", "-fPIC", "-Wno-unknown-pragmas"]


def toolkit() -> Path | None:
    """The folder of the CUDA toolkit that has nvcc and the headers, or None."""
    nvcc = shutil.which("nvcc")
    found = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    found += [str(Path(os.path.realpath(nvcc)).parents[1])] if nvcc else []
    for place in filter(None, found):
        if Path(place, "bin", "nvcc").is_file() and Path(place, "include", "cuda_runtime.h").is_file():
            return Path(place)
    return None


def kernels(root: Path = SOURCES) -> list[Path]:
    return sorted(root.glob("*.cu"))


def run(command: list[str]) -> str:
    """Runs a compiler and returns its messages.

    Raises:
        RuntimeError: with them, if it fails.
    """
    done = subprocess.run(command, capture_output=True, text=True)
    output = done.stdout + done.stderr
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{output}")
    return output


def on_cpu_command(sanitizer: str, *extra: str) -> list[str]:
    """The compiler and its flags for a source that runs on the CPU."""
    home = toolkit()
    if home is None:
        raise RuntimeError("there is no CUDA toolkit")
    flags = SANITIZERS[sanitizer]
    if sanitizer != "none":
        flags = [*flags, "-g", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"]
    header = ["-isystem", str(home / "include"), "-include", str(ON_CPU / "cuda_on_cpu.h")]
    return [os.environ.get("CXX", "g++"), *_ON_CPU_FLAGS, *flags, *header, *extra]


def build(name: str, command: list[str], sources: list[Path], link: list[str]) -> Path:
    """build/cuda/NAME, linked from `sources`; compiled again only if they, their headers or the commands changed."""
    target = ROOT / "build" / "cuda" / name
    seen = hashlib.sha256(repr([command, link, [str(s) for s in sources]]).encode())
    folders = {path.parent for path in sources} | {SOURCES, ON_CPU, ROOT / "csrc"}
    for path in sorted(p for folder in folders for p in folder.iterdir() if p.is_file()):
        seen.update(path.name.encode() + path.read_bytes())
    stamp = target.with_name(f"{target.name}.stamp")
    if target.is_file() and stamp.is_file() and stamp.read_text() == seen.hexdigest():
        return target
    objects = target.with_name(f"{target.name}.objects")
    objects.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> str:
        out = str(objects / f"{source.stem}.o")
        run([*command, "-x", "c++", "-c", str(source), "-o", out])
        return out

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(compile_one, sources))
    sanitize = [flag for flag in command if flag.startswith("-fsanitize")]
    run([command[0], *sanitize, *found, "-o", str(target), *link])
    stamp.write_text(seen.hexdigest())
    return target
