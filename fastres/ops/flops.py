"""FLOPs of the ops with a convolution in them, for torch.utils.flop_counter: without a formula they would count as
zero.

What is counted is the work of the convolution as such, 2 N K OH OW C / groups R S, whichever way it is computed:
Winograd does less, the algebraic batch norm of 1x1 convolutions more. Batch norms, additions, ReLUs and poolings are
not counted, nor are eager's. Networks run as in eager while a FlopCounterMode watches them, because of its hooks on
all modules; the formulas count the functions of fastres.functional, traced graphs, and the parts that synchronised
batch norm is made of (torch.ops.fastres_cpu).
"""

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


def _compiled(*names: str) -> Any:
    """Registers a formula for compiled ops, which are called by themselves, where there are such. A convolution answers
    with an empty tensor where it does not serve: then ATen's is called, and counted."""
    ops = torch.ops.fastres_cpu
    return flop_counter.register_flop_formula([getattr(ops, name) for name in names if hasattr(ops, name)])


@_compiled("conv")
def _conv(
    x: Any, packed: Any, weight: Any, bias: Any, residual: Any, stride: Any, padding: Any, dilation: Any,
    *args: Any, **kw: Any
) -> int:  # fmt: skip
    return _forward(x, weight, stride, padding, dilation)


@_compiled("conv_with_statistics", "conv_maxpool")
def _conv_with_more(
    x: Any, packed: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, *args: Any, **kw: Any
) -> int:
    return _forward(x, weight, stride, padding, dilation)


@_compiled("conv_backward_input")
def _conv_backward_input(
    grad_y: Any, weight: Any, x: Any, stride: Any, padding: Any, dilation: Any, *args: Any, out_shape: Any, **_: Any
) -> int:
    return _forward(x, weight, stride, padding, dilation) if len(out_shape) == 4 else 0


@_compiled("conv_backward_weight")
def _conv_backward_weight(
    grad_y: Any, x: Any, weight: Any, stride: Any, padding: Any, dilation: Any, *args: Any, out_shape: Any, **_: Any
) -> int:
    return _forward(x, weight, stride, padding, dilation) if len(out_shape) == 4 else 0


@_compiled("conv1x1_backward_reduce")
def _conv1x1_backward_reduce(grad_y: Any, x: Any, *args: Any, **kw: Any) -> int:
    """The product of the gradient of the weight."""
    return _forward(x, (grad_y[1], x[1], 1, 1), _ONE, (0, 0), _ONE)


@_compiled("conv1x1_backward_apply")
def _conv1x1_backward_apply(grad_y: Any, x: Any, *args: Any, **kw: Any) -> int:
    """The product of the gradient of x."""
    need_x = args[-2]
    return bool(need_x) * _forward(x, (grad_y[1], x[1], 1, 1), _ONE, (0, 0), _ONE)


@_compiled("classify")
def _classify(x: Any, weight: Any, *args: Any, **kw: Any) -> int:
    return flop_counter.mm_flop((x[0], x[1]), (weight[1], weight[0]))
