"""Recipes for fastres.models."""

from fastres.models.cifar import CifarResNet
from fastres.models.resnet import BasicBlock, Bottleneck, ResNet
from fastres.recipes.residual import BasicBlockForward, BottleneckForward, CifarForward, StemForward


class FusedBasicBlock(BasicBlockForward, BasicBlock):
    """fastres.models' BasicBlock, fused."""


class FusedBottleneck(BottleneckForward, Bottleneck):
    """fastres.models' Bottleneck, fused."""


class FusedResNet(StemForward, ResNet):
    """fastres.models' ResNet with a fused stem."""


class FusedCifarResNet(CifarForward, CifarResNet):
    """fastres.models' CifarResNet with a fused stem."""
