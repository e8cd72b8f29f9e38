"""fastres::bn_act: batch norm (+ residual) (+ ReLU). Formulas: fastres/reference.py.

Saved for backward: x, mean, var, and only with a residual under a ReLU a mask of 1 bit a value. Without a residual the
sign of the
ReLU's input is recomputed from x, which backward reads anyway.
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
    residual: Tensor | None,
    training: bool,
    eps: float,
    relu: bool,
    save_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = torch.empty_like(layout.dense(x))
    statistic = x.new_empty(x.shape[1], dtype=torch.float64)
    mask = x.new_empty(layout.mask_bytes(y) if save_mask else 0, dtype=torch.uint8)
    return y, statistic, torch.empty_like(statistic), mask


def _fake_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    mask: Tensor | None,
    training: bool,
    eps: float,
    relu: bool,
    need_x: bool,
    need_affine: bool,
    need_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = layout.dense(x)
    vector = x.new_empty(x.shape[1] if need_affine else 0, dtype=reference.vector_dtype(x))
    return (
        torch.empty_like(x) if need_x else x.new_empty(0),
        vector,
        torch.empty_like(vector),
        torch.empty_like(x) if need_residual and mask is not None else x.new_empty(0),
    )


op = registration.define(
    "bn_act(Tensor x, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, Tensor? residual, "
    "bool training, float eps, bool relu, bool save_mask) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
)
backward_op = registration.define(
    "bn_act_backward(Tensor grad_y, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, Tensor? mask, "
    "bool training, float eps, bool relu, bool need_x, bool need_affine, bool need_residual) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
)


def second_order(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    keep: Tensor | None,
    grad_y: Tensor,
    needed: tuple[bool, bool, bool],
    training: bool,
    eps: float,
    relu: bool,
) -> list[Tensor | None]:
    """Differentiable grad_x, grad_weight, grad_bias. `keep`: where the ReLU let z through, if it cannot be
    recomputed."""

    def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return _plain(x, weight, bias, mean, var, keep, training, eps, relu)

    return registration.second_order(forward, (x, weight, bias), needed, grad_y)


def _plain(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    keep: Tensor | None,
    training: bool,
    eps: float,
    relu: bool,
) -> Tensor:
    """The op without a residual in differentiable calls of PyTorch, in float64. keep: what the ReLU lets through."""
    if training:
        var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    z = reference.normalise(x, weight, bias, mean, var, eps)
    return torch.where(~(z <= 0) if keep is None else keep, z, 0.0) if relu else z


def again(ctx: Any) -> Tensor:
    """The output of a call without a residual, computed again from what it saved, with its history."""
    x, weight, bias, mean, var, _ = ctx.saved_tensors
    y = _plain(x, weight, bias, mean, var, None, *ctx.options)
    return layout.in_format(y.to(x.dtype), layout.memory_format(layout.dense(x)))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, _, _, residual, training, eps, relu, _ = inputs
    _, mean, var, mask = output
    masked = residual is not None and relu
    if masked and mask.numel() == 0 and x.numel():
        raise RuntimeError("fastres::bn_act: gradients through a residual and a ReLU need save_mask=True")
    ctx.mark_non_differentiable(mean, var, mask)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, mean, var, mask if masked else None)
    ctx.options = (training, eps, relu)


def _backward(ctx: Any, grad_y: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad_y is None:
        return (None,) * 10
    x, weight, bias, mean, var, mask = ctx.saved_tensors
    need_x, need_weight, need_bias, _, _, need_residual = ctx.needs_input_grad[:6]
    grad_residual = grad_y if need_residual else None
    if torch.is_grad_enabled():
        keep = None
        if mask is not None:
            keep = layout.unpack_mask(mask, x.shape, layout.is_channels_last(layout.dense(x)))
            grad_residual = torch.where(keep, grad_y, 0.0) if need_residual else None
        training, eps, relu = ctx.options
        needed = (need_x, need_weight, need_bias)
        grads = second_order(x, weight, bias, mean, var, keep, grad_y, needed, training, eps, relu)
        return (*grads, None, None, grad_residual, None, None, None, None)
    grad_x, grad_weight, grad_bias, masked_grad = backward_op(
        grad_y, x, weight, bias, mean, var, mask, *ctx.options, need_x, need_weight or need_bias, need_residual
    )
    if need_residual and mask is not None:
        grad_residual = masked_grad
    return (
        grad_x if need_x else None,
        grad_weight.to(weight.dtype) if need_weight else None,
        grad_bias.to(bias.dtype) if need_bias else None,
        None,
        None,
        grad_residual,
        None,
        None,
        None,
        None,
    )


call = registration.differentiable(op, _setup_context, _backward)


def _cast(
    dtype: torch.dtype, x: Tensor, weight: Any, bias: Any, mean: Any, var: Any, residual: Any, *rest: Any
) -> tuple[Any, ...]:
    # Batch norm is on none of autocast's lists: x keeps its dtype, and `out += residual` keeps that of out.
    return (x, weight, bias, mean, var, registration.to_dtype(residual, x.dtype), *rest)


registration.autocast(op, _cast)
