"""Gradients of plain, post-activation and pre-activation networks by layer, at initialisation and in training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from fastres.analysis import curves, figures, identity, training
from fastres.analysis.families import FAMILIES, build, check_depths, check_families, title
from fastres.analysis.report import Plot, Report, Table
from fastres.errors import UserError
from fastres.train.datasets import Data

__all__ = ["gradient_flow"]

CLAIM = (
    'He et al. 2015 (section 4.1): the trouble of deep plain networks is "unlikely to be caused by vanishing '
    'gradients": with batch norm "the backward propagated gradients exhibit healthy norms". He et al. 2016 (section '
    "2): through identity shortcuts a term of the gradient reaches every earlier block as it is, dL/dx = dL/dy "
    "(dF/dx + 1), so that it does not vanish however small the weights are."
)
LIMITS = (
    "Norms are those at initialisation and in some dozens of steps; a network trained to the end may differ. The "
    "identity says that a term 1 is there, not that the sum is at least 1, as it is often put: the two terms can "
    "cancel in part, and the ReLU of a v1 block drops the gradient where it is off. Gradients of weights before a "
    "batch norm scale with one over the norm of the weights, so those of different layers compare only roughly; "
    "dL/dx does not depend on that."
)
#: Gradients that are this many times larger at one end of a network than at the other are not healthy.
HEALTHY = 1000.0
#: What central differences in float64 have to reach.
EXACT = 1e-5


class WeightGradients:
    """Norms of the gradients of the weights of all convolutions, noted at every step of a training.

    Attributes:
        names: of the layers, from the input on. steps: for every layer, a norm a step.
    """

    def __init__(self, model: nn.Module) -> None:
        convolutions = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
        self.names = list(convolutions)
        self.steps: list[list[float]] = [[] for _ in self.names]
        for norms, module in zip(self.steps, convolutions.values(), strict=True):
            module.weight.register_post_accumulate_grad_hook(partial(self._note, norms))

    @staticmethod
    def _note(norms: list[float], weight: Tensor) -> None:
        assert weight.grad is not None
        norms.append(weight.grad.norm().item())

    def at_first(self) -> list[float]:
        """At the first step: of the network as it was initialised."""
        return [norms[0] for norms in self.steps]

    def at_last(self, steps: int) -> list[float]:
        """Geometric mean over the last steps."""
        return [_geometric_mean(norms[-steps:]) for norms in self.steps]


@dataclass(frozen=True)
class Flow:
    """The gradients of one network.

    Attributes:
        layers: names of its convolutions, from the input on. first: norms of their weights' gradients at
            initialisation. trained: the same in the last epoch of training. blocks: see `identity.Block`, at
            initialisation.
    """

    name: str
    layers: list[str]
    first: list[float]
    trained: list[float]
    blocks: list[identity.Block]

    @property
    def growth(self) -> float:
        """Geometric mean over the blocks of |dL/dx| / |dL/dy|."""
        return _geometric_mean([block.growth for block in self.blocks])

    @property
    def whole(self) -> float:
        """The gradient at the input of the first block over that at the output of the last."""
        return self.blocks[0].of_input / self.blocks[-1].of_output


def gradient_flow(
    *,
    depths: tuple[int, ...] = (20, 32, 56),
    families: tuple[str, ...] = FAMILIES,
    epochs: int = 1,
    batch: int = 32,
    lr: float = 0.02,
    probe: int = 16,
    seed: int = 0,
    data: str = "digits",
    root: str = "",
) -> Report:
    """Norms of gradients through plain and residual networks, and dL/dx = dL/dy (dF/dx + 1) checked numerically.

    Args:
        depths: of the networks, 6n + 2; the verdict is that of the deepest.
        families: plain, resnet (v1) and resnet_v2, or some of them.
        epochs: of each training, in which the norms of every step are noted.
        batch: images a step.
        lr: learning rate at its highest.
        probe: images of the pass in float64 in which blocks are taken apart, at initialisation.
        seed: of weights, order of the images and augmentation.
        data: digits, cifar10, cifar100, folder or synthetic.
        root: where the files of the data are, for those that have any.

    Raises:
        UserError: for an unknown depth or family, or data that cannot be read. Stopped: if a training diverges.
    """
    found, families = check_depths(depths), tuple(check_families(families))
    images = training.load_data(data, root)
    if not 2 <= probe <= len(images.train):
        raise UserError(f"--probe must be from 2 to {len(images.train)} images, not {probe}")
    options: dict[str, Any] = {"epochs": epochs, "batch": batch, "lr": lr}
    flows = {
        (family, depth): _flow(family, depth, images, probe, seed, options) for depth in found for family in families
    }
    measured, verdict = _judge({family: flows[family, found[-1]] for family in families}, list(flows.values()))
    return Report(
        name="gradient-flow",
        title="Gradient flow through plain and residual networks",
        claim=CLAIM,
        measured=measured,
        verdict=verdict,
        setting=f"{curves.setting(images, data, (seed,), **options)} Blocks: {probe} training images, float64, "
        f"batch statistics, central differences with step {identity.STEP:g} along {identity.DIRECTIONS} directions.",
        limits=LIMITS,
        tables=[_summary(flows), _layers(flows), _blocks(flows)],
        plots=[_plot_layers(flows, found, families), _plot_blocks(flows, found, families)],
    )


def _flow(family: str, depth: int, images: Data, probe: int, seed: int, options: dict[str, Any]) -> Flow:
    make = partial(build, family, depth, len(images.classes), seed=seed)
    blocks = identity.blocks(make(), *_batch(images, probe), seed=seed)
    model, name = make(), title(family, depth)
    gradients = WeightGradients(model)
    training.train(model, name, images, seed=seed, **options)
    steps = math.ceil(len(images.train) / options["batch"])
    return Flow(name, gradients.names, gradients.at_first(), gradients.at_last(steps), blocks)


def _batch(images: Data, count: int) -> tuple[Tensor, Tensor]:
    """The first training images, (count, 3, H, W), normalised, and their labels."""
    images.train.set_epoch(0, 0)
    found = images.train.__getitems__(range(count))
    if isinstance(found, UserError):
        raise found
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) * 255 for values in (images.mean, images.std))
    return (found[0] - mean) / std, found[1]


def _geometric_mean(values: list[float]) -> float:
    return math.exp(fmean(math.log(max(value, 1e-300)) for value in values))


def _judge(deepest: dict[str, Flow], flows: list[Flow]) -> tuple[str, str]:
    """What was measured, and the verdict: the identity is exact, gradients of the plain network are healthy, those
    through shortcuts neither vanish nor change as much from block to block."""
    blocks = [block for flow in flows for block in flow.blocks]
    worst = max(max(block.error, block.difference_error) for block in blocks)
    kept = [worst < EXACT]
    parts = [
        f"dL/dx is dL/dy (dF/dx + 1), in plain blocks without the 1, to within {worst:.0e} in {len(blocks)} blocks"
    ]
    plain = deepest.get("plain")
    for family, flow in deepest.items():
        if family == "plain":
            kept.append(1 / HEALTHY < flow.whole < HEALTHY)
        else:
            steadier = plain is None or abs(math.log(flow.growth)) < abs(math.log(plain.growth))
            kept.append(flow.whole > 1 / HEALTHY and steadier)
        how = "vanishes" if flow.whole < 1 / HEALTHY else "explodes" if flow.whole > HEALTHY else "stays within 1000"
        parts.append(
            f"{flow.name}: the gradient {how}: before the first block {_times(flow.whole)} times that after the last, "
            f"{flow.growth:.3g} times a block"
        )
    verdict = "reproduced" if all(kept) else "partly reproduced" if any(kept) else "not reproduced"
    return "; ".join(parts) + ".", verdict


def _times(factor: float) -> str:
    return f"{factor:,.0f}" if factor >= 10 else f"{factor:.2g}"


def _summary(flows: dict[tuple[str, int], Flow]) -> Table:
    columns = (
        "network", "|dL/dx| first block / |dL/dy| last", "growth a block", "least growth of a block",
        "weights, first stage / last, initial", "the same in training", "error of the identity",
        "error of its central differences",
    )  # fmt: skip
    rows = [
        (
            flow.name,
            flow.whole,
            flow.growth,
            min(block.growth for block in flow.blocks),
            _first_to_last_stage(flow, flow.first),
            _first_to_last_stage(flow, flow.trained),
            max(block.error for block in flow.blocks),
            max(block.difference_error for block in flow.blocks),
        )
        for flow in flows.values()
    ]
    return Table("gradient-flow", columns, rows, "Gradients at initialisation, and of weights in the last epoch too")


def _first_to_last_stage(flow: Flow, norms: list[float]) -> float:
    """Of the weights' gradients of the first stage to those of the last: ratio of geometric means."""
    first, last = (
        _geometric_mean([norm for name, norm in zip(flow.layers, norms, strict=True) if name.startswith(stage)])
        for stage in ("layer1.", "layer3.")
    )
    return first / last


def _layers(flows: dict[tuple[str, int], Flow]) -> Table:
    rows = [
        (flow.name, i, name, first, trained)
        for flow in flows.values()
        for i, (name, first, trained) in enumerate(zip(flow.layers, flow.first, flow.trained, strict=True), 1)
    ]
    columns = ("network", "layer", "name", "at initialisation", "in the last epoch")
    return Table(
        "gradient-flow-layers", columns, rows, "Norms of the gradients of all convolutions' weights", long=True
    )


def _blocks(flows: dict[tuple[str, int], Flow]) -> Table:
    columns = (
        "network", "block", "|dL/dy|", "|dL/dx|", "growth", "|J^T g|, through the branch", "|g|, through the shortcut",
        "error of the identity", "error of its central differences",
    )  # fmt: skip
    rows = [
        (flow.name, b.name, b.of_output, b.of_input, b.growth, b.through_branch, b.through_shortcut, b.error,
         b.difference_error)
        for flow in flows.values()
        for b in flow.blocks
    ]  # fmt: skip
    return Table("gradient-flow-blocks", columns, rows, "Gradients through the blocks, at initialisation", long=True)


def _plot_layers(flows: dict[tuple[str, int], Flow], depths: list[int], families: tuple[str, ...]) -> Plot:
    """A column for each family, rows for initialisation and training, a curve for each depth."""
    figure, axes = figures.axes(len(families), 2, width=3.1, height=2.4)
    lowest = min(min(flow.first + flow.trained) for flow in flows.values())
    highest = max(max(flow.first + flow.trained) for flow in flows.values())
    for i, axis in enumerate(axes):
        family = families[i % len(families)]
        training = i >= len(families)
        axis.set_yscale("log")
        axis.set_ylim(lowest / 2, highest * 2)
        axis.minorticks_off()
        labels = []
        for depth, color in zip(depths, (figures.COLORS[j % 6] for j in range(len(depths))), strict=True):
            norms = flows[family, depth].trained if training else flows[family, depth].first
            places = [k / (len(norms) - 1) for k in range(len(norms))]
            axis.plot(places, norms, "-", color=color, linewidth=1.4)
            labels.append((norms[-1], title(family, depth), color))
        curves.label_ends(axis, labels)
        axis.set_title("last epoch of training" if training else "initialisation", fontsize=10, loc="left")
        if i >= len(families):
            axis.set_xlabel("layer, 0: first, 1: last", fontsize=9)
        if i % len(families) == 0:
            axis.set_ylabel("norm of the weights' gradient", fontsize=9)
        axis.tick_params(labelbottom=i >= len(families), labelleft=i % len(families) == 0)
    return Plot("gradient-flow-layers", figure, "Norms of the gradients of the convolutions' weights, layer by layer.")


def _plot_blocks(flows: dict[tuple[str, int], Flow], depths: list[int], families: tuple[str, ...]) -> Plot:
    """dL/dx of every block over that after the last one: an axis for each depth, a curve for each family."""
    figure, axes = figures.axes(len(depths), width=4.2)
    ratios = {key: [b.of_input / flow.blocks[-1].of_output for b in flow.blocks] for key, flow in flows.items()}
    values = [ratio for found in ratios.values() for ratio in found]
    for axis, depth in zip(axes, depths, strict=True):
        axis.set_yscale("log")
        axis.set_ylim(min(values) / 2, max(values) * 2)
        axis.axhline(1, color=figures.COLORS[5], linewidth=0.6)
        labels = []
        for family, color in zip(families, (figures.COLORS[i] for i in (1, 2, 0)), strict=False):
            found = ratios[family, depth]
            axis.plot(range(1, len(found) + 1), found, ".-", color=color, linewidth=1.6, markersize=4)
            labels.append((found[-1], title(family, depth), color))
        curves.label_ends(axis, labels)
        axis.set_xlabel("block with an identity, from the input on", fontsize=9)
    axes[0].set_ylabel("|dL/dx| over |dL/dy| of the last block", fontsize=9)
    caption = "Norm of the gradient at the input of each block at initialisation, over that at the output of the last."
    return Plot("gradient-flow-blocks", figure, caption)
