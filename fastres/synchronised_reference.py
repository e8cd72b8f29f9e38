"""The parts of synchronised batch norm in plain PyTorch, as fastres/reference.py has the ops: float64, rounded once.

A part takes or gives what lies between the processes: statistics, and gradients of weight and bias. Formulas:
fastres/reference.py, with mean, var, the gradients of weight and bias, and the number of values a channel those of all
processes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastres import layout, reference

_DIMS = (0, 2, 3)


def bn_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of x [N, C, H, W] over N, H, W, float64 [C]; zeros and ones of an empty x."""
    return reference.statistics(x, None, None, True)


def bn_act_backward_apply(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    mask: Tensor | None,
    grad_weight: Tensor,
    grad_bias: Tensor,
    count: int,
    eps: float,
    relu: bool,
) -> Tensor:
    """grad_x. grad_weight and grad_bias, float64 [C], are those of all `count` values a channel."""
    x = layout.dense(x)
    g = reference.behind_relu(grad_y, x, weight, bias, mean, var, mask, eps, relu)
    return torch.empty_like(x).copy_(
        reference.input_gradient(g, x, weight, mean, var, grad_weight, grad_bias, count, eps)
    )


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[Any, ...]) -> Tensor:
    """The convolution in x's dtype; geometry: stride, padding, dilation, groups."""
    y = reference.convolution(x, weight, bias, *geometry)
    return layout.in_format(y.to(x.dtype), reference.conv_format(x, weight))


def convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    has_bias: bool,
    geometry: tuple[Any, ...],
    needed: tuple[bool, bool, bool],
    addend: Tensor | None,
) -> list[Tensor | None]:
    """The gradients of x (plus addend), weight and bias that are needed."""
    stride, padding, dilation, groups = geometry
    sizes = [weight.shape[0]] if has_bias else None
    grads = torch.ops.aten.convolution_backward(
        grad.double(), x.double(), weight.double(), sizes, stride, padding, dilation, False, [0, 0], groups, [*needed]
    )
    if needed[0] and addend is not None:
        grads[0].add_(addend)
    return [g.to(x.dtype) if need else None for g, need in zip(grads, needed, strict=True)]
