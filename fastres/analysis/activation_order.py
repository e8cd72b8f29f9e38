"""Post-activation against pre-activation at depth (He et al. 2016)."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastres.analysis import curves, figures, training
from fastres.analysis.curves import Trained
from fastres.analysis.families import build, check_depths, title
from fastres.analysis.report import Plot, Report, Table
from fastres.train.datasets import Data

__all__ = ["activation_order"]

CLAIM = (
    "He et al. 2016 (arXiv 1603.05027, section 4.2, Table 3): full pre-activation makes residual networks easier to "
    "train, because a ReLU after the addition truncates the signal where it is negative, and lets them generalise "
    'better; "this effect is particularly obvious when training the 1001-layer ResNet", and "not severe" up to 164 '
    "layers. Test error on CIFAR-10: 6.61 % against 6.37 % at 110 layers, 5.93 % against 5.46 % at 164, 7.61 % "
    "against 4.92 % at 1001."
)
LIMITS = (
    "Where the paper finds a large effect there are 1001 layers; at 110 it is a quarter of a point of test error "
    "after 64,000 steps, which neither so few steps nor so few test images resolve. What is seen here is the "
    "beginning of training, at one learning rate, and which family is ahead depends on it (--lr): a v2 network has a "
    "batch norm before its linear layer, so the same rate moves it less. Noise is judged by the number of images "
    "only; differences from seed to seed come on top."
)
NAMES = {"resnet": "post-activation (v1)", "resnet_v2": "pre-activation (v2)"}


def activation_order(
    *,
    depths: tuple[int, ...] = (20, 56),
    epochs: int = 3,
    batch: int = 32,
    lr: float = 0.02,
    seeds: tuple[int, ...] = (0,),
    data: str = "digits",
    root: str = "",
) -> Report:
    """Pre-activation against post-activation: how fast residual networks of several depths learn.

    Args:
        depths: of the networks, 6n + 2; the verdict is that of the deepest.
        epochs: of each training.
        batch: images a step.
        lr: learning rate at its highest.
        seeds: a training for each.
        data: digits, cifar10, cifar100, folder or synthetic.
        root: where the files of the data are, for those that have any.

    Raises:
        UserError: for a depth that no network has, or data that cannot be read. Stopped: if a training diverges.
    """
    found = check_depths(depths)
    images = training.load_data(data, root)
    options: dict[str, Any] = {"epochs": epochs, "batch": batch, "lr": lr}
    trained = {
        (family, depth): curves.train(
            title(family, depth), partial(build, family, depth, len(images.classes)), images, seeds, **options
        )
        for depth in found
        for family in NAMES
    }
    networks = list(trained.values())
    measured, verdict = _judge(trained, found, images)
    return Report(
        name="activation-order",
        title="Pre-activation against post-activation at depth",
        claim=CLAIM,
        measured=measured,
        verdict=verdict,
        setting=curves.setting(images, data, networks[0].seeds, **options),
        limits=LIMITS,
        tables=[_table(trained), curves.curves_table("activation-order-curves", networks)],
        plots=[_plot(trained, found)],
    )


def _whole(network: Trained) -> float:
    """Mean training error over all epochs: low for a network that learns early."""
    return float(network.curve("train_error").mean())


def _judge(trained: dict[tuple[str, int], Trained], depths: list[int], images: Data) -> tuple[str, str]:
    """What was measured, and the verdict, of the deepest networks: v2 learns faster, and generalises better."""
    parts = []
    for depth in depths:
        post, pre = trained["resnet", depth], trained["resnet_v2", depth]
        parts.append(
            f"{depth} layers: training error over all epochs {_whole(post):.1f} % post-activation, {_whole(pre):.1f} % "
            f"pre-activation; test error at the end {post.last('test_error'):.1f} % and {pre.last('test_error'):.1f} %"
        )
    runs = len(post.seeds)
    kept = [
        curves.beyond_noise(_whole(post), _whole(pre), len(images.train) * runs),
        curves.beyond_noise(post.last("test_error"), pre.last("test_error"), len(images.test) * runs),
    ]
    verdict = "reproduced" if all(kept) else "partly reproduced" if any(kept) else "not reproduced"
    learns, tests = ("better" if better else "no better" for better in kept)
    words = f"At {depths[-1]} layers pre-activation learns {learns} and tests {tests}, beyond noise."
    return f"{'. '.join(parts)}. {words}", verdict


def _table(trained: dict[tuple[str, int], Trained]) -> Table:
    columns = (
        "network", "parameters", "training error over all epochs, %", "training error, %", "test error, %",
        "ms an image",
    )  # fmt: skip
    rows = [
        (
            network.name,
            network.parameters,
            _whole(network),
            network.last("train_error"),
            network.last("test_error"),
            network.milliseconds(),
        )
        for network in trained.values()
    ]
    return Table("activation-order", columns, rows, "In the last epoch where not said otherwise, means over the seeds")


def _plot(trained: dict[tuple[str, int], Trained], depths: list[int]) -> Plot:
    figure, axes = figures.axes(len(depths))
    for axis, depth in zip(axes, depths, strict=True):
        curves.draw(axis, [trained[family, depth] for family in ("resnet_v2", "resnet")], figures.COLORS, top=100)
        axis.set_title(f"{depth} layers", fontsize=10, loc="left")
    axes[0].set_ylabel("error, % (dashed: training)", fontsize=9)
    caption = "Errors by epoch: training dashed, test solid; at the right the last test error."
    return Plot("activation-order", figure, caption)
