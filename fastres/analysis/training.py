"""Short trainings for the analyses: `fastres train`'s loop, without its files."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

import fastres
from fastres.train import Options, datasets
from fastres.train.datasets import Data
from fastres.train.distributed import World
from fastres.train.log import Log
from fastres.train.loop import Trainer

__all__ = ["History", "load_data", "train"]

#: A row for each epoch, as in `fastres train`'s log.csv: errors in per cent, losses.
History = list[dict[str, Any]]


def load_data(data: str = "digits", root: str = "", *, augment: str = "") -> Data:
    """A data set of `fastres train`, with the augmentation that suits it, or another one. Raises UserError if it cannot
    be read."""
    return datasets.load(_options(data, root, **({"augment": augment} if augment else {})))


def train(
    model: nn.Module,
    name: str,
    data: Data,
    *,
    epochs: int,
    batch: int = 64,
    lr: float = 0.1,
    seed: int = 0,
    **more: Any,
) -> History:
    """Trains a model in place, with SGD and a cosine schedule.

    Args:
        model: with its first weights, which the caller has seeded; blocks that can be fused are.
        name: what the line of progress on stderr calls it. data: see `load_data`.
        epochs, batch, lr, seed, more: options of `fastres train`.

    Raises:
        Stopped: if the loss is not finite, or the user interrupts.
    """
    options = _options("digits", "", epochs=epochs, batch=batch, lr=lr, seed=seed, **more)
    fastres.fuse_(model)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # the stubs lack it
    trainer = Trainer(options, model, data, World(torch.device("cpu")), _Progress(name, epochs), None)
    return trainer.run().history


def _options(data: str, root: str, **given: Any) -> Options:
    where = {"root": root} if root else {}
    return Options.of(**{"data": data, "schedule": "cosine", "warmup": 22, **where, **given})


class _Progress(Log):
    """Says on stderr how far a training is: the tables go to stdout."""

    def __init__(self, name: str, epochs: int) -> None:
        super().__init__(None)
        self.name, self.epochs = name, epochs

    def epoch(self, history: History) -> None:
        row = history[-1]
        end = "\n" if row["epoch"] == self.epochs or not sys.stderr.isatty() else ""
        print(
            f"\r{self.name}: epoch {row['epoch']} of {self.epochs}, training error {row['train_error']:.1f} %, "
            f"test error {row['test_error']:.1f} %, {row['seconds']:.0f} s",
            end=end, file=sys.stderr, flush=True,
        )  # fmt: skip
