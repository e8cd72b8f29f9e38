"""The residual networks for CIFAR of He et al. 2015, section 4.2: a 3x3 stem and three stages of 16, 32 and 64
channels, without max-pooling.

Nothing in this file is fused: `fastres.fuse_` swaps the classes afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastres.models.resnet import BasicBlock, Bottleneck, conv1x1, conv3x3, initialise_

__all__ = [
    "CifarResNet",
    "ZeroPadShortcut",
    "resnet110",
    "resnet1202",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
]


class ZeroPadShortcut(nn.Module):
    """Shortcut option A, without parameters: every stride-th pixel of x, followed by zeros for the channels it lacks.

    Args:
        channels: of the output, at least those of the input. stride: 1 or more.
    """

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.channels, self.stride = channels, stride

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return nn.functional.pad(x, (0, 0, 0, 0, 0, self.channels - x.shape[1]))

    def extra_repr(self) -> str:
        return f"{self.channels}, stride={self.stride}"


class CifarResNet(nn.Module):
    """A residual network for small images: `(N, 3, H, W)` to logits `(N, num_classes)`; made for 32 x 32.

    Args:
        block: BasicBlock or Bottleneck (whose output has four times the channels).
        layers: number of blocks in each of the three stages.
        num_classes: number of logits.
        shortcut: where a block changes its size, "A": zero padding; "B": a projection (1x1 convolution, batch norm).
        zero_init_residual: start the last batch norm of every branch at 0, so that each block starts as the identity.

    Raises:
        ValueError: if num_classes < 1, layers is not of length 3, or there is no such shortcut.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        num_classes: int = 10,
        shortcut: str = "A",
        zero_init_residual: bool = False,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if len(layers) != 3:
            raise ValueError(f"layers should give the number of blocks of three stages, got {layers}")
        if shortcut not in ("A", "B"):
            raise ValueError(f'shortcut must be "A" or "B", got {shortcut!r}')
        self.inplanes = 16
        self.shortcut = shortcut
        self.conv1 = conv3x3(3, self.inplanes)
        self.bn1 = nn.BatchNorm2d(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = self._make_layer(block, 16, layers[0], 1)
        self.layer2 = self._make_layer(block, 32, layers[1], 2)
        self.layer3 = self._make_layer(block, 64, layers[2], 2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(64 * block.expansion, num_classes)
        initialise_(self, zero_init_residual)

    def _make_layer(
        self, block: type[BasicBlock] | type[Bottleneck], planes: int, blocks: int, stride: int
    ) -> nn.Sequential:
        out_planes = planes * block.expansion
        downsample: nn.Module | None = None
        if stride != 1 or self.inplanes != out_planes:
            if self.shortcut == "A":
                downsample = ZeroPadShortcut(out_planes, stride)
            else:
                downsample = nn.Sequential(conv1x1(self.inplanes, out_planes, stride), nn.BatchNorm2d(out_planes))
        first = block(self.inplanes, planes, stride, downsample)
        self.inplanes = out_planes
        return nn.Sequential(first, *(block(out_planes, planes) for _ in range(1, blocks)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.fc(x)


def _resnet(depth: int, num_classes: int, fused: bool, **options: Any) -> CifarResNet:
    model = CifarResNet(BasicBlock, [(depth - 2) // 6] * 3, num_classes, **options)
    if fused:
        from fastres.fuse import fuse_  # here, because its recipes import this file

        fuse_(model)
    return model


def resnet20(num_classes: int = 10, *, fused: bool = True, **options: Any) -> CifarResNet:
    """ResNet-20 for CIFAR, 0.27 M parameters. fused: call `fastres.fuse_` on it. options: as in `CifarResNet`."""
    return _resnet(20, num_classes, fused, **options)


def resnet32(num_classes: int = 10, *, fused: bool = True, **options: Any) -> CifarResNet:
    """ResNet-32 for CIFAR, 0.46 M parameters. fused: call `fastres.fuse_` on it. options: as in `CifarResNet`."""
    return _resnet(32, num_classes, fused, **options)


def resnet44(num_classes: int = 10, *, fused: bool = True, **options: Any) -> CifarResNet:
    """ResNet-44 for CIFAR, 0.66 M parameters. fused: call `fastres.fuse_` on it. options: as in `CifarResNet`."""
    return _resnet(44, num_classes, fused, **options)


def resnet56(num_classes: int = 10, *, fused: bool = True, **options: Any) -> CifarResNet:
    """ResNet-56 for CIFAR, 0.85 M parameters. fused: call `fastres.fuse_` on it. options: as in `CifarResNet`."""
    return _resnet(56, num_classes, fused, **options)


def resnet110(num_classes: int = 10, *, fused: bool = True, **options: Any) -> CifarResNet:
    """ResNet-110 for CIFAR, 1.7 M parameters. fused: call `fastres.fuse_` on it. options: as in `CifarResNet`."""
    return _resnet(110, num_classes, fused, **options)


def resnet1202(num_classes: int = 10, *, fused: bool = True, **options: Any) -> CifarResNet:
    """ResNet-1202 for CIFAR, 19.4 M parameters. fused: call `fastres.fuse_` on it. options: as in `CifarResNet`."""
    return _resnet(1202, num_classes, fused, **options)
