"""The analysis of batch norm: networks without it, trainings that diverge, the range of rates."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from _analysis import SHORT, check_files, run, small_data
from torch import nn
from torch.nn import functional as F

import fastres
from fastres.analysis import batch_norm, families, training
from fastres.analysis.batch_norm import without_batch_norm_
from fastres.train import Stopped

__all__ = ["small_data"]


def without(family: str, depth: int = 8) -> nn.Module:
    return without_batch_norm_(families.build(family, depth, 3, seed=0))


@pytest.mark.parametrize("family", families.FAMILIES)
def test_without_batch_norm(family: str) -> None:
    model, normalised = without(family), families.build(family, 8, 3, seed=0)
    assert not [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    channels = sum(m.out_channels for m in normalised.modules() if isinstance(m, nn.Conv2d))
    weights = sum(p.numel() for name, p in normalised.named_parameters() if "bn" not in name)
    assert sum(p.numel() for p in model.parameters()) == weights + channels
    x = torch.randn(2, 3, 8, 8)
    # With its first running statistics, 0 and 1, batch norm only divides by sqrt(1 + 1e-5); a bias starts at 0.
    torch.testing.assert_close(model(x), normalised.eval()(x), rtol=1e-3, atol=1e-3)


def test_biases_without_batch_norm_are_used() -> None:
    model: Any = without("plain")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    x = torch.randn(2, 3, 8, 8)
    y = x
    for conv in [m for m in model.modules() if isinstance(m, nn.Conv2d)]:
        y = F.relu(F.conv2d(y, conv.weight, conv.bias, conv.stride, 1))
    wanted = model.fc(y.mean((2, 3)))
    torch.testing.assert_close(model(x), wanted)
    fused = copy.deepcopy(model)
    fastres.fuse_(fused)
    torch.testing.assert_close(fused(x), wanted)


def test_divergence_is_a_result(small_data: Any, tmp_path: Path) -> None:
    report = batch_norm(**{**SHORT, "epochs": 2}, rates=(0.01, 1e30), depth=8)
    check_files(report, tmp_path / "report")
    ranges, rates, runs = report.tables
    assert [row[0] for row in rates.rows] == [0.01, 1e30]
    assert rates.rows[1][2] == "diverged" and isinstance(rates.rows[0][2], float)
    gone = [row for row in runs.rows if row[4] is None]
    assert len(runs.rows) == 8 and gone and all(row[2] == 1e30 and "step" in row[6] for row in gone)
    assert "checkpoint" not in gone[0][6]
    assert sum(row[6] for row in ranges.rows) == len(gone)


def test_the_errors_are_those_of_the_trainings(small_data: Any) -> None:
    report = batch_norm(**{**SHORT, "epochs": 2}, rates=(0.1, 0.2), depth=8, families=("resnet",), seeds=(2,))
    model = families.build("resnet", 8, 3, seed=2)
    history = training.train(model, "", small_data, epochs=2, batch=16, lr=0.2, seed=2, warmup=0)
    row = next(row for row in report.tables[2].rows if row[1:3] == ("yes", 0.2))
    assert row[4:6] == (history[-1]["train_error"], history[-1]["test_error"])


@pytest.mark.parametrize(
    ("used", "bare", "verdict", "says"),
    [
        ((90, 10, 10, 20), (90, 10, None, None), "reproduced", "rates 0.01 to 1 (the highest that was tried) with"),
        ((90, 10, 10, 90), (20, 10, None, None), "reproduced", "the highest is 10 times as high"),
        ((90, 10, 10, 90), (90, 90, None, None), "partly reproduced", "none that was tried without"),
        ((90, 10, 10, 90), (90, 10, 40, None), "not reproduced", "the highest is 1 times as high"),
        ((90, 90, None, 90), (90, 90, 90, None), "not reproduced", "none that was tried with"),
    ],
)
def test_verdict(
    used: Any, bare: Any, verdict: str, says: str, small_data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = (0.001, 0.01, 0.1, 1.0)

    def train(model: nn.Module, name: str, data: Any, *, lr: float, **options: Any) -> list[dict[str, float]]:
        assert options["warmup"] == 0
        normalised = any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
        assert normalised == (" with batch norm" in name)
        error = (used if normalised else bare)[rates.index(lr)]
        if error is None:
            raise Stopped("the loss is nan at step 3; there is no checkpoint yet")
        return [{"train_error": 100.0, "test_error": 100.0}, {"train_error": error, "test_error": error / 2}]

    monkeypatch.setattr(training, "train", train)
    report = batch_norm(rates=rates, families=("plain",), depth=8, seeds=(0, 1))
    assert report.verdict == verdict and says in report.measured
    row = report.tables[0].rows[1]
    assert row[-1] == 2 * bare.count(None) and row[4] == min(e for e in bare if e is not None) / 2


def test_an_interrupted_run_is_no_result(small_data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any, **options: Any) -> None:
        raise Stopped("stopped after step 1", 2)

    monkeypatch.setattr(training, "train", stop)
    with pytest.raises(Stopped):
        batch_norm()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--rates", "0.1"), "--rates needs two or more different learning rates"),
        (("--rates", "0.1", "-1"), "--rates needs two or more"),
        (("--rates", "0.1", "nan"), "--rates needs two or more"),
        (("--depth", "19"), "no network has depth 19"),
        (("--seeds", "-3"), "--seeds must be numbers from 0 on"),
        (("--families", "vgg"), "no family of networks is named 'vgg'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_input_is_one_line(arguments: tuple[str, ...], says: str, small_data: Any, capsys: Any) -> None:
    code, said, error = run(capsys, "batch-norm", *arguments)
    assert (code, said) == (2, "") and error.count("\n") == 1 and error.startswith(f"fastres: error: {says}")
