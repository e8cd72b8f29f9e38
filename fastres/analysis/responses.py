"""Layer responses: how strongly each 3x3 layer of a trained network changes the signal (He et al. 2015, Figure 7)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from fastres.analysis import blocks, checks, figures, trained, training
from fastres.analysis.blocks import Block
from fastres.analysis.checks import Check
from fastres.analysis.report import Plot, Report, Table
from fastres.errors import UserError

__all__ = ["Response", "measure", "responses"]

CLAIM = (
    "He et al. 2015 (arXiv 1512.03385, section 4.2, Figure 7): the standard deviation of the responses, the outputs "
    "of each 3x3 layer after batch norm and before the nonlinearity or addition, is generally smaller in residual "
    "networks than in plain ones of the same depth, and smaller in deeper residual networks (20, 56, 110 layers): "
    "residual functions are closer to zero than others, and an individual layer of a deep one modifies the signal "
    "less."
)
LIMITS = (
    "Batch norm starts with weights of 1, so every response starts near 1; it takes training to move it, and these "
    "networks are trained for some hundreds of steps, the paper's for 64,000. A difference of a few per cent is "
    "decided by the seed. The relative size of branch and shortcut is not in the paper: it says the same of the "
    "signal, whatever its scale, and falls with depth already at the start, since a shortcut adds up what the "
    "branches before gave."
)


@dataclass(frozen=True)
class Response:
    """A 3x3 layer.

    Attributes:
        name: of its batch norm. std: of its response, over images, pixels and channels.
    """

    name: str
    std: float


@dataclass(frozen=True)
class _Network:
    """name: of the network. how: it was trained. plain: has no shortcuts. layers: its responses, in order.
    ratios: std(F(x)) / std(s(x)) of each residual block."""

    name: str
    how: str
    plain: bool
    layers: list[Response]
    ratios: list[float]

    @property
    def mean(self) -> float:
        return fmean(layer.std for layer in self.layers)


def responses(
    *,
    models: tuple[str, ...] = ("resnet20", "plain20", "resnet32", "plain32"),
    checkpoint: tuple[str, ...] = (),
    epochs: int = 10,
    batch: int = 64,
    lr: float = 0.1,
    seed: int = 0,
    images: int = 1000,
    data: str = "digits",
    root: str = "",
) -> Report:
    """Standard deviations of the layers' responses by depth, for plain and residual networks.

    Args:
        models: plain networks and residual ones of v1, of fastres.models or package.module:callable.
        checkpoint: their weights, such as weights.pt of fastres train, in the order of the models; without, they are
            trained.
        epochs: of each training.
        batch: images a step.
        lr: learning rate at its highest.
        seed: of weights and order of the images.
        images: test images at most, on which the responses are measured.
        data: digits, cifar10, cifar100, folder or synthetic.
        root: where the files of the data are, for those that have any.

    Raises:
        UserError: for a network that is not known or is of v2, or data or weights that cannot be read.
        Stopped: if a training diverges.
    """
    trained.check_counts(1, images=images, models=len(models))
    if checkpoint and len(checkpoint) != len(models):
        raise UserError(f"--checkpoint needs a file for each of {len(models)} networks, got {len(checkpoint)}")
    loaded = training.load_data(data, root)
    test = trained.batches(loaded.test, loaded, count=images)
    networks = []
    for name, file in zip(models, checkpoint or [""] * len(models), strict=True):
        model, how = trained.get(name, loaded, checkpoint=file, epochs=epochs, batch=batch, lr=lr, seed=seed)
        parts = blocks.find(model)
        layers, ratios = measure(model, test)
        networks.append(_Network(name, how, all(block.plain for block in parts), layers, ratios))
    found = _check(networks)
    sentences = [f"{n.name} {n.mean:.3f}" for n in networks]
    relative = [f"{n.name} {fmean(n.ratios):.2f}" for n in networks if n.ratios]
    also = f" Branch over shortcut, mean of the blocks: {', '.join(relative)}." if relative else ""
    return Report(
        name="responses",
        title="Layer responses of plain and residual networks",
        claim=CLAIM,
        measured=f"Mean standard deviation of the layers' responses: {', '.join(sentences)}.{also}",
        verdict=checks.verdict(found),
        setting=(
            f"data: {data}, {sum(len(y) for _, y in test)} test images, eval mode; "
            f"{'; '.join(n.how for n in networks)}; batches of {batch}, learning rate {lr:g}, seed {seed}."
        ),
        limits=LIMITS,
        tables=[*checks.tables("responses-claims", found), *_tables(networks)],
        plots=[_plot(networks)],
    )


def measure(model: nn.Module, test: trained.Batches) -> tuple[list[Response], list[float]]:
    """The responses of a network, in order, and std(F(x)) / std(s(x)) of its residual blocks.

    Args:
        model: in the mode in which it is to run. test: the images.

    Raises:
        UserError: for a network of v2: no batch norm follows the last layer of its blocks.
    """
    parts = blocks.find(model)
    if any(block.preactivation for block in parts):
        raise UserError("responses are taken behind batch norm, which precedes the layers in a network of v2")
    moments: dict[str, _Moments] = {}
    pairs: dict[str, tuple[_Moments, _Moments]] = {}
    handles = []

    def watch(name: str, norm: nn.Module) -> None:
        moments[name] = _Moments()
        handles.append(norm.register_forward_hook(lambda _, __, y: moments[name].add(y)))

    def watch_block(block: Block) -> None:
        pairs[block.name] = _Moments(), _Moments()
        of_branch, of_shortcut = pairs[block.name]

        def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            of_shortcut.add(block.shortcut(inputs[0]))

        # The branch ends with the last batch norm: a hook there sees F(x) before the addition writes into it.
        handles.append(block.module.register_forward_pre_hook(note))
        handles.append(block.norms[-1].register_forward_hook(lambda _, __, y: of_branch.add(y)))

    stem: Any = model
    if hasattr(stem, "conv1") and hasattr(stem, "bn1") and stem.conv1.kernel_size == (3, 3):
        watch("bn1", stem.bn1)
    for block in parts:
        for i, (conv, norm) in enumerate(zip(block.convolutions, block.norms, strict=True)):
            if conv.kernel_size == (3, 3):
                watch(f"{block.name}.bn{i + 1}", norm)
        if not block.plain:
            watch_block(block)
    try:
        with torch.no_grad():  # a block with hooks inside runs its original forward
            for x, _ in test:
                model(x)
    finally:
        for handle in handles:
            handle.remove()
    found = [Response(name, moment.std()) for name, moment in moments.items()]
    return found, [branch.std() / shortcut.std() for branch, shortcut in pairs.values()]


class _Moments:
    """Standard deviation over all values of several tensors, in float64."""

    def __init__(self) -> None:
        self.count, self.sum, self.squares = 0, 0.0, 0.0

    def add(self, y: Tensor) -> None:
        y = y.detach().double()
        self.count += y.numel()
        self.sum += y.sum().item()
        self.squares += y.square().sum().item()

    def std(self) -> float:
        mean = self.sum / self.count
        return max(0.0, self.squares / self.count - mean * mean) ** 0.5


# The report ----------------------------------------------------------------------------------------------------------


def _check(networks: Sequence[_Network]) -> list[Check]:
    """Residual against plain of the same depth, and residual networks against the next shallower one."""
    found = []
    residual = sorted((n for n in networks if not n.plain), key=lambda n: len(n.layers))
    for n in residual:
        for other in networks:
            if other.plain and len(other.layers) == len(n.layers):
                claim = f"the mean response of {n.name} is smaller than that of {other.name}"
                found.append(Check(claim, f"{n.mean:.3f} and {other.mean:.3f}", n.mean < other.mean))
    for shallow, deep in zip(residual, residual[1:], strict=False):
        if len(deep.layers) > len(shallow.layers):
            claim = f"the mean response of {deep.name} is smaller than that of {shallow.name}"
            found.append(Check(claim, f"{deep.mean:.3f} and {shallow.mean:.3f}", deep.mean < shallow.mean))
    return found


def _tables(networks: Sequence[_Network]) -> list[Table]:
    rows = []
    for n in networks:
        values = torch.tensor([layer.std for layer in n.layers], dtype=torch.float64)
        ratio = fmean(n.ratios) if n.ratios else ""
        rows.append(
            (n.name, len(n.layers), n.mean, *(f.item() for f in (values.median(), values.min(), values.max())), ratio)
        )
    layers = [(n.name, i, layer.name, layer.std) for n in networks for i, layer in enumerate(n.layers, 1)]
    columns = ("network", "3x3 layers", "mean std", "median", "least", "most", "std of branch / shortcut, mean")
    return [
        Table("responses", columns, rows, "Standard deviations of the responses of the 3x3 layers"),
        Table("responses-layers", ("network", "layer", "batch norm", "std"), layers, "Every layer", long=True),
    ]


def _plot(networks: Sequence[_Network]) -> Plot:
    figure, (ordered, ranked) = figures.axes(2, width=5.2, height=3.5)
    for n, color in zip(networks, figures.cycle(len(networks)), strict=True):
        stds = [layer.std for layer in n.layers]
        style = {
            "color": color,
            "linewidth": 1.5,
            "linestyle": "--" if n.plain else "-",
            "label": f"{n.name.lstrip('_')} ({n.mean:.2f})",
        }
        ordered.plot(range(1, len(stds) + 1), stds, **style)
        ranked.plot(range(1, len(stds) + 1), sorted(stds, reverse=True), **style)
    for axis, title, x in (
        (ordered, "in their order", "3x3 layer, from the input"),
        (ranked, "ranked", "3x3 layer, by its response"),
    ):
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel(x, fontsize=9)
        axis.set_ylim(0, 1.08 * max(layer.std for n in networks for layer in n.layers))
    ranked.legend(fontsize=7.5, frameon=False, title="mean in brackets", title_fontsize=7.5, loc="lower right")
    ordered.set_ylabel("standard deviation of the response", fontsize=9)
    caption = (
        "The responses of the 3x3 layers, behind batch norm and before ReLU or addition, as in Figure 7 of the paper. "
        "Plain networks are dashed."
    )
    return Plot("responses", figure, caption)
