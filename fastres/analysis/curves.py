"""Networks trained side by side: their final errors as a table, their learning curves as figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from torch import nn

from fastres.analysis import training
from fastres.analysis.report import Table
from fastres.analysis.training import History
from fastres.errors import UserError
from fastres.train.datasets import Data

__all__ = ["Trained", "beyond_noise", "curves_table", "draw", "label_ends", "setting", "train"]


@dataclass(frozen=True)
class Trained:
    """Networks of one kind, one for each seed.

    Attributes:
        name: of the kind. parameters: of a network. seeds: of weights, order of the images and augmentation.
        histories: a row for each epoch, see `training.History`; for each seed.
    """

    name: str
    parameters: int
    seeds: tuple[int, ...]
    histories: tuple[History, ...]

    def last(self, what: str) -> float:
        """Mean over the seeds of a column of the last epoch, such as "test_error"."""
        return fmean(history[-1][what] for history in self.histories)

    def curve(self, what: str) -> np.ndarray:
        """A column for every seed and epoch: (seeds, epochs)."""
        return np.array([[row[what] for row in history] for history in self.histories])

    def milliseconds(self) -> float:
        """Of training on one image, in the fastest epoch: the one that other work disturbed least."""
        return 1000 / max(row["images_per_second"] for history in self.histories for row in history)


def train(name: str, build: Callable[..., nn.Module], data: Data, seeds: Sequence[int], **options: Any) -> Trained:
    """Trains a network for each seed.

    Args:
        name: of the kind. build: makes a network, given seed=. data: see `training.load_data`.
        seeds: duplicates count once. options: of `training.train`.

    Raises:
        UserError: if there is no seed. Stopped: if a loss is not finite.
    """
    seeds = tuple(dict.fromkeys(seeds))
    if not seeds or min(seeds) < 0:
        raise UserError("--seeds must be numbers from 0 on")
    histories, parameters = [], 0
    for seed in seeds:
        model = build(seed=seed)
        parameters = sum(p.numel() for p in model.parameters())
        histories.append(training.train(model, f"{name}, seed {seed}", data, seed=seed, **options))
    return Trained(name, parameters, seeds, tuple(histories))


def beyond_noise(higher: float, lower: float, images: int) -> bool:
    """Whether the first of two error rates, in per cent, is higher by more than chance explains.

    That is by more than two standard errors of the difference, if each is the rate over so many independent images:
    sqrt(2 p (1 - p) / n), p their mean. Differences from seed to seed come on top: use more than one seed.
    """
    p = (higher + lower) / 200
    return higher - lower > 200 * math.sqrt(2 * p * (1 - p) / images)


def curves_table(name: str, networks: Sequence[Trained]) -> Table:
    """Every epoch of every network, for the CSV file."""
    columns = ("epoch", "train_loss", "train_error", "test_loss", "test_error", "seconds")
    rows = [
        (network.name, seed, *(row[column] for column in columns))
        for network in networks
        for seed, history in zip(network.seeds, network.histories, strict=True)
        for row in history
    ]
    return Table(name, ("network", "seed", *columns), rows, "Every epoch: errors in per cent", long=True)


def draw(axis: Any, networks: Sequence[Trained], colors: Sequence[str], *, top: float | None = None) -> None:
    """Errors by epoch: training dashed, test solid, means over the seeds, a band from the lowest to the highest test
    error; each network is named at the end of its test curve, with the error there."""
    labels = []
    for network, color in zip(networks, colors, strict=False):
        test, training_error = network.curve("test_error"), network.curve("train_error")
        epochs = np.arange(1, test.shape[1] + 1)
        axis.plot(epochs, training_error.mean(0), "--", color=color, linewidth=1)
        axis.plot(epochs, test.mean(0), "-", color=color, linewidth=1.8)
        if len(test) > 1:
            axis.fill_between(epochs, test.min(0), test.max(0), color=color, alpha=0.15, linewidth=0)
        labels.append((test.mean(0)[-1], f"{network.name}: {test.mean(0)[-1]:.1f} %", color))
    axis.set_xlabel("epoch", fontsize=9)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_ylim(0, top)
    label_ends(axis, labels)


def label_ends(axis: Any, labels: Sequence[tuple[float, str, str]]) -> None:
    """Writes (height in data, text, colour) to the right of the axis; labels that would touch move apart."""
    low, high = axis.get_ylim()
    place = axis.transData.transform
    to_axis = axis.transAxes.inverted().transform
    heights = [to_axis(place((1, min(max(y, min(low, high)), max(low, high)))))[1] for y, _, _ in labels]
    order = sorted(range(len(labels)), key=heights.__getitem__)
    gap, floor = 0.075, -1.0
    for i in order:
        heights[i] = floor = max(heights[i], floor + gap)
    excess = max(0.0, floor - 1.0)
    for height, (_, text, color) in zip(heights, labels, strict=True):
        axis.annotate(
            text, (1.01, height - excess), xycoords="axes fraction", color=color, fontsize=8, va="center",
            annotation_clip=False,
        )  # fmt: skip


def setting(data: Data, name: str, seeds: Sequence[int], *, epochs: int, batch: int, lr: float) -> str:
    """What a training is made of, for a report."""
    return (
        f"data: {name}, {len(data.train)} images to train, {len(data.test)} to test; {epochs} epochs of batches of "
        f"{batch}, SGD with momentum 0.9, weight decay 1e-4, learning rate {lr:g} with 22 steps of warm-up and cosine "
        f"decay; {'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}. Training errors are those of "
        "the steps of the last epoch, on augmented images."
    )
