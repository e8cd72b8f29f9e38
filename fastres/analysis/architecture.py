"""Architecture: a network as an annotated table, and where it differs from the paper (He et al. 2015)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

from fastres import models
from fastres.analysis import checks, figures, parts, trained
from fastres.analysis import paper as papers
from fastres.analysis.checks import Check
from fastres.analysis.paper import Paper
from fastres.analysis.parts import Network, Part
from fastres.analysis.report import Plot, Report, Table
from fastres.bench.task import build_model
from fastres.errors import UserError

__all__ = ["architecture"]

LIMITS = (
    "What is compared is what a forward pass in eval mode shows: layers, shapes, shortcuts, work; not initialisation, "
    "training or weights. The receptive field is the theoretical one, along the longer axis: the pixels that can "
    "matter, not those that do. It cannot be followed through attention, upsampling and rearranged pixels (shown as "
    "?). Multiply-adds are those of convolutions and linear layers in modules. Functions called without a module, "
    "such as F.relu, are seen where they follow an addition, and not in the table of layers."
)


def architecture(*, model: str = "resnet50", size: int = 0) -> Report:
    """An annotated table of any network's blocks, and where it differs from the paper.

    Args:
        model: a network of fastres.models, or package.module:callable, such as torchvision.models:resnext50_32x4d or
            timm.models:resnet50d.
        size: height and width of the images; 0 for the network's own, 224 or 32.

    Raises:
        UserError: if there is no such network, or it does not take such images.
    """
    trained.check_counts(0, size=size)
    net = _take_apart(model, size or models.image_size(model))
    paper = papers.find(net)
    differences = papers.compare(net, paper)
    same = sum(check.holds for check in differences)
    claim = "The network is of none of the paper's depths: the paper says what its residual networks have in common."
    if paper is not None:
        quantity = (
            f"{paper.value / 1e9:g} billion multiply-adds"
            if not paper.small
            else f"{paper.value / 1e6:g} million parameters"
        )
        claim = (
            f"He et al. 2015 (arXiv 1512.03385, section {'4.2' if paper.small else '4.1, Table 1'}): {paper.name} has "
            f"{_join(paper.blocks)} blocks of {paper.kernels} convolutions and {quantity}."
        )
    return Report(
        name="architecture",
        title=f"Architecture of {model}",
        claim=claim,
        measured=_sentence(model, net, same, len(differences)),
        verdict="no claim" if paper is None else checks.verdict(differences),
        setting=f"One pass on PyTorch's meta device, eval mode, input {_join(net.summary.input_shape, ' x ')}.",
        limits=LIMITS,
        tables=[_difference_table(differences, paper), _parts_table(net), _layers_table(net)],
        plots=[_plot(net)],
    )


def _take_apart(name: str, size: int) -> Network:
    try:
        with torch.device("meta"):  # weights that nobody needs take no memory
            model = build_model(name)
    except UserError:  # some constructors compute with values, which there are none of on that device
        model = build_model(name)
    shape = (1, 3, size, size)
    try:
        net = parts.take_apart(model, shape)
    except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{name} does not take images of {_join(shape[1:], ' x ')}: {why}") from error
    if not net.parameters:
        raise UserError(f"{name} has no parameters")
    return net


# The report ----------------------------------------------------------------------------------------------------------


def _sentence(name: str, net: Network, same: int, aspects: int) -> str:
    trace = next((part.trace for part in reversed(net.blocks) if part.trace), None)
    pixels, seen = None if trace is None else trace.receptive_field, ""
    if pixels is not None:
        extent = "the whole image" if math.isinf(pixels) else f"{pixels:.0f} pixels"
        seen = f", a receptive field of {extent} behind the last block"
    return (
        f"{name}: {net.depth} layers on the longest way, {len(net.blocks)} blocks, "
        f"{net.parameters / 1e6:.2f} million parameters, {net.summary.multiply_adds / 1e6:,.0f} million multiply-adds"
        f"{seen}. {same} of {aspects} aspects are as in the paper."
    )


def _pixels(field: float | None) -> str:
    return "?" if field is None else "all" if math.isinf(field) else f"{field:.0f}"


def _difference_table(differences: Sequence[Check], paper: Paper | None) -> Table:
    rows = []
    for check in differences:
        aspect, _, theirs = check.claim.partition(": ")
        rows.append((aspect, theirs, check.measured.partition(": ")[2], "yes" if check.holds else "no"))
    whose = paper.name if paper is not None else "the paper's residual networks"
    return Table("architecture-paper", ("aspect", whose, "here", "same"), rows, "Where it differs from the paper")


def _note(part: Part) -> str:
    """What is worth knowing of a part."""
    notes = []
    if part.additions:
        if len(part.additions) > 1:
            notes.append(f"{len(part.additions)} additions")
        if not any(a.activated for a in part.additions):
            notes.append("pre-activation: nothing follows the addition")
        if strided := [c for c in part.convolutions if max(c.stride) > 1]:
            notes.append(
                f"stride {max(strided[0].stride)} in its {strided[0].kernel_size[0]}x{strided[0].kernel_size[1]}"
            )
    if part.entry and len(part.entry) == 4 == len(part.shape) and part.entry[1] != part.shape[1]:
        notes.append(f"{part.entry[1]} to {part.shape[1]} channels")
    return "; ".join(notes)


def _parts_table(net: Network) -> Table:
    rows, blocks = [], net.blocks
    for part in net.parts:
        trace, shape = part.trace, _join(part.shape[1:], "x")
        field = "" if trace is None else _pixels(trace.receptive_field)
        shortcut = part.shortcut if part in blocks else ""
        if extra := part.layers(shortcut=True):
            shortcut += f": {extra}"
        numbers = (part.parameters, part.multiply_adds / 1e6)
        rows.append((part.title, part.kind, part.layers(), shortcut, shape, *numbers, field, _note(part)))
    if other := net.parameters - net.summary.parameters:
        rows.append(("-", "", "held by modules that have layers inside", "", "", other, 0.0, "", ""))
    total = (net.parameters, net.summary.multiply_adds / 1e6)
    rows.append(("total", "", "", "", "", *total, "", ""))
    columns = (
        *("part", "class", "layers (kernel, channels, /stride)", "shortcut", "output"),
        *("parameters", "multiply-adds, M", "receptive field, px", "note"),
    )
    return Table("architecture", columns, rows, "The network, part by part, for one image")


def _layers_table(net: Network) -> Table:
    rows = []
    for row in net.rows:
        layer, axis = row.layer, row.trace.field[0] if row.trace is not None and row.trace.field else None
        rows.append(
            (
                *(layer.name, layer.kind, parts.describe(row.module), _join(layer.shape, "x")),
                *(
                    layer.parameters,
                    layer.multiply_adds,
                    layer.bytes,
                    {True: "yes", False: "no", None: ""}[layer.fused],
                ),
                _pixels(row.trace.receptive_field) if row.trace is not None else "?",
                "" if axis is None else f"{axis.step:g}",
            )
        )
    columns = (
        *("layer", "kind", "details", "output", "parameters", "multiply-adds", "bytes", "fused"),
        *("receptive field, px", "step, px"),
    )
    return Table("architecture-layers", columns, rows, "Every layer", long=True)


def _plot(net: Network) -> Plot:
    shown = [part for part in net.parts if part.parameters]
    figure, axes = figures.axes(3, width=3.6, height=min(14.0, 1.1 + 0.19 * len(shown)))
    at = range(len(shown))
    styles = {"none": figures.COLORS[5], "identity": figures.COLORS[0]}
    colors = [styles.get(part.shortcut, figures.COLORS[1]) for part in shown]
    fields = [part.trace.receptive_field if part.trace is not None else None for part in shown]
    axes[0].barh(at, [part.parameters / 1e6 for part in shown], color=colors)
    axes[1].barh(at, [part.multiply_adds / 1e6 for part in shown], color=colors)
    known = [(i, field) for i, field in zip(at, fields, strict=True) if field is not None and not math.isinf(field)]
    axes[2].plot([field for _, field in known], [i for i, _ in known], "o-", color=figures.COLORS[2], markersize=3)
    size = net.summary.input_shape[-1]
    axes[2].axvline(size, color=figures.COLORS[5], linewidth=1, linestyle=":")
    axes[2].annotate(f" image: {size}", (size, -0.4), fontsize=7.5, color=figures.COLORS[5], va="bottom")
    titles = ("parameters, million", "multiply-adds, million", "receptive field, pixels")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_ylim(len(shown) - 0.4, -1.2)
        axis.set_yticks([])
    if len(shown) <= 70:
        axes[0].set_yticks(list(at), [part.title for part in shown], fontsize=7)
    for text, color in (("identity", 0), ("other shortcut", 1), ("no shortcut", 5)):
        axes[0].barh([0], [0], color=figures.COLORS[color], label=text)
    axes[0].legend(fontsize=7.5, frameon=False, loc="upper right")
    caption = (
        "Part by part, from the image down; colours: the shortcut of a block. The receptive field is the one "
        "behind the part, up to where it is the whole image."
    )
    return Plot("architecture", figure, caption)


def _join(values: Iterable[object], between: str = ", ") -> str:
    return between.join(map(str, values))
