"""The networks of the paper (He et al. 2015, Tables 1 and 6), and a network held against them, aspect by aspect."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastres import models
from fastres.analysis import parts
from fastres.analysis.checks import Check
from fastres.analysis.parts import Network, Part

__all__ = ["Paper", "compare", "find"]


@dataclass(frozen=True)
class Paper:
    """A network of the paper. blocks: of each stage. size: "multiply-adds" (Table 1) or "parameters" (Table 6)."""

    name: str
    blocks: tuple[int, ...]
    kernels: str
    channels: str
    size: str
    value: float

    @property
    def small(self) -> bool:
        return len(self.blocks) == 3


_BASIC, _BOTTLENECK = "3x3, 3x3", "1x1, 3x3, 1x1"
_WIDTHS = "64-64, 128-128, 256-256, 512-512"
_DEEP = "64-64-256, 128-128-512, 256-256-1024, 512-512-2048"
#: Networks for ImageNet, by depth.
_LARGE = {
    depth: Paper(f"ResNet-{depth}", blocks, kernels, channels, "multiply-adds", billions * 1e9)
    for depth, blocks, kernels, channels, billions in (
        (18, (2, 2, 2, 2), _BASIC, _WIDTHS, 1.8),
        (34, (3, 4, 6, 3), _BASIC, _WIDTHS, 3.6),
        (50, (3, 4, 6, 3), _BOTTLENECK, _DEEP, 3.8),
        (101, (3, 4, 23, 3), _BOTTLENECK, _DEEP, 7.6),
        (152, (3, 8, 36, 3), _BOTTLENECK, _DEEP, 11.3),
    )
}
#: Networks for CIFAR, by depth: 6n + 2.
_SMALL = {
    depth: Paper(
        f"ResNet-{depth} for CIFAR",
        ((depth - 2) // 6,) * 3,
        _BASIC,
        "16-16, 32-32, 64-64",
        "parameters",
        millions * 1e6,
    )
    for depth, millions in ((20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7), (1202, 19.4))
}
#: The paper rounds, down or up: 3.86 to 3.8, 7.57 to 7.6, 1.73 to 1.7.
ROUNDING = 0.03


def find(net: Network) -> Paper | None:
    """The network of the paper that has as many blocks of this kind in each stage; else, as many layers."""
    stages = parts.stages(net.blocks)
    if len(stages) not in (3, 4):
        return None
    known = _SMALL if len(stages) == 3 else _LARGE
    counts, kernels = tuple(map(len, stages)), {_kernels(block) for block in net.blocks}
    same = (paper for paper in known.values() if paper.blocks == counts and {paper.kernels} == kernels)
    return next(same, known.get(net.depth))


def compare(net: Network, paper: Paper | None) -> list[Check]:
    """A row for each aspect: what the paper has in `claim`, the network in `measured`."""
    blocks, stages = net.blocks, parts.stages(net.blocks)
    stem, head = _ends(net)
    found: list[tuple[str, str]] = []
    if paper is not None:
        found += [
            ("stem: 3x3 16" if paper.small else "stem: 7x7 64 /2, max-pool 3x3 /2", f"stem: {stem}"),
            (f"blocks in each stage: {_join(paper.blocks)}", f"blocks in each stage: {_join(map(len, stages))}"),
            (f"convolutions of a block: {paper.kernels}", f"convolutions of a block: {_each(map(_kernels, blocks))}"),
            (f"their channels: {paper.channels}", f"their channels: {_join(_channels(s[-1]) for s in stages)}"),
        ]
        narrowing = [block for block in blocks if any(max(c.stride) > 1 for c in block.convolutions)]
        first = f"stride of 2: in the first {paper.kernels[:3]} convolution of a stage"
        found.append((first, f"stride of 2: {_each(map(_stride, narrowing))} of a stage"))
    changes = "zero padding" if paper is not None and paper.small else "projection"
    found += [
        ("shortcuts where sizes stay: identity", f"shortcuts where sizes stay: {_shortcuts(blocks, False)}"),
        (f"shortcuts where sizes change: {changes}", f"shortcuts where sizes change: {_shortcuts(blocks, True)}"),
        ("after the addition: activation", f"after the addition: {_after(blocks)}"),
        ("a block starts with: convolution", f"a block starts with: {_each(map(_start, blocks))}"),
        ("activations: ReLU", f"activations: {_kinds(net, parts.is_activation)}"),
        ("normalisation: BatchNorm2d", f"normalisation: {_kinds(net, parts.is_norm)}"),
        (
            "groups of a convolution: 1",
            f"groups of a convolution: {_each(str(c.groups) for b in blocks for c in b.convolutions)}",
        ),
        ("other layers in blocks: none", f"other layers in blocks: {_others(blocks)}"),
        ("head: average pooling, one linear layer", f"head: {head}"),
    ]
    checked = [Check(theirs, ours, theirs == ours) for theirs, ours in found]
    if paper is not None:
        small, input_size = paper.small, net.summary.input_shape[-1]
        value = net.parameters if small else net.summary.multiply_adds
        text = f"{value / 1e6:.2f} million" if small else f"{value / 1e9:.2f} billion"
        theirs = f"{paper.value / 1e6:g} million" if small else f"{paper.value / 1e9:g} billion"
        if small or input_size == 224:
            close = abs(value / paper.value - 1) < ROUNDING
            checked.append(Check(f"{paper.size}: {theirs}", f"{paper.size}: {text}", close))
    return checked


def _ends(net: Network) -> tuple[str, str]:
    """The layers before the first block and behind the last."""
    blocks = net.blocks
    if not blocks:
        return "no blocks", "no blocks"
    first, last = net.parts.index(blocks[0]), net.parts.index(blocks[-1])
    stem = ", ".join(filter(None, (part.layers() for part in net.parts[:first])))
    behind = [row for part in net.parts[last + 1 :] for row in part.rows]
    linear = sum(isinstance(row.module, nn.Linear) for row in behind)
    pooled = any("AvgPool" in type(row.module).__name__ for row in behind)
    head = ", ".join(filter(None, (parts.describe(row.module) for row in behind)))
    return stem or "none", "average pooling, one linear layer" if (pooled, linear) == (True, 1) else head or "none"


def _kernels(block: Part) -> str:
    return _join(f"{c.kernel_size[0]}x{c.kernel_size[1]}" for c in block.convolutions) or "none"


def _channels(block: Part) -> str:
    return _join((c.out_channels for c in block.convolutions), "-")


def _stride(block: Part) -> str:
    """Which convolution of a block has the stride."""
    at = next(i for i, c in enumerate(block.convolutions) if max(c.stride) > 1)
    kernels = [f"{c.kernel_size[0]}x{c.kernel_size[1]}" for c in block.convolutions]
    which = "first" if kernels.index(kernels[at]) == at and kernels.count(kernels[at]) > 1 else "only"
    if which == "only" and kernels.count(kernels[at]) > 1:
        which = "last"
    return f"in the {which} {kernels[at]} convolution"


def _shortcuts(blocks: Sequence[Part], changes: bool) -> str:
    return _each(block.shortcut for block in blocks if block.changes_size is changes)


def _after(blocks: Sequence[Part]) -> str:
    return _each("activation" if a.activated else "nothing" for block in blocks for a in block.additions)


def _start(block: Part) -> str:
    """Whether a block starts with its convolution (post-activation) or what comes before it (pre-activation)."""
    module = block.rows[0].module
    return "convolution" if isinstance(module, nn.Conv2d) else type(module).__name__


def _kinds(net: Network, matches: Callable[[Any], bool]) -> str:
    return _each(type(module).__name__ for module in net.modules if matches(module))


def _others(blocks: Sequence[Part]) -> str:
    known = (nn.Conv2d, nn.Identity)
    return _each(
        type(row.module).__name__
        for block in blocks
        for row in block.rows
        if row.module is not None
        and not (isinstance(row.module, known) or parts.is_norm(row.module) or parts.is_activation(row.module))
        and type(row.module) is not models.ZeroPadShortcut
    )


def _each(values: Iterable[str]) -> str:
    """The different values, each once; "none" if there are none."""
    return " or ".join(dict.fromkeys(values)) or "none"


def _join(values: Iterable[object], between: str = ", ") -> str:
    return between.join(map(str, values))
