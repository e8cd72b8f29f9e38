"""Networks with and without batch norm, over learning rates (Ioffe and Szegedy 2015)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import nn

from fastres.analysis import curves, figures, training
from fastres.analysis.families import build, check_depths, check_families, title
from fastres.analysis.report import Plot, Report, Table
from fastres.errors import UserError
from fastres.train import Stopped
from fastres.train.datasets import Data

__all__ = ["batch_norm", "without_batch_norm_"]

CLAIM = (
    'Ioffe and Szegedy 2015 (arXiv 1502.03167): batch norm "allows us to use much higher learning rates and be less '
    'careful about initialization" (abstract). Networks with it were trained at 5 and at 30 times the usual rate, '
    'while 5 times "caused the model parameters to reach machine infinity" without it (section 4.2). He et al. 2015 '
    "(section 3.4) normalise after every convolution, in their plain networks too."
)
LIMITS = (
    "A few epochs of one network on an easy data set, one seed by default: rates next to the edge of a range may "
    "fall on the other side of it with another seed. Without batch norm the signal of a residual network grows with "
    "every block; initialisations that mend this would widen its range."
)
#: Training error, in per cent, below which a network counts as trained.
TRAINED = 50.0


@dataclass(frozen=True)
class Outcome:
    """A training at one learning rate.

    Attributes:
        train_error, test_error: in the last epoch, in per cent; None if the loss or a weight became infinite or NaN.
        said: what ended it then.
    """

    family: str
    normalised: bool
    lr: float
    seed: int
    train_error: float | None
    test_error: float | None
    said: str = ""


def batch_norm(
    *,
    rates: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
    families: tuple[str, ...] = ("plain", "resnet"),
    depth: int = 8,
    epochs: int = 4,
    batch: int = 32,
    seeds: tuple[int, ...] = (0,),
    data: str = "digits",
    root: str = "",
) -> Report:
    """With and without batch norm: at which learning rates a network trains.

    Args:
        rates: learning rates, two or more, without warm-up.
        families: plain, resnet (v1) and resnet_v2, or some of them.
        depth: of the networks, 6n + 2.
        epochs: of each training.
        batch: images a step.
        seeds: a training for each.
        data: digits, cifar10, cifar100, folder or synthetic.
        root: where the files of the data are, for those that have any.

    Raises:
        UserError: for rates, a depth or a family that make no sense, or data that cannot be read.
    """
    check_depths([depth])
    families = tuple(check_families(families))
    ladder, runs = sorted(set(rates)), tuple(dict.fromkeys(seeds))
    if len(ladder) < 2 or not all(math.isfinite(rate) and rate > 0 for rate in ladder):
        raise UserError("--rates needs two or more different learning rates above zero")
    if not runs or min(runs) < 0:
        raise UserError("--seeds must be numbers from 0 on")
    images = training.load_data(data, root)
    outcomes = [
        _train(family, normalised, depth, lr, seed, images, epochs=epochs, batch=batch)
        for family in families
        for normalised in (True, False)
        for lr in ladder
        for seed in runs
    ]
    measured, verdict = _judge(outcomes, families, ladder, depth)
    return Report(
        name="batch-norm",
        title=f"Batch norm and the learning rate, at {depth} layers",
        claim=CLAIM,
        measured=measured,
        verdict=verdict,
        setting=f"data: {data}, {len(images.train)} images to train, {len(images.test)} to test; {epochs} epochs of "
        f"batches of {batch}, SGD with momentum 0.9, weight decay 1e-4, cosine decay, no warm-up; seeds "
        f"{', '.join(map(str, runs))}. Without batch norm every convolution has a bias; the weights start the same. A "
        f"network counts as trained if its training error, in the last epoch, is below {TRAINED:g} %.",
        limits=LIMITS,
        tables=[_ranges(outcomes, families, depth), _table(outcomes, families, ladder, depth), _runs(outcomes, depth)],
        plots=[_plot(outcomes, families, ladder, depth)],
    )


def without_batch_norm_(model: nn.Module) -> nn.Module:
    """Takes the batch norms out of a network that is not fused, and gives every convolution a bias, which starts at 0.
    In place."""
    for module in list(model.modules()):
        if isinstance(module, nn.Conv2d) and module.bias is None:
            module.bias = nn.Parameter(torch.zeros(module.out_channels))
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
    return model


def _train(family: str, normalised: bool, depth: int, lr: float, seed: int, images: Data, **options: Any) -> Outcome:
    model: nn.Module = build(family, depth, len(images.classes), seed=seed)
    if not normalised:
        without_batch_norm_(model)
    name = f"{title(family, depth)} {'with' if normalised else 'without'} batch norm, learning rate {lr:g}, seed {seed}"
    try:
        history = training.train(model, name, images, lr=lr, seed=seed, warmup=0, **options)
    except Stopped as stop:
        if stop.signal:
            raise
        said = str(stop).partition(";")[0]  # without what it says of checkpoints
        return Outcome(family, normalised, lr, seed, None, None, said)
    return Outcome(family, normalised, lr, seed, history[-1]["train_error"], history[-1]["test_error"])


def _of(outcomes: Sequence[Outcome], family: str, normalised: bool, lr: float | None = None) -> list[Outcome]:
    same = [o for o in outcomes if (o.family, o.normalised) == (family, normalised)]
    return same if lr is None else [o for o in same if o.lr == lr]


def _error(outcomes: Sequence[Outcome], what: str) -> float | None:
    """Mean over the seeds; None if one of them diverged."""
    found = [getattr(outcome, what) for outcome in outcomes]
    return None if None in found else fmean(found)


def _trained_rates(outcomes: Sequence[Outcome], family: str, normalised: bool) -> list[float]:
    """Rates at which all seeds trained."""
    rates = sorted({outcome.lr for outcome in outcomes})
    return [
        lr
        for lr in rates
        if all(o.train_error is not None and o.train_error < TRAINED for o in _of(outcomes, family, normalised, lr))
    ]


def _judge(outcomes: list[Outcome], families: Sequence[str], ladder: list[float], depth: int) -> tuple[str, str]:
    """What was measured, and the verdict: the highest rate that trains is higher with batch norm, in each family. Where
    no rate trains without it there is nothing to compare with: that counts in part."""
    parts, higher, only = [], [], []
    for family in families:
        used, bare = (_trained_rates(outcomes, family, normalised) for normalised in (True, False))
        higher.append(bool(used and bare) and used[-1] > bare[-1])
        only.append(bool(used) and not bare)
        with_it, without = _span(used, ladder), _span(bare, ladder)
        words = f"{title(family, depth)} trains at rates {with_it} with batch norm, {without} without"
        if used and bare:
            words += f": the highest is {used[-1] / bare[-1]:.3g} times as high"
        parts.append(words)
    verdict = "reproduced" if all(higher) else "partly reproduced" if any(higher + only) else "not reproduced"
    return "; ".join(parts) + ".", verdict


def _span(rates: list[float], ladder: list[float]) -> str:
    if not rates:
        return "none that was tried"
    edge = " (the highest that was tried)" if rates[-1] == ladder[-1] else ""
    return f"{rates[0]:g} to {rates[-1]:g}{edge}"


def _ranges(outcomes: list[Outcome], families: Sequence[str], depth: int) -> Table:
    rows = []
    for family in families:
        for normalised in (True, False):
            rates = _trained_rates(outcomes, family, normalised)
            errors = [(o.test_error, o.lr) for o in _of(outcomes, family, normalised) if o.test_error is not None]
            best, at = min(errors, default=("", ""))
            ends = (rates[0], rates[-1]) if rates else ("", "")
            diverged = sum(o.train_error is None for o in _of(outcomes, family, normalised))
            rows.append((title(family, depth), "yes" if normalised else "no", *ends, best, at, diverged))
    columns = (
        "network", "batch norm", "lowest rate that trains", "highest rate that trains", "best test error, %",
        "at the rate", "trainings that diverged",
    )  # fmt: skip
    return Table("batch-norm", columns, rows, f"Rates at which the training error falls below {TRAINED:g} %")


def _table(outcomes: list[Outcome], families: Sequence[str], ladder: list[float], depth: int) -> Table:
    def shown(found: list[Outcome]) -> float | str:
        error = _error(found, "train_error")
        return "diverged" if error is None else error

    kinds = [(family, normalised) for family in families for normalised in (True, False)]
    columns = ["learning rate"] + [f"{title(f, depth)}, {'with' if n else 'without'}" for f, n in kinds]
    rows = [(lr, *(shown(_of(outcomes, family, n, lr)) for family, n in kinds)) for lr in ladder]
    return Table("batch-norm-rates", columns, rows, "Training error in the last epoch, %, means over the seeds")


def _runs(outcomes: list[Outcome], depth: int) -> Table:
    columns = ("network", "batch norm", "learning rate", "seed", "training error, %", "test error, %", "ended by")
    rows = [
        (title(o.family, depth), "yes" if o.normalised else "no", o.lr, o.seed, o.train_error, o.test_error, o.said)
        for o in outcomes
    ]
    return Table("batch-norm-runs", columns, rows, "Every training", long=True)


def _plot(outcomes: list[Outcome], families: Sequence[str], ladder: list[float], depth: int) -> Plot:
    """Training error over learning rate, an axis for each family; a cross where a training diverged."""
    figure, axes = figures.axes(len(families))
    for axis, family in zip(axes, families, strict=True):
        axis.set_xscale("log")
        axis.set_ylim(0, 104)
        axis.axhline(TRAINED, color=figures.COLORS[5], linewidth=0.6, linestyle=":")
        labels = []
        for normalised, color in ((True, figures.COLORS[0]), (False, figures.COLORS[1])):
            errors = [_error(_of(outcomes, family, normalised, lr), "train_error") for lr in ladder]
            axis.plot(ladder, [math.nan if e is None else e for e in errors], "o-", color=color, markersize=4)
            gone = [lr for lr, error in zip(ladder, errors, strict=True) if error is None]
            axis.plot(gone, [100] * len(gone), "x", color=color, markersize=7, markeredgewidth=2)
            last = errors[-1]
            ending = "diverges" if last is None else f"{last:.0f} %"
            labels.append((100 if last is None else last, f"{'with' if normalised else 'without'}: {ending}", color))
        curves.label_ends(axis, labels)
        axis.set_title(title(family, depth), fontsize=10, loc="left")
        axis.set_xlabel("learning rate", fontsize=9)
    axes[0].set_ylabel("training error in the last epoch, %", fontsize=9)
    caption = "Training error over learning rate, with and without batch norm. A cross: the training diverged."
    return Plot("batch-norm", figure, caption)
