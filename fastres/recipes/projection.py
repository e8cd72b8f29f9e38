"""The end of a residual block with a projection: relu(bn(conv(y)) + other_bn(other_conv(x))), both batch norms in one
pass (fastres::bn_add_bn_act), where a kernel has it.

Not behind a bottleneck's last convolution, where the algebraic conv1x1_bn_act serves that one. How often what is as
wide as the block's output is read and written in training, by its convolutions too:

    two batch norms, one after the other                  forward 5 + 4    backward 12 + 3    saved: both raw outputs
    bn_add_bn_act                                         forward 4 + 3    backward 10 + 2    saved: both raw outputs
    conv1x1_bn_act, the normalised shortcut its residual  forward 3 + 3    backward  8 + 2    saved: the shortcut's

The last is least, although the shortcut has passes of its own there. The projection could become part of its product,
with statistics from the covariance of the block's input (0 + 1 and 4 + 1). It is not: a projection with a stride only
doubles the channels, so that products with that covariance cost half as many multiplications again as the convolution,
and it would be taken from cuDNN, beside whose time ours was never measured.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastres import arguments, batch_norm, folding, functional, guard, observe, sites
from fastres.batch_norm import FORWARDS, BatchNorm
from fastres.kernels import table

Projection = tuple[nn.Conv2d, BatchNorm]


def of(block: Any, x: Tensor) -> Projection | None:
    """What the block's whole shortcut is, if fused code may stand for it."""
    downsample = block.downsample
    if type(downsample) is not nn.Sequential or len(downsample) != 2:
        return None
    conv: Any = downsample[0]
    bn: Any = downsample[1]
    hooked = downsample._forward_hooks or downsample._forward_pre_hooks
    hooked = hooked or downsample._backward_hooks or downsample._backward_pre_hooks
    plain = type(conv) is nn.Conv2d and type(bn) in FORWARDS and not hooked
    return (conv, bn) if plain and guard.blocked(downsample, x, conv=conv, bn=bn) is None else None


def join(
    conv: nn.Conv2d, bn: BatchNorm, y: Tensor, other_conv: nn.Conv2d, other_bn: BatchNorm, x: Tensor
) -> Tensor | None:
    """relu(bn(conv(y)) + other_bn(other_conv(x))) with the modules' attributes as they are now; None where this is not
    the way: in inference, without a kernel, where conv1x1_bn_act serves, and where the two do not have one shape."""
    branches = ((conv, bn, y), (other_conv, other_bn, x))
    gradient = torch.is_grad_enabled() and any(sites.wants_gradient(*branch, None) for branch in branches)
    if not (gradient or bn.training or other_bn.training):
        return None
    if batch_norm.process_group(bn) or batch_norm.process_group(other_bn):
        return None
    if not table.fused_kernel_serves("bn_add_bn_act", (y,)):
        return None
    geometry = folding.geometry(conv)
    # Errors of convolutions come before batches are counted.
    shape = arguments.check_convolution(y, conv.weight, conv.bias, geometry)
    if shape != arguments.check_convolution(x, other_conv.weight, other_conv.bias, folding.geometry(other_conv)):
        return None
    if gradient and functional.algebraic(y, conv.weight, conv.bias, geometry):
        return None
    norm = _norm(bn)
    if norm.training:  # as in eager, where such an error leaves the shortcut's batch uncounted
        arguments.check_values_per_channel(shape)
    other_norm = _norm(other_bn)
    raw, other = _convolved(conv, y), _convolved(other_conv, x)
    observe.stand_for(bn, other_bn)
    return functional.bn_add_bn_act(raw, norm, other, other_norm)


def _norm(bn: BatchNorm) -> functional.BatchNorm:
    options = batch_norm.options(bn)  # counts the batch
    del options["process_group"]
    return functional.BatchNorm(*batch_norm.running(bn), bn.weight, bn.bias, **options)


def _convolved(conv: nn.Conv2d, x: Tensor) -> Tensor:
    stride, padding, dilation, groups = folding.geometry(conv)
    observe.stand_for(conv)
    return functional.conv_bias_act(
        x,
        conv.weight,
        conv.bias,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        act="identity",
    )
