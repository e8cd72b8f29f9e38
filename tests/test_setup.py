"""Installation, compiled or pure Python with the reason kept."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
COMPILER = next(filter(shutil.which, ("c++", "g++", "clang++")), None)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")

# A whole extension in one short file: the real one takes half a minute.
MODULE = """
#include <Python.h>
#include <torch/csrc/stable/library.h>
static std::string isa() { return "tiny"; }
STABLE_TORCH_LIBRARY(fastres_cpu, m) { m.def("isa() -> str"); }
STABLE_TORCH_LIBRARY_IMPL(fastres_cpu, CompositeExplicitAutograd, m) { m.impl("isa", TORCH_BOX(&isa)); }
extern "C" PyObject* PyInit__C(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1};
  return PyModule_Create(&definition);
}
"""


def clean_environment(**variables):
    """This process's environment without what changes a build or a load."""
    ours = re.compile(r"FASTRES_|CXX|LDFLAGS$|TORCH$|LD_PRELOAD$|MAKE|PYTHON$|PYTHONPATH$")
    return {k: v for k, v in os.environ.items() if not ours.match(k)} | variables


@pytest.fixture
def tree(tmp_path):
    """A checkout with the short extension instead of csrc/cpu."""
    root = tmp_path / "check out"
    built = shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__")
    shutil.copytree(ROOT / "fastres", root / "fastres", ignore=built)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "fastres_pytest.py"):
        shutil.copy(ROOT / name, root)
    (root / "README.md").write_text("# fastres\n")
    (root / "csrc" / "cpu").mkdir(parents=True)
    (root / "csrc" / "cpu" / "module.cpp").write_text(MODULE)
    (root / "csrc" / "cpu" / "module.h").write_text("// in the source distribution\n")
    return root


def setup(tree, *command, **variables):
    """Runs setup.py, which must succeed, and returns what it printed."""
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", *command],
        cwd=tree,
        env=clean_environment(**variables),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def evaluate(tree, expression, **variables):
    """The value of an expression of fastres.kernels.extension in a process that imports fastres from `tree`."""
    code = f"import json; from fastres.kernels import extension; print(json.dumps({expression}))"
    env = clean_environment(PYTHONPATH=str(tree), **variables)
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def build_info(directory):
    return json.loads((directory / "fastres" / "_build_info.json").read_text())


@needs_compiler
def test_compiles_in_place(tree):
    setup(tree, "build_ext", "--inplace")
    assert [p.name for p in tree.glob("fastres/_C*")] == ["_C.abi3.so"]
    info = build_info(tree)
    assert info["compiled"] and info["error"] is None and info["torch"] == torch.__version__ and info["compiler"]
    assert "-std=c++20" in info["flags"] and str(tree) not in json.dumps(info)
    assert evaluate(tree, "[extension.available(), extension.load_error(), extension.isa()]") == [True, None, "tiny"]


@needs_compiler
def test_wheel(tree):
    setup(tree, "bdist_wheel")
    (wheel,) = (tree / "dist").glob("*.whl")
    assert re.fullmatch(r"fastres-[\d.]+-cp310-abi3-\w+\.whl", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    own = {"fastres/_C.abi3.so", "fastres/_build_info.json", "fastres/py.typed", "fastres/cli.py", "fastres_pytest.py"}
    assert own <= set(names)
    assert not [name for name in names if name.startswith(("tests", "csrc", "scripts", "benchmarks"))]
    entry_points = zipfile.ZipFile(wheel).read(next(name for name in names if name.endswith("entry_points.txt")))
    assert b"fastres = fastres.cli:main" in entry_points and b"fastres_pytest = fastres_pytest" in entry_points


def test_pure_wheel(tree):
    """For every platform, with the reason in it."""
    setup(tree, "bdist_wheel", FASTRES_BUILD_EXT="0")
    (wheel,) = (tree / "dist").glob("*.whl")
    assert re.fullmatch(r"fastres-[\d.]+-py3-none-any\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert not [name for name in names if name.endswith(".so") or ".data/" in name]
        assert (
            json.loads(archive.read("fastres/_build_info.json"))["error"]
            == "fastres was built with FASTRES_BUILD_EXT=0"
        )
    assert {"fastres/py.typed", "fastres/cli.py"} <= set(names)


def test_source_distribution_can_be_compiled(tree):
    setup(tree, "sdist", "--formats=zip")
    (archive,) = (tree / "dist").glob("*.zip")
    names = {name.split("/", 1)[1] for name in zipfile.ZipFile(archive).namelist()}
    assert {"setup.py", "pyproject.toml", "csrc/cpu/module.cpp", "csrc/cpu/module.h"} <= names


@needs_compiler
def test_sanitizer_and_own_flags(tree):
    setup(tree, "build_ext", "--inplace", FASTRES_SANITIZE="undefined", CXXFLAGS="-DMINE='1 2'")
    flags = build_info(tree)["flags"]
    assert "-fsanitize=undefined" in flags and "-fno-sanitize-recover=all" in flags and "MINE" in flags
    assert evaluate(tree, "extension.isa()") == "tiny"


def old_torch(tree):
    (tree / "old").mkdir()
    (tree / "old" / "version.py").write_text("__version__ = '2.10.1'\n")


def broken_source(tree):
    (tree / "csrc" / "cpu" / "broken.cpp").write_text("int f() { return nothing_of_this_name; }\n")


def missing_symbol(tree):
    (tree / "csrc" / "cpu" / "broken.cpp").write_text("int g();\nint f() { return g(); }\n")


# name: variables, what to change in the tree, what the reason must say
PURE_PYTHON = {
    "asked for": ({"FASTRES_BUILD_EXT": "0"}, None, "FASTRES_BUILD_EXT=0"),
    "no compiler": ({"CXX": "no-such-compiler -x"}, None, "CXX=no-such-compiler was not found"),
    "no torch": ({"FASTRES_TORCH_DIR": "nowhere"}, None, "PyTorch was not found in FASTRES_TORCH_DIR=nowhere"),
    "old torch": ({"FASTRES_TORCH_DIR": "old"}, old_torch, "PyTorch 2.10.1 was installed; 2.11 or newer is needed"),
}
FAILED_BUILD = {
    "does not compile": ({}, broken_source, "nothing_of_this_name"),
    "does not link": ({"LDFLAGS": "-Wl,--no-undefined"}, missing_symbol, "undefined reference"),
}


@pytest.mark.parametrize("case", [*PURE_PYTHON, *(pytest.param(name, marks=needs_compiler) for name in FAILED_BUILD)])
def test_pure_python_installation_keeps_the_reason(tree, case):
    variables, change, reason = (PURE_PYTHON | FAILED_BUILD)[case]
    if change:
        change(tree)
    output = setup(tree, "build", "--build-lib", "out", **variables)
    assert not list((tree / "out").glob("fastres/_C*")) and (tree / "out" / "fastres" / "fuse.py").is_file()
    info = build_info(tree / "out")
    assert not info["compiled"] and reason in info["error"] and "\n" not in info["error"]
    assert f"pure Python installation: {info['error']}" in output
    error, available = evaluate(tree / "out", "[extension.load_error(), extension.available()]")
    assert reason in error and not available


def test_failed_build_leaves_no_binary_of_other_sources(tree):
    (tree / "fastres" / "_C.abi3.so").write_bytes(b"of yesterday")
    setup(tree, "build_ext", "--inplace", CXX="no-such-compiler")
    assert not list(tree.glob("fastres/_C*"))
    assert "no-such-compiler" in evaluate(tree, "extension.load_error()")


def test_binary_that_does_not_load(tree):
    (tree / "fastres" / "_C.abi3.so").write_bytes(b"not a library")
    error, info = evaluate(tree, "[extension.load_error(), extension.build_info()]")
    assert error.startswith("fastres._C does not load: ImportError") and info == {}


def test_never_built(tree):
    assert "pip install -e ." in evaluate(tree, "extension.load_error()")


def test_no_ext_variable(tree):
    expression = "[extension.available(), extension.load_error(), extension.error]"
    reason = "FASTRES_NO_EXT=1 leaves the compiled kernels out"
    assert evaluate(ROOT, expression, FASTRES_NO_EXT="1") == [False, reason, reason]


def test_isa_without_kernels_raises_the_reason(monkeypatch):
    from fastres.kernels import extension

    monkeypatch.setattr(extension, "error", "no kernels here")
    with pytest.raises(RuntimeError, match="no kernels here"):
        extension.isa()
