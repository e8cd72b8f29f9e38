"""fastres::bn_act_maxpool: max_pool2d(act(batch_norm(x))), the tail of a ResNet's stem, without writing the normalised
activation.

Saved for backward: x (or what it is made from, see recompute.py), mean, var, and a byte per pooled value: which element
of its window was the maximum.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastres import layout, reference
from fastres.ops import recompute, registration


def pooled(size: Any, kernel: int, stride: int, padding: int) -> Any:
    """Output size of a pooling along one axis."""
    return (size + 2 * padding - kernel) // stride + 1


def _fake(
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
    x = layout.dense(x)
    n, c, h, w = x.shape
    shape = (n, c, pooled(h, kernel, stride, padding), pooled(w, kernel, stride, padding))
    order = torch.channels_last if layout.is_channels_last(x) else torch.contiguous_format
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=order)
    statistic = x.new_empty(c, dtype=torch.float64)
    return y, statistic, torch.empty_like(statistic), torch.empty_like(y, dtype=torch.uint8)


def _fake_backward(
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
    x = layout.dense(x)
    vector = x.new_empty(x.shape[1] if need_affine else 0, dtype=reference.vector_dtype(x))
    return torch.empty_like(x) if need_x else x.new_empty(0), vector, torch.empty_like(vector)


op = registration.define(
    "bn_act_maxpool(Tensor x, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, bool training, "
    "float eps, bool relu, int kernel, int stride, int padding) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
)
backward_op = registration.define(
    "bn_act_maxpool_backward(Tensor grad_y, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, "
    "Tensor index, "
    "bool training, float eps, bool relu, int kernel, int stride, int padding, bool need_x, bool need_affine) "
    "-> (Tensor, Tensor, Tensor)",
    _fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, _, _, *options = inputs
    _, mean, var, index = output
    ctx.mark_non_differentiable(mean, var, index)
    ctx.set_materialize_grads(False)
    recompute.save(ctx, x, (weight, bias, mean, var, index))
    ctx.options = tuple(options)


def _backward(ctx: Any, grad_y: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad_y is None:
        return (None,) * 11
    x, (weight, bias, mean, var, index) = recompute.saved(ctx)
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    if torch.is_grad_enabled():
        training, eps, relu, kernel, stride, padding = ctx.options

        def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
            used_var, used_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0) if training else (var, mean)
            z = reference.normalise(x, weight, bias, used_mean, used_var, eps)
            return F.max_pool2d(z.relu() if relu else z, kernel, stride, padding)

        needed = (need_x, need_weight, need_bias)
        return (*registration.second_order(forward, (x, weight, bias), needed, grad_y), *(None,) * 8)
    grad_x, grad_weight, grad_bias = backward_op(
        grad_y, x, weight, bias, mean, var, index, *ctx.options, need_x, need_weight or need_bias
    )
    return (
        grad_x if need_x else None,
        grad_weight.to(weight.dtype) if need_weight else None,
        grad_bias.to(bias.dtype) if need_bias else None,
        *(None,) * 8,
    )


call = registration.differentiable(op, _setup_context, _backward)
registration.autocast(op, lambda dtype, *args: args)  # batch norm and max-pooling are on none of autocast's lists
