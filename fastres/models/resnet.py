"""ResNet (He et al. 2015, v1.5), ResNeXt and Wide ResNet in the plain eager form.

Parameter names, their order, attributes and initialisation are torchvision's: checkpoints load both ways with
`strict=True`, and the same seed gives the same weights. Nothing in this file is fused: `fastres.fuse_` swaps the
classes of the blocks afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "ResNet",
    "resnet101",
    "resnet152",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnext101_32x8d",
    "resnext50_32x4d",
    "wide_resnet101_2",
    "wide_resnet50_2",
]

NormLayer = Callable[[int], nn.Module]


def conv3x3(in_planes: int, out_planes: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_planes, out_planes, 3, stride, dilation, dilation, groups, bias=False)


def conv1x1(in_planes: int, out_planes: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_planes, out_planes, 1, stride, bias=False)


class BasicBlock(nn.Module):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)), two 3x3 convolutions: the block of ResNet-18 and -34.

    Args:
        inplanes: input channels. planes: output channels. stride: of conv1 and the shortcut.
        downsample: the projection shortcut, or None for the identity.
        groups, base_width, dilation: only 1, 64 and 1; they are here so that both blocks are made alike.
        norm_layer: makes a normalisation layer for so many channels; `nn.BatchNorm2d` by default.

    Raises:
        ValueError: for any other groups or base_width.
        NotImplementedError: for any other dilation.
    """

    expansion = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        if groups != 1 or base_width != 64:
            raise ValueError("BasicBlock only supports groups=1 and base_width=64")
        if dilation > 1:
            raise NotImplementedError("Dilation > 1 not supported in BasicBlock")
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = norm_layer(planes)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        identity = x if self.downsample is None else self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    """1x1 reduction, 3x3, 1x1 expansion to 4 * planes channels, plus the shortcut: the block of ResNet-50 and deeper.

    The stride is in the 3x3 convolution (v1.5, as in torchvision), not in the first 1x1 as in the paper.

    Args:
        inplanes: input channels. planes: output channels / 4. stride: of conv2 and the shortcut.
        downsample: the projection shortcut, or None for the identity.
        groups, base_width: of the 3x3 convolution, which has planes * base_width / 64 * groups channels.
        dilation: of the 3x3 convolution.
        norm_layer: makes a normalisation layer for so many channels; `nn.BatchNorm2d` by default.
    """

    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        width = int(planes * (base_width / 64.0)) * groups
        self.conv1 = conv1x1(inplanes, width)
        self.bn1 = norm_layer(width)
        self.conv2 = conv3x3(width, width, stride, groups, dilation)
        self.bn2 = norm_layer(width)
        self.conv3 = conv1x1(width, planes * self.expansion)
        self.bn3 = norm_layer(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        identity = x if self.downsample is None else self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """A residual network for images: `(N, 3, H, W)` to logits `(N, num_classes)`.

    Args:
        block: BasicBlock or Bottleneck.
        layers: number of blocks in each of the four stages.
        num_classes: number of logits.
        zero_init_residual: start the last batch norm of every branch at 0, so that each block starts as the identity
            (Goyal et al. 2017).
        groups, width_per_group: of the 3x3 convolutions in Bottleneck (ResNeXt, Wide ResNet).
        replace_stride_with_dilation: whether to dilate instead of striding, for each of the last three stages
            (segmentation backbones).
        norm_layer: makes a normalisation layer for so many channels; `nn.BatchNorm2d` by default.

    Raises:
        ValueError: if num_classes < 1, or layers or replace_stride_with_dilation are not of length 4 and 3.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: NormLayer | None = None,
    ) -> None:
        super().__init__()
        dilate = (False, False, False) if replace_stride_with_dilation is None else replace_stride_with_dilation
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if len(layers) != 4:
            raise ValueError(f"layers should give the number of blocks of four stages, got {layers}")
        if len(dilate) != 3:
            raise ValueError(f"replace_stride_with_dilation should be None or a 3-element tuple, got {dilate}")
        self._norm_layer = norm_layer or nn.BatchNorm2d
        self.inplanes = 64
        self.dilation = 1
        self.groups = groups
        self.base_width = width_per_group
        self.conv1 = nn.Conv2d(3, self.inplanes, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = self._norm_layer(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = self._make_layer(block, 64, layers[0])
        self.layer2 = self._make_layer(block, 128, layers[1], stride=2, dilate=dilate[0])
        self.layer3 = self._make_layer(block, 256, layers[2], stride=2, dilate=dilate[1])
        self.layer4 = self._make_layer(block, 512, layers[3], stride=2, dilate=dilate[2])
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        initialise_(self, zero_init_residual)

    def _make_layer(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        planes: int,
        blocks: int,
        stride: int = 1,
        dilate: bool = False,
    ) -> nn.Sequential:
        first_dilation = self.dilation  # the first block still sees the resolution of the stage before
        if dilate:
            self.dilation, stride = self.dilation * stride, 1
        out_planes = planes * block.expansion
        downsample = None
        if stride != 1 or self.inplanes != out_planes:
            downsample = nn.Sequential(conv1x1(self.inplanes, out_planes, stride), self._norm_layer(out_planes))
        width = (self.groups, self.base_width)
        layer = [block(self.inplanes, planes, stride, downsample, *width, first_dilation, self._norm_layer)]
        self.inplanes = out_planes
        for _ in range(1, blocks):
            layer.append(block(out_planes, planes, 1, None, *width, self.dilation, self._norm_layer))
        return nn.Sequential(*layer)

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


def initialise_(model: nn.Module, zero_init_residual: bool) -> None:
    """He initialisation of the convolutions. Norm layers start at weight 1, bias 0 by themselves."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    if zero_init_residual:
        for module in model.modules():
            if isinstance(module, (BasicBlock, Bottleneck)):
                last = module.bn3 if isinstance(module, Bottleneck) else module.bn2
                if isinstance(last.weight, Tensor):
                    nn.init.zeros_(last.weight)


def _resnet(block: Any, layers: Sequence[int], num_classes: int, fused: bool, **options: Any) -> ResNet:
    model = ResNet(block, layers, num_classes, **options)
    if fused:
        from fastres.fuse import fuse_  # here, because its recipes import this file

        fuse_(model)
    return model


def resnet18(num_classes: int = 1000, *, fused: bool = True, **options: Any) -> ResNet:
    """ResNet-18, 11.7 M parameters. fused: call `fastres.fuse_` on it. options: as in `ResNet`."""
    return _resnet(BasicBlock, (2, 2, 2, 2), num_classes, fused, **options)


def resnet34(num_classes: int = 1000, *, fused: bool = True, **options: Any) -> ResNet:
    """ResNet-34, 21.8 M parameters. fused: call `fastres.fuse_` on it. options: as in `ResNet`."""
    return _resnet(BasicBlock, (3, 4, 6, 3), num_classes, fused, **options)


def resnet50(num_classes: int = 1000, *, fused: bool = True, **options: Any) -> ResNet:
    """ResNet-50 v1.5, 25.6 M parameters. fused: call `fastres.fuse_` on it. options: as in `ResNet`."""
    return _resnet(Bottleneck, (3, 4, 6, 3), num_classes, fused, **options)


def resnet101(num_classes: int = 1000, *, fused: bool = True, **options: Any) -> ResNet:
    """ResNet-101 v1.5, 44.5 M parameters. fused: call `fastres.fuse_` on it. options: as in `ResNet`."""
    return _resnet(Bottleneck, (3, 4, 23, 3), num_classes, fused, **options)


def resnet152(num_classes: int = 1000, *, fused: bool = True, **options: Any) -> ResNet:
    """ResNet-152 v1.5, 60.2 M parameters. fused: call `fastres.fuse_` on it. options: as in `ResNet`."""
    return _resnet(Bottleneck, (3, 8, 36, 3), num_classes, fused, **options)


def resnext50_32x4d(num_classes: int = 1000, *, fused: bool = True, **options: Any) -> ResNet:
    """ResNeXt-50 32x4d, 25.0 M parameters. fused: call `fastres.fuse_` on it. options: as in `ResNet`."""
    return _resnet(Bottleneck, (3, 4, 6, 3), num_classes, fused, groups=32, width_per_group=4, **options)


def resnext101_32x8d(num_classes: int = 1000, *, fused: bool = True, **options: Any) -> ResNet:
    """ResNeXt-101 32x8d, 88.8 M parameters. fused: call `fastres.fuse_` on it. options: as in `ResNet`."""
    return _resnet(Bottleneck, (3, 4, 23, 3), num_classes, fused, groups=32, width_per_group=8, **options)


def wide_resnet50_2(num_classes: int = 1000, *, fused: bool = True, **options: Any) -> ResNet:
    """Wide ResNet-50-2, 68.9 M parameters. fused: call `fastres.fuse_` on it. options: as in `ResNet`."""
    return _resnet(Bottleneck, (3, 4, 6, 3), num_classes, fused, width_per_group=128, **options)


def wide_resnet101_2(num_classes: int = 1000, *, fused: bool = True, **options: Any) -> ResNet:
    """Wide ResNet-101-2, 126.9 M parameters. fused: call `fastres.fuse_` on it. options: as in `ResNet`."""
    return _resnet(Bottleneck, (3, 4, 23, 3), num_classes, fused, width_per_group=128, **options)
