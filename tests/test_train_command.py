"""`fastres train`: what it writes, how it ends, what it refuses."""

from __future__ import annotations

import csv
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from _train import TIME
from torch import nn

from fastres import cli, models
from fastres.train import command
from fastres.train.log import Log

TINY = ("--data", "synthetic", "--size", "8", "--model", "_train:tiny", "--epochs", "2", "--batch", "128")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(("train", *arguments))
    found = capsys.readouterr()
    return code, found.out, found.err


def rows(folder: Path) -> list[dict[str, str]]:
    """log.csv without times."""
    with open(folder / "log.csv") as file:
        found = list(csv.DictReader(file))
    return [{name: value for name, value in row.items() if name not in (TIME, "seconds")} for row in found]


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A SIGTERM when the log hears of this step."""

    def note(self: Log, done: int, loss: float) -> None:
        if done == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Log, "step", note)


def test_a_run_and_its_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "a" / "run"
    code, said, error = run(capsys, *TINY, "--ema", "0.9", "--out", str(out))
    assert (code, error) == (0, "")
    assert "512 images to train, 128 to test; 2 epochs of 4 steps, cpu" in said
    assert said.count("test error") == 2 and "of the average" in said and "test accuracy" in said
    assert sorted(os.listdir(out)) == ["curves.png", "last.pt", "log.csv", "weights.pt"]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    log = rows(out)
    assert [(row["epoch"], row["step"]) for row in log] == [("1", "4"), ("2", "8")]
    assert float(log[1]["train_loss"]) < float(log[0]["train_loss"])
    assert 0 <= float(log[1]["ema_test_error"]) <= 100
    model = models.CifarResNet(models.BasicBlock, (1, 1, 1))
    average, last = (models.load_checkpoint(model, out / name).fc.weight.clone() for name in ("weights.pt", "last.pt"))
    assert not torch.equal(average, last)

    code, _, error = run(capsys, *TINY, "--out", str(out))
    assert code == 2 and "holds a run: continue it with --resume" in error
    assert run(capsys, *TINY, "--lr", "1e30", "--out", str(out), "--overwrite")[0] == 1
    assert os.listdir(out) == []  # what nobody is to take for the new run


def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(capsys, *TINY, "--out", str(tmp_path / "whole"))[0] == 0
    with monkeypatch.context() as patch:
        stop_after(5, patch)
        code, _, error = run(capsys, *TINY, "--out", str(tmp_path / "cut"))
    assert code == 128 + signal.SIGTERM
    assert error.startswith("fastres train: stopped after step 6; the last good checkpoint is") and "\n" in error
    assert len(rows(tmp_path / "cut")) == 1
    (tmp_path / "cut").rename(tmp_path / "moved")
    code, _, error = run(capsys, "--resume", str(tmp_path / "moved"))
    assert code == 2 and "asks for code of _train:tiny" in error and "--model _train:tiny" in error
    again = ("--resume", str(tmp_path / "moved"), "--model", "_train:tiny")
    code, said, error = run(capsys, *again, "--workers", "1")
    assert (code, error) == (0, "") and "from step 6" in said
    assert rows(tmp_path / "moved") == rows(tmp_path / "whole")
    weights = [torch.load(tmp_path / name / "weights.pt", weights_only=True) for name in ("moved", "whole")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    code, _, error = run(capsys, *again, "--lr", "1")
    assert code == 2 and "a resumed run keeps its options; different are: lr (0.1, not 1.0)" in error


def test_divergence_is_exit_code_1(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, error = run(capsys, *TINY, "--lr", "1e30", "--warmup", "0", "--out", str(tmp_path / "run"))
    assert code == 1 and error.count("\n") == 1
    assert "the loss is nan at step 2 (epoch 1, learning rate" in error and "no checkpoint yet" in error


def ten_always(num_classes: int) -> nn.Module:
    return models.CifarResNet(models.BasicBlock, (1, 1, 1), 11)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--epochs", "0"), "--epochs must be at least 1"),
        (("--epochs", "x"), "invalid int value: 'x'"),
        (("--warmup", "soon"), 'a number of steps or "paper"'),
        (("--data", "mnist"), "no data set is named 'mnist'"),
        (("--data", "cifar10"), "--data cifar10 needs --root"),
        (("--data", "cifar10", "--root", "missing"), "no such folder: missing"),
        (("--data", "folder", "--root", "missing"), "no folder"),
        (("--data", "synthetic", "--model", "resnet19"), "no model named 'resnet19'"),
        (("--data", "synthetic", "--model", "nowhere:net"), "No module named 'nowhere'"),
        (("--data", "synthetic", "--model", "builtins:dict"), "gave a dict, not an nn.Module"),
        (("--data", "synthetic", "--model", "test_train_command:ten_always"), "10 classes, the model gives (1, 11)"),
        (("--resume", "missing"), "no such checkpoint"),
        (("--resume", "missing", "--overwrite"), "give one of them"),
        pytest.param(
            ("--device", "cuda"),
            "finds no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_input_is_one_line_and_no_file(
    arguments: tuple[str, ...], says: str, capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, said, error = run(capsys, *arguments)
    assert (code, said) == (2, "")
    assert error.startswith("fastres: error: ") and error.count("\n") == 1 and says in error
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_made(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, _, error = run(capsys, *TINY, "--out", str(tmp_path / "file" / "run"))
    assert code == 2 and "cannot make the folder" in error


def test_every_option_has_a_flag() -> None:
    import argparse
    import dataclasses

    from fastres.train import Options

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    known = {action.dest for action in parser._actions} - {"help", "resume", "overwrite"}
    assert known == {field.name for field in dataclasses.fields(Options)}
    assert vars(parser.parse_args([])) == {"resume": None, "overwrite": False}


def test_tensorboard(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert run(capsys, *TINY, "--tensorboard", "--out", str(tmp_path))[0] == 0
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train_loss")] == [4, 8]
    found = [event.value for event in events.Scalars("test_error")]
    assert found == pytest.approx([float(row["test_error"]) for row in rows(tmp_path)])


def test_tensorboard_keeps_what_was_logged_before_a_restart(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    history: list[dict[str, Any]] = []
    for done, steps in ((0, (4, 8)), (4, (8, 12))):  # killed after step 8, whose checkpoint was not written
        log = Log(tmp_path, steps=12, done=done, tensorboard=True)
        for step in steps:
            row = {"epoch": step // 4, "step": step, "train_loss": float(step + done), "train_error": 1.0}
            history.append({**row, "test_loss": 1.0, "test_error": 1.0, TIME: 1.0})
            log.epoch(history)
        log.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train_loss")] == [(4, 4.0), (8, 12.0), (12, 16.0)]


def test_tensorboard_that_is_not_there(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    code, _, error = run(capsys, *TINY, "--tensorboard", "--out", str(tmp_path))
    assert code == 2 and "pip install 'fastres[tensorboard]'" in error


def test_without_matplotlib_there_are_no_curves(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, said, _ = run(capsys, *TINY, "--epochs", "1", "--out", str(tmp_path))
    assert code == 0 and "no curves" in said and not (tmp_path / "curves.png").exists()


def test_the_bar_on_a_terminal(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    log = Log(tmp_path, steps=8, done=2)
    log.step(3, 1.5)
    task = log._bar.tasks[0]
    assert (task.completed, task.total, task.description) == (3, 8, "loss 1.5000")
    log.say("a line [with] brackets")
    log.close()
    assert "a line [with] brackets\n" in capsys.readouterr().out
