"""The C++ kernels (csrc/cpu): arguments put into the form they take, and why they do not serve a call.

They take fp32, bf16 and fp16 activations, dense in NCHW or NHWC order, fp32 weights and biases, float64 statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastres import layout, reference
from fastres.kernels import convolution, extension

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unavailable() -> str | None:
    return extension.load_error()


def why_not(x: Tensor, *args: Any) -> str | None:
    if x.dtype not in _DTYPES:
        return f"{x.dtype} activations"
    if x.numel() == 0:
        return "empty batch"
    return None


def conv_bn_act_why_not(x: Tensor, conv_weight: Tensor, *args: Any) -> str | None:
    if x.dtype is not conv_weight.dtype:
        return f"{x.dtype} input, {conv_weight.dtype} weight"
    return why_not(x)


def conv_bn_act_method(x: Tensor, conv_weight: Tensor, *args: Any) -> str:
    """Whose convolution stands before batch norm: one of our methods, or ATen's."""
    geometry = args[6:10]
    if convolution.why_not(x, conv_weight, None, None, *geometry) is not None:
        return "ATen's convolution"
    return convolution.METHODS[convolution.method(x, conv_weight, *geometry)]


def conv_bn_act_backward_why_not(grad_y: Tensor, x: Tensor, conv_weight: Tensor, raw: Tensor, *args: Any) -> str | None:
    return why_not(raw)


def conv1x1_bn_act_why_not(x: Tensor, conv_weight: Tensor, *args: Any) -> str | None:
    if reference.conv_format(x, conv_weight) is not torch.channels_last:
        return "not channels_last"
    return why_not(x)


def conv1x1_bn_act_backward_why_not(grad_y: Tensor, x: Tensor, *args: Any) -> str | None:
    return conv1x1_bn_act_why_not(x, args[0])


def _float(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float().contiguous()


def _rows(conv_weight: Tensor) -> Tensor:
    return conv_weight.float().contiguous()


def _double(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.double().contiguous()


def bn_act(
    x: Tensor,
    weight: Any,
    bias: Any,
    mean: Any,
    var: Any,
    residual: Tensor | None,
    training: bool,
    eps: float,
    relu: bool,
    save_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = layout.dense(x)
    channels_last = layout.is_channels_last(x)
    residual = None if residual is None else layout.like(residual, channels_last)
    mean, var = (None, None) if training else (_double(mean), _double(var))
    return torch.ops.fastres_cpu.bn_act.default(
        x, _float(weight), _float(bias), mean, var, residual, training, eps, relu, save_mask, channels_last
    )


def bn_act_backward(
    grad_y: Tensor, x: Tensor, weight: Any, bias: Any, mean: Tensor, var: Tensor, mask: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = layout.dense(x)
    channels_last = layout.is_channels_last(x)
    grad_y = layout.like(grad_y.to(x.dtype), channels_last)
    return torch.ops.fastres_cpu.bn_act_backward.default(
        grad_y, x, _float(weight), _float(bias), mean, var, mask, *options, channels_last
    )


def bn_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    x = layout.dense(x)
    return torch.ops.fastres_cpu.bn_statistics.default(x, layout.is_channels_last(x))


def bn_act_backward_apply(
    grad_y: Tensor, x: Tensor, weight: Any, bias: Any, mean: Tensor, var: Tensor, mask: Tensor | None, *options: Any
) -> Tensor:
    x = layout.dense(x)
    channels_last = layout.is_channels_last(x)
    grad_y = layout.like(grad_y.to(x.dtype), channels_last)
    return torch.ops.fastres_cpu.bn_act_backward_apply.default(
        grad_y, x, _float(weight), _float(bias), mean, var, mask, *options, channels_last
    )


def add_act(x: Tensor, residual: Tensor, relu: bool) -> Tensor:
    x = layout.dense(x)
    return torch.ops.fastres_cpu.add_act.default(x, layout.like(residual, layout.is_channels_last(x)), relu)


def add_act_backward(grad_y: Tensor, y: Tensor) -> Tensor:
    y = layout.dense(y)
    return torch.ops.fastres_cpu.add_act_backward.default(
        layout.like(grad_y.to(y.dtype), layout.is_channels_last(y)), y
    )


def bn_act_maxpool(
    x: Tensor, weight: Any, bias: Any, mean: Any, var: Any, training: bool, *options: Any
) -> tuple[Tensor, ...]:
    x = layout.dense(x)
    mean, var = (None, None) if training else (_double(mean), _double(var))
    return torch.ops.fastres_cpu.bn_act_maxpool.default(
        x, _float(weight), _float(bias), mean, var, training, *options, layout.is_channels_last(x)
    )


def bn_act_maxpool_backward(
    grad_y: Tensor, x: Tensor, weight: Any, bias: Any, mean: Tensor, var: Tensor, index: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    x = layout.dense(x)
    channels_last = layout.is_channels_last(x)
    return torch.ops.fastres_cpu.bn_act_maxpool_backward.default(
        layout.like(grad_y.to(x.dtype), channels_last),
        x,
        _float(weight),
        _float(bias),
        mean,
        var,
        layout.like(index, channels_last),
        *options,
        channels_last,
    )


def conv_bn_act(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    weight: Any,
    bias: Any,
    mean: Any,
    var: Any,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    training: bool,
    *options: Any,
) -> tuple[Tensor, ...]:
    geometry = (stride, padding, dilation, groups)
    if training:  # the running statistics are not read; those of the batch may come with the convolution
        raw, mean, var = convolution.convolve_with_statistics(x, conv_weight, conv_bias, geometry)
    else:
        raw = convolution.convolve(x, conv_weight, conv_bias, geometry)
    y, mean, var, mask = bn_act(raw, weight, bias, mean, var, residual, mean is None, *options)
    return y, raw, mean, var, mask


def conv_bn_act_backward(
    grad_y: Tensor,
    x: Tensor,
    conv_weight: Tensor,
    raw: Tensor,
    weight: Any,
    bias: Any,
    mean: Tensor,
    var: Tensor,
    mask: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    training: bool,
    eps: float,
    relu: bool,
    need_x: bool,
    need_conv_weight: bool,
    need_conv_bias: bool,
    need_affine: bool,
    need_residual: bool,
    addend: Tensor | None,
) -> tuple[Tensor, ...]:
    needed = (need_x, need_conv_weight, need_conv_bias)
    grad_raw, grad_weight, grad_bias, grad_residual = bn_act_backward(
        grad_y, raw, weight, bias, mean, var, mask, training, eps, relu, any(needed), need_affine, need_residual
    )
    grads: Sequence[Tensor | None] = (None, None, None)
    if any(needed):
        geometry = (stride, padding, dilation, groups)
        grads = convolution.convolve_backward(grad_raw, x, conv_weight, need_conv_bias, geometry, needed, addend)
    return (*(x.new_empty(0) if g is None else g for g in grads), grad_weight, grad_bias, grad_residual)


def conv1x1_bn_act(
    x: Tensor,
    conv_weight: Tensor,
    weight: Any,
    bias: Any,
    mean: Any,
    var: Any,
    residual: Tensor | None,
    training: bool,
    *options: Any,
) -> tuple[Tensor, ...]:
    mean, var = (None, None) if training else (_double(mean), _double(var))
    residual = None if residual is None else layout.like(residual, True)
    y, *rest = torch.ops.fastres_cpu.conv1x1_bn_act.default(
        layout.like(x, True),
        _rows(conv_weight),
        _float(weight),
        _float(bias),
        mean,
        var,
        residual,
        training,
        *options,
    )
    return layout.in_format(y, torch.channels_last), *rest


def conv1x1_bn_act_backward(
    grad_y: Tensor,
    x: Tensor,
    conv_weight: Tensor,
    weight: Any,
    bias: Any,
    mean: Tensor,
    var: Tensor,
    x_mean: Tensor,
    covariance: Tensor,
    mask: Tensor | None,
    *options: Any,
) -> tuple[Tensor, ...]:
    grad_x, grad_conv_weight, grad_weight, grad_bias, masked = torch.ops.fastres_cpu.conv1x1_bn_act_backward.default(
        layout.like(grad_y.to(x.dtype), True),
        layout.like(x, True),
        _rows(conv_weight),
        _float(weight),
        mean,
        var,
        x_mean,
        covariance,
        mask,
        *options,
    )
    if grad_x.numel():
        grad_x = layout.in_format(grad_x, torch.channels_last)
    if masked.numel():
        masked = layout.in_format(masked, torch.channels_last)
    return grad_x, grad_conv_weight.to(x.dtype), grad_weight, grad_bias, masked


def conv1x1_statistics(x: Tensor, conv_weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean and variance of the output's channels, mean and covariance of the input's."""
    return torch.ops.fastres_cpu.conv1x1_statistics.default(layout.like(x, True), _rows(conv_weight))


def conv1x1_backward_reduce(
    grad_y: Tensor, x: Tensor, conv_weight: Tensor, mean: Tensor, x_mean: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """g (grad_y without a mask), g^T (x - x_mean), and the sums of g * (raw - mean) and of g over the pixels."""
    grad_y, x = layout.like(grad_y.to(x.dtype), True), layout.like(x, True)
    g, *sums = torch.ops.fastres_cpu.conv1x1_backward_reduce.default(grad_y, x, _rows(conv_weight), mean, x_mean, mask)
    return grad_y if mask is None else layout.in_format(g, torch.channels_last), *sums


def conv1x1_backward_apply(
    g: Tensor, x: Tensor, conv_weight: Tensor, weight: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    """grad_x and grad_conv_weight; rest: mean, var, x_mean, covariance, what conv1x1_backward_reduce gave but for g,
    with the second of them left out, its sums over all processes, the number of their pixels, eps, need_x and
    need_conv_weight."""
    grad_conv_weight = rest[4]
    grad_x = torch.ops.fastres_cpu.conv1x1_backward_apply.default(
        g, layout.like(x, True), _rows(conv_weight), _float(weight), *rest
    )
    if grad_x.numel():
        grad_x = layout.in_format(grad_x, torch.channels_last)
    return grad_x, grad_conv_weight.to(x.dtype)
