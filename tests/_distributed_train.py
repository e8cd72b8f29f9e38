"""`fastres train` with two processes: what tests/test_distributed_train.py compares with one."""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path
from typing import Any

import torch
from _distributed import check
from _train import assert_same_bits, options, signal_after, trainer

from fastres import cli
from fastres.train import Stopped, checkpoint
from fastres.train.distributed import World
from fastres.train.loop import CHECKPOINT

#: 512 images in 6 batches of 85 or 86: the processes' shares differ.
OPTIONS: dict[str, Any] = {"model": "_train:smooth", "data": "synthetic", "size": 8, "epochs": 1, "batch": 100}
OPTIONS |= {"lr": 0.05, "ema": 0.9, "label_smoothing": 0.1}


def folder() -> Path:
    """Where the processes of this launch leave what they found."""
    return Path(sys.argv[1])


@check("train", (2,))
def train(rank: int, world: int) -> None:
    """The command, with synchronised batch norm, uneven shares, micro-batches and averaged weights."""
    arguments = [text for name, value in OPTIONS.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert not cli.main(["train", *arguments, "--sync-bn", "--out", str(folder() / "trained")])
    (folder() / f"train-{rank}.txt").write_text(said.getvalue())


@check("train, stopped and continued", (2,))
def resume(rank: int, world: int) -> None:
    """Bit for bit, with random layers, each process its own statistics, micro-batches; stopped within an epoch."""
    processes = World(torch.device("cpu"), rank, world)
    given = options("with_dropout", accumulate=2, ema=0.9)
    whole = trainer(given, world=processes)
    whole.run()

    stopped = folder() / "stopped"
    stopped.mkdir(exist_ok=True)
    cut = trainer(given, stopped, world=processes)
    if rank == 1:  # the signal reaches one process only, and both stop at the same step
        signal_after(cut, 2)
    try:
        cut.run()
    except Stopped as stop:
        assert "stopped after step 3" in str(stop), stop
    else:
        raise AssertionError("not stopped")
    processes.sum([0])  # the checkpoint is there
    state = checkpoint.load(stopped / CHECKPOINT)

    torch.manual_seed(rank)
    again = trainer(given, world=processes)
    again.load_state(state)
    again.run()
    assert whole.state()["progress"]["step"] == 8
    assert_same_bits(again.state(), whole.state())
