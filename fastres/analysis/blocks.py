"""The blocks of a network taken apart: y = after(F(x) + s(x)), with the branch F and the shortcut s by themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastres.errors import UserError
from fastres.models import ZeroPadShortcut
from fastres.recipes.preactivation import PreActBasicBlockForward, PreActBottleneckForward
from fastres.recipes.residual import (
    BasicBlockForward,
    BottleneckForward,
    PlainBasicBlockForward,
    PlainBottleneckForward,
)

__all__ = ["Block", "find", "replaced", "resize"]

_POST = (BasicBlockForward, BottleneckForward)
_PRE = (PreActBasicBlockForward, PreActBottleneckForward)
_PLAIN = (PlainBasicBlockForward, PlainBottleneckForward)


@dataclass(frozen=True)
class Block:
    """A block of a fused network: fastres.models' or torchvision's.

    Attributes:
        name: its path in the network. module: the block.
    """

    name: str
    module: Any

    @property
    def plain(self) -> bool:
        """Without a shortcut."""
        return not getattr(self.module, "residual", True)  # torchvision's blocks do not say

    @property
    def preactivation(self) -> bool:
        """v2: nothing follows the addition."""
        return bool(getattr(self.module, "preactivation", False))

    @property
    def convolutions(self) -> list[nn.Conv2d]:
        """Of the branch, in order."""
        names = ("conv1", "conv2", "conv3") if hasattr(self.module, "conv3") else ("conv1", "conv2")
        return [getattr(self.module, name) for name in names]

    @property
    def norms(self) -> list[Any]:
        """Of the branch, in order; None where v2 has none."""
        return [getattr(self.module, f"bn{i + 1}") for i in range(len(self.convolutions))]

    @property
    def changes_size(self) -> bool:
        """Whether the output has other channels, or fewer pixels, than the input."""
        first, *_, last = self.convolutions
        return first.in_channels != last.out_channels or any(c.stride != (1, 1) for c in self.convolutions)

    def branch(self, x: Tensor) -> Tensor:
        """F(x), without the activation that may follow the addition."""
        if self.preactivation:
            x = self._activated(x)
            for i, (conv, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
                x = conv(x if i == 0 else self.module.relu(norm(x)))
            return x
        for i, (conv, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            x = norm(conv(x if i == 0 else self.module.relu(x)))
        return x

    def shortcut(self, x: Tensor) -> Tensor:
        """s(x): x, or what the block's projection or zero padding makes of it."""
        downsample = self.module.downsample
        if downsample is None:
            return x
        return downsample(self._activated(x) if self.preactivation else x)

    def after(self, y: Tensor) -> Tensor:
        """What follows the addition: ReLU, which may write into y, or nothing in v2."""
        return y if self.preactivation else self.module.relu(y)

    def without_branch(self) -> nn.Module:
        """What is left of a block whose branch is dropped.

        A residual block becomes its shortcut: the identity where it is one (v1's last ReLU changes nothing, since what
        comes in is not negative), else its projection or zero padding. A plain block becomes the identity, and where
        sizes change what they force: see `resize`.
        """
        if self.plain:
            first, *_, last = self.convolutions
            stride = max(conv.stride[0] for conv in self.convolutions)
            return resize(first.in_channels, last.out_channels, stride)
        return nn.Identity() if self.module.downsample is None else _ShortcutOnly(self)

    def without_layer(self, index: int) -> nn.Module:
        """A plain block that lacks one of its layers (convolution, batch norm and ReLU)."""
        return _WithoutLayer(self, index)

    def _activated(self, x: Tensor) -> Tensor:
        """v2: relu(bn1(x)), or x in the first block, whose input is activated."""
        return x if self.module.bn1 is None else self.module.relu(self.module.bn1(x))


def find(model: nn.Module) -> list[Block]:
    """The blocks of a network on which `fastres.fuse_` was called, in order.

    Raises:
        UserError: if there are none.
    """
    kinds = (*_POST, *_PRE, *_PLAIN)
    found = [Block(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]
    if not found:
        raise UserError("the network has no blocks of fastres.models or torchvision's ResNet that could be taken apart")
    return found


@contextmanager
def replaced(model: nn.Module, new: Mapping[str, nn.Module]) -> Iterator[nn.Module]:
    """Inside the `with` block other modules stand at these paths of the model."""
    old = {name: model.get_submodule(name) for name in new}
    try:
        for name, module in new.items():
            model.set_submodule(name, module)
        yield model
    finally:
        for name, module in old.items():
            model.set_submodule(name, module)


def resize(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """The least that can stand in for a layer: the identity, or every stride-th pixel with channels that are zero where
    there are too few, and cut where there are too many."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return ZeroPadShortcut(out_channels, stride)


class _ShortcutOnly(nn.Module):
    """after(s(x))."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.module, self.block = block.module, block

    def forward(self, x: Tensor) -> Tensor:
        return self.block.after(self.block.shortcut(x))  # the shortcut is no identity: what ReLU writes into is its own


class _WithoutLayer(nn.Module):
    """A plain block without its layer number `index`."""

    def __init__(self, block: Block, index: int) -> None:
        super().__init__()
        self.module, self.block, self.index = block.module, block, index

    def forward(self, x: Tensor) -> Tensor:
        for i, (conv, norm) in enumerate(zip(self.block.convolutions, self.block.norms, strict=True)):
            if i == self.index:
                x = resize(conv.in_channels, conv.out_channels, conv.stride[0])(x)
            else:
                x = self.module.relu(norm(conv(x)))
        return x
