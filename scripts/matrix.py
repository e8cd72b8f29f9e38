#!/usr/bin/env python3
"""Builds the wheel once and runs the tests on it with the oldest, the default and the newest supported PyTorch.

    make test-matrix [ARGS="pytest arguments"] [PYTHON=python3.12]
    make wheels [ARGS="oldest default newest"]

Each PyTorch gets an environment under .venv-matrix, kept for the next time; where pip serves only CUDA builds, count on
7 GB for each. The tests run in a copy without fastres/, so that it is the installed wheel that they test.

`make wheels` (--wheels) is about what would be published: `python -m build` makes a source distribution, from that the
binary wheel, and a wheel without compiled kernels; their names and contents are checked, abi3audit looks at the
binary's symbols; then each wheel is installed, and scripts/smoke.py run, with the PyTorchs that are named (oldest and
default). They stay in .venv-matrix/dist.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import dev

MATRIX = {"oldest": "torch==2.11.0", "default": dev.TORCH, "newest": "torch<2.15"}
HOME = dev.ROOT / ".venv-matrix"
COPIED = ("tests", "benchmarks", "csrc", "docs", "scripts", "pyproject.toml", "README.md")
IGNORED = ("tests/test_setup.py", "tests/test_dev.py")  # tests the checkout, whichever the PyTorch


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


def packaging_tools() -> str:
    """The interpreter of an environment with what builds and checks wheels, and no PyTorch."""
    python = str(HOME / "tools" / "bin" / "python")
    if not dev.package_version(python, "abi3audit"):
        dev.create_venv(HOME / "tools")
        if not dev.pip(python, "build", "abi3audit", "twine", what="build, abi3audit, twine"):
            dev.fail("could not install them")
    return python


def build_all(tools: str, torch: str) -> dict[str, Path]:
    """Source distribution and wheels, as they would be published; torch: the package whose headers are used."""
    dist = HOME / "dist"
    for old in (*dev.ROOT.glob("build/lib*"), *dev.ROOT.glob("build/bdist*"), dist):
        shutil.rmtree(old, ignore_errors=True)
    for what, variables in (("binary", {"FASTRES_TORCH_DIR": torch}), ("pure", {"FASTRES_BUILD_EXT": "0"})):
        dev.say(f"building the {what} wheel")
        options = ["--outdir", dist] if what == "binary" else ["--wheel", "--outdir", dist]
        done = dev.run(tools, "-m", "build", *options, ".", env=os.environ | variables, capture_output=True, text=True)
        if done.returncode:
            dev.fail(f"it does not build:\n{(done.stdout + done.stderr)[-3000:]}")
    (source,) = dist.glob("fastres-*.tar.gz")
    (binary,) = dist.glob("fastres-*-cp310-abi3-*.whl")
    (pure,) = dist.glob("fastres-*-py3-none-any.whl")
    return {"source": source, "binary": binary, "pure": pure}


def check_contents(tools: str, built: dict[str, Path]) -> None:
    """Names, contents, description and, of the binary, that it keeps to the stable ABI of Python 3.10."""
    for kind in ("binary", "pure"):
        names = zipfile.ZipFile(built[kind]).namelist()
        libraries = [name for name in names if name.endswith(".so")]
        strangers = [name for name in names if not re.match(r"fastres(_pytest\.py|/|-[\d.]+\.dist-info/)", name)]
        if strangers or ("fastres/_C.abi3.so" in libraries) != (kind == "binary") or "fastres/py.typed" not in names:
            dev.fail(f"{built[kind].name} has {libraries or 'no libraries'}, and {strangers[:5]}")
        dev.say(f"{built[kind].name}: {len(names)} files, {built[kind].stat().st_size >> 10} KB")
    for command in (["twine", "check", "--strict", *built.values()], ["abi3audit", "--strict", built["binary"]]):
        if dev.run(tools, "-m", *command).returncode:
            dev.fail(f"{command[0]} has found something")


def check_wheels(names: list[str]) -> int:
    """Builds, checks, installs and tries the wheels; how many tries failed."""
    pythons = {name: environment(name) for name in names}
    where = "import importlib.util as u; print(*u.find_spec('torch').submodule_search_locations)"
    tools = packaging_tools()
    built = build_all(tools, dev.ask(next(iter(pythons.values())), where))
    check_contents(tools, built)
    failed = 0
    for name, python in pythons.items():
        for kind in ("binary", "pure"):
            if not dev.pip(python, "--force-reinstall", "--no-deps", built[kind], what=f"{built[kind].name}, {name}"):
                dev.fail("could not install it")
            checked = dev.run(python, "-m", "pip", "check", capture_output=True, text=True).stdout
            if wrong := [line for line in checked.splitlines() if line.startswith("fastres ")]:
                dev.fail("; ".join(wrong))  # numpy or a torch that fits is missing
            failed += dev.run(python, "-I", dev.ROOT / "scripts" / "smoke.py", kind).returncode != 0
    dev.say("passed" if not failed else f"{failed} FAILED")
    return failed


def main() -> None:
    if sys.argv[1:2] == ["--wheels"]:
        sys.exit(check_wheels(sys.argv[2:] or ["oldest", "default"]) != 0)
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
