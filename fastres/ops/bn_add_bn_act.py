"""fastres::bn_add_bn_act: act(batch_norm(x) + batch_norm(other)), the end of a block with a projection.

Formulas: fastres/reference_join.py. Saved for backward: x, other, their mean and var, and under a ReLU a mask of 1 bit
a value. The normalised shortcut, which a batch norm of its own would write and this one's would read, never exists.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastres import layout, reference
from fastres.ops import registration


def _fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    other: Tensor,
    other_weight: Tensor | None,
    other_bias: Tensor | None,
    other_running_mean: Tensor | None,
    other_running_var: Tensor | None,
    training: bool,
    other_training: bool,
    eps: float,
    other_eps: float,
    relu: bool,
    save_mask: bool,
) -> tuple[Tensor, ...]:
    y = torch.empty_like(layout.dense(x))
    mean, var, other_mean, other_var = (x.new_empty(x.shape[1], dtype=torch.float64) for _ in range(4))
    mask = x.new_empty(layout.mask_bytes(y) if save_mask else 0, dtype=torch.uint8)
    return y, mean, var, other_mean, other_var, mask


def _fake_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    other: Tensor,
    other_weight: Tensor | None,
    other_mean: Tensor,
    other_var: Tensor,
    mask: Tensor | None,
    training: bool,
    other_training: bool,
    eps: float,
    other_eps: float,
    need_x: bool,
    need_affine: bool,
    need_other: bool,
    need_other_affine: bool,
) -> tuple[Tensor, ...]:
    x = layout.dense(x)
    grads = []
    for need, affine in ((need_x, need_affine), (need_other, need_other_affine)):
        vector = x.new_empty(x.shape[1] if affine else 0, dtype=reference.vector_dtype(x))
        grads += [torch.empty_like(x) if need else x.new_empty(0), vector, torch.empty_like(vector)]
    return tuple(grads)


op = registration.define(
    "bn_add_bn_act(Tensor x, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, Tensor other, "
    "Tensor? other_weight, Tensor? other_bias, Tensor? other_running_mean, Tensor? other_running_var, bool training, "
    "bool other_training, float eps, float other_eps, bool relu, bool save_mask) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake,
)
backward_op = registration.define(
    "bn_add_bn_act_backward(Tensor grad_y, Tensor x, Tensor? weight, Tensor mean, Tensor var, Tensor other, "
    "Tensor? other_weight, Tensor other_mean, Tensor other_var, Tensor? mask, bool training, bool other_training, "
    "float eps, float other_eps, bool need_x, bool need_affine, bool need_other, bool need_other_affine) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, _, _, other, other_weight, other_bias, _, _, *options, relu, _ = inputs
    _, mean, var, other_mean, other_var, mask = output
    if relu and mask.numel() == 0 and x.numel():
        raise RuntimeError("fastres::bn_add_bn_act: gradients through a ReLU need save_mask=True")
    ctx.mark_non_differentiable(mean, var, other_mean, other_var, mask)
    ctx.set_materialize_grads(False)
    branches = (x, weight, bias, mean, var, other, other_weight, other_bias, other_mean, other_var)
    ctx.save_for_backward(*branches, mask if relu else None)
    ctx.options = tuple(options)  # training, other_training, eps, other_eps


def _second_order(ctx: Any, grad_y: Tensor) -> list[Tensor | None]:
    """Differentiable gradients of x, weight, bias, other, other_weight, other_bias."""
    x, weight, bias, mean, var, other, other_weight, other_bias, other_mean, other_var, mask = ctx.saved_tensors
    training, other_training, eps, other_eps = ctx.options
    need = ctx.needs_input_grad

    def normalised(x: Tensor, weight: Any, bias: Any, mean: Tensor, var: Tensor, training: bool, eps: float) -> Tensor:
        if training:
            var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
        return reference.normalise(x, weight, bias, mean, var, eps)

    def forward(x: Any, weight: Any, bias: Any, other: Any, other_weight: Any, other_bias: Any) -> Tensor:
        z = normalised(x, weight, bias, mean, var, training, eps)
        z = z + normalised(other, other_weight, other_bias, other_mean, other_var, other_training, other_eps)
        if mask is None:
            return z
        return torch.where(layout.unpack_mask(mask, x.shape, layout.is_channels_last(layout.dense(x))), z, 0.0)

    inputs = (x, weight, bias, other, other_weight, other_bias)
    return registration.second_order(forward, inputs, (*need[:3], *need[5:8]), grad_y)


def _backward(ctx: Any, grad_y: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad_y is None:
        return (None,) * 16
    if torch.is_grad_enabled():
        grads = _second_order(ctx, grad_y)
        return (*grads[:3], None, None, *grads[3:], *(None,) * 8)
    x, weight, bias, mean, var, other, other_weight, other_bias, other_mean, other_var, mask = ctx.saved_tensors
    need = ctx.needs_input_grad
    grads = backward_op(
        grad_y,
        x,
        weight,
        mean,
        var,
        other,
        other_weight,
        other_mean,
        other_var,
        mask,
        *ctx.options,
        need[0],
        need[1] or need[2],
        need[5],
        need[6] or need[7],
    )
    inputs = (x, weight, bias, other, other_weight, other_bias)
    grads = [
        grad.to(t.dtype) if wanted else None
        for grad, t, wanted in zip(grads, inputs, (*need[:3], *need[5:8]), strict=True)
    ]
    return (*grads[:3], None, None, *grads[3:], *(None,) * 8)


call = registration.differentiable(op, _setup_context, _backward)


def _cast(dtype: torch.dtype, *args: Any) -> tuple[Any, ...]:
    # As of bn_act: x keeps its dtype, and `out += shortcut` keeps that of out.
    return (*args[:5], registration.to_dtype(args[5], args[0].dtype), *args[6:])


registration.autocast(op, _cast)
