"""fastres::conv_bias_act: y = act(conv(x, weight) + bias + residual), the inference form of a block once batch norm is
folded.

Saved for backward: x (or what it is made from, see recompute.py), weight and, with ReLU, y.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastres import layout, reference
from fastres.kernels import convolution
from fastres.ops import cast_weights, recompute, registration


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    relu: bool,
) -> Tensor:
    y = torch.ops.aten.convolution(x, weight, bias, stride, padding, dilation, False, [0, 0], groups)
    return layout.in_format(y, reference.conv_format(x, weight))


op = registration.define(
    "conv_bias_act(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int[] stride, int[] padding, "
    "int[] dilation, "
    "int groups, bool relu) -> Tensor",
    _fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, _, *ctx.geometry, ctx.relu = inputs
    ctx.has_bias = bias is not None
    recompute.save(ctx, x, (weight, output if ctx.relu else None))


def _backward(ctx: Any, grad_y: Tensor, eager: bool = False) -> tuple[Any, ...]:
    x, (weight, y) = recompute.saved(ctx)
    need_x, need_weight, need_bias, need_residual = ctx.needs_input_grad[:4]
    g = grad_y if y is None else torch.where(y <= 0, 0.0, grad_y)
    needed = (need_x, need_weight, need_bias)
    grads: Sequence[Tensor | None] = (None, None, None)
    if any(needed):
        # By our own kernels where they served forward, unless the gradients are traced, or differentiated again.
        own = eager and not torch.is_grad_enabled()
        own = own and registration.served_by(op, x, weight, None, None, *ctx.geometry, ctx.relu) == "cpu"
        gradients = convolution.convolve_backward if own else convolution.aten_backward
        grads = gradients(g, x, weight, ctx.has_bias, tuple(ctx.geometry), needed)
    return (
        *(grad if need else None for grad, need in zip(grads, needed, strict=True)),
        g if need_residual else None,
        *(None,) * 5,
    )


def _eager_backward(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
    return _backward(ctx, grad_y, eager=True)


def remake(ctx: Any, bias: tuple[Any, ...]) -> Tensor:
    """The output of a call without residual and ReLU, computed again from what it saved and its bias."""
    x, tensors = recompute.saved(ctx)
    recompute.wait(ctx, x, tensors)
    return op(x, tensors[0], registration.to_dtype(bias[0], x.dtype), None, *ctx.geometry, False)


def again(ctx: Any, bias: tuple[Any, ...]) -> Tensor:
    """The same with its history."""
    x, (weight, _) = recompute.saved(ctx)
    y = reference.convolution(x, weight, bias[0], *ctx.geometry).to(x.dtype)
    return layout.in_format(y, reference.conv_format(x, weight))


call = registration.differentiable(op, _setup_context, _backward, _eager_backward)


def _cast(dtype: torch.dtype, x: Any, weight: Any, bias: Any, residual: Any, *rest: Any) -> tuple[Any, ...]:
    x, bias, residual = (registration.to_dtype(t, dtype) for t in (x, bias, residual))
    return (x, cast_weights.cast(weight, dtype), bias, residual, *rest)


registration.autocast(op, _cast)
