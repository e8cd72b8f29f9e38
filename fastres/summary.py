"""summarise: the layers of a model in the order in which they run, with shapes, parameters, work and memory, and which
of them `fastres.fuse_` lets run fused."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastres import fuse
from fastres.report import FuseReport


@dataclass(frozen=True)
class Layer:
    """One call of a module without children, or the addition of a block.

    Attributes:
        name: path of the module; of the block for an addition.
        kind: class of the module, or "add".
        shape: of its output.
        parameters: its own; 0 if they have been counted in an earlier call.
        multiply_adds: of convolutions and linear layers. The papers call them FLOPs; a multiply and an add are two.
        bytes: of its output.
        fused: whether fuse_ lets it run inside a fused op; None for what fusing is not about.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    multiply_adds: int
    bytes: int
    fused: bool | None


@dataclass(frozen=True)
class Summary:
    """Layers, and what fuse_ says about the model; as text a table."""

    input_shape: tuple[int, ...]
    layers: list[Layer]
    report: FuseReport

    @property
    def parameters(self) -> int:
        return sum(layer.parameters for layer in self.layers)

    @property
    def multiply_adds(self) -> int:
        return sum(layer.multiply_adds for layer in self.layers)

    @property
    def bytes(self) -> int:
        """Of all outputs together."""
        return sum(layer.bytes for layer in self.layers)

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("layer", "kind", "output", "parameters", "multiply-adds", "bytes", "fused")]
        for layer in self.layers:
            shape, fused = "x".join(map(str, layer.shape)), {True: "yes", False: "no", None: ""}[layer.fused]
            numbers = (f"{n:,}" if n else "" for n in (layer.parameters, layer.multiply_adds, layer.bytes))
            rows.append((layer.name, layer.kind, shape, *numbers, fused))
        rows.append(("total", "", "", f"{self.parameters:,}", f"{self.multiply_adds:,}", f"{self.bytes:,}", ""))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.rjust(width) if 3 <= i <= 5 else cell.ljust(width) for i, (cell, width) in enumerate(pairs))
            for pairs in (zip(row, widths, strict=True) for row in rows)
        ]
        lines.append(
            f"{self.parameters / 1e6:.2f} M parameters, {self.multiply_adds / 1e9:.2f} G multiply-adds "
            f"({2 * self.multiply_adds / 1e9:.2f} GFLOP) and {self.bytes / 1e6:.1f} MB of outputs for an input of "
            f"{'x'.join(map(str, self.input_shape))}"
        )
        return "\n".join([line.rstrip() for line in lines] + [str(self.report)])


def summarise(model: nn.Module, input_shape: tuple[int, ...]) -> Summary:
    """Runs a copy of `model` in eval mode on the meta device, where nothing is computed.

    Args:
        model: any module; it is not changed. input_shape: of its input, [N, C, H, W].

    Returns:
        A Summary; print it, or read its layers.
    """
    plain: Any = fuse.unfuse_(copy.deepcopy(model)).to("meta").eval()
    rows = fuse.plan(plain).rows
    fusible = {(row.name, row.kind == "add"): row.fused for row, _ in rows}
    layers: list[Layer] = []
    counted: set[Tensor] = set()

    def note(name: str, module: nn.Module, y: Any) -> None:
        if not isinstance(y, Tensor):
            return
        new = {p for p in module.parameters() if p not in counted}
        counted.update(new)
        count, work, size = sum(p.numel() for p in new), _multiply_adds(module, y), y.numel() * y.element_size()
        layers.append(Layer(name, type(module).__name__, (*y.shape,), count, work, size, fusible.get((name, False))))

    def note_addition(name: str, y: Tensor) -> None:
        last = layers[-1].name == f"{name}.relu"  # of post-activation: it comes after the addition
        layer = Layer(name, "add", (*y.shape,), 0, 0, y.numel() * y.element_size(), fusible[name, True])
        layers.insert(len(layers) - last, layer)

    for name, module in plain.named_modules():
        if next(module.children(), None) is None:
            module.register_forward_hook(lambda m, _, y, name=name: note(name, m, y))
        elif (name, True) in fusible:
            module.register_forward_hook(lambda m, _, y, name=name: note_addition(name, y))
    dtype = next((p.dtype for p in plain.parameters()), torch.float32)
    with torch.no_grad():
        plain(torch.empty(input_shape, device="meta", dtype=dtype))
    return Summary(tuple(input_shape), layers, FuseReport([row for row, _ in rows]))


def _multiply_adds(module: nn.Module, y: Tensor) -> int:
    """Every output value of a convolution or a linear layer is a sum of as many products as a filter has weights."""
    if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
        return y.numel() * (module.weight.numel() // module.weight.shape[0])
    return 0
