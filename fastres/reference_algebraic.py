"""What conv1x1_bn_act means: conv_bn_act of a 1x1 convolution whose raw output is not kept for backward.

Computed in float64 and rounded once, like everything in reference.py, where the formulas are.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastres import layout
from fastres.reference import conv_bn_act, conv_bn_act_backward, conv_format, convolution, vector_dtype


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
    """conv_bn_act of a 1x1 convolution whose raw output is not kept: returns y, mean, var, the mean and the covariance
    of x's channels (with batch statistics), from which backward can be computed without it, and mask."""
    geometry = ([1, 1], [0, 0], [1, 1], 1)
    y, _, mean, var, mask = conv_bn_act(
        x,
        conv_weight,
        None,
        weight,
        bias,
        running_mean,
        running_var,
        residual,
        *geometry,
        training,
        eps,
        relu,
        save_mask,
    )
    if not training:
        return y, mean, var, mean.new_empty(0), x.new_empty(0, dtype=vector_dtype(x)), mask
    rows = x.double().transpose(0, 1).flatten(1)
    x_mean = rows.mean(1)
    rows = rows - x_mean.unsqueeze(1)
    return y, mean, var, x_mean, (rows @ rows.T / rows.shape[1]).flatten().to(vector_dtype(x)), mask


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
    """Returns grad_x, grad_conv_weight, grad_weight, grad_bias and grad_residual (empty without a mask: it is grad_y).
    The raw output is computed again."""
    geometry = ([1, 1], [0, 0], [1, 1], 1)
    raw = layout.in_format(convolution(x, conv_weight, None, *geometry), conv_format(x, conv_weight))
    options: Any = (training, eps, False, need_x, need_conv_weight, False, need_affine, True, None)
    grad_x, grad_conv_weight, _, *rest = conv_bn_act_backward(
        grad_y, x, conv_weight, raw, weight, bias, mean, var, mask, *geometry, *options
    )
    return grad_x, grad_conv_weight, *rest
