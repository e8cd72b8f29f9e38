"""Installation, compiled or pure Python with the reason kept; what scripts/dev.py decides to do; how .ci/run counts."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

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


# ---------------------------------------------------------------------------------------------------- scripts/dev.py


@pytest.fixture
def dev(tmp_path, monkeypatch):
    """scripts/dev.py over an empty checkout, in an inactive environment; what it would install is collected."""
    spec = importlib.util.spec_from_file_location("dev", ROOT / "scripts" / "dev.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    root = tmp_path / "checkout"
    (root / "csrc").mkdir(parents=True)
    (root / "fastres").mkdir()
    for name in ("csrc/a.cpp", "setup.py", "pyproject.toml"):
        (root / name).write_text(name)
    monkeypatch.setattr(module, "ROOT", root)
    monkeypatch.setattr(module, "VENV", root / ".venv")
    for name in ("TORCH", "CONDA_PREFIX", *module.BUILD_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module, "installed", [], raising=False)
    monkeypatch.setattr(module, "pip", lambda python, *a, what, quiet=True: module.installed.append(what) or True)
    return module


def use(dev, monkeypatch, *, active, here="", venv=""):
    """Pretends an active environment or none, and the versions of torch here and in .venv after installation."""
    monkeypatch.setattr(dev.sys, "prefix", "env" if active else dev.sys.base_prefix)
    monkeypatch.setattr(dev, "package_version", lambda python, name: here if python == sys.executable else venv)
    made = SimpleNamespace(inherit=None)

    def create_venv(place, inherit=False):
        place.mkdir()
        made.inherit = inherit

    monkeypatch.setattr(dev, "create_venv", create_venv)
    return made


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cpu", "2.14.1+cu130"])
def test_active_environment_is_used_as_it_is(dev, monkeypatch, version):
    made = use(dev, monkeypatch, active=True, here=version)
    assert dev.environment() == sys.executable
    assert made.inherit is None and dev.installed == []


@pytest.mark.parametrize("version", ["", "2.10.0", "2.15.0", "1.13.1"])
def test_active_environment_without_a_supported_torch_is_left_alone(dev, monkeypatch, version):
    made = use(dev, monkeypatch, active=True, here=version, venv="2.13.0")
    assert dev.environment() == str(dev.VENV / "bin" / "python") and made.inherit is False


def test_torch_of_the_base_python_is_reused(dev, monkeypatch):
    made = use(dev, monkeypatch, active=False, here="2.12.0", venv="2.12.0")
    assert dev.environment().startswith(str(dev.VENV)) and made.inherit is True and dev.installed == []


def test_torch_variable_chooses_what_is_installed_once(dev, monkeypatch):
    made = use(dev, monkeypatch, active=True, here="2.13.0", venv="2.11.0")
    monkeypatch.setenv("TORCH", "torch==2.11.0")
    for _ in range(2):
        assert dev.environment().startswith(str(dev.VENV))
        (dev.VENV / "bin").mkdir(exist_ok=True)
        (dev.VENV / "bin" / "python").touch()
    assert made.inherit is False and len(dev.installed) == 1 and "torch==2.11.0" in dev.installed[0]


def test_unsupported_torch_variable_is_refused(dev, monkeypatch):
    use(dev, monkeypatch, active=False, venv="2.15.0")
    monkeypatch.setenv("TORCH", "torch")
    with pytest.raises(SystemExit, match=r"TORCH=torch gave torch 2\.15\.0; fastres needs 2\.11 to 2\.14"):
        dev.environment()


def test_old_python_is_refused_in_one_line(dev, monkeypatch):
    monkeypatch.setattr(dev.sys, "version_info", (3, 9, 1))
    with pytest.raises(SystemExit, match=r"Python 3\.10 or newer is needed") as info:
        dev.main()
    assert "\n" not in str(info.value)


def finish_build(dev, prefix, **info):
    (dev.ROOT / "fastres" / "_build_info.json").write_text(json.dumps({"compiled": True, "error": None} | info))
    if info.get("compiled", True):
        (dev.ROOT / "fastres" / "_C.abi3.so").touch()
    for stamp in dev.build_stamps(prefix):
        stamp.write()


def changed(path, text="changed"):
    return lambda dev, prefix, monkeypatch: (dev.ROOT / path).write_text(text)


REBUILD = {
    "source changed": changed("csrc/a.cpp"),
    "source added": changed("csrc/b.h"),
    "setup.py changed": changed("setup.py"),
    "pyproject.toml changed": changed("pyproject.toml"),
    "compiler changed": lambda dev, prefix, monkeypatch: monkeypatch.setenv("CXX", "clang++"),
    "binary deleted": lambda dev, prefix, monkeypatch: (dev.ROOT / "fastres" / "_C.abi3.so").unlink(),
    "checkout cleaned": lambda dev, prefix, monkeypatch: shutil.rmtree(dev.ROOT / "build"),
    "environment made anew": lambda dev, prefix, monkeypatch: (prefix / ".fastres-build").unlink(),
    "environment of another checkout": lambda dev, prefix, monkeypatch: monkeypatch.setattr(
        dev, "ROOT", dev.ROOT.rename(dev.ROOT.with_name("moved"))
    ),
}


@pytest.mark.parametrize("change", REBUILD)
def test_builds_again_only_when_something_changed(dev, tmp_path, monkeypatch, change):
    prefix = tmp_path / "prefix"
    assert not dev.up_to_date(dev.build_stamps(prefix))
    finish_build(dev, prefix)
    (dev.ROOT / "fastres" / "fuse.py").write_text("Python needs no build")
    assert dev.up_to_date(dev.build_stamps(prefix))
    REBUILD[change](dev, prefix, monkeypatch)
    assert not dev.up_to_date(dev.build_stamps(prefix))


def test_failed_build_is_tried_again(dev, tmp_path, monkeypatch):
    finish_build(dev, tmp_path, compiled=False, error="no compiler")
    assert not dev.up_to_date(dev.build_stamps(tmp_path))
    monkeypatch.setenv("FASTRES_BUILD_EXT", "0")
    finish_build(dev, tmp_path, compiled=False, error="asked for")
    assert dev.up_to_date(dev.build_stamps(tmp_path))


LISTED = [
    "torch<2.15,>=2.11",
    "numpy",
    'rich; extra == "bench"',
    'onnx; extra == "peers"',
    "pytest>=8; extra == 'test'",
]


def test_extra_installs_what_it_names(dev, monkeypatch):
    monkeypatch.setattr(dev, "ask", lambda python, code: "\n".join(LISTED))
    assert dev.install_extra("python", "test") and dev.installed == ["pytest>=8"]


@pytest.mark.parametrize("there", [True, False])
def test_triton_that_came_with_torch_stays(dev, monkeypatch, there):
    listed = "\n".join([*LISTED, 'triton; extra == "test"'])
    monkeypatch.setattr(dev, "ask", lambda python, code: listed if "requires" in code else "ModuleSpec" * there)
    assert dev.install_extra("python", "test")
    assert dev.installed == ["pytest>=8" if there else "pytest>=8, triton"]


def test_old_triton_is_installed_once_and_for_its_python(dev, monkeypatch):
    asked = []
    monkeypatch.setattr(dev, "ask", lambda python, code: python)
    monkeypatch.setattr(dev, "pip", lambda python, *a, what, quiet=True: asked.append((python, what)) or True)
    places = {dev.install_old_triton(python) for python in ("one", "one", "other")}
    assert places == {dev.ROOT / "build" / "triton"}
    assert asked == [("one", "triton==3.6.0 numpy>=2,<2.4"), ("other", "triton==3.6.0 numpy>=2,<2.4")]


def test_missing_peer_is_left_out_and_said(dev, monkeypatch, capsys):
    monkeypatch.setattr(dev, "ask", lambda python, code: "\n".join([*LISTED, 'openvino; extra == "peers"']))
    monkeypatch.setattr(dev, "pip", lambda python, *a, what, quiet=True: what != "openvino")
    assert not dev.install_extra("python", "peers")
    assert "going on without openvino" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="'bench'"):
        monkeypatch.setattr(dev, "pip", lambda python, *a, what, quiet=True: False)
        dev.install_extra("python", "bench")


@pytest.mark.parametrize(
    ("installed", "ours", "wanted"),
    [("", True, 1), ("", False, 1), ("0.28.1", True, 0), ("0.26.0", True, 1), ("0.26.0", False, 0)],
)
def test_torchvision_pairs_with_torch(dev, monkeypatch, installed, ours, wanted):
    monkeypatch.setattr(dev, "package_version", lambda python, name: "2.13.0" if name == "torch" else installed)
    dev.install_torchvision("python", ours)
    assert len(dev.installed) == wanted and all("0.28." in what for what in dev.installed)


def test_every_command_has_its_extras(dev):
    pyproject = (ROOT / "pyproject.toml").read_text()
    for name, extras in dev.EXTRAS.items():
        assert dev.commands(name, sys.executable, ["x"])
        for extra in extras:
            assert re.search(rf"^{extra} = \[", pyproject, re.MULTILINE), extra


def test_hooks_use_the_versions_of_the_extra_lint():
    hooks, pyproject = (ROOT / ".pre-commit-config.yaml").read_text(), (ROOT / "pyproject.toml").read_text()
    for tool in ("ruff", "clang-format"):
        (version,) = set(re.findall(rf"\[{tool}==([\d.]+)\]", hooks))
        assert f'"{tool}=={version}"' in pyproject


# -------------------------------------------------------------------------------------------------------- .ci/run


@pytest.mark.parametrize("status", [0, 1, 5])
def test_ci_counts_every_failing_leg(tmp_path, status):
    """5 is pytest's status when it found no test."""
    for name in ("make", "python"):
        (tmp_path / name).write_text(f"#!/bin/sh\nexit {status}\n")
        (tmp_path / name).chmod(0o755)
    env = clean_environment(PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}", PYTHON=str(tmp_path / "python"))
    done = subprocess.run(["bash", ROOT / ".ci" / "run"], env=env, capture_output=True, text=True)
    legs = done.stdout.count("\n=== ") // 2
    last = done.stdout.splitlines()[-1]
    assert legs >= 7 and done.returncode == (1 if status else 0)
    assert last == (f"legs: 0 passed, {legs} failed" if status else f"legs: {legs} passed, 0 failed")
