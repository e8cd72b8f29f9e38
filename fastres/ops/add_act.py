"""fastres::add_act: y = act(x + residual). Saved for backward: y, which the next op saves anyway; nothing without a
ReLU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastres import layout
from fastres.ops import registration

op = registration.define(
    "add_act(Tensor x, Tensor residual, bool relu) -> Tensor",
    lambda x, residual, relu: torch.empty_like(layout.dense(x)),
)
backward_op = registration.define(
    "add_act_backward(Tensor grad_y, Tensor y) -> Tensor", lambda grad_y, y: torch.empty_like(layout.dense(y))
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.relu = inputs[2]
    ctx.save_for_backward(*((output,) if ctx.relu else ()))


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
    grad = grad_y
    if ctx.relu:
        (y,) = ctx.saved_tensors
        grad = torch.where(y <= 0, 0.0, grad_y) if torch.is_grad_enabled() else backward_op(grad_y, y)
    return (grad if ctx.needs_input_grad[0] else None, grad if ctx.needs_input_grad[1] else None, None)


call = registration.differentiable(op, _setup_context, _backward)


def _cast(dtype: torch.dtype, x: Tensor, residual: Tensor, *rest: Any) -> tuple[Any, ...]:
    wider = torch.promote_types(x.dtype, residual.dtype)  # what `x + residual` gives
    return (x.to(wider), residual.to(wider), *rest)


registration.autocast(op, _cast)
