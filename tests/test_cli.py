"""The `fastres` command: help, exit codes, one line for wrong input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastres import cli, doctor

COMMANDS = ("bench", "verify", "explain", "models", "tune", "train", "doctor")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(arguments)
    found = capsys.readouterr()
    return code, found.out, found.err


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert all(f"  {name} " in out for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_has_examples_that_parse(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    examples = [line.split("   ")[0].split() for line in out.partition("examples:")[2].splitlines() if line.strip()]
    assert examples
    for example in examples:
        assert example[:2] == ["fastres", command]
        cli._parser().parse_args(example[1:])
    assert max(map(len, out.splitlines())) <= 120


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    import fastres

    assert run(capsys, "--version") == (0, f"fastres {fastres.__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "required: COMMAND"),
        (("frobnicate",), "invalid choice: 'frobnicate'"),
        (("bench", "--batch", "x"), "invalid int value: 'x'"),
        (("bench", "resnet19"), "no model named 'resnet19'"),
        (("bench", "nowhere:resnet18"), "No module named 'nowhere'"),
        (("bench", "--batch", "0"), "--batch must be at least 1"),
        (("bench", "--batch", "1", "-3"), "--batch must be at least 1"),
        (("bench", "--peers", "caffe"), "no contender is named caffe; there are eager, compile"),
        (("bench", "--dtype", "int8"), "--dtype must be one of float32"),
        (("bench", "--rounds", "0"), "--rounds must be above zero"),
        (("bench", "--images", "missing"), "missing"),
        (("bench", "resnet18", "--checkpoint", "missing.pth"), "missing.pth"),
        (("verify", "resnet19"), "there are resnet18"),
        (("verify", "resnet18", "--batch", "0"), "--batch must be at least 1"),
        (("verify", "resnet18", "--checkpoint", "missing.pth"), "missing.pth"),
        (("verify", "resnet18", "--dtype", "float128"), "--dtype must be one of"),
        (("explain", "resnet18", "--size", "0"), "--size must be at least 1"),
        (("explain", "resnet18", "--images", "missing"), "missing"),
        (("explain", "json:loads"), "loads"),
        (("models", "resnet19"), "no model named 'resnet19'"),
        (("models", "resnet50", "--size", "0"), "--size must be at least 1"),
        (("models", "resnet50", "--batch", "-1"), "--batch must be at least 1"),
        (("models", "json:loads"), "no model json:loads"),
        (("models", "torch.nn:Identity"), "has no parameters"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_input_is_one_line_and_exit_code_2(
    arguments: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("fastres: error: ") and err.count("\n") == 1 and says in err
    assert list(tmp_path.iterdir()) == []


def test_unreadable_files_are_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"not an image")
    (tmp_path / "broken.pth").write_bytes(b"not a checkpoint")
    for option, name in (("--images", ""), ("--checkpoint", "broken.pth")):
        code, _, err = run(capsys, "explain", "resnet18", "--size", "64", option, str(tmp_path / name))
        assert code == 2 and err.count("\n") == 1 and "broken." in err


def test_interrupt_is_130(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "examine", interrupted)
    assert run(capsys, "doctor") == (130, "", "fastres: interrupted\n")


def test_other_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> dict[str, Any]:
        raise ZeroDivisionError

    monkeypatch.setattr(doctor, "examine", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main(["doctor"])


def test_explain_prints_the_ledger(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "explain.json"
    code, out, err = run(capsys, "explain", "resnet18", "--size", "64", "--all", "--json", str(file))
    assert (code, err) == (0, "")
    assert out.startswith("resnet18, eval mode, float32")
    assert "layer4.1.conv2" in out
    rows = json.loads(file.read_text())["rows"]
    assert {row["kind"] for row in rows} >= {"conv", "bn", "act", "add"}


@pytest.mark.parametrize("mode", ["eval", "both"])
def test_verify_writes_certificates(mode: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "certificate.json"
    code, out, _ = run(capsys, "verify", "resnet18", "--size", "64", "--mode", mode, "--json", str(file))
    assert code == 0, out
    found = json.loads(file.read_text())
    assert set(found) == {"eval", "train"} if mode == "both" else found


@pytest.mark.parametrize("ok", [True, False])
def test_verify_fails_outside_the_budget(ok: bool, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    class Certificate:
        def __init__(self) -> None:
            self.ok = ok

        def to_json(self) -> dict[str, Any]:
            return {}

    monkeypatch.setattr(importlib.import_module("fastres.verify"), "verify", lambda *args, **kwargs: Certificate())
    assert run(capsys, "verify", "resnet18", "--size", "64", "--mode", "eval")[0] == (0 if ok else 1)


def test_doctor_says_what_serves_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "doctor")
    assert (code, err) == (0, "")
    for word in ("python", "torch", "cpu", "threads", "C++ kernels", "oneDNN", "conv_bias_act", "reference"):
        assert word in out
    code, out, _ = run(capsys, "doctor", "--json")
    found = json.loads(out)
    assert found["extension"]["loaded"] == (found["extension"]["error"] is None)
    assert all(row["serves"] for row in found["kernels"])


def test_doctor_shows_why_the_extension_is_not_loaded() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastres", "doctor"],
        env={**os.environ, "FASTRES_NO_EXT": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert "not loaded: " in done.stdout and "FASTRES_NO_EXT" in done.stdout


def test_module_is_lean_and_runs() -> None:
    code = "import sys, fastres.cli; print([m for m in ('rich', 'matplotlib', 'sklearn', 'PIL') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
