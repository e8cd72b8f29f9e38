"""The convolution ops on GPUs: ATen's convolution (cuDNN, MIOpen), then one pass of our own kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastres import layout, reference
from fastres.kernels import convolution

Op = Callable[..., tuple[Tensor, ...]]


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[Any, ...]) -> Tensor:
    """conv2d(x, weight, bias) in the layout that the ops return; geometry: stride, padding, dilation, groups."""
    stride, padding, dilation, groups = geometry
    y = torch.ops.aten.convolution(x, layout.plain(weight), bias, stride, padding, dilation, False, [0, 0], groups)
    return layout.in_format(y, reference.conv_format(x, weight))


def conv_bias_act(add_act: Callable[[Tensor, Tensor, bool], Tensor]) -> Callable[..., Tensor]:
    """The op conv_bias_act with this addition."""

    def run(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *options: Any) -> Tensor:
        *geometry, relu = options
        y = convolve(x, weight, bias, tuple(geometry))
        if residual is not None:
            return add_act(y, residual, relu)
        return y.relu_() if relu else y

    return run


def conv_bn_act(bn_act: Op) -> Op:
    """The op conv_bn_act with this batch norm."""

    def run(
        x: Tensor,
        conv_weight: Tensor,
        conv_bias: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        residual: Tensor | None,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        groups: int,
        *options: Any,
    ) -> tuple[Tensor, ...]:
        raw = convolve(x, conv_weight, conv_bias, (stride, padding, dilation, groups))
        y, mean, var, mask = bn_act(raw, weight, bias, running_mean, running_var, residual, *options)
        return y, raw, mean, var, mask

    return run


def conv_bn_act_backward(bn_act_backward: Op) -> Op:
    """The op conv_bn_act_backward with this batch norm's."""

    def run(
        grad_y: Tensor,
        x: Tensor,
        conv_weight: Tensor,
        raw: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
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
        grads: Any = (None, None, None)
        if any(needed):
            geometry = (stride, padding, dilation, groups)
            grads = convolution.aten_backward(grad_raw, x, conv_weight, need_conv_bias, geometry, needed)
            if grads[0] is not None and addend is not None:
                grads[0] += addend
        return (*(x.new_empty(0) if g is None else g for g in grads), grad_weight, grad_bias, grad_residual)

    return run
