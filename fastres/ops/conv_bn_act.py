"""fastres::conv_bn_act: act(batch_norm(conv(x)) + residual), where a gradient is wanted or batch statistics are used.

Saved for backward: x (or what it is made from, see recompute.py), the raw convolution output (or nothing in its place:
`call_again`), mean, var, and with residual and ReLU a mask of 1 bit a value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastres import layout, reference
from fastres.kernels import convolution
from fastres.ops import bn_act, cast_weights, recompute, registration


def _fake(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    training: bool,
    eps: float,
    relu: bool,
    save_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    raw = torch.ops.aten.convolution(x, conv_weight, conv_bias, stride, padding, dilation, False, [0, 0], groups)
    raw = layout.in_format(raw, reference.conv_format(x, conv_weight))
    y, mean, var, mask = bn_act._fake(
        raw, weight, bias, running_mean, running_var, residual, training, eps, relu, save_mask
    )
    return y, raw, mean, var, mask


def _fake_backward(
    grad_y: Tensor,
    x: Tensor,
    conv_weight: Tensor,
    raw: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    mask: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    training: bool,
    eps: float,
    relu: bool,
    need_x: bool,
    need_conv_weight: bool,
    need_conv_bias: bool,
    need_affine: bool,
    need_residual: bool,
    addend: Tensor | None,
) -> tuple[Tensor, ...]:
    need_raw = need_x or need_conv_weight or need_conv_bias
    grad_raw, grad_weight, grad_bias, grad_residual = bn_act._fake_backward(
        grad_y, raw, weight, bias, mean, var, mask, training, eps, relu, need_raw, need_affine, need_residual
    )
    empty = x.new_empty(0)
    if not need_raw:
        return empty, empty.clone(), empty.clone(), grad_weight, grad_bias, grad_residual
    grads = convolution.aten_backward(
        grad_raw,
        x,
        conv_weight,
        need_conv_bias,
        (stride, padding, dilation, groups),
        (need_x, need_conv_weight, need_conv_bias),
    )
    return (*(x.new_empty(0) if g is None else g for g in grads), grad_weight, grad_bias, grad_residual)


op = registration.define(
    "conv_bn_act(Tensor x, Tensor conv_weight, Tensor? conv_bias, Tensor? weight, Tensor? bias, Tensor? running_mean, "
    "Tensor? running_var, Tensor? residual, int[] stride, int[] padding, int[] dilation, int groups, bool "
    "training, float eps, "
    "bool relu, bool save_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake,
)
backward_op = registration.define(
    "conv_bn_act_backward(Tensor grad_y, Tensor x, Tensor conv_weight, Tensor raw, Tensor? weight, Tensor? "
    "bias, Tensor mean, "
    "Tensor var, Tensor? mask, int[] stride, int[] padding, int[] dilation, int groups, bool training, float "
    "eps, bool relu, "
    "bool need_x, bool need_conv_weight, bool need_conv_bias, bool need_affine, bool need_residual, "
    "Tensor? addend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _save(ctx, inputs, output, output[1])


def _setup_without_raw(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """The convolution is computed again in backward, instead of its output being saved."""
    _save(ctx, inputs, output, None)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...], kept: Tensor | None) -> None:
    x, conv_weight, conv_bias, weight, bias, _, _, residual, *geometry, training, eps, relu, _ = inputs
    _, raw, mean, var, mask = output
    masked = residual is not None and relu
    if masked and mask.numel() == 0 and raw.numel():
        raise RuntimeError("fastres::conv_bn_act: gradients through a residual and a ReLU need save_mask=True")
    ctx.mark_non_differentiable(raw, mean, var, mask)
    ctx.set_materialize_grads(False)
    recompute.save(ctx, x, (conv_weight, conv_bias, kept, weight, bias, mean, var, mask if masked else None))
    ctx.geometry, ctx.options = tuple(geometry), (training, eps, relu)
    ctx.shape, ctx.channels_last = raw.shape, layout.is_channels_last(raw)


def _plain(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: tuple[Tensor, Tensor] | None,
    keep: Tensor | None,
    geometry: tuple[Any, ...],
    eps: float,
    relu: bool,
) -> Tensor:
    """The op without a residual in differentiable calls of PyTorch, in float64. keep: what the ReLU lets through."""
    z = reference.convolution(x, conv_weight, conv_bias, *geometry)
    if statistics is None:
        var, mean = torch.var_mean(z, (0, 2, 3), correction=0)
    else:
        mean, var = statistics
    z = reference.normalise(z, weight, bias, mean, var, eps)
    return torch.where(~(z <= 0) if keep is None else keep, z, 0.0) if relu else z


def second_order(
    inputs: tuple[Tensor | None, ...], needed: tuple[bool, ...], grad_y: Tensor, **options: Any
) -> list[Tensor | None]:
    """Gradients of x, conv_weight, conv_bias, weight and bias that can be differentiated again; options: `_plain`'s."""
    return registration.second_order(lambda *tensors: _plain(*tensors, **options), inputs, needed, grad_y)


def _second_order(ctx: Any, grad_y: Tensor, addend: Tensor | None) -> tuple[Any, ...]:
    x, (conv_weight, conv_bias, _, weight, bias, mean, var, mask) = recompute.saved(ctx)
    training, eps, relu = ctx.options
    need = ctx.needs_input_grad
    keep = None if mask is None else layout.unpack_mask(mask, ctx.shape, ctx.channels_last)
    grads = second_order(
        (x, conv_weight, conv_bias, weight, bias),
        need[:5],
        grad_y,
        statistics=None if training else (mean, var),
        keep=keep,
        geometry=ctx.geometry,
        eps=eps,
        relu=relu,
    )
    if need[0] and addend is not None:
        grads[0] = addend if grads[0] is None else grads[0] + addend
    grad_residual = None
    if need[7]:
        grad_residual = grad_y if keep is None else torch.where(keep, grad_y, 0.0)
    return (*grads, None, None, grad_residual, *(None,) * 8)


def again(ctx: Any) -> Tensor:
    """The output of a call without a residual, computed again from what it saved, with its history."""
    x, (conv_weight, conv_bias, _, weight, bias, mean, var, _) = recompute.saved(ctx)
    training, eps, relu = ctx.options
    statistics = None if training else (mean, var)
    y = _plain(x, conv_weight, conv_bias, weight, bias, statistics, None, ctx.geometry, eps, relu)
    return layout.in_format(y.to(x.dtype), reference.conv_format(x, conv_weight))


def remake(ctx: Any, residual: tuple[Any, ...]) -> Tensor:
    """The output of a call, computed again from what it saved and its residual, with the statistics of forward."""
    x, (conv_weight, conv_bias, _, weight, bias, mean, var, mask) = recompute.saved(ctx)
    _, eps, relu = ctx.options
    tensors = (conv_weight, conv_bias, weight, bias, mean, var, residual[0] if residual else None)
    y, raw, *_ = op(x, *tensors, *ctx.geometry, False, eps, relu, False)
    recompute.wait(ctx, x, (conv_weight, conv_bias, raw, weight, bias, mean, var, mask))
    return y


def again_with_residual(ctx: Any, residual: tuple[Any, ...]) -> Tensor:
    """The output of a call with a residual and a ReLU, with its history."""
    x, (conv_weight, conv_bias, _, weight, bias, mean, var, mask) = recompute.saved(ctx)
    training, eps, _ = ctx.options
    statistics = None if training else (mean, var)
    z = _plain(x, conv_weight, conv_bias, weight, bias, statistics, None, ctx.geometry, eps, False) + residual[0]
    y = torch.where(layout.unpack_mask(mask, ctx.shape, ctx.channels_last), z, 0.0)
    return layout.in_format(y.to(x.dtype), reference.conv_format(x, conv_weight))


def _backward(ctx: Any, grad_y: Tensor | None, *rest: Any) -> tuple[Any, ...]:
    addend = rest[4] if len(rest) > 4 else None  # of a forked call: the gradient of the input that it gave back
    if grad_y is None:
        return addend, *(None,) * 15
    if torch.is_grad_enabled():
        return _second_order(ctx, grad_y, addend)
    x, (conv_weight, conv_bias, raw, weight, bias, mean, var, mask) = recompute.saved(ctx)
    if raw is None:  # by the kernel that made it in forward: without a mask the ReLU's signs follow from it
        given = (weight, bias, mean, var, None, *ctx.geometry, False, *ctx.options[1:], False)
        raw = op(x, conv_weight, conv_bias, *given)[1]
    need_x, need_conv_weight, need_conv_bias, need_weight, need_bias, _, _, need_residual = ctx.needs_input_grad[:8]
    grad_x, grad_conv_weight, grad_conv_bias, grad_weight, grad_bias, masked_grad = backward_op(
        grad_y,
        x,
        conv_weight,
        raw,
        weight,
        bias,
        mean,
        var,
        mask,
        *ctx.geometry,
        *ctx.options,
        need_x,
        need_conv_weight,
        need_conv_bias,
        need_weight or need_bias,
        need_residual,
        addend,
    )
    return (
        grad_x if need_x else None,
        grad_conv_weight if need_conv_weight else None,
        grad_conv_bias if need_conv_bias else None,
        grad_weight.to(weight.dtype) if need_weight else None,
        grad_bias.to(bias.dtype) if need_bias else None,
        None,
        None,
        (masked_grad if mask is not None else grad_y) if need_residual else None,
        *(None,) * 8,
    )


call = registration.differentiable(op, _setup_context, _backward)
#: The same, and x as one more result: what is done with that one adds its gradient to x's within the convolution's
#: backward, instead of by a pass of autograd's.
call_forked = registration.forked(op, call, _setup_context, _backward)
#: Which of its results that is.
FORK = 5
#: Both, with a convolution that is computed again.
call_again = registration.variant(op, call, _setup_without_raw, _backward)
call_again_forked = registration.forked(op, call, _setup_without_raw, _backward)


def _cast(
    dtype: torch.dtype,
    x: Any,
    conv_weight: Any,
    conv_bias: Any,
    weight: Any,
    bias: Any,
    mean: Any,
    var: Any,
    residual: Any,
    *rest: Any,
) -> tuple[Any, ...]:
    x, conv_bias, residual = (registration.to_dtype(t, dtype) for t in (x, conv_bias, residual))
    return (x, cast_weights.cast(conv_weight, dtype), conv_bias, weight, bias, mean, var, residual, *rest)


registration.autocast(op, _cast)
