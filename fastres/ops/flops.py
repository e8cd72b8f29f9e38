"""FLOPs of the ops with a convolution in them, for torch.utils.flop_counter: without a formula they would count as
zero."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import flop_counter


def _pair_output(x: Any, weight: Any, stride: Any, padding: Any, dilation: Any) -> list[int]:
    sizes = zip(x[2:], weight[2:], stride, padding, dilation, strict=True)
    return [x[0], weight[0], *((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in sizes)]


def _forward(x: Any, weight: Any, stride: Any, padding: Any, dilation: Any) -> int:
    return flop_counter.conv_flop_count(x, weight, _pair_output(x, weight, stride, padding, dilation))


@flop_counter.register_flop_formula(torch.ops.fastres.conv_bias_act)
def _conv_bias_act(
    x: Any, weight: Any, bias: Any, residual: Any, stride: Any, padding: Any, dilation: Any, *args: Any, **kw: Any
) -> int:
    return _forward(x, weight, stride, padding, dilation)


@flop_counter.register_flop_formula(torch.ops.fastres.conv_bn_act)
def _conv_bn_act(x: Any, conv_weight: Any, *args: Any, **kw: Any) -> int:
    stride, padding, dilation = args[6:9]
    return _forward(x, conv_weight, stride, padding, dilation)


@flop_counter.register_flop_formula(torch.ops.fastres.conv_bn_act_backward)
def _conv_bn_act_backward(grad_y: Any, x: Any, conv_weight: Any, *args: Any, **kw: Any) -> int:
    stride, padding, dilation = args[6:9]
    need_x, need_conv_weight = args[13:15]
    return (bool(need_x) + bool(need_conv_weight)) * _forward(x, conv_weight, stride, padding, dilation)


_ONE = (1, 1)


@flop_counter.register_flop_formula(torch.ops.fastres.conv1x1_bn_act)
def _conv1x1_bn_act(x: Any, conv_weight: Any, *args: Any, **kw: Any) -> int:
    return _forward(x, conv_weight, _ONE, (0, 0), _ONE)


@flop_counter.register_flop_formula(torch.ops.fastres.conv1x1_bn_act_backward)
def _conv1x1_bn_act_backward(grad_y: Any, x: Any, conv_weight: Any, *args: Any, **kw: Any) -> int:
    need_x, need_conv_weight = args[9:11]
    return (bool(need_x) + bool(need_conv_weight)) * _forward(x, conv_weight, _ONE, (0, 0), _ONE)
