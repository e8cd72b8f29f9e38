"""Recipes for torchvision's ResNet, ResNeXt and Wide ResNet. Imported only for a model that comes from torchvision."""

from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from fastres.recipes.residual import BasicBlockForward, BottleneckForward, StemForward


class FusedBasicBlock(BasicBlockForward, BasicBlock):
    """torchvision's BasicBlock, fused."""


class FusedBottleneck(BottleneckForward, Bottleneck):
    """torchvision's Bottleneck, fused."""


class FusedResNet(StemForward, ResNet):
    """torchvision's ResNet with a fused stem."""
