"""Residual networks for images of ImageNet's kind: ResNet v1, v1.5 and v2 (He et al. 2015 and 2016), ResNeXt, Wide
ResNet, and the plain networks that the paper compares with.

Parameter names, their order, attributes and initialisation of `ResNet` are torchvision's: checkpoints load both ways
with `strict=True`, and the same seed gives the same weights. The networks are made plain; `fastres.fuse_`, which the
named constructors call, swaps the classes of the blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastres.models.blocks import (
    BasicBlock,
    BatchNormReLU,
    Block,
    Bottleneck,
    NormLayer,
    PlainBasicBlock,
    PlainBottleneck,
    PreActBasicBlock,
    PreActBottleneck,
)
from fastres.models.constructor import constructor
from fastres.models.stages import check_network, initialise_, make_stage, shortcut_option, without_first_activation_

__all__ = ["BasicBlock", "Bottleneck", "PreActResNet", "ResNet"]


class ResNet(nn.Module):
    """A residual or plain network for images: `(N, 3, H, W)` to logits `(N, num_classes)`.

    Args:
        block: BasicBlock, Bottleneck, PlainBasicBlock or PlainBottleneck.
        layers: number of blocks in each of the four stages.
        num_classes: number of logits.
        zero_init_residual: start every branch at 0, so that each block starts as its shortcut (see `initialise_`).
        groups, width_per_group: of the 3x3 convolutions in Bottleneck (ResNeXt, Wide ResNet).
        replace_stride_with_dilation: whether to dilate instead of striding, for each of the last three stages
            (segmentation backbones).
        norm_layer: makes a normalisation layer for so many channels; `nn.BatchNorm2d` by default.
        shortcut: "A" (zero padding), "B" (projections where sizes change; the default) or "C" (projections everywhere).
            A plain network has none.
        stride_in_1x1: v1, as in the paper: bottlenecks stride in their first 1x1 convolution, not in the 3x3 (v1.5).

    Raises:
        ValueError: if num_classes < 1, layers or replace_stride_with_dilation are not of length 4 and 3, or the block
            and the other options do not go together.
    """

    #: Of the blocks that the network is made of.
    preactivation: ClassVar[bool] = False

    def __init__(
        self,
        block: Block,
        layers: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: NormLayer | None = None,
        *,
        shortcut: str | None = None,
        stride_in_1x1: bool = False,
    ) -> None:
        super().__init__()
        dilate = (False, False, False) if replace_stride_with_dilation is None else replace_stride_with_dilation
        check_network(type(self), block, num_classes, layers, 4)
        if len(dilate) != 3:
            raise ValueError(f"replace_stride_with_dilation should be None or a 3-element tuple, got {dilate}")
        if stride_in_1x1 and block.expansion == 1:
            raise ValueError(f"{block.__name__} has no 1x1 convolution that could have the stride")
        self._norm_layer = norm_layer or nn.BatchNorm2d
        self.inplanes = 64
        self.dilation = 1
        self.groups = groups
        self.base_width = width_per_group
        self.conv1 = nn.Conv2d(3, self.inplanes, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = self._norm_layer(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        options: dict[str, Any] = {
            "shortcut": shortcut_option(block, shortcut, "B"),
            "groups": groups,
            "base_width": width_per_group,
            "norm_layer": self._norm_layer,
        }
        if stride_in_1x1:
            options["stride_in_1x1"] = True
        self.layer1 = self._make_layer(block, 64, layers[0], 1, False, **options)
        self.layer2 = self._make_layer(block, 128, layers[1], 2, dilate[0], **options)
        self.layer3 = self._make_layer(block, 256, layers[2], 2, dilate[1], **options)
        self.layer4 = self._make_layer(block, 512, layers[3], 2, dilate[2], **options)
        self._make_head(512 * block.expansion, num_classes)
        initialise_(self, zero_init_residual)

    def _make_layer(
        self, block: Block, planes: int, blocks: int, stride: int, dilate: bool, **options: Any
    ) -> nn.Sequential:
        first_dilation = self.dilation  # the first block still sees the resolution of the stage before
        if dilate:
            self.dilation, stride = self.dilation * stride, 1
        in_planes, self.inplanes = self.inplanes, planes * block.expansion
        return make_stage(
            block, in_planes, planes, blocks, stride, dilations=(first_dilation, self.dilation), **options
        )

    def _make_head(self, planes: int, num_classes: int) -> None:
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(planes, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self._forward_impl(x)

    def _forward_impl(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.fc(x)


class PreActResNet(ResNet):
    """The pre-activation network, v2: the stem activates before the first block splits into two paths, and one more
    batch norm and ReLU follow the last block (He et al. 2016, arXiv 1603.05027, appendix).

    Args: as in `ResNet`, with PreActBasicBlock or PreActBottleneck as block.
    """

    preactivation = True

    def __init__(self, block: Block, layers: Sequence[int], num_classes: int = 1000, **options: Any) -> None:
        super().__init__(block, layers, num_classes, **options)
        without_first_activation_(self.layer1)

    def _make_head(self, planes: int, num_classes: int) -> None:
        self.norm = BatchNormReLU(self._norm_layer(planes))
        super()._make_head(planes, num_classes)

    def _forward_impl(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)
        x = self.norm(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.fc(x)


_18, _34, _50, _101, _152 = (2, 2, 2, 2), (3, 4, 6, 3), (3, 4, 6, 3), (3, 4, 23, 3), (3, 8, 36, 3)

# v1.5, as in torchvision.
resnet18 = constructor("resnet18", 11_689_512, ResNet, BasicBlock, _18, 1000)
resnet34 = constructor("resnet34", 21_797_672, ResNet, BasicBlock, _34, 1000)
resnet50 = constructor("resnet50", 25_557_032, ResNet, Bottleneck, _50, 1000)
resnet101 = constructor("resnet101", 44_549_160, ResNet, Bottleneck, _101, 1000)
resnet152 = constructor("resnet152", 60_192_808, ResNet, Bottleneck, _152, 1000)
# v1, the paper's. Basic blocks have no 1x1 convolution: these two are the networks above.
resnet18_v1 = constructor("resnet18_v1", 11_689_512, ResNet, BasicBlock, _18, 1000)
resnet34_v1 = constructor("resnet34_v1", 21_797_672, ResNet, BasicBlock, _34, 1000)
resnet50_v1 = constructor("resnet50_v1", 25_557_032, ResNet, Bottleneck, _50, 1000, stride_in_1x1=True)
resnet101_v1 = constructor("resnet101_v1", 44_549_160, ResNet, Bottleneck, _101, 1000, stride_in_1x1=True)
resnet152_v1 = constructor("resnet152_v1", 60_192_808, ResNet, Bottleneck, _152, 1000, stride_in_1x1=True)
# v2
resnet18_v2 = constructor("resnet18_v2", 11_687_720, PreActResNet, PreActBasicBlock, _18, 1000)
resnet34_v2 = constructor("resnet34_v2", 21_795_880, PreActResNet, PreActBasicBlock, _34, 1000)
resnet50_v2 = constructor("resnet50_v2", 25_549_352, PreActResNet, PreActBottleneck, _50, 1000)
resnet101_v2 = constructor("resnet101_v2", 44_541_480, PreActResNet, PreActBottleneck, _101, 1000)
resnet152_v2 = constructor("resnet152_v2", 60_185_128, PreActResNet, PreActBottleneck, _152, 1000)
# plain
plain18 = constructor("plain18", 11_515_688, ResNet, PlainBasicBlock, _18, 1000)
plain34 = constructor("plain34", 21_623_848, ResNet, PlainBasicBlock, _34, 1000)
plain50 = constructor("plain50", 22_780_456, ResNet, PlainBottleneck, _50, 1000)
plain101 = constructor("plain101", 41_772_584, ResNet, PlainBottleneck, _101, 1000)
plain152 = constructor("plain152", 57_416_232, ResNet, PlainBottleneck, _152, 1000)
# ResNeXt (Xie et al. 2016, arXiv 1611.05431), Wide ResNet (Zagoruyko and Komodakis 2016, arXiv 1605.07146)
resnext50_32x4d = constructor(
    "resnext50_32x4d", 25_028_904, ResNet, Bottleneck, _50, 1000, groups=32, width_per_group=4
)
resnext101_32x8d = constructor(
    "resnext101_32x8d", 88_791_336, ResNet, Bottleneck, _101, 1000, groups=32, width_per_group=8
)
wide_resnet50_2 = constructor("wide_resnet50_2", 68_883_240, ResNet, Bottleneck, _50, 1000, width_per_group=128)
wide_resnet101_2 = constructor("wide_resnet101_2", 126_886_696, ResNet, Bottleneck, _101, 1000, width_per_group=128)

#: Every model for images of 224 pixels, shallow to deep within each family.
MODELS = (
    *(resnet18, resnet34, resnet50, resnet101, resnet152),
    *(resnext50_32x4d, resnext101_32x8d, wide_resnet50_2, wide_resnet101_2),
    *(resnet18_v1, resnet34_v1, resnet50_v1, resnet101_v1, resnet152_v1),
    *(resnet18_v2, resnet34_v2, resnet50_v2, resnet101_v2, resnet152_v2),
    *(plain18, plain34, plain50, plain101, plain152),
)
