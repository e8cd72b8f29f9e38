"""What scripts/dev.py decides to do; how .ci/run counts."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]


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


def test_libraries_of_models_do_not_replace_torch(dev, monkeypatch):
    listed = 'timm; extra == "timm"\ntransformers; extra == "sweep"\nsegmentation-models-pytorch; extra == "sweep"'
    asked = []
    monkeypatch.setattr(dev, "ask", lambda python, code: listed)
    monkeypatch.setattr(dev, "pip", lambda python, *a, what, quiet=True: asked.append(a) or True)
    assert dev.install_extra("python", "timm") and dev.install_extra("python", "sweep")
    assert asked == [("--no-deps", "timm"), ("transformers",), ("--no-deps", "segmentation-models-pytorch")]


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


@pytest.mark.parametrize("status", [0, 1, 5])
def test_ci_counts_every_failing_leg(tmp_path, status):
    """5 is pytest's status when it found no test."""
    for name in ("make", "python"):
        (tmp_path / name).write_text(f"#!/bin/sh\nexit {status}\n")
        (tmp_path / name).chmod(0o755)
    env = os.environ | dict(PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}", PYTHON=str(tmp_path / "python"))
    done = subprocess.run(["bash", ROOT / ".ci" / "run"], env=env, capture_output=True, text=True)
    legs = done.stdout.count("\n=== ") // 2
    last = done.stdout.splitlines()[-1]
    assert legs >= 7 and done.returncode == (1 if status else 0)
    assert last == (f"legs: 0 passed, {legs} failed" if status else f"legs: {legs} passed, 0 failed")
