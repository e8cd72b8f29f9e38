"""Shortcut options A, B and C against no shortcut at all (He et al. 2015, Table 3)."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastres.analysis import curves, figures, training
from fastres.analysis.curves import Trained
from fastres.analysis.families import build, check_depths
from fastres.analysis.report import Plot, Report, Table
from fastres.summary import summarise
from fastres.train.datasets import Data

__all__ = ["shortcuts"]

CLAIM = (
    "He et al. 2015 (section 4.1, Table 3): with zero padding (A), projections where sizes change (B) and "
    'projections everywhere (C), "all three options are considerably better than the plain counterpart" (ImageNet, '
    '34 layers, top-1 error: plain 28.54 %, A 25.03 %, B 24.52 %, C 24.19 %), and "the small differences among A/B/C '
    'indicate that projection shortcuts are not essential for addressing the degradation problem".'
)
LIMITS = (
    "On a small, easy data set all three options end near the same error: their order, less than a point from first "
    "to last in the paper, is below what so few test images resolve. Times are those of one machine, and hold only "
    "if it did nothing else."
)
OPTIONS = {
    "none": "none (plain)",
    "A": "A: zero padding",
    "B": "B: some projections",
    "C": "C: all projections",
}


def shortcuts(
    *,
    depth: int = 32,
    epochs: int = 6,
    batch: int = 32,
    lr: float = 0.02,
    seeds: tuple[int, ...] = (0,),
    data: str = "digits",
    root: str = "",
) -> Report:
    """Error, parameters and time of the shortcut options A, B and C, and of the plain network.

    Args:
        depth: of the networks, 6n + 2.
        epochs: of each training.
        batch: images a step.
        lr: learning rate at its highest.
        seeds: a training for each.
        data: digits, cifar10, cifar100, folder or synthetic.
        root: where the files of the data are, for those that have any.

    Raises:
        UserError: for a depth that no network has, or data that cannot be read. Stopped: if a training diverges.
    """
    check_depths([depth])
    images = training.load_data(data, root)
    options: dict[str, Any] = {"epochs": epochs, "batch": batch, "lr": lr}
    trained = {
        option: curves.train(name, partial(_network, option, depth, len(images.classes)), images, seeds, **options)
        for option, name in OPTIONS.items()
    }
    networks = list(trained.values())
    measured, verdict = _judge(trained, images)
    return Report(
        name="shortcuts",
        title=f"Shortcut options at {depth} layers",
        claim=CLAIM,
        measured=measured,
        verdict=verdict,
        setting=curves.setting(images, data, networks[0].seeds, **options),
        limits=LIMITS,
        tables=[_table(trained, images, depth), curves.curves_table("shortcuts-curves", networks)],
        plots=[_plot(trained)],
    )


def _network(option: str, depth: int, classes: int, seed: int) -> Any:
    if option == "none":
        return build("plain", depth, classes, seed=seed)
    return build("resnet", depth, classes, seed=seed, shortcut=option)


def _judge(trained: dict[str, Trained], images: Data) -> tuple[str, str]:
    """What was measured, and the verdict: all options beat the plain network; what tells them apart is noise, or less
    than half of that."""
    seen = len(images.test) * len(trained["A"].seeds)
    plain, *errors = (trained[option].last("test_error") for option in OPTIONS)
    gain, spread = plain - max(errors), max(errors) - min(errors)
    beaten = [curves.beyond_noise(plain, error, seen) for error in errors]
    small = not curves.beyond_noise(max(errors), min(errors), seen) or spread < gain / 2
    verdict = "reproduced" if all(beaten) and small else "partly reproduced" if any(beaten) else "not reproduced"
    listed = ", ".join(f"{option} {error:.1f} %" for option, error in zip("ABC", errors, strict=True))
    beat = (
        f"all beat the plain network, by {gain:.1f} points or more" if all(beaten) else "do not all beat the plain one"
    )
    measured = (
        f"test error: plain {plain:.1f} %, {listed}. The options {beat}, and are {spread:.1f} points apart; B has "
        f"{_more(trained, 'B')} more parameters than A, C {_more(trained, 'C')}."
    )
    return measured, verdict


def _more(trained: dict[str, Trained], option: str) -> str:
    return f"{100 * (trained[option].parameters / trained['A'].parameters - 1):.1f} %"


def _table(trained: dict[str, Trained], images: Data, depth: int) -> Table:
    (first, _), size = images.test.__getitems__([0]), len(images.classes)  # type: ignore[misc]  # digits have no error
    columns = (
        "shortcut", "parameters", "M multiply-adds", "training error, %", "test error, %", "ms an image, training"
    )  # fmt: skip
    rows = [
        (
            OPTIONS[option],
            network.parameters,
            summarise(_network(option, depth, size, seed=0), tuple(first.shape)).multiply_adds / 1e6,
            network.last("train_error"),
            network.last("test_error"),
            network.milliseconds(),
        )
        for option, network in trained.items()
    ]
    return Table("shortcuts", columns, rows, "In the last epoch, means over the seeds; time of the fastest epoch")


def _plot(trained: dict[str, Trained]) -> Plot:
    figure, (errors, costs) = figures.axes(2)
    colors = (figures.COLORS[5], figures.COLORS[0], figures.COLORS[3], figures.COLORS[2])
    curves.draw(errors, list(trained.values()), colors, top=100)
    errors.set_ylabel("error, % (dashed: training)", fontsize=9)
    for (option, network), color in zip(trained.items(), colors, strict=True):
        parameters, error = network.parameters / 1e3, network.last("test_error")
        costs.plot(parameters, error, "o", color=color, markersize=8)
        costs.annotate(option, (parameters, error), (6, 6), textcoords="offset points", fontsize=9, color=color)
    costs.set_xlabel("parameters, thousands", fontsize=9)
    costs.set_ylabel("test error in the last epoch, %", fontsize=9)
    costs.set_ylim(0, 1.15 * max(network.last("test_error") for network in trained.values()) + 1)
    costs.margins(x=0.2)
    return Plot("shortcuts", figure, "Left: errors by epoch, training dashed, test solid. Right: what parameters buy.")
