"""Two processes, as torchrun starts them: the same numbers as one process with the same global batch."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from _train import TIME, assert_same_bits
from torch import distributed

from fastres.train import Options, checkpoint, train
from fastres.train.loop import CHECKPOINT

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="PyTorch without torch.distributed")
TESTS = Path(__file__).parent
#: 512 images in 6 batches of 85 or 86: the processes' shares differ.
OPTIONS: dict[str, Any] = {"model": "_train:smooth", "data": "synthetic", "size": 8, "epochs": 1, "batch": 100}
OPTIONS |= {"lr": 0.05, "ema": 0.9, "label_smoothing": 0.1}
ARGUMENTS = [text for name, value in OPTIONS.items() for text in (f"--{name.replace('_', '-')}", str(value))]


def torchrun(*arguments: str) -> str:
    """Standard output of two processes."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments],
        env={**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def assert_close(a: dict[str, Any], b: dict[str, Any], bound: float) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        difference = (value.double() - b[name].double()).abs().max().item()
        assert difference <= bound, f"{name} differs by {difference}"


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """With synchronised batch norm, uneven shares, micro-batches and averaged weights; one log, written once."""
    said = torchrun("-m", "fastres", "train", *ARGUMENTS, "--sync-bn", "--out", str(tmp_path / "two"))
    assert said.count("epoch   1") == 1 and said.count("test accuracy") == 1
    progress = train(Options.of(out=str(tmp_path / "one"), **OPTIONS))
    one, two = (checkpoint.load(tmp_path / name / CHECKPOINT) for name in ("one", "two"))
    assert_close(two["model"], one["model"], 1e-5)
    assert_close(two["ema"], one["ema"], 1e-5)
    found, row = two["progress"]["history"][0], progress.history[0]
    for name in row.keys() - {TIME, "seconds"}:
        assert found[name] == pytest.approx(row[name], abs=1e-5, rel=1e-5), name
    with open(tmp_path / "two" / "log.csv") as file:
        assert len(list(csv.DictReader(file))) == 1


def test_two_processes_resume_bit_for_bit(tmp_path: Path) -> None:
    """With random layers, each process its own statistics, micro-batches; stopped within an epoch."""
    said = torchrun(str(TESTS / "train_resume.py"), str(tmp_path))
    assert all(f"rank {rank}: stopped after step 3" in said for rank in (0, 1))
    states = checkpoint.load(tmp_path / "states.pt")
    assert states["whole"]["progress"]["step"] == 8
    assert_same_bits(states["again"], states["whole"])
