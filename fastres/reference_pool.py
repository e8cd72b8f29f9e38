"""What bn_act_maxpool means: batch norm, activation and max-pooling, the end of a stem.

Computed in float64 and rounded once, like everything in reference.py, where the formulas are. Backward sends the
gradient of each window to its maximum, the first where there are several.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastres import layout
from fastres.reference import _activate, _bn_gradients, behind_relu, normalise, statistics, vector_dtype


def bn_act_maxpool(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    eps: float,
    relu: bool,
    kernel: int,
    stride: int,
    padding: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """max_pool2d(act(batch_norm(x))): returns y, mean, var, and which element of its window each maximum was
    (uint8)."""
    x = layout.dense(x)
    mean, var = statistics(x, running_mean, running_var, training)
    z = _activate(normalise(x, weight, bias, mean, var, eps), relu)
    y, place = F.max_pool2d(z, kernel, stride, padding, return_indices=True)
    h, w = place // x.shape[3], place % x.shape[3]
    window_h = torch.arange(y.shape[2], device=x.device).reshape(-1, 1) * stride - padding
    window_w = torch.arange(y.shape[3], device=x.device) * stride - padding
    order = torch.channels_last if layout.is_channels_last(x) else torch.contiguous_format
    index = ((h - window_h) * kernel + (w - window_w)).to(torch.uint8)
    return y.to(x.dtype).contiguous(memory_format=order), mean, var, index.contiguous(memory_format=order)


def scatter_pooled(grad_y: Tensor, index: Tensor, shape: torch.Size, kernel: int, stride: int, padding: int) -> Tensor:
    """The gradient of max-pooling's input: every window sends its gradient to its maximum."""
    n, c, height, width = shape
    rows = torch.arange(index.shape[2], device=index.device).reshape(-1, 1) * stride - padding
    columns = torch.arange(index.shape[3], device=index.device) * stride - padding
    code = index.long()
    place = (rows + code // kernel) * width + columns + code % kernel
    flat = grad_y.new_zeros(n, c, height * width)
    return flat.scatter_add(2, place.flatten(2), grad_y.flatten(2)).reshape(n, c, height, width)


def bn_act_maxpool_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    index: Tensor,
    training: bool,
    eps: float,
    relu: bool,
    kernel: int,
    stride: int,
    padding: int,
    need_x: bool,
    need_affine: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns grad_x, grad_weight, grad_bias; empty where not needed."""
    x = layout.dense(x)
    g = scatter_pooled(grad_y.double(), index, x.shape, kernel, stride, padding)
    g = behind_relu(g, x, weight, bias, mean, var, None, eps, relu)
    grad_x, grad_weight, grad_bias = _bn_gradients(g, x, weight, mean, var, training, eps)
    vector = vector_dtype(x)
    return (
        torch.empty_like(x).copy_(grad_x) if need_x else x.new_empty(0),
        grad_weight.to(vector) if need_affine else x.new_empty(0, dtype=vector),
        grad_bias.to(vector) if need_affine else x.new_empty(0, dtype=vector),
    )
