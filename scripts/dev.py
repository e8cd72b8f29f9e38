#!/usr/bin/env python3
"""Sets up what is missing, then runs a command. The Makefile calls this; it needs nothing but Python.

    python3 scripts/dev.py test [pytest arguments]       the tests
    python3 scripts/dev.py bench [arguments]             fastres bench: whole networks, against other engines
    python3 scripts/dev.py bench-ops [pytest arguments]  benchmarks/: every op at the shapes of real layers
    python3 scripts/dev.py bench-cpu [arguments]         benchmarks/cpu.py: everything about the CPU
    python3 scripts/dev.py kernel-report [arguments]     what compilers make of the Triton kernels, for GPUs not here
    python3 scripts/dev.py test-triton [pytest arguments]  the tests of the Triton kernels with the oldest Triton
    python3 scripts/dev.py bench-gpu [arguments]         benchmarks/gpu.py: everything about a GPU
    python3 scripts/dev.py sweep [arguments]             scripts/sweep.py: every model of timm, torchvision and others
    python3 scripts/dev.py lint | format                 checks, or mends, style and types
    python3 scripts/dev.py python [arguments]            Python, in the environment of the tests

An active virtual or conda environment with a supported PyTorch is used as it is. Otherwise .venv is made here, and
PyTorch installed in it: torch==2.13.0, or what TORCH says (arguments for pip install; then always in .venv). fastres is
compiled and installed there as an editable package, again only after csrc/, setup.py or pyproject.toml changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
TORCH = "torch==2.13.0"
OLDEST, NEWEST = (2, 11), (2, 14)
EXTRAS = {
    "test": ["test", "timm"],
    "bench": ["bench", "peers"],
    "bench-ops": ["test"],
    "bench-cpu": ["bench", "peers", "ncnn"],
    "kernel-report": ["test"],
    "test-triton": ["test"],
    "bench-gpu": ["bench"],
    "sweep": ["test", "timm", "sweep"],
    "lint": ["lint"],
    "format": ["lint"],
    "python": ["test"],
}
# the oldest Triton that a supported PyTorch brings; its interpreter fails with newer NumPy
OLD_TRITON = ["triton==3.6.0", "numpy>=2,<2.4"]
OPTIONAL_EXTRAS = {"peers", "ncnn", "timm", "sweep"}  # what is not to be had here is left out
BESIDE_TORCH = {"timm", "segmentation-models-pytorch"}  # their dependencies might replace the PyTorch
BUILD_VARIABLES = ("CXX", "CXXFLAGS", "LDFLAGS", "FASTRES_BUILD_EXT", "FASTRES_SANITIZE", "FASTRES_TORCH_DIR")
BUILD_VARIABLES += ("FASTRES_CUDA", "FASTRES_CUDA_ARCHS")


def say(text: str) -> None:
    print(f"[dev] {text}", flush=True)


def fail(text: str) -> None:
    sys.exit(f"[dev] error: {text}")


def run(*command: object, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([str(part) for part in command], cwd=ROOT, check=False, **kwargs)


def pip(python: str, *arguments: object, what: str, quiet: bool = True) -> bool:
    """Runs pip install and says what for. False if it failed, after its own messages."""
    say(f"installing {what}")
    options = ["--disable-pip-version-check", *(["-qq"] if quiet else [])]
    return run(python, "-m", "pip", "install", *options, *arguments).returncode == 0


def ask(python: str, code: str) -> str:
    """What `code` prints in that interpreter, started outside the checkout; nothing if it fails or is not there."""
    if not os.path.exists(python):
        return ""
    done = subprocess.run([python, "-c", code], cwd=os.path.dirname(python), capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def package_version(python: str, package: str) -> str:
    """Version of an installed package without importing it; nothing if it is not there."""
    return ask(python, f"from importlib.metadata import version; print(version({package!r}))")


def minor(version: str) -> tuple[int, ...]:
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def supported(torch: str) -> bool:
    return OLDEST <= minor(torch) <= NEWEST


def environment() -> str:
    """The interpreter to use, in an environment that has a supported PyTorch."""
    asked = os.environ.get("TORCH", "").strip()
    active = sys.prefix != sys.base_prefix or os.environ.get("CONDA_PREFIX") == sys.prefix
    here = package_version(sys.executable, "torch")
    if active and not asked and supported(here):
        say(f"active environment {sys.prefix}: torch {here}")
        return sys.executable
    python = str(VENV / "bin" / "python")
    if not os.path.exists(python):
        create_venv(VENV, inherit=not active and not asked and supported(here))
    torch, pinned = package_version(python, "torch"), VENV / ".torch"
    if asked and not (supported(torch) and pinned.exists() and pinned.read_text() == asked) or not supported(torch):
        want = asked or TORCH
        quiet = not sys.stdout.isatty()  # may be gigabytes: let pip show its progress
        if not pip(python, *shlex.split(want), "numpy", what=f"{want} (TORCH=... chooses another)", quiet=quiet):
            fail(f"could not install {want}")
        pinned.write_text(want)
        torch = package_version(python, "torch")
        if not supported(torch):
            fail(f"TORCH={want} gave torch {torch or '(none)'}; fastres needs 2.11 to 2.14")
    say(f"environment .venv: torch {torch}")
    return python


def create_venv(place: Path, inherit: bool = False) -> None:
    """Makes a virtual environment; with `inherit` it sees the packages of the Python below, PyTorch among them."""
    say(f"making {place.relative_to(ROOT)}" + (" with the PyTorch of this Python" if inherit else ""))
    options = ["--system-site-packages"] if inherit else []
    done = run(sys.executable, "-m", "venv", "--clear", *options, place, capture_output=True, text=True)
    if done.returncode:
        shutil.rmtree(place, ignore_errors=True)  # half of one, without pip
        output = (done.stdout + done.stderr).strip()
        reason = output.splitlines()[-1] if output else f"exit status {done.returncode}"
        if "ensurepip" in output:
            reason = "its module ensurepip is missing (Debian and Ubuntu: apt install python3-venv)"
        fail(f"{sys.executable} cannot make a virtual environment: {reason}")


def digest(*patterns: str, variables: tuple[str, ...] = ()) -> str:
    """Hash of the checkout's files that match, names included, and of environment variables."""
    found = hashlib.sha256(repr([os.environ.get(name) for name in variables]).encode())
    for path in sorted(p for pattern in patterns for p in ROOT.glob(pattern) if p.is_file()):
        found.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


class Stamp:
    """Remembers in a file what was done last; `current` tells whether that is still what is wanted."""

    def __init__(self, path: Path, wanted: str):
        self.path, self.wanted = path, wanted

    def current(self) -> bool:
        return self.path.is_file() and self.path.read_text() == self.wanted

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(self.wanted)


def build_stamps(prefix: Path) -> list[Stamp]:
    """One for each place that a build writes to: the checkout gets the binary, the environment a link to it."""
    sources = digest("csrc/**/*", "setup.py", "pyproject.toml", variables=BUILD_VARIABLES)
    return [Stamp(ROOT / "build" / "stamp", sources), Stamp(prefix / ".fastres-build", f"{ROOT} {sources}")]


def build_info() -> dict:
    """What setup.py left about the last build in this checkout; empty if there was none."""
    path = ROOT / "fastres" / "_build_info.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def up_to_date(build: list[Stamp]) -> bool:
    """Whether the last build was of these sources. A failed one is not: a compiler may have been installed since."""
    compiled = build_info().get("compiled") and any(ROOT.glob("fastres/_C*"))
    return all(stamp.current() for stamp in build) and bool(compiled or os.environ.get("FASTRES_BUILD_EXT") == "0")


def install(python: str, extras: list[str]) -> None:
    """Builds and installs fastres and what the extras name, where that is not done yet."""
    prefix = Path(ask(python, "import sys; print(sys.prefix)"))
    build = build_stamps(prefix)
    if not up_to_date(build):
        if "FASTRES_CUDA" not in os.environ and not ask(python, "import torch; print(torch.version.cuda or '')"):
            os.environ["FASTRES_CUDA"] = "0"  # a minute for what this PyTorch could not load; cuda-report compiles it
        if not pip(python, "--editable", ".", what="fastres (compiling csrc/)"):
            fail("could not install fastres")
        for stamp in build:
            stamp.write()
    if build_info()["error"]:
        say(f"no compiled kernels: {build_info()['error']}")
    for extra in extras:
        stamp = Stamp(prefix / f".fastres-{extra}", digest("pyproject.toml"))
        if not stamp.current() and install_extra(python, extra):
            stamp.write()
    if "test" in extras:
        install_torchvision(python, ours=prefix == VENV)


def install_torchvision(python: str, ours: bool) -> None:
    """The torchvision that pairs with this PyTorch, without its dependencies: they might replace the PyTorch."""
    pair = f"0.{minor(package_version(python, 'torch'))[1] + 15}."
    installed = package_version(python, "torchvision")
    if installed.startswith(pair) or (installed and not ours):
        return
    if not pip(python, "--no-deps", f"torchvision=={pair}*", what=f"torchvision {pair}*, for the tests"):
        say("going on without torchvision: its tests will be skipped")


def install_extra(python: str, extra: str) -> bool:
    """Installs what an extra of pyproject.toml names, without building fastres again. False if something is missing."""
    listed = ask(python, "from importlib.metadata import requires; print(*requires('fastres'), sep='\\n')").splitlines()
    wanted = [line.split(";")[0].strip() for line in listed if re.search(rf"extra\s*==\s*['\"]{extra}['\"]", line)]
    has_triton = "import importlib.util as u; print(u.find_spec('triton') or '')"
    if "triton" in wanted and (sys.platform != "linux" or ask(python, has_triton)):
        wanted.remove("triton")  # there is none; or PyTorch brought one, as builds for GPUs do, some under another name
    if extra not in OPTIONAL_EXTRAS:
        if not pip(python, *wanted, what=", ".join(wanted)):
            fail(f"could not install the packages of the extra {extra!r}")
        return True
    alone = {name: ["--no-deps"] if name in BESIDE_TORCH else [] for name in wanted}
    missing = [name for name in wanted if not pip(python, *alone[name], name, what=name)]
    if missing:
        say(f"going on without {', '.join(missing)}")
    return not missing


def install_old_triton(python: str) -> Path:
    """A folder that, put on PYTHONPATH, hides the Triton and the NumPy of the environment behind old ones."""
    place = ROOT / "build" / "triton"
    stamp = Stamp(place / "stamp", " ".join([*OLD_TRITON, ask(python, "import sys; print(sys.version)")]))
    if not stamp.current():
        shutil.rmtree(place, ignore_errors=True)
        if not pip(python, "--no-deps", "--target", place, *OLD_TRITON, what=" ".join(OLD_TRITON)):
            fail("could not install the old Triton")
        stamp.write()
    return place


def commands(name: str, python: str, arguments: list[str]) -> list[list[str]]:
    """The command lines behind a name."""
    module = [python, "-m"]
    sources = sorted(
        str(p.relative_to(ROOT))
        for pattern in ("csrc/**/*", "tests/cuda_on_cpu/*")
        for p in ROOT.glob(pattern)
        if p.suffix in (".cpp", ".h", ".inl", ".cu", ".cuh")
    )
    triton_tests = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("tests/test_triton*.py"))
    clang_format = [os.path.join(os.path.dirname(python), "clang-format")]
    return {
        "test": [[*module, "pytest", *arguments]],
        "bench": [[*module, "fastres", "bench", *arguments]],
        "bench-ops": [[*module, "pytest", "benchmarks", *arguments]],
        "bench-cpu": [[python, "benchmarks/cpu.py", *arguments]],
        "kernel-report": [[python, "scripts/kernel_report.py", *arguments]],
        "test-triton": [[*module, "pytest", *(arguments or triton_tests)]],
        "bench-gpu": [[python, "benchmarks/gpu.py", *arguments]],
        "sweep": [[python, "scripts/sweep.py", *arguments]],
        "python": [[python, *arguments]],
        "lint": [
            [*module, "ruff", "check"],
            [*module, "ruff", "format", "--check"],
            [*clang_format, "--dry-run", "-Werror", *sources],
            [*module, "mypy"],
        ],
        "format": [[*module, "ruff", "check", "--fix"], [*module, "ruff", "format"], [*clang_format, "-i", *sources]],
    }[name]


def main() -> None:
    if sys.version_info < (3, 10):  # noqa: UP036
        here = f"{sys.executable} is {sys.version.split()[0]}"
        fail(f"Python 3.10 or newer is needed, {here} (make PYTHON=... chooses another)")
    if len(sys.argv) < 2 or sys.argv[1] not in EXTRAS:
        sys.exit(__doc__)
    name, arguments = sys.argv[1], sys.argv[2:]
    python = environment()
    install(python, EXTRAS[name])
    if name == "test-triton":
        os.environ["PYTHONPATH"] = os.pathsep.join(
            filter(None, [str(install_old_triton(python)), os.environ.get("PYTHONPATH")])
        )
    os.chdir(ROOT)
    steps = commands(name, python, arguments)
    if len(steps) == 1:
        os.execv(python, steps[0])
    results = []
    for command in steps:
        say(" ".join(Path(part).name if part == command[0] else part for part in command[:5]))
        results.append(run(*command).returncode)
    sys.exit(max(results, key=abs))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
