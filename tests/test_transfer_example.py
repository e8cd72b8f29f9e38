"""The embedded example: its data, its report, a short run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastres import cli
from fastres.train import datasets
from fastres.transfer import example

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


def test_the_two_tasks_share_no_image() -> None:
    data = datasets.digits()
    first, second = example._only(data, range(5)), example._only(data, range(5, 10))
    assert (first.classes, second.classes) == (list("01234"), list("56789"))
    for mine, whole in ((0, data.train), (1, data.test)):
        parts: Any = [(part.train, part.test)[mine] for part in (first, second)]
        assert len(parts[0]) + len(parts[1]) == len(whole)
        for part, digits in zip(parts, (range(5), range(5, 10)), strict=True):
            where = torch.isin(whole.labels, torch.tensor(list(digits)))  # type: ignore[attr-defined]
            assert torch.equal(part.labels + digits[0], whole.labels[where])  # type: ignore[attr-defined]
            assert torch.equal(part.images, whole.images[where])  # type: ignore[attr-defined]


def test_few_images_of_each_class() -> None:
    labels = torch.arange(60) % 5
    three, five, other = example.few(labels, 3, 0), example.few(labels, 5, 0), example.few(labels, 3, 1)
    assert torch.bincount(labels[three]).tolist() == [3] * 5 and len(set(three)) == 15
    assert set(three) < set(five) and three != other and three == example.few(labels, 3, 0)


@pytest.mark.parametrize(
    ("scratch", "features", "finetune", "expected"),
    [(50, 60, 70, "reproduced"), (50, 60, 55, "partly reproduced"), (50, 40, 45, "partly reproduced"),
     (50, 45, 40, "not reproduced"), (50, 50, 50, "not reproduced")],
)  # fmt: skip
def test_verdict(scratch: float, features: float, finetune: float, expected: str) -> None:
    means = {(2, "scratch"): scratch, (2, "features"): features, (2, "finetune"): finetune}
    means |= {(5, name): 1.0 for name in example.METHODS}  # it is the fewest images that count
    assert example.verdict([5, 2], list(example.METHODS), means) == expected
    assert example.verdict([2], ["scratch"], means) == "no claim"


def test_a_short_run(capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers again, but for times; a method by itself gives those that it has beside the others."""
    short = {"model": "_train:tiny", "pretrain_epochs": 1, "epochs": 2, "head_epochs": 2, "scratch_lr": 0.05}
    monkeypatch.setattr(example, "_EPOCH", 32)
    monkeypatch.setattr(example.Setting, "__init__", _with(example.Setting.__init__, short))
    monkeypatch.setattr(datasets, "digits", fewer)
    arguments = ["transfer", "--shots", "2", "4", "--seeds", "0"]
    assert cli.main([*arguments, "--out", str(tmp_path / "all")]) == 0
    found = capsys.readouterr()
    assert "Accuracy on" in found.out and "verdict" in found.out and found.err.count("a class, seed 0") == 6
    names = {"transfer.html", "transfer.csv", "transfer.png", "runs.csv"}
    assert {path.name for path in (tmp_path / "all").iterdir()} == names
    assert (tmp_path / "all" / "transfer.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main([*arguments, "--mode", "features", "--out", str(tmp_path / "one")]) == 0
    rows = [_rows(tmp_path / name / "runs.csv") for name in ("all", "one")]
    assert len(rows[0]) == 6 and rows[1] == [row for row in rows[0] if row[1] != "finetune"]


def fewer(whole: Any = datasets.digits) -> datasets.Data:
    """A third of the digits."""
    data = whole()
    parts = [datasets.ArrayImages(part.images[::3], part.labels[::3]) for part in (data.train, data.test)]
    return datasets.Data(*parts, data.classes, data.mean, data.std)


def _with(init: Any, values: dict[str, Any]) -> Any:
    return lambda self, **given: init(self, **{**values, **given})


def _rows(path: Path) -> list[list[str]]:
    return [line.split(",")[:-1] for line in path.read_text().splitlines()[1:]]
