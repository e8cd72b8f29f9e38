"""What the networks of resnet.py and cifar.py are put together from: stages of blocks, and their initialisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fastres.models.blocks import (
    BasicBlock,
    Block,
    Bottleneck,
    NormLayer,
    PreActBasicBlock,
    PreActBottleneck,
    make_shortcut,
)


def shortcut_option(block: Block, option: str | None, default: str) -> str | None:
    """The shortcut option of a network of such blocks; None for a plain one.

    Raises:
        ValueError: if a plain network is to have shortcuts.
    """
    if block.residual:
        return default if option is None else option
    if option is not None:
        raise ValueError(f"{block.__name__} makes a plain network, without shortcuts; got shortcut={option!r}")
    return None


def make_stage(
    block: Block,
    in_planes: int,
    planes: int,
    blocks: int,
    stride: int,
    shortcut: str | None,
    *,
    dilations: tuple[int, int] = (1, 1),
    norm_layer: NormLayer = nn.BatchNorm2d,
    **options: Any,
) -> nn.Sequential:
    """Some blocks in a row, of which the first one has the stride and comes from in_planes channels.

    Args:
        shortcut: their option, or None for plain blocks.
        dilations: of the first block and of the others. options: of all blocks.
    """
    stage, out_planes = [], planes * block.expansion
    for i in range(blocks):
        if i > 0:
            in_planes, stride = out_planes, 1
        if shortcut is not None:
            options["downsample"] = make_shortcut(
                shortcut, in_planes, out_planes, stride, preactivation=block.preactivation, norm_layer=norm_layer
            )
        dilation = dilations[min(i, 1)]
        stage.append(block(in_planes, planes, stride, dilation=dilation, norm_layer=norm_layer, **options))
    return nn.Sequential(*stage)


def without_first_activation_(stage: nn.Sequential) -> None:
    """Takes bn1 off the first block of a network of v2: what enters it is activated already."""
    first: Any = stage[0]
    first.bn1 = None


def check_network(kind: Any, block: Block, num_classes: int, layers: Sequence[int], stages: int) -> None:
    """Raises ValueError for arguments that no network can be made of."""
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    if len(layers) != stages or min(layers) < 1:
        names = {3: "three", 4: "four"}
        raise ValueError(f"layers should give the number of blocks of {names[stages]} stages, got {layers}")
    if block.preactivation != kind.preactivation:
        raise ValueError(f"{kind.__name__} cannot be made of {block.__name__}s")


def initialise_(model: nn.Module, zero_init_residual: bool) -> None:
    """He initialisation of the convolutions: normal, standard deviation sqrt(2 / (output channels * kernel size)) (He
    et al. 2015, arXiv 1502.01852). Norm layers start at weight 1, bias 0 by themselves.

    zero_init_residual: start the last layer of every branch at 0, so that each block starts as its shortcut (Goyal et
    al. 2017, arXiv 1706.02677): the last batch norm's weight; in v2, where the last layer is a convolution, its weight.

    Raises:
        ValueError: if a plain network is to have zeros: nothing would come through.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    if not zero_init_residual:
        return
    for module in model.modules():
        last: Any = None
        if isinstance(module, (BasicBlock, Bottleneck)):
            if not module.residual:
                raise ValueError("zero_init_residual needs residual blocks, not a plain network")
            last = module.bn3 if isinstance(module, Bottleneck) else module.bn2
        elif isinstance(module, (PreActBasicBlock, PreActBottleneck)):
            last = module.conv3 if isinstance(module, PreActBottleneck) else module.conv2
        if last is not None and isinstance(last.weight, Tensor):
            nn.init.zeros_(last.weight)
