"""Run by torchrun in test_train_distributed.py: a whole run, and one that is stopped and continued.

torchrun --nproc-per-node 2 tests/train_resume.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from _train import options, signal_after, trainer

from fastres.train import Stopped, checkpoint
from fastres.train.distributed import world
from fastres.train.loop import CHECKPOINT

folder = Path(sys.argv[1])
given = options("with_dropout", accumulate=2, ema=0.9)
with world("cpu") as processes:
    whole = trainer(given, world=processes)
    whole.run()

    cut = trainer(given, folder, world=processes)
    if processes.rank == 1:  # the signal reaches one process only, and both stop at the same step
        signal_after(cut, 2)
    try:
        cut.run()
    except Stopped as stop:
        print(f"rank {processes.rank}: {stop}", flush=True)
    processes.sum([0])  # the checkpoint is there
    state = checkpoint.load(folder / CHECKPOINT)

    torch.manual_seed(processes.rank)
    again = trainer(given, world=processes)
    again.load_state(state)
    again.run()
    if processes.rank == 0:
        checkpoint.save({"whole": whole.state(), "again": again.state()}, folder / "states.pt")
