"""The analyses that compare trainings: degradation, shortcuts, activation order."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from _analysis import SHORT, check_files, run, small_data
from torch import nn

from fastres import models
from fastres.analysis import ANALYSES, activation_order, command, curves, degradation, families, shortcuts, training
from fastres.errors import UserError
from fastres.train import Stopped

__all__ = ["small_data"]

TINY = {**SHORT, "seeds": (0,)}


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch, small_data: Any) -> dict[str, tuple[float, float]]:
    """Nothing is trained: a name of a network that holds a key of this dict gets these errors, training and test."""
    errors: dict[str, tuple[float, float]] = {}

    def train(model: nn.Module, name: str, data: Any, **options: Any) -> list[dict[str, Any]]:
        kind = name.partition(",")[0].partition(":")[0]
        first, second = errors[kind]
        row = {"train_error": first, "test_error": second, "train_loss": 1.0, "test_loss": 1.0}
        return [{"epoch": i, "seconds": 1.0, "images_per_second": 100.0, **row} for i in (1, 2)]

    monkeypatch.setattr(training, "train", train)
    small_data.train.images = small_data.train.images[:1].expand(1000, -1, -1, -1)
    small_data.test.images = small_data.test.images[:1].expand(1000, -1, -1, -1)
    return errors


@pytest.mark.parametrize(("family", "depth"), [("plain", 20), ("resnet", 32), ("resnet_v2", 56)])
def test_networks_are_those_of_the_models(family: str, depth: int) -> None:
    name = f"plain{depth}" if family == "plain" else f"resnet{depth}" + "_v2" * (family == "resnet_v2")
    torch.manual_seed(3)
    wanted = models.create_model(name, num_classes=7, fused=False)
    found = families.build(family, depth, 7, seed=3)
    assert type(found) is type(wanted)
    assert found.state_dict().keys() == wanted.state_dict().keys()
    assert all(torch.equal(value, wanted.state_dict()[key]) for key, value in found.state_dict().items())


@pytest.mark.parametrize("analysis", ["degradation", "shortcuts", "activation-order"])
def test_a_short_run_leaves_its_files(analysis: str, small_data: Any, tmp_path: Path) -> None:
    depth: dict[str, Any] = {"depth": 8} if analysis == "shortcuts" else {"depths": (14, 8)}
    report = ANALYSES[analysis](**TINY, **depth)
    assert report.name == analysis
    assert "32 images to train, 20 to test" in report.setting
    check_files(report, tmp_path / "report")
    assert analysis == report.tables[0].name
    assert len(report.tables[0].rows) == 4 and len(report.tables[1].rows) == 4  # of one epoch each


def test_the_numbers_are_those_of_the_trainings(small_data: Any) -> None:
    report = degradation(**{**TINY, "epochs": 2}, depths=(8, 14), lr=0.05)
    (network, _, error, test_error, _, _), *_ = report.tables[0].rows
    assert network == "plain-8"
    history = training.train(families.build("plain", 8, 3, seed=0), "", small_data, epochs=2, batch=16, lr=0.05)
    assert (error, test_error) == (history[-1]["train_error"], history[-1]["test_error"])
    rows = [row for row in report.tables[1].rows if row[0] == "plain-8"]
    assert [row[4] for row in rows] == [row["train_error"] for row in history]


def test_seeds_are_averaged(small_data: Any) -> None:
    one, other, both = (
        curves.train(
            "net", lambda seed: families.build("resnet", 8, 3, seed=seed), small_data, seeds, epochs=1, batch=16
        )
        for seeds in ((0,), (1,), (0, 1, 1))
    )
    assert both.seeds == (0, 1) and both.curve("train_loss").shape == (2, 1)
    assert both.last("train_loss") == pytest.approx((one.last("train_loss") + other.last("train_loss")) / 2)
    assert one.last("train_loss") != other.last("train_loss")


@pytest.mark.parametrize(
    ("plain", "residual", "verdict"),
    [
        ((10, 40), (10, 9), "reproduced"),
        ((10, 40), (10, 11), "reproduced"),  # within noise: two standard errors are 2.7 points
        ((10, 40), (10, 20), "partly reproduced"),
        ((10, 11), (10, 9), "partly reproduced"),
        ((40, 10), (10, 40), "not reproduced"),
    ],
)
def test_verdict_on_degradation(plain: Any, residual: Any, verdict: str, made_up: Any) -> None:
    names = ("plain-8", "plain-14", "ResNet-8", "ResNet-14")
    made_up |= {name: (error, 50.0) for name, error in zip(names, plain + residual, strict=True)}
    assert degradation(depths=(8, 14)).verdict == verdict


@pytest.mark.parametrize(
    ("errors", "verdict"),
    [
        ((30, 10, 10, 9), "reproduced"),
        ((30, 20, 10, 10), "partly reproduced"),  # they differ as much as they gain
        ((30, 10, 30, 10), "partly reproduced"),
        ((10, 10, 10, 9), "not reproduced"),
    ],
)
def test_verdict_on_shortcuts(errors: Any, verdict: str, made_up: Any) -> None:
    made_up |= {name: (50.0, error) for name, error in zip(("none (plain)", "A", "B", "C"), errors, strict=True)}
    report = shortcuts(depth=8)
    assert report.verdict == verdict
    assert report.measured.startswith(f"test error: plain {errors[0]:.1f} %, A {errors[1]:.1f} %")


@pytest.mark.parametrize(
    ("post", "pre", "verdict"),
    [
        ((40, 20), (10, 5), "reproduced"),
        ((40, 20), (10, 20), "partly reproduced"),
        ((40, 20), (41, 21), "not reproduced"),
    ],
)
def test_verdict_on_the_order_of_activation(post: Any, pre: Any, verdict: str, made_up: Any) -> None:
    made_up |= {"ResNet-8": (50, 50), "ResNet-8 v2": (1, 1), "ResNet-14": post, "ResNet-14 v2": pre}
    assert activation_order(depths=(14, 8)).verdict == verdict  # of the deepest


def test_parameters_and_multiply_adds_of_the_shortcuts(small_data: Any) -> None:
    rows = shortcuts(**TINY, depth=8).tables[0].rows
    counts = [row[1] for row in rows]
    plain = sum(p.numel() for p in families.build("plain", 8, 3, seed=0).parameters())
    b = (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)  # 1x1 convolutions with their batch norms
    assert counts == [plain, plain, plain + b, plain + b + 16 * 16 + 2 * 16]
    b_work = 16 * 32 * 4 * 4 + 32 * 64 * 2 * 2  # at the sizes of the stages for images of 8 x 8
    work = [row[2] * 1e6 for row in rows]
    assert [w - work[0] for w in work] == pytest.approx([0, 0, b_work, b_work + 16 * 16 * 8 * 8])


def test_noise() -> None:
    # p = 10 %, n = 450: the standard error of the difference is sqrt(2 * 0.1 * 0.9 / 450) = 2 points.
    assert curves.beyond_noise(12.1, 7.9, 450) and not curves.beyond_noise(11.9, 8.1, 450)
    assert not curves.beyond_noise(7.9, 12.1, 450) and not curves.beyond_noise(0, 0, 450)


def test_labels_do_not_touch() -> None:
    pytest.importorskip("matplotlib")
    from fastres.analysis import figures

    _, (axis,) = figures.axes()
    axis.set_ylim(0, 100)
    curves.label_ends(axis, [(5.0, "b", "k"), (4.0, "a", "k"), (99.0, "c", "k"), (1000.0, "d", "k")])
    heights = {text.get_text(): text.xy[1] for text in axis.texts}
    order = sorted(heights, key=heights.__getitem__)
    assert order == ["a", "b", "c", "d"]
    assert all(heights[y] - heights[x] > 0.07 for x, y in zip(order, order[1:], strict=False))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("degradation", "--depths", "20", "57"), "no network has depth 57: it must be 6n + 2"),
        (("degradation", "--depths", "20", "20"), "at least 2 different depths"),
        (("degradation", "--depths", "deep"), "invalid int value: 'deep'"),
        (("degradation", "--seeds", "-1"), "--seeds must be numbers from 0 on"),
        (("degradation", "--epochs", "0"), "--epochs must be at least 1"),
        (("degradation", "--data", "mnist"), "no data set is named 'mnist'"),
        (("degradation", "--data", "cifar10"), "needs --root"),
        (("degradation", "--data", "cifar10", "--root", "missing"), "no such folder: missing"),
        (("shortcuts", "--depth", "2"), "no network has depth 2"),
        (("shortcuts", "--depth", "8", "--lr", "0"), "--lr must be above zero"),
        (("activation-order", "--depths", "18"), "no network has depth 18"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_input_is_one_line(
    arguments: tuple[str, ...], says: str, capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, said, error = run(capsys, *arguments)
    assert (code, said) == (2, "")
    assert error.startswith("fastres: error: ") and error.count("\n") == 1 and says in error
    assert not list(tmp_path.iterdir())


def test_command(small_data: Any, capsys: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    options = ("--depths", "8", "14", "--epochs", "1", "--batch", "16", "--seeds", "0", "1", "--data", "synthetic")
    code, said, error = run(capsys, "degradation", *options, "--out", str(tmp_path / "a" / "b"))
    assert code == 0 and "plain-14, seed 1: epoch 1 of 1, training error" in error
    assert all(f"\n{word}  " in said for word in ("claim", "measured", "verdict")) and "ResNet-14" in said
    files = ["degradation-curves.csv", "degradation.csv", "degradation.html", "degradation.png"]
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == files


@pytest.mark.parametrize(("signal", "wanted"), [(0, 1), (15, 143)])
def test_a_training_that_ends_early(
    signal: int, wanted: int, small_data: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stop(*args: Any, **options: Any) -> Iterator[None]:
        raise Stopped("the loss is nan at step 1", signal)

    monkeypatch.setattr(training, "train", stop)
    code, said, error = run(capsys, "shortcuts", "--out", str(tmp_path / "out"))
    assert (code, said, error) == (wanted, "", "fastres analyze: the loss is nan at step 1\n")
    assert not list(tmp_path.iterdir())


def test_every_option_says_what_it_is(capsys: Any) -> None:
    """Its docstring has an argument for every keyword."""
    for name, analysis in ANALYSES.items():
        code, said, _ = run(capsys, name, "--help")
        assert code == 0 and "--out FOLDER" in said
        helps = command._argument_docs(inspect.getdoc(analysis) or "")
        assert all(helps[parameter] for parameter in inspect.signature(analysis).parameters)


def test_data_has_the_augmentation_that_suits_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    assert training.load_data("digits").train.augment == "crop"  # type: ignore[attr-defined]
    assert training.load_data("digits", augment="none").train.augment == "none"  # type: ignore[attr-defined]
    assert training.load_data("synthetic").train.augment == "none"  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="means nothing with --data digits"):
        training.load_data("digits", "somewhere")
