"""fastres::conv1x1_bn_act: act(batch_norm(conv(x)) + residual) of a 1x1 convolution, without its raw output.

Batch norm's statistics follow from the mean and the covariance of x's channels, and its gradients from these and from
products with x (formulas: csrc/cpu/conv1x1_bn_act.cpp). So the raw output, four times as large as x in a bottleneck, is
neither written nor read. Saved for backward: x, mean, var, the moments of x, and under a ReLU a mask of 1 bit a value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastres import layout, reference
from fastres.ops import cast_weights, conv_bn_act, recompute, registration

_GEOMETRY = ([1, 1], [0, 0], [1, 1], 1)


def _fake(
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
    y, _, mean, var, mask = conv_bn_act._fake(
        x,
        conv_weight,
        None,
        weight,
        bias,
        running_mean,
        running_var,
        residual,
        *_GEOMETRY,
        training,
        eps,
        relu,
        save_mask,
    )
    channels = x.shape[1] if training else 0
    covariance = x.new_empty(channels * channels, dtype=reference.vector_dtype(x))
    return y, mean, var, mean.new_empty(channels), covariance, mask


def _fake_backward(
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
    raw = layout.in_format(grad_y, reference.conv_format(x, conv_weight))
    options: Any = (training, eps, False, need_x, need_conv_weight, False, need_affine, True, None)
    grad_x, grad_conv_weight, _, *rest = conv_bn_act._fake_backward(
        grad_y, x, conv_weight, raw, weight, bias, mean, var, mask, *_GEOMETRY, *options
    )
    return grad_x, grad_conv_weight, *rest


op = registration.define(
    "conv1x1_bn_act(Tensor x, Tensor conv_weight, Tensor? weight, Tensor? bias, Tensor? running_mean, "
    "Tensor? running_var, Tensor? residual, bool training, float eps, bool relu, bool save_mask) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake,
)
backward_op = registration.define(
    "conv1x1_bn_act_backward(Tensor grad_y, Tensor x, Tensor conv_weight, Tensor? weight, Tensor? bias, Tensor mean, "
    "Tensor var, Tensor x_mean, Tensor covariance, Tensor? mask, bool training, float eps, bool need_x, "
    "bool need_conv_weight, bool need_affine) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, conv_weight, weight, bias, _, _, _, training, eps, relu, _ = inputs
    _, mean, var, x_mean, covariance, mask = output
    if relu and mask.numel() == 0 and output[0].numel():
        raise RuntimeError("fastres::conv1x1_bn_act: gradients through a ReLU need save_mask=True")
    ctx.mark_non_differentiable(mean, var, x_mean, covariance, mask)
    ctx.set_materialize_grads(False)
    tensors = (conv_weight, weight, bias, mean, var, x_mean, covariance, mask if relu else None)
    recompute.save(ctx, x, tensors)
    ctx.options, ctx.channels_last = (training, eps), layout.is_channels_last(output[0])


def _backward(ctx: Any, grad_y: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad_y is None:
        return (None,) * 11
    x, (conv_weight, weight, bias, mean, var, x_mean, covariance, mask) = recompute.saved(ctx)
    training, eps = ctx.options
    need = ctx.needs_input_grad
    if torch.is_grad_enabled():
        keep = None if mask is None else layout.unpack_mask(mask, grad_y.shape, ctx.channels_last)
        grads = conv_bn_act.second_order(
            (x, conv_weight, None, weight, bias),
            (need[0], need[1], False, need[2], need[3]),
            grad_y,
            statistics=None if training else (mean, var),
            keep=keep,
            geometry=_GEOMETRY,
            eps=eps,
            relu=keep is not None,
        )
        grad_residual = grad_y if keep is None else torch.where(keep, grad_y, 0.0)
        grads = [g for i, g in enumerate(grads) if i != 2]
        return (*grads, None, None, grad_residual if need[6] else None, *(None,) * 4)
    grad_x, grad_conv_weight, grad_weight, grad_bias, masked_grad = backward_op(
        grad_y,
        x,
        conv_weight,
        weight,
        bias,
        mean,
        var,
        x_mean,
        covariance,
        mask,
        training,
        eps,
        need[0],
        need[1],
        need[2] or need[3],
    )
    return (
        grad_x if need[0] else None,
        grad_conv_weight if need[1] else None,
        grad_weight.to(weight.dtype) if need[2] else None,
        grad_bias.to(bias.dtype) if need[3] else None,
        None,
        None,
        (masked_grad if mask is not None else grad_y) if need[6] else None,
        *(None,) * 4,
    )


def remake(ctx: Any, residual: tuple[Any, ...]) -> Tensor:
    """The output of a call with a ReLU, computed again from what it saved and its residual, with the statistics of
    forward."""
    x, tensors = recompute.saved(ctx)
    recompute.wait(ctx, x, tensors)
    conv_weight, weight, bias, mean, var, *_ = tensors
    return op(x, conv_weight, weight, bias, mean, var, *residual, False, ctx.options[1], True, False)[0]


def again_with_residual(ctx: Any, residual: tuple[Any, ...]) -> Tensor:
    """The same with its history."""
    x, (conv_weight, weight, bias, mean, var, _, _, mask) = recompute.saved(ctx)
    training, eps = ctx.options
    statistics = None if training else (mean, var)
    z = conv_bn_act._plain(x, conv_weight, None, weight, bias, statistics, None, _GEOMETRY, eps, False) + residual[0]
    y = torch.where(layout.unpack_mask(mask, z.shape, ctx.channels_last), z, 0.0)
    return layout.in_format(y.to(x.dtype), torch.channels_last)


call = registration.differentiable(op, _setup_context, _backward)


def _cast(
    dtype: torch.dtype, x: Any, conv_weight: Any, weight: Any, bias: Any, mean: Any, var: Any, residual: Any, *rest: Any
) -> tuple[Any, ...]:
    x, residual = (registration.to_dtype(t, dtype) for t in (x, residual))
    return (x, cast_weights.cast(conv_weight, dtype), weight, bias, mean, var, residual, *rest)


registration.autocast(op, _cast)
