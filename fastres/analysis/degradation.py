"""Degradation: a deeper plain network trains worse, a deeper residual one does not (He et al. 2015)."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastres.analysis import curves, figures, training
from fastres.analysis.curves import Trained
from fastres.analysis.families import build, check_depths, title
from fastres.analysis.report import Plot, Report, Table
from fastres.train.datasets import Data

__all__ = ["degradation"]

CLAIM = (
    'He et al. 2015 (Figures 1 and 6, section 4.2): "the deep plain nets suffer from increased depth, and exhibit '
    'higher training error when going deeper". Residual networks of the same depth do not: on CIFAR-10 the test '
    "error falls from 8.75 % (ResNet-20) to 6.97 % (ResNet-56). It is the training error that rises: this is no "
    "overfitting."
)
LIMITS = (
    "Some hundreds of steps on a small, easy data set show how fast networks of each depth start to learn, not where "
    "they end after the 64,000 steps of the paper. The result depends on the learning rate: at the paper's 0.1 the "
    "deep residual network does not get going in so few steps either. That a deeper residual network is better, not "
    "merely no worse, needs a harder data set and a long training (--data cifar10 --root DIR --epochs 164 --batch "
    "128 --lr 0.1). Noise is judged by the number of images only; differences from seed to seed come on top."
)
NAMES = {"plain": "plain", "resnet": "residual"}


def degradation(
    *,
    depths: tuple[int, ...] = (20, 56),
    epochs: int = 6,
    batch: int = 32,
    lr: float = 0.02,
    seeds: tuple[int, ...] = (0,),
    data: str = "digits",
    root: str = "",
) -> Report:
    """Training and test error of plain and residual networks of several depths.

    Args:
        depths: of the networks, 6n + 2, two or more; the shallowest and the deepest are compared.
        epochs: of each training.
        batch: images a step.
        lr: learning rate at its highest.
        seeds: a training for each.
        data: digits, cifar10, cifar100, folder or synthetic.
        root: where the files of the data are, for those that have any.

    Raises:
        UserError: for a depth that no network has, or data that cannot be read. Stopped: if a training diverges.
    """
    found = check_depths(depths, least=2)
    images = training.load_data(data, root)
    options: dict[str, Any] = {"epochs": epochs, "batch": batch, "lr": lr}
    trained = {
        (family, depth): curves.train(
            title(family, depth), partial(build, family, depth, len(images.classes)), images, seeds, **options
        )
        for family in NAMES
        for depth in found
    }
    networks = list(trained.values())
    measured, verdict = _judge({f: (trained[f, found[0]], trained[f, found[-1]]) for f in NAMES}, images)
    return Report(
        name="degradation",
        title="Degradation: plain and residual networks of growing depth",
        claim=CLAIM,
        measured=measured,
        verdict=verdict,
        setting=curves.setting(images, data, networks[0].seeds, **options),
        limits=LIMITS,
        tables=[_table(trained), curves.curves_table("degradation-curves", networks)],
        plots=[_plot(trained)],
    )


def _judge(ends: dict[str, tuple[Trained, Trained]], images: Data) -> tuple[str, str]:
    """What was measured, and the verdict. ends: the shallowest and the deepest network of each family."""
    parts, worse = [], {}
    for family, (shallow, deep) in ends.items():
        seen = len(images.train) * len(shallow.seeds)
        low, high = shallow.last("train_error"), deep.last("train_error")
        worse[family] = curves.beyond_noise(high, low, seen)
        better = curves.beyond_noise(low, high, seen)
        how = "worse than" if worse[family] else "better than" if better else "as well, within noise, as"
        parts.append(
            f"{deep.name} trains {how} {shallow.name}: training error {high:.1f} % against {low:.1f} %, test error "
            f"{deep.last('test_error'):.1f} % against {shallow.last('test_error'):.1f} %"
        )
    kept = [worse["plain"], not worse["resnet"]]
    verdict = "reproduced" if all(kept) else "partly reproduced" if any(kept) else "not reproduced"
    return "; ".join(parts) + ".", verdict


def _table(trained: dict[tuple[str, int], Trained]) -> Table:
    columns = ("network", "parameters", "training error, %", "test error, %", "training loss", "ms an image")
    rows = [
        (
            network.name,
            network.parameters,
            network.last("train_error"),
            network.last("test_error"),
            network.last("train_loss"),
            network.milliseconds(),
        )
        for network in trained.values()
    ]
    return Table("degradation", columns, rows, "In the last epoch, means over the seeds")


def _plot(trained: dict[tuple[str, int], Trained]) -> Plot:
    figure, axes = figures.axes(len(NAMES))
    for axis, (family, name) in zip(axes, NAMES.items(), strict=True):
        networks = [network for (kind, _), network in trained.items() if kind == family]
        curves.draw(axis, networks, figures.COLORS, top=100)
        axis.set_title(f"{name} networks", fontsize=10, loc="left")
    axes[0].set_ylabel("error, % (dashed: training)", fontsize=9)
    return Plot(
        "degradation", figure, "Errors by epoch: training dashed, test solid; at the right the last test error."
    )
