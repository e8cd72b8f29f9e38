"""Residual networks as ensembles: how many paths of each length there are, and how much gradient comes along them
(Veit et al. 2016)."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from statistics import fmean

import numpy as np

from fastres.analysis import blocks, checks, figures, trained, training
from fastres.analysis.checks import Check
from fastres.analysis.report import Plot, Report, Table
from fastres.analysis.unravelled import Paths
from fastres.errors import UserError

__all__ = ["central", "counts", "paths"]

CLAIM = (
    "Veit et al. 2016 (arXiv 1605.06431, section 5, Figure 6): n residual blocks form 2^n paths, whose lengths are "
    "binomially distributed. The gradient that arrives along a path falls exponentially with its length. So nearly "
    "all gradient comes along paths that are shorter than most: of 54 blocks, along those of 5 to 17, which are 0.45 "
    "% of the paths."
)
LIMITS = (
    "One network, trained shortly on a small data set. As in the paper, the gradient of a length is the number of its "
    "paths times the mean norm of sampled ones: it would be reached only if all of them pointed the same way, and "
    "a few large norms decide the mean. The exact sums add the gradients as vectors: they need no sampling, and what "
    "cancels is gone. A path is one of the backward pass; the forward pass is that of the whole network."
)
SHARE = 0.95


def paths(
    *,
    model: str = "resnet56_v2",
    checkpoint: str = "",
    epochs: int = 10,
    batch: int = 64,
    lr: float = 0.1,
    seed: int = 0,
    batches: int = 4,
    images: int = 16,
    samples: int = 25,
    data: str = "digits",
    root: str = "",
) -> Report:
    """The paths of a residual network: their number and their gradient, by length.

    Args:
        model: a residual network of fastres.models, or package.module:callable.
        checkpoint: its weights, such as weights.pt of fastres train; without, it is trained.
        epochs: of the training.
        batch: images a step of the training.
        lr: learning rate at its highest.
        seed: of weights, order of the images, and choice of the paths.
        batches: batches of training images on which gradients are measured.
        images: in each of these batches.
        samples: paths of each length on each batch; the paper has 1,000 in all.
        data: digits, cifar10, cifar100, folder or synthetic.
        root: where the files of the data are, for those that have any.

    Raises:
        UserError: for a network that is not known or not residual, or data or weights that cannot be read.
        Stopped: if the training diverges.
    """
    trained.check_counts(1, batches=batches, samples=samples)
    trained.check_counts(2, images=images)  # batch norm needs more than one
    loaded = training.load_data(data, root)
    net, how = trained.get(model, loaded, checkpoint=checkpoint, epochs=epochs, batch=batch, lr=lr, seed=seed)
    parts = blocks.find(net)
    if any(block.plain for block in parts):
        raise UserError(f"{model} is a plain network: without shortcuts there is only one path")
    net.train()  # batch norm as in training: the paper's question is which paths train a network
    draw = random.Random(seed)
    n = len(parts)
    norms: list[list[float]] = [[] for _ in range(n + 1)]
    exact: list[list[float]] = [[] for _ in range(n + 1)]
    found = trained.batches(loaded.train, loaded, count=batches * images, batch=images, shuffle=seed)
    for x, y in found:
        unravelled = Paths(net, x, y)
        for length, sum_of_paths in enumerate(unravelled.sums()):
            exact[length].append(sum_of_paths.norm().item())
            chosen = [set(draw.sample(range(n), length)) for _ in range(samples if 0 < length < n else 1)]
            norms[length] += [unravelled.gradient(branches).norm().item() for branches in chosen]
    means = [fmean(values) for values in norms]
    total = _shares([count * mean for count, mean in zip(counts(n), means, strict=True)])
    sums = _shares([fmean(values) for values in exact])
    judged = _check(n, means, total)
    return Report(
        name="paths",
        title="Ensemble view: the paths of a residual network",
        claim=CLAIM,
        measured=_sentence(model, n, means, total, sums),
        verdict=checks.verdict(judged),
        setting=(
            f"data: {data}; {how}, {n} residual blocks. Norms of the gradient of the mean cross-entropy with respect "
            f"to {len(found)} batches of {images} training images, batch norm in training mode; {samples} random "
            f"paths of each length on each batch; seed {seed}."
        ),
        limits=LIMITS,
        tables=[*checks.tables("paths-claims", judged), _table(n, norms, exact, total, sums)],
        plots=[_plot(n, norms, total, sums)],
    )


def counts(n: int) -> list[int]:
    """Number of paths of each length, 0 to n, through n blocks: n over k."""
    return [math.comb(n, k) for k in range(n + 1)]


def central(shares: Sequence[float], share: float = SHARE) -> tuple[int, int]:
    """The lengths first..last that hold a share of a distribution, with at most half of the rest on each side."""
    rest = (1 - share) / 2
    below = np.cumsum(shares)
    first = int(np.searchsorted(below, rest, side="right"))
    return first, int(np.searchsorted(below, 1 - rest, side="left"))


def _shares(values: Sequence[float]) -> list[float]:
    total = math.fsum(values)
    if not (math.isfinite(total) and total > 0):
        raise UserError(f"there is no gradient to share out: the norms add up to {total}")
    return [value / total for value in values]


def _mean(shares: Sequence[float]) -> float:
    """Mean length."""
    return math.fsum(length * share for length, share in enumerate(shares))


def _fall(means: Sequence[float]) -> tuple[float, float]:
    """The line through log(norm) against length: by which factor a norm changes with each block, and how well the line
    fits (R^2)."""
    lengths = np.arange(len(means))
    logs = np.log(np.maximum(means, np.finfo(float).tiny))
    slope, start = np.polyfit(lengths, logs, 1)
    spread = float(((logs - logs.mean()) ** 2).sum())
    rest = float(((logs - (start + slope * lengths)) ** 2).sum())
    return math.exp(slope), 1 - rest / spread if spread else 0.0


def _check(n: int, means: Sequence[float], total: Sequence[float]) -> list[Check]:
    factor, fit = _fall(means)
    first, last = central(total)
    return [
        Check(
            "the gradient along a path falls exponentially with its length: factor below 1 a block, R^2 of the logs "
            "above 0.9",
            f"factor {factor:.3f}, R^2 {fit:.3f}",
            factor < 1 and fit > 0.9,
        ),
        Check(
            "paths shorter than the average path contribute most: mean length of the gradient below n / 2",
            f"{_mean(total):.1f} of {n} blocks; average path {n / 2:g}",
            _mean(total) < n / 2,
        ),
        Check(
            f"nearly all of it ({SHARE:.0%}) comes along paths shorter than n / 2",
            f"lengths {first} to {last}; n / 2 is {n / 2:g}",
            last < n / 2,
        ),
    ]


def _sentence(name: str, n: int, means: Sequence[float], total: Sequence[float], sums: Sequence[float]) -> str:
    number = counts(n)
    every = _shares([float(count) for count in number])
    (few, many), (first, last) = central(every), central(total)
    (low, high), (factor, _) = central(sums), _fall(means)
    effective = math.fsum(every[first : last + 1])
    return (
        f"{name} has {sum(number):,} paths through {n} blocks; {SHARE:.0%} of them are {few} to {many} blocks long. "
        f"The norm of a path's gradient changes by a factor of {factor:.2f} with every block. {SHARE:.0%} of the "
        f"gradient (number of paths times mean norm) comes along lengths {first} to {last}, mean {_mean(total):.1f}; "
        f"these are {effective:.2%} of the paths. Added up as vectors, lengths {low} to {high} hold {SHARE:.0%} of "
        f"the norms, mean {_mean(sums):.1f}."
    )


def _table(
    n: int,
    norms: Sequence[Sequence[float]],
    exact: Sequence[Sequence[float]],
    total: Sequence[float],
    sums: Sequence[float],
) -> Table:
    columns = (
        "length",
        "paths",
        "mean norm",
        "least",
        "most",
        "paths x mean, share",
        "norm of their sum",
        "sum, share",
    )
    rows = [
        (k, count, fmean(norms[k]), min(norms[k]), max(norms[k]), total[k], fmean(exact[k]), sums[k])
        for k, count in enumerate(counts(n))
    ]
    return Table("paths", columns, rows, "Paths by the number of branches on them, and the gradient along them")


def _plot(n: int, norms: Sequence[Sequence[float]], total: Sequence[float], sums: Sequence[float]) -> Plot:
    figure, (number, norm, share) = figures.axes(3, width=4.2, height=3.4)
    lengths = np.arange(n + 1)
    green, red, blue = figures.COLORS[:3]
    number.bar(lengths, [100 * count / 2**n for count in counts(n)], color=blue, width=0.85)
    number.set_ylabel("share of the paths, %", fontsize=9)
    means = [fmean(values) for values in norms]
    norm.plot(lengths, means, "o-", color=green, markersize=3, linewidth=1.5)
    norm.fill_between(lengths, [min(v) for v in norms], [max(v) for v in norms], color=green, alpha=0.2, linewidth=0)
    norm.set_yscale("log")
    norm.tick_params(which="both", labelsize=8)
    norm.set_ylabel("norm of the gradient at the images", fontsize=9)
    share.bar(
        lengths, [100 * value for value in total], color=green, width=0.85, label="paths x mean norm (the paper's)"
    )
    share.plot(
        lengths, [100 * value for value in sums], "o-", color=red, markersize=3, linewidth=1.2, label="exact sums"
    )
    share.axvline(n / 2, color=figures.COLORS[5], linewidth=1, linestyle=":", label="length of the average path")
    share.set_ylabel("share of the gradient, %", fontsize=9)
    share.set_ylim(top=1.3 * 100 * max(*total, *sums))  # room for the legend
    share.legend(fontsize=7.5, framealpha=1, edgecolor="white", loc="upper right")
    titles = ("paths of each length", "gradient along one path", "gradient along all of them")
    for axis, title in zip((number, norm, share), titles, strict=True):
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel("length: branches on the path", fontsize=9)
        axis.xaxis.get_major_locator().set_params(integer=True)
    caption = (
        "Left: the number of paths of each length. Middle: the norm of the gradient that arrives at the images along "
        "one path, mean and range of random ones. Right: what all paths of a length contribute."
    )
    return Plot("paths", figure, caption)
