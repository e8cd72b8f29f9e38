"""Recipes for fastres.models."""

from fastres.models.blocks import (
    BasicBlock,
    BatchNormReLU,
    Bottleneck,
    PlainBasicBlock,
    PlainBottleneck,
    PreActBasicBlock,
    PreActBottleneck,
)
from fastres.models.cifar import CifarResNet, PreActCifarResNet
from fastres.models.resnet import PreActResNet, ResNet
from fastres.recipes.preactivation import (
    BatchNormReLUForward,
    PreActBasicBlockForward,
    PreActBottleneckForward,
    PreActCifarForward,
    PreActStemForward,
)
from fastres.recipes.residual import (
    BasicBlockForward,
    BottleneckForward,
    CifarForward,
    PlainBasicBlockForward,
    PlainBottleneckForward,
    StemForward,
)


class FusedBasicBlock(BasicBlockForward, BasicBlock):
    """fastres.models' BasicBlock, fused."""


class FusedBottleneck(BottleneckForward, Bottleneck):
    """fastres.models' Bottleneck, fused."""


class FusedPlainBasicBlock(PlainBasicBlockForward, PlainBasicBlock):
    """fastres.models' PlainBasicBlock, fused."""


class FusedPlainBottleneck(PlainBottleneckForward, PlainBottleneck):
    """fastres.models' PlainBottleneck, fused."""


class FusedPreActBasicBlock(PreActBasicBlockForward, PreActBasicBlock):
    """fastres.models' PreActBasicBlock, fused."""


class FusedPreActBottleneck(PreActBottleneckForward, PreActBottleneck):
    """fastres.models' PreActBottleneck, fused."""


class FusedBatchNormReLU(BatchNormReLUForward, BatchNormReLU):
    """fastres.models' BatchNormReLU, fused."""


class FusedResNet(StemForward, ResNet):
    """fastres.models' ResNet with a fused stem."""


class FusedPreActResNet(PreActStemForward, PreActResNet):
    """fastres.models' PreActResNet with a fused stem."""


class FusedCifarResNet(CifarForward, CifarResNet):
    """fastres.models' CifarResNet with a fused stem."""


class FusedPreActCifarResNet(PreActCifarForward, PreActCifarResNet):
    """fastres.models' PreActCifarResNet with a fused stem."""
