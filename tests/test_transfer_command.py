"""`fastres transfer`: what it writes, what it says, how it ends, what it refuses."""

from __future__ import annotations

import csv
import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _train import tiny
from torch import nn

from fastres import cli, models, transfer
from fastres.train import datasets
from fastres.train.log import Log

Image = pytest.importorskip("PIL.Image")

CLASSES = ("ant", "bee", "cow")
MODEL = ("--model", "_train:tiny", "--size", "8")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = cli.main(("transfer", *map(str, arguments)))
    found = capsys.readouterr()
    return code, found.out, found.err


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three classes of one colour each, with noise."""
    random = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 4)):
        for label, name in enumerate(CLASSES):
            folder = tmp_path / "photos" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 120, (9, 11, 3), dtype=np.uint8)
                pixels[..., label] += 120
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "photos"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Of a network for seven other classes."""
    torch.save(tiny(7).state_dict(), tmp_path / "old.pth")
    return tmp_path / "old.pth"


def given(photos: Path, weights: Path, *more: object) -> tuple[object, ...]:
    cache = ("--cache", photos.parent / "cache") if "finetune" not in more else ()
    return ("--checkpoint", weights, "--root", photos, *MODEL, "--workers", 0, *cache, *more)


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "log.csv") as file:
        return [{k: v for k, v in row.items() if "second" not in k} for row in csv.DictReader(file)]


def accuracy(folder: Path, photos: Path, hidden: int = 0) -> float:
    """Of weights.pt on val/, read and normalised by hand, in eager PyTorch."""
    model = transfer.replace_head(tiny(3), 3, hidden)
    models.load_checkpoint(model, folder / "weights.pt").eval()
    images = datasets.ImageFolder(photos, ("val",), 8)
    x, labels = images.__getitems__(range(len(images)))  # type: ignore[misc]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        return 100 * (model((x / 255 - mean) / std).argmax(1) == labels).float().mean().item()


@pytest.mark.parametrize("hidden", [0, 5])
def test_features(capsys: Any, photos: Path, weights: Path, tmp_path: Path, hidden: int) -> None:
    pytest.importorskip("matplotlib")
    more = ("--epochs", 30, "--hidden", hidden)
    code, said, error = run(capsys, *given(photos, weights, *more, "--out", tmp_path / "a"))
    assert (code, error) == (0, "")
    assert f"_train:tiny from {weights}; its head is dropped: fc.weight (7, 64), fc.bias (7,)\n" in said
    assert re.search(r"train: 24 images, 64 features each in [\d.]+ s, \d+ images/s; written to .*\.npz\n", said)
    assert "test: 12 images, 64 features each" in said
    assert sorted(os.listdir(tmp_path / "a")) == ["classes.txt", "curves.png", "log.csv", "weights.pt"]
    assert (tmp_path / "a" / "classes.txt").read_text() == "ant\nbee\ncow\n"
    found = rows(tmp_path / "a")
    assert len(found) == 30
    right = accuracy(tmp_path / "a", photos, hidden)
    assert right == pytest.approx(100 - float(found[-1]["test_error"])) and right > 80
    assert f"test accuracy {right:.2f} %; in" in said

    code, said, _ = run(capsys, *given(photos, weights, *more, "--out", tmp_path / "b"))
    assert code == 0 and said.count("; read from") == 2  # computed once
    assert rows(tmp_path / "b") == found
    same = [torch.load(tmp_path / name / "weights.pt", weights_only=True) for name in "ab"]
    assert all(torch.equal(same[0][key], same[1][key]) for key in same[0])

    for path in (tmp_path / "cache").iterdir():
        path.write_bytes(path.read_bytes()[:-40])
    code, said, error = run(capsys, *given(photos, weights, *more, "--out", tmp_path / "c"))
    assert (code, error) == (0, "") and said.count("is unusable") == 2
    assert rows(tmp_path / "c") == found


def test_finetune(capsys: Any, photos: Path, weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = given(photos, weights, "--mode", "finetune", "--unfreeze", "layer3,layer2", "--epochs", 4, "--lr", 0.1)
    code, said, error = run(capsys, *arguments, "--backbone-lr", 0.01, "--out", out)
    assert (code, error) == (0, "")
    assert "learning rates: head 0.1, layer3 0.01, layer2 0.005; the rest is frozen" in said
    assert said.count("test error") == 4
    assert {"last.pt", "weights.pt", "classes.txt", "log.csv"} <= set(os.listdir(out))
    old, new = (torch.load(path, weights_only=True) for path in (weights, out / "weights.pt"))
    kept = {
        name.split(".")[0] for name in old if old[name].shape == new[name].shape and torch.equal(old[name], new[name])
    }
    assert kept == {"conv1", "bn1", "layer1"}
    assert accuracy(out, photos) == pytest.approx(100 - float(rows(out)[-1]["test_error"]))
    code, said, _ = run(capsys, *arguments, "--backbone-lr", 0.01, "--out", tmp_path / "again")
    assert rows(tmp_path / "again") == rows(out)

    code, _, error = run(capsys, *arguments, "--out", out)
    assert code == 2 and f"holds a run: continue it with --resume {out}, or give --overwrite" in error


def test_an_interrupted_run_goes_on(
    capsys: Any, photos: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = given(photos, weights, "--mode", "finetune", "--epochs", 3, "--batch", 12, "--patience", 9)
    assert run(capsys, *arguments, "--out", tmp_path / "whole")[0] == 0

    def note(self: Log, done: int, loss: float) -> None:
        if done == 3:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # may be ignored, as for a job in the background
    with monkeypatch.context() as patch:
        patch.setattr(Log, "step", note)
        code, _, error = run(capsys, *arguments, "--out", tmp_path / "cut")
    signal.signal(signal.SIGINT, before)
    assert code == 128 + signal.SIGINT and error.startswith("fastres transfer: stopped after step 4;")
    (tmp_path / "cut").rename(tmp_path / "moved")
    weights.unlink()  # not needed again
    again = ("--resume", tmp_path / "moved", "--model", "_train:tiny")
    code, said, error = run(capsys, *again)
    assert (code, error) == (0, "")
    assert rows(tmp_path / "moved") == rows(tmp_path / "whole")
    states = [torch.load(tmp_path / name / "weights.pt", weights_only=True) for name in ("moved", "whole")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    code, _, error = run(capsys, *again, "--lr", 1)
    assert code == 2 and "a resumed run keeps its options; different are: lr" in error


def test_the_head_can_be_kept(capsys: Any, photos: Path, weights: Path, tmp_path: Path) -> None:
    arguments = given(photos, weights, "--mode", "finetune", "--keep-head", "--epochs", 2, "--out", tmp_path / "run")
    code, _, error = run(capsys, *arguments)
    assert code == 2 and "other shape: fc.weight (7, 64) for (3, 64), fc.bias (7,) for (3,)" in error
    torch.save(tiny(3).state_dict(), weights)
    code, said, _ = run(capsys, *arguments)
    assert code == 0 and "with its head" in said


def test_divergence_is_exit_code_1(capsys: Any, photos: Path, weights: Path, tmp_path: Path) -> None:
    arguments = given(photos, weights, "--mode", "finetune", "--lr", 1e30, "--gradual", 0, "--out", tmp_path / "run")
    code, _, error = run(capsys, *arguments)
    assert code == 1 and error.startswith("fastres transfer: the loss is ") and error.count("\n") == 1


def no_linear(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, num_classes, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def needs_32(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 9), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--data", "digits"), "--data digits needs --checkpoint"),
        (("--root", "."), "--data folder needs --checkpoint"),
        (("--checkpoint", "W"), "--data folder needs --root"),
        (("--checkpoint", "W", "--root", "missing"), "no folder missing/train"),
        (("--checkpoint", "missing.pth", "P"), "no such checkpoint"),
        (("--checkpoint", "text", "P"), "corrupt, or not a checkpoint"),
        (("--checkpoint", "W", "P", "--model", "resnet19"), "no model named 'resnet19'"),
        (("--checkpoint", "W", "P", "--model", "resnet18"), "does not fit the model: missing: layer1.1.conv1.weight"),
        (("--checkpoint", "W", "P", "--mode", "both"), "invalid choice: 'both'"),
        (("--checkpoint", "W", "P", "--unfreeze", "layer3"), "--unfreeze means nothing with --mode features"),
        (
            ("--checkpoint", "W", "P", "--mode", "finetune", "--cache", "x"),
            "--cache means nothing with --mode finetune",
        ),
        (("--checkpoint", "W", "P", "--mode", "finetune", "--unfreeze", "layer9"), "no part named 'layer9'"),
        (
            ("--checkpoint", "W", "P", "--mode", "finetune", "--gradual", "9", "--epochs", "9"),
            "--gradual 9 unfreezes all",
        ),
        (("--checkpoint", "W", "P", "--mode", "finetune", "--lr-decay", "0"), "--lr-decay must be above 0"),
        (("--checkpoint", "W", "P", "--mode", "finetune", "--keep-head", "--hidden", "3"), "give one of them"),
        (("--checkpoint", "W", "P", "--epochs", "0"), "--epochs must be at least 1"),
        (("--checkpoint", "W", "P", "--patience", "-1"), "--patience must be at least 0"),
        (("--checkpoint", "W", "P", "--shots", "3"), "--shots is for the example"),
        (("--checkpoint", "no.pth", "P", "--model", "test_transfer_command:no_linear"), "no linear layer"),
        (
            ("--checkpoint", "S", "P", "--model", "test_transfer_command:needs_32"),
            "does not take images of 8 x 8 pixels",
        ),
        (("--resume", "missing"), "no such checkpoint"),
        (("--resume", "missing", "--overwrite"), "give one of them"),
        (("--shots", "0"), "--shots must be from 1 to"),
        (("--shots", "3", "1000"), "the images of the rarest digit; not 1000"),
        (("--seeds", "-1"), "--seeds must be at least 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_input_is_one_line_and_no_file(
    arguments: tuple[str, ...], says: str, capsys: Any, photos: Path, weights: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    (tmp_path / "text").write_text("weights")
    torch.save(no_linear(3).state_dict(), tmp_path / "no.pth")
    torch.save(needs_32(3).state_dict(), tmp_path / "small.pth")
    files = {
        "W": [weights],
        "S": [tmp_path / "small.pth"],
        "no.pth": [tmp_path / "no.pth"],
        "text": [tmp_path / "text"],
    }
    size = [] if "--model" in arguments and "resnet19" in arguments else ["--size", 8]
    files["P"] = ["--root", photos, *(size if "--model" in arguments else MODEL)]
    code, said, error = run(capsys, *(part for word in arguments for part in files.get(word, [word])))
    assert (code, said) == (2, "")
    assert error.startswith("fastres: error: ") and error.count("\n") == 1 and says in error
    assert os.listdir(here) == []


def test_a_broken_image_is_named(capsys: Any, photos: Path, weights: Path, tmp_path: Path) -> None:
    (photos / "train" / "bee" / "2.png").write_bytes(b"no image")
    code, _, error = run(capsys, *given(photos, weights, "--out", tmp_path / "run"))
    assert code == 2 and "cannot read image" in error and "2.png" in error and error.count("\n") == 1


def test_processes(capsys: Any, photos: Path, weights: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """torchrun has nothing to share out here."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, error = run(capsys, *given(photos, weights, "--out", tmp_path / "run"))
    assert code == 2 and "runs as one process" in error
