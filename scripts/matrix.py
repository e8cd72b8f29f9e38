#!/usr/bin/env python3
"""Builds the wheel once and runs the tests on it with the oldest, the default and the newest supported PyTorch.

    make test-matrix [ARGS="pytest arguments"] [PYTHON=python3.12]

Each PyTorch gets an environment under .venv-matrix, kept for the next time; where pip serves only CUDA builds, count on
7 GB for each. The tests run in a copy without fastres/, so that it is the installed wheel that they test.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import dev

MATRIX = {"oldest": "torch==2.11.0", "default": dev.TORCH, "newest": "torch<2.15"}
HOME = dev.ROOT / ".venv-matrix"
COPIED = ("tests", "benchmarks", "csrc", "docs", "scripts", "pyproject.toml", "README.md")
IGNORED = ("tests/test_setup.py",)  # tests the checkout, whichever the PyTorch


def environment(name: str) -> str:
    """The interpreter of an environment with that PyTorch, made if need be."""
    place = HOME / f"{name}-py{sys.version_info.major}.{sys.version_info.minor}"
    python = str(place / "bin" / "python")
    if not dev.package_version(python, "torch"):
        dev.create_venv(place)
        if not dev.pip(python, MATRIX[name], "numpy", what=f"{MATRIX[name]} in {place.relative_to(dev.ROOT)}"):
            dev.fail(f"could not install {MATRIX[name]}")
    return python


def build_wheel(python: str) -> Path:
    """The wheel, built against the headers of the PyTorch in that environment."""
    for old in (*dev.ROOT.glob("build/lib*"), *dev.ROOT.glob("build/bdist*"), HOME / "dist"):
        shutil.rmtree(old, ignore_errors=True)  # whatever lies there would get into the wheel
    dev.say("building the wheel")
    options = ["--quiet", "--no-deps", "--wheel-dir", HOME / "dist"]
    if dev.run(python, "-m", "pip", "wheel", *options, ".").returncode:
        dev.fail("the wheel does not build")
    return next((HOME / "dist").glob("*.whl"))


def install(python: str, wheel: Path) -> None:
    for arguments in (["--no-deps", "--force-reinstall", wheel], [f"{wheel}[test]"]):
        if not dev.pip(python, *arguments, what=Path(str(arguments[-1])).name):
            dev.fail(f"could not install {wheel.name}")
    dev.install_torchvision(python, ours=True)


def test(python: str, arguments: list[str]) -> int:
    """Runs the tests against the installed wheel; its exit status."""
    copy = Path(python).parents[1] / "checkout"
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    for name in filter(lambda name: (dev.ROOT / name).exists(), COPIED):
        place = dev.ROOT / name
        (shutil.copytree if place.is_dir() else shutil.copy)(place, copy / name)
    check = "from fastres.kernels import extension as e; print(e.load_error() or e.isa()); exit(not e.available())"
    for command in (["-c", check], ["-m", "pytest", "-q", *(f"--ignore={path}" for path in IGNORED), *arguments]):
        status = subprocess.run([python, *command], cwd=copy, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}).returncode
        if status:
            return status
    return 0


def main() -> None:
    pythons = {name: environment(name) for name in MATRIX}
    wheel = build_wheel(pythons["default"])
    lines, failed = [], False
    for name, python in pythons.items():
        start = time.monotonic()
        install(python, wheel)
        version = dev.package_version(python, "torch")
        dev.say(f"torch {version}")
        status = test(python, sys.argv[1:])
        failed |= status != 0
        outcome = f"FAILED (status {status})" if status else "passed"
        lines.append(f"{name:8} torch {version:14} {outcome} in {time.monotonic() - start:.0f} s")
    print("", *lines, sep="\n")
    sys.exit(failed)


if __name__ == "__main__":
    main()
