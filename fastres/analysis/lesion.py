"""Lesions: what is left of a trained network when blocks are dropped or change places (Veit et al. 2016)."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import combinations
from statistics import fmean, median
from typing import Any

import numpy as np
from torch import nn

from fastres.analysis import blocks, checks, figures, trained, training
from fastres.analysis.blocks import Block, replaced
from fastres.analysis.checks import Check
from fastres.analysis.report import Plot, Report, Table
from fastres.errors import UserError

__all__ = ["kendall_tau", "lesion"]

CLAIM = (
    "Veit et al. 2016 (arXiv 1605.06431, section 4): dropping any one block of a trained residual network hardly "
    "changes its error, dropping any one layer of VGG brings it to chance. Dropping more blocks, or letting blocks "
    "change places, raises the error of a residual network smoothly. The paper's networks: ResNet-110 (54 blocks) and "
    "a VGG of 15 layers, trained on CIFAR-10."
)
LIMITS = (
    "Networks and data are small. A block is a larger part of a short network: the paper's has 54. Blocks that change "
    "sizes cannot be the identity: a residual one keeps its projection or zero padding, a plain one is replaced by "
    "every other pixel and zeros for new channels; such blocks never change places. Batch norm keeps the running "
    "statistics of the whole network. Unlike VGG, our plain networks have batch norm."
)
#: What counts as little, in points of error, and as much, as a share of the way from the error to that of guessing.
LITTLE, MUCH = 5.0, 0.5
SWAPS = (1, 2, 4, 8, 16, 32)


@dataclass
class _Lesions:
    """What was measured in one network: errors in per cent.

    Attributes:
        name: of the network. how: it was trained. plain: has no shortcuts. count: of its blocks. error: as it is.
        single: (what was dropped, whether it changes sizes, error), for each block.
        layers: the same for each layer of a plain network.
        removed: errors by the number of dropped blocks. order: (number of swaps, Kendall's tau, error).
    """

    name: str
    how: str
    plain: bool
    count: int
    error: float
    single: list[tuple[str, bool, float]] = field(default_factory=list)
    layers: list[tuple[str, bool, float]] = field(default_factory=list)
    removed: dict[int, list[float]] = field(default_factory=dict)
    order: list[tuple[int, float, float]] = field(default_factory=list)

    def rises(self) -> list[float]:
        """By which a single dropped block raises the error, in points."""
        return [error - self.error for _, _, error in self.single]


def lesion(
    *,
    models: tuple[str, ...] = ("resnet56_v2", "resnet20", "plain20"),
    checkpoint: tuple[str, ...] = (),
    epochs: int = 10,
    batch: int = 64,
    lr: float = 0.1,
    seed: int = 0,
    repeats: int = 5,
    images: int = 1000,
    data: str = "digits",
    root: str = "",
) -> Report:
    """Drops and reorders the blocks of trained networks: error against what is missing.

    Args:
        models: networks of fastres.models, or package.module:callable.
        checkpoint: their weights, such as weights.pt of fastres train, in the order of the models; without, they are
            trained.
        epochs: of each training.
        batch: images a step.
        lr: learning rate at its highest.
        seed: of weights, order of the images, and what is dropped.
        repeats: random choices for each number of dropped blocks, and of swaps.
        images: test images at most.
        data: digits, cifar10, cifar100, folder or synthetic.
        root: where the files of the data are, for those that have any.

    Raises:
        UserError: for a network that is not known or has no blocks, or data or weights that cannot be read.
        Stopped: if a training diverges.
    """
    trained.check_counts(1, repeats=repeats, images=images, models=len(models))
    if checkpoint and len(checkpoint) != len(models):
        raise UserError(f"--checkpoint needs a file for each of {len(models)} networks, got {len(checkpoint)}")
    loaded = training.load_data(data, root)
    test = trained.batches(loaded.test, loaded, count=images)
    networks = []
    for name, file in zip(models, checkpoint or [""] * len(models), strict=True):
        model, how = trained.get(name, loaded, checkpoint=file, epochs=epochs, batch=batch, lr=lr, seed=seed)
        networks.append(_study(name, how, model, test, repeats, random.Random(seed)))
    chance = 100 * (1 - 1 / len(loaded.classes))
    found = _check(networks, chance)
    return Report(
        name="lesion",
        title="Lesion study: networks without some of their blocks",
        claim=CLAIM,
        measured="; ".join(_sentence(network) for network in networks) + ".",
        verdict=checks.verdict(found),
        setting=(
            f"data: {data}, {sum(len(y) for _, y in test)} test images; {'; '.join(n.how for n in networks)}. "
            f"Nothing is trained after a lesion. {repeats} random choices for each number of dropped blocks and of "
            f"swapped pairs; seed {seed}. Guessing has an error of {chance:.0f} %."
        ),
        limits=LIMITS,
        tables=[*checks.tables("lesion-claims", found), *_tables(networks)],
        plots=[_plot(networks, chance)],
    )


def kendall_tau(order: list[int]) -> float:
    """Kendall's rank correlation of a permutation of 0 .. n - 1 with their order: 1 - 4 inversions / (n (n - 1))."""
    n = len(order)
    inversions = sum(a > b for a, b in combinations(order, 2))
    return 1 - 4 * inversions / (n * (n - 1)) if n > 1 else 1.0


def _study(name: str, how: str, model: nn.Module, test: trained.Batches, repeats: int, draw: random.Random) -> _Lesions:
    parts = blocks.find(model)
    found = _Lesions(name, how, all(block.plain for block in parts), len(parts), trained.error(model, test))

    def error_with(new: dict[str, nn.Module]) -> float:
        with replaced(model, new):
            return trained.error(model, test)

    for block in parts:
        found.single.append((block.name, block.changes_size, error_with({block.name: block.without_branch()})))
        for i, conv in enumerate(block.convolutions if block.plain else ()):
            changes = conv.stride != (1, 1) or conv.in_channels != conv.out_channels
            error = error_with({block.name: block.without_layer(i)})
            found.layers.append((f"{block.name}.conv{i + 1}", changes, error))
    for count in np.unique(np.linspace(1, len(parts), min(len(parts), 10)).round().astype(int)).tolist():
        chosen = [draw.sample(parts, count) for _ in range(repeats if count < len(parts) else 1)]
        found.removed[count] = [error_with({block.name: block.without_branch() for block in some}) for some in chosen]
    for swaps in SWAPS if _pairs(parts) else ():
        for _ in range(repeats):
            order = _reordered(parts, swaps, draw)
            error = error_with({parts[i].name: parts[j].module for i, j in enumerate(order) if i != j})
            found.order.append((swaps, kendall_tau(order), error))
    return found


def _pairs(parts: list[Block]) -> list[tuple[int, int]]:
    """The pairs of blocks that may change places: neither changes sizes, and both have the same."""
    alike: dict[int, list[int]] = defaultdict(list)
    for i, block in enumerate(parts):
        if not block.changes_size:
            alike[block.convolutions[0].in_channels].append(i)
    return [pair for group in alike.values() for pair in combinations(group, 2)]


def _reordered(parts: list[Block], swaps: int, draw: random.Random) -> list[int]:
    """Which block stands at each place after some swaps of pairs."""
    order, pairs = list(range(len(parts))), _pairs(parts)
    for _ in range(swaps):
        i, j = draw.choice(pairs)
        order[i], order[j] = order[j], order[i]
    return order


# The report ----------------------------------------------------------------------------------------------------------


def _check(networks: list[_Lesions], chance: float) -> list[Check]:
    found = []
    for n in networks:
        rise = median(n.rises())
        text = f"{n.name}: median rise {rise:.1f} points"
        if n.plain:
            bound = MUCH * max(0.0, chance - n.error)
            claim = (
                f"dropping one block of {n.name} costs much: at least {bound:.0f} points, half of the way to guessing"
            )
            found.append(Check(claim, text, rise >= bound > 0))
            continue
        found.append(
            Check(f"dropping one block of {n.name} costs little: at most {LITTLE:g} points", text, rise <= LITTLE)
        )
        if len(n.removed) > 2:
            means = {0: n.error} | {count: fmean(errors) for count, errors in n.removed.items()}
            counts = sorted(means)
            steps = [(means[b] - means[a]) / (b - a) for a, b in zip(counts, counts[1:], strict=False)]
            whole = means[counts[-1]] - n.error
            claim = (
                f"dropping more blocks of {n.name} raises the error smoothly: no block more than half of the whole rise"
            )
            found.append(Check(claim, f"at most {max(steps):.1f} of {whole:.1f} points", 0 < max(steps) <= whole / 2))
        if len({tau for _, tau, _ in n.order}) > 2:
            r = float(np.corrcoef([1 - tau for _, tau, _ in n.order], [error for _, _, error in n.order])[0, 1])
            claim = f"the more the blocks of {n.name} change places, the higher the error: correlation above 0.5"
            found.append(Check(claim, f"correlation of 1 - tau and error {r:.2f}", r > 0.5))
    return found


def _sentence(n: _Lesions) -> str:
    rises = n.rises()
    kept = [e - n.error for _, changes, e in n.single if not changes]
    text = (
        f"{n.name} ({n.count} blocks, error {n.error:.1f} %): one block less, {median(rises):+.1f} points in the "
        f"median, {max(rises):+.1f} at most"
    )
    return text + (f" ({max(kept):+.1f} among those that keep sizes)" if kept and len(kept) < len(rises) else "")


def _tables(networks: list[_Lesions]) -> list[Table]:
    def of(rises: list[float]) -> tuple[float, ...]:
        return min(rises), median(rises), max(rises)

    summary = []
    for n in networks:
        for what, single in (("block", n.single), ("layer", n.layers)):
            for changes in (False, True):
                rises = [error - n.error for _, resizes, error in single if resizes is changes]
                if rises:
                    summary.append((n.name, what, "changes" if changes else "keeps", len(rises), n.error, *of(rises)))
    columns = ("network", "dropped", "sizes", "number", "error %", "least rise, points", "median", "most")
    everything = [
        (n.name, what, name, "changes" if changes else "keeps", error, error - n.error)
        for n in networks
        for what, each in (("block", n.single), ("layer", n.layers))
        for name, changes, error in each
    ]
    removed = [
        (n.name, count, count / n.count, fmean(errors), min(errors), max(errors))
        for n in networks
        for count, errors in ({0: [n.error]} | n.removed).items()
    ]
    order = []
    for n in networks:
        for swaps in sorted({swaps for swaps, _, _ in n.order}):
            taus, errors = zip(*[(tau, error) for s, tau, error in n.order if s == swaps], strict=True)
            order.append((n.name, swaps, fmean(taus), fmean(errors), min(errors), max(errors)))
    spread = ("mean error %", "least", "most")
    return [
        Table("lesion", columns, summary, "One block, or one layer, is dropped"),
        Table(
            "lesion-single",
            ("network", "dropped", "name", "sizes", "error %", "rise"),
            everything,
            "Each one",
            long=True,
        ),
        Table("lesion-removed", ("network", "dropped", "share", *spread), removed, "Some blocks are dropped at random"),
        Table("lesion-order", ("network", "swaps", "Kendall's tau", *spread), order, "Pairs of blocks change places"),
    ]


def _plot(networks: list[_Lesions], chance: float) -> Plot:
    figure, (one, many, moved) = figures.axes(3, width=4.2, height=3.7)
    for n, color in zip(networks, figures.cycle(len(networks)), strict=True):
        at = np.linspace(0, 1, n.count) if n.count > 1 else np.zeros(1)
        errors = np.array([error for _, _, error in n.single])
        changes = np.array([changes for _, changes, _ in n.single])
        one.plot(at, errors, "-", color=color, linewidth=1.5, label=f"{n.name.lstrip('_')}: {n.error:.1f} % as it is")
        one.plot(at[~changes], errors[~changes], "o", color=color, markersize=4)
        one.plot(at[changes], errors[changes], "s", color=color, markersize=6, markerfacecolor="white")
        removed = {0: [n.error]} | n.removed
        counts = np.array(sorted(removed)) / n.count
        columns = [removed[count] for count in sorted(removed)]
        many.plot(counts, [fmean(c) for c in columns], "o-", color=color, markersize=3, linewidth=1.5)
        many.fill_between(
            counts, [min(c) for c in columns], [max(c) for c in columns], color=color, alpha=0.15, linewidth=0
        )
        if n.order:
            taus, after = zip(*[(tau, error) for _, tau, error in n.order], strict=True)
            moved.plot(taus, after, "o", color=color, markersize=4, alpha=0.7)
    _finish(one, "one block dropped", "its place in the network (first 0, last 1)", chance)
    _finish(many, "some blocks dropped", "share of the blocks that are dropped", chance)
    _finish(moved, "blocks change places", "order that is left (Kendall's tau; 1: all)", chance)
    moved.invert_xaxis()
    one.set_ylabel("test error, %", fontsize=9)
    figure.legend(*one.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    caption = (
        "Test error after a lesion. Left: without one block; open squares are blocks that change sizes. Middle: "
        "without some, chosen at random; mean and range. Right: with pairs of blocks of one size swapped; the blocks "
        "of the three stages keep their stage. Dotted: guessing."
    )
    return Plot("lesion", figure, caption)


def _finish(axis: Any, title: str, x: str, chance: float) -> None:
    axis.axhline(chance, color="#6b7a88", linewidth=1, linestyle=":")
    axis.set_ylim(-2, 104)
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlabel(x, fontsize=9)
