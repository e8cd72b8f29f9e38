"""Two processes, as torchrun starts them: the same numbers as one process with the same global batch."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from _distributed import found, launched, outcome
from _distributed_train import OPTIONS
from _train import TIME

from fastres.train import Options, checkpoint, train
from fastres.train.loop import CHECKPOINT


def assert_close(a: dict[str, Any], b: dict[str, Any], bound: float) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        difference = (value.double() - b[name].double()).abs().max().item()
        assert difference <= bound, f"{name} differs by {difference}"


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """With synchronised batch norm, uneven shares, micro-batches and averaged weights; one log, written once."""
    wrong = outcome(2, "train", found(2))
    assert not wrong, wrong
    folder = launched(2)
    said = "".join((folder / f"train-{rank}.txt").read_text() for rank in range(2))
    assert said.count("epoch   1") == 1 and said.count("test accuracy") == 1
    progress = train(Options.of(out=str(tmp_path / "one"), **OPTIONS))
    one, two = (checkpoint.load(path / CHECKPOINT) for path in (tmp_path / "one", folder / "trained"))
    assert_close(two["model"], one["model"], 1e-5)
    assert_close(two["ema"], one["ema"], 1e-5)
    history, row = two["progress"]["history"][0], progress.history[0]
    for name in row.keys() - {TIME, "seconds"}:
        assert history[name] == pytest.approx(row[name], abs=1e-5, rel=1e-5), name
    with open(folder / "trained" / "log.csv") as file:
        assert len(list(csv.DictReader(file))) == 1
