"""conv1x1_bn_act and its backward in Triton: act(batch_norm(x W^T) + residual), whose raw output x W^T is never stored.

Formulas: csrc/cpu/conv1x1_bn_act.cpp. What is as large as an activation is read and written by kernels: once for the
statistics and once for y forward, once for D = g^T x and once for grad_x backward. Products of W [K, C] and of the
covariance S [C, C] are PyTorch's, in float64. Nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastres import layout, reference
from fastres.kernels.triton.gram import gram
from fastres.kernels.triton.product import Pair, product
from fastres.kernels.triton.row_product import row_product


def _matrix(conv_weight: Tensor, x: Tensor) -> Tensor:
    """W [K, C] with the values that products with x see, in float64."""
    return conv_weight.flatten(1).to(x.dtype).double()


def _scale(var: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """gamma / sqrt(var + eps)"""
    inverse = (var + eps).rsqrt()
    return inverse if weight is None else inverse * weight


def conv1x1_bn_act(
    x: Tensor,
    conv_weight: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    training: bool,
    eps: float,
    relu: bool,
    save_mask: bool,
) -> tuple[Tensor, ...]:
    x = layout.like(x, True)
    (n, _, height, width), k = x.shape, conv_weight.shape[0]
    w = _matrix(conv_weight, x)
    if training:
        x_mean, covariance = gram(x)
        mean, var = w @ x_mean, (w @ covariance).mul_(w).sum(1).clamp_min_(0)
    else:
        assert running_mean is not None and running_var is not None
        mean, var = (t.to(torch.float64, copy=True) for t in (running_mean, running_var))
        x_mean, covariance = mean.new_empty(0), mean.new_empty(0)
    scale = _scale(var, weight, eps)
    shift = -scale * mean if bias is None else bias - scale * mean
    y = torch.empty((n, k, height, width), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    mask = torch.empty(layout.mask_bytes(y) if save_mask else 0, dtype=torch.uint8, device=x.device)
    product(
        Pair(x, conv_weight.flatten(1).to(x.dtype).T),
        y,
        scale=scale.float(),
        bias=shift.float(),
        residual=None if residual is None else layout.like(residual.to(x.dtype), True),
        mask=mask if save_mask else None,
        relu=relu,
    )
    covariance = covariance.flatten().to(reference.vector_dtype(x))
    return layout.in_format(y, torch.channels_last), mean, var, x_mean, covariance, mask


def conv1x1_bn_act_backward(
    grad_y: Tensor,
    x: Tensor,
    conv_weight: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    x_mean: Tensor,
    covariance: Tensor,
    mask: Tensor | None,
    training: bool,
    eps: float,
    need_x: bool,
    need_conv_weight: bool,
    need_affine: bool,
) -> tuple[Tensor, ...]:
    x, g = layout.like(x, True), layout.like(grad_y.to(x.dtype), True)
    k, c = conv_weight.shape[:2]
    count = x.numel() // c
    w, scale = _matrix(conv_weight, x), _scale(var, weight, eps)
    masked = x.new_empty(0) if mask is None else torch.empty_like(g)
    # Products with fp32 values are taken around the mean; those of 16 bits are exact, and would have to be rounded.
    centre = x_mean.float() if training and x.dtype is torch.float32 else None
    d, sums = row_product(
        g,
        x,
        k,
        c,
        dtype=torch.float64,
        mask=mask,
        masked=None if mask is None else masked,
        centre=centre,
        sums=True,
    )
    g = g if mask is None else masked
    if training:
        left = x_mean if centre is None else x_mean - centre
        d = d - sums[:, None] * left
    inverse_square = 1.0 / (var + eps)
    p = (w * d).sum(1) if training else (w * d).sum(1) - mean * sums
    vector = reference.vector_dtype(x)
    empty = x.new_empty(0, dtype=vector)
    grad_weight, grad_bias = (p * inverse_square.sqrt()).to(vector), sums.to(vector)
    turned = (-scale * p * inverse_square / count)[:, None] * w  # b W; 0 with running statistics
    grad_conv_weight = conv_weight.new_empty(0)
    if need_conv_weight:
        grad_conv_weight = scale[:, None] * d
        if training:
            grad_conv_weight += count * (turned @ covariance.double().view(c, c))
        grad_conv_weight = grad_conv_weight.to(conv_weight.dtype).view(conv_weight.shape)
    grad_x = x.new_empty(0)
    if need_x:
        grad_x = torch.empty_like(x)
        behind = Pair(g, (scale[:, None] * w).to(x.dtype))
        if training:
            q = w.T @ turned
            unit = q.abs().max().clamp_min(torch.finfo(torch.float32).tiny).float()  # fp16 does not hold q itself
            q = (q / unit).to(x.dtype)
            constant = (-scale * sums / count) @ w - unit * (x_mean @ q.double())  # of the rounded q: x may have a mean
            product(Pair(x, q), grad_x, behind, unit=unit, bias=constant.float())
        else:
            product(behind, grad_x)
        grad_x = layout.in_format(grad_x, torch.channels_last)
    if mask is not None:
        masked = layout.in_format(masked, torch.channels_last)
    affine = (grad_weight, grad_bias) if need_affine else (empty, empty.clone())
    return grad_x, grad_conv_weight, *affine, masked
