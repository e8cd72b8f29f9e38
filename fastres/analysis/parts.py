"""A network as its parts: stem, blocks, head; each with layers, shortcut, shape, parameters, work, receptive field."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from torch import nn

from fastres.analysis.flow import Addition, Trace, watch
from fastres.summary import Layer, Summary, summarise

__all__ = ["Network", "Part", "take_apart"]

#: By name, without regard to case: libraries have classes of their own.
_ACTIVATIONS = ("relu", "relu6", "leakyrelu", "prelu", "elu", "gelu", "quickgelu", "silu", "swish", "hardswish", "mish")


@dataclass(frozen=True)
class Row:
    """A layer of `fastres.summary`, with its module (None for an addition) and where its result comes from."""

    layer: Layer
    module: Any
    trace: Trace | None


@dataclass(eq=False)
class Part:
    """Layers that belong together.

    Attributes:
        name: of the block, or "" for what lies in no module but the network itself. kind: class of the block.
        rows: its layers, in order. addition: of its shortcut, the last if there are several. additions: how many.
        entry: shape of what enters it. trace: of what leaves it.
    """

    name: str
    kind: str
    rows: list[Row]
    additions: list[Addition] = field(default_factory=list)
    entry: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.rows[-1].layer.shape

    @property
    def parameters(self) -> int:
        return sum(row.layer.parameters for row in self.rows)

    @property
    def multiply_adds(self) -> int:
        return sum(row.layer.multiply_adds for row in self.rows)

    @property
    def trace(self) -> Trace | None:
        return next((row.trace for row in reversed(self.rows) if row.trace is not None), None)

    @property
    def shortcut_layers(self) -> set[str]:
        """Those on the shortcuts, and what shares a module inside the block with them: pooling, batch norm."""
        weighted = {name for addition in self.additions for name in addition.layers}
        inside = {_parent(name) for name in weighted} - {self.name}
        return weighted | {row.layer.name for row in self.rows if _parent(row.layer.name) in inside}

    @property
    def convolutions(self) -> list[nn.Conv2d]:
        """Those that are not on the shortcut, in order; nor of a gate, which are of a single pixel."""
        rows = [r for r in self.rows if isinstance(r.module, nn.Conv2d) and r.layer.name not in self.shortcut_layers]
        return [r.module for r in rows if r.layer.shape[2:] != (1, 1) or self.shape[2:] == (1, 1)]

    @property
    def shortcut(self) -> str:
        """ "none", "identity", "projection", ...; several additions have several."""
        return ", ".join(dict.fromkeys(a.shortcut for a in self.additions)) or "none"

    @property
    def changes_size(self) -> bool:
        return self.shape[1:] != self.entry[1:]

    @property
    def title(self) -> str:
        """Its name; of what is in no module of its own, the first and the last layer."""
        first, last = self.rows[0].layer.name, self.rows[-1].layer.name
        return self.name or (first if first == last else f"{first} .. {last}")

    def layers(self, *, shortcut: bool = False) -> str:
        """What has weights or pools, of the branch or of the shortcut: "3x3 64 /2" for kernel, channels, stride."""
        rows = [row for row in self.rows if (row.layer.name in self.shortcut_layers) is shortcut]
        return ", ".join(text for row in rows if (text := describe(row.module)))


@dataclass
class Network:
    """parts, rows: in order. modules: all. summary: of the layers. output: what it sees, and its longest way of layers.
    parameters: also those that modules with children hold themselves."""

    parts: list[Part]
    summary: Summary
    rows: list[Row]
    modules: list[nn.Module]
    output: Trace
    parameters: int

    @property
    def depth(self) -> int:
        """Convolutions and linear layers on the longest way."""
        return len(self.output.layers)

    @property
    def blocks(self) -> list[Part]:
        """The parts with a shortcut; of a network without any, those of two convolutions or more."""
        found = [part for part in self.parts if part.additions]
        return found or [part for part in self.parts if part.name and len(part.convolutions) > 1]


def describe(module: Any) -> str:
    """ "3x3 64 /2" for a convolution of 64 channels and stride 2, "" for what is not worth a word."""
    if isinstance(module, nn.Conv2d):
        rows, columns = module.kernel_size
        text = f"{rows}x{columns} {module.out_channels}"
        if module.groups > 1:
            text += " depthwise" if module.groups == module.in_channels else f" in {module.groups} groups"
        if module.dilation != (1, 1):
            text += f" dilated {max(module.dilation)}"
        return text + (f" /{max(module.stride)}" if module.stride != (1, 1) else "")
    if isinstance(module, nn.Linear):
        return f"linear {module.out_features}"
    if isinstance(module, (nn.MaxPool2d, nn.AvgPool2d)):
        size, stride = (v if isinstance(v, int) else max(v) for v in (module.kernel_size, module.stride))
        return f"{'max' if isinstance(module, nn.MaxPool2d) else 'average'}-pool {size}x{size} /{stride}"
    return "average-pool" if "AvgPool" in type(module).__name__ else ""  # libraries have classes of their own


def is_norm(module: Any) -> bool:
    return "Norm" in type(module).__name__ and bool(module._parameters or module._buffers)  # not what only holds one


def is_activation(module: Any) -> bool:
    return type(module).__name__.lower() in _ACTIVATIONS


def take_apart(model: nn.Module, input_shape: tuple[int, int, int, int]) -> Network:
    """The parts of a network, from one pass on PyTorch's meta device.

    Args:
        model: any network for images. input_shape: (N, 3, H, W).
    """
    summary, flow = summarise(model, input_shape), watch(model, input_shape[1:])
    modules = dict(model.named_modules())
    calls = {name: iter(traces) for name, traces in flow.calls.items()}
    sums = {addition.block: addition.trace for addition in flow.additions}
    rows = []
    for layer in summary.layers:
        if layer.kind == "add":
            rows.append(Row(layer, None, sums.get(layer.name)))
        else:
            rows.append(Row(layer, modules[layer.name], next(calls.get(layer.name, iter(())), None)))
    blocks = {addition.block for addition in flow.additions if addition.block}
    parts, entry = [], tuple(input_shape)
    for name, group in groupby(rows, key=lambda row: _part_of(row, blocks)):
        kind = type(modules[name]).__name__ if name else ""
        part = Part(name, kind, list(group), [a for a in flow.additions if a.block == name], entry)
        parts.append(part)
        entry = part.shape
    count = sum(p.numel() for p in model.parameters())
    return Network(parts, summary, rows, list(modules.values()), flow.output, count)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _part_of(row: Row, blocks: set[str]) -> str:
    """The innermost block with a shortcut that holds the layer; else its module, or one that is as deep as blocks."""
    path = row.layer.name.split(".")
    inside = [".".join(path[:i]) for i in range(len(path), 0, -1)]
    if row.layer.kind == "add":
        return row.layer.name
    depth = min((name.count(".") + 1 for name in blocks), default=len(path))
    return next((name for name in inside if name in blocks), ".".join(path[:-1][:depth]))


def stages(blocks: Sequence[Part]) -> list[list[Part]]:
    """Blocks of one output shape, one after the other."""
    return [list(group) for _, group in groupby(blocks, key=lambda part: part.shape)]
