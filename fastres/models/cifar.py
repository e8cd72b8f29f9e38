"""The networks for CIFAR of He et al. 2015, section 4.2: a 3x3 stem and three stages of 16, 32 and 64 channels, without
max-pooling; residual, pre-activation (He et al. 2016) and plain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastres.models.blocks import (
    BasicBlock,
    BatchNormReLU,
    Block,
    PlainBasicBlock,
    PreActBasicBlock,
    ZeroPadShortcut,
    conv3x3,
)
from fastres.models.constructor import constructor
from fastres.models.stages import check_network, initialise_, make_stage, shortcut_option, without_first_activation_

__all__ = ["CifarResNet", "PreActCifarResNet", "ZeroPadShortcut"]


class CifarResNet(nn.Module):
    """A residual or plain network for small images: `(N, 3, H, W)` to logits `(N, num_classes)`; made for 32 x 32.

    Args:
        block: BasicBlock, Bottleneck (whose output has four times the channels), or one of the plain ones.
        layers: number of blocks in each of the three stages.
        num_classes: number of logits.
        shortcut: "A" (zero padding; the default, as in the paper), "B" (projections where sizes change) or "C"
            (projections everywhere). A plain network has none.
        zero_init_residual: start every branch at 0, so that each block starts as its shortcut (see `initialise_`).

    Raises:
        ValueError: if num_classes < 1, layers is not of length 3, there is no such shortcut, or the block is not one of
            these.
    """

    #: Of the blocks that the network is made of.
    preactivation: ClassVar[bool] = False

    def __init__(
        self,
        block: Block,
        layers: Sequence[int],
        num_classes: int = 10,
        shortcut: str | None = None,
        zero_init_residual: bool = False,
    ) -> None:
        super().__init__()
        check_network(type(self), block, num_classes, layers, 3)
        option = shortcut_option(block, shortcut, "A")
        self.conv1 = conv3x3(3, 16)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = make_stage(block, 16, 16, layers[0], 1, option)
        self.layer2 = make_stage(block, 16 * block.expansion, 32, layers[1], 2, option)
        self.layer3 = make_stage(block, 32 * block.expansion, 64, layers[2], 2, option)
        self._make_head(64 * block.expansion, num_classes)
        initialise_(self, zero_init_residual)

    def _make_head(self, planes: int, num_classes: int) -> None:
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(planes, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.fc(x)


class PreActCifarResNet(CifarResNet):
    """The pre-activation network, v2, for small images: see `PreActResNet`.

    Args: as in `CifarResNet`, with PreActBasicBlock or PreActBottleneck as block.
    """

    preactivation = True

    def __init__(self, block: Block, layers: Sequence[int], num_classes: int = 10, **options: Any) -> None:
        super().__init__(block, layers, num_classes, **options)
        without_first_activation_(self.layer1)

    def _make_head(self, planes: int, num_classes: int) -> None:
        self.norm = BatchNormReLU(nn.BatchNorm2d(planes))
        super()._make_head(planes, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.norm(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.fc(x)


def _layers(depth: int) -> tuple[int, int, int]:
    """Blocks a stage: a network of 6n + 2 layers has n of two layers in each of three stages."""
    return ((depth - 2) // 6,) * 3


resnet20 = constructor("resnet20", 269_722, CifarResNet, BasicBlock, _layers(20), 10)
resnet32 = constructor("resnet32", 464_154, CifarResNet, BasicBlock, _layers(32), 10)
resnet44 = constructor("resnet44", 658_586, CifarResNet, BasicBlock, _layers(44), 10)
resnet56 = constructor("resnet56", 853_018, CifarResNet, BasicBlock, _layers(56), 10)
resnet110 = constructor("resnet110", 1_727_962, CifarResNet, BasicBlock, _layers(110), 10)
resnet1202 = constructor("resnet1202", 19_421_274, CifarResNet, BasicBlock, _layers(1202), 10)
# v2
resnet20_v2 = constructor("resnet20_v2", 269_722, PreActCifarResNet, PreActBasicBlock, _layers(20), 10)
resnet32_v2 = constructor("resnet32_v2", 464_154, PreActCifarResNet, PreActBasicBlock, _layers(32), 10)
resnet44_v2 = constructor("resnet44_v2", 658_586, PreActCifarResNet, PreActBasicBlock, _layers(44), 10)
resnet56_v2 = constructor("resnet56_v2", 853_018, PreActCifarResNet, PreActBasicBlock, _layers(56), 10)
resnet110_v2 = constructor("resnet110_v2", 1_727_962, PreActCifarResNet, PreActBasicBlock, _layers(110), 10)
resnet1202_v2 = constructor("resnet1202_v2", 19_421_274, PreActCifarResNet, PreActBasicBlock, _layers(1202), 10)
# plain
plain20 = constructor("plain20", 269_722, CifarResNet, PlainBasicBlock, _layers(20), 10)
plain32 = constructor("plain32", 464_154, CifarResNet, PlainBasicBlock, _layers(32), 10)
plain44 = constructor("plain44", 658_586, CifarResNet, PlainBasicBlock, _layers(44), 10)
plain56 = constructor("plain56", 853_018, CifarResNet, PlainBasicBlock, _layers(56), 10)
plain110 = constructor("plain110", 1_727_962, CifarResNet, PlainBasicBlock, _layers(110), 10)
plain1202 = constructor("plain1202", 19_421_274, CifarResNet, PlainBasicBlock, _layers(1202), 10)

#: Every model for images of 32 pixels, shallow to deep within each family.
MODELS = (
    *(resnet20, resnet32, resnet44, resnet56, resnet110, resnet1202),
    *(resnet20_v2, resnet32_v2, resnet44_v2, resnet56_v2, resnet110_v2, resnet1202_v2),
    *(plain20, plain32, plain44, plain56, plain110, plain1202),
)
