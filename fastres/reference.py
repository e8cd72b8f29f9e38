"""What every op means, in plain PyTorch. The oracle of all tests and the kernel of last resort.

Each function has the signature of the raw op `torch.ops.fastres.<name>` and computes in float64, rounding once at the
end; so it is as right as the output's dtype allows, and not fast. Shapes: x, residual, y are [N, C, H, W]; per-channel
tensors are [C].

Batch norm (Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167), then the residual (He et al. 2015,
https://arxiv.org/abs/1512.03385), then the activation:

    x_hat = (x - mean) / sqrt(var + eps)         mean, var over N, H, W: of this batch, or running
    y = act(x_hat * weight + bias + residual)    act = relu or identity

Backward, with g = grad_y where the ReLU let z through (`not (z <= 0)`: NaN passes, the gradient at 0 is 0):

    grad_residual = g        grad_bias = sum g        grad_weight = sum g * x_hat
    grad_x = weight / sqrt(var + eps) * (g - mean(g) - x_hat * mean(g * x_hat))     with batch statistics
    grad_x = weight / sqrt(var + eps) * g                                           with running statistics
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastres import layout

_DIMS = (0, 2, 3)


def _per_channel(v: Tensor) -> Tensor:
    return v.double().reshape(1, -1, 1, 1)


def statistics(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, training: bool
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, float64 [C]."""
    if not training:
        assert running_mean is not None and running_var is not None
        return running_mean.double().clone(), running_var.double().clone()
    if x.numel() == 0:
        return torch.zeros_like(x[:0].sum(_DIMS), dtype=torch.float64), torch.ones_like(
            x[:0].sum(_DIMS), dtype=torch.float64
        )
    mean = x.double().mean(_DIMS)  # not var_mean: with an Inf in the channel it gives NaN here, where eager gives Inf
    return mean, (x.double() - _per_channel(mean)).square().mean(_DIMS)


def normalise(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """x_hat * weight + bias in float64; differentiable."""
    z = (x.double() - _per_channel(mean)) * _per_channel((var + eps).rsqrt())
    if weight is not None:
        z = z * _per_channel(weight)
    if bias is not None:
        z = z + _per_channel(bias)
    return z


def _activate(z: Tensor, relu: bool) -> Tensor:
    return z.relu() if relu else z


def vector_dtype(x: Tensor) -> torch.dtype:
    """Of the per-channel gradients and moments of an activation: float32 at least."""
    return torch.promote_types(x.dtype, torch.float32)


def bn_act(
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
    """Returns y, the mean and biased variance used (float64 [C]), and the 1-bit mask of z (empty unless asked for)."""
    x = layout.dense(x)
    mean, var = statistics(x, running_mean, running_var, training)
    z = normalise(x, weight, bias, mean, var, eps)
    if residual is not None:
        z = z + residual.double()
    mask = layout.pack_mask(~(z <= 0), layout.is_channels_last(x)) if save_mask else x.new_empty(0, dtype=torch.uint8)
    return torch.empty_like(x).copy_(_activate(z, relu)), mean, var, mask


def behind_relu(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    mask: Tensor | None,
    eps: float,
    relu: bool,
) -> Tensor:
    """The gradient g of the batch norm's output, float64."""
    g = grad_y.double()
    if mask is not None:
        return torch.where(layout.unpack_mask(mask, x.shape, layout.is_channels_last(x)), g, 0.0)
    return torch.where(normalise(x, weight, bias, mean, var, eps) <= 0, 0.0, g) if relu else g


def input_gradient(
    g: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    count: int,
    eps: float,
) -> Tensor:
    """grad_x, float64, where statistics and the sums grad_weight and grad_bias are of `count` values a channel."""
    inverse = _per_channel((var + eps).rsqrt())
    x_hat = (x.double() - _per_channel(mean)) * inverse
    scale = inverse if weight is None else inverse * _per_channel(weight)
    return scale * (g - _per_channel(grad_bias / count) - x_hat * _per_channel(grad_weight / count))


def _bn_gradients(
    g: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, var: Tensor, training: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_x, grad_weight, grad_bias in float64, from the gradient g of the batch norm's output."""
    x_hat = normalise(x, None, None, mean, var, eps)
    grad_weight, grad_bias = (g * x_hat).sum(_DIMS), g.sum(_DIMS)
    if training and x.numel():
        count = x.numel() // x.shape[1]
        return input_gradient(g, x, weight, mean, var, grad_weight, grad_bias, count, eps), grad_weight, grad_bias
    return normalise(g, weight, None, torch.zeros_like(mean), var, eps), grad_weight, grad_bias


def bn_act_backward(
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
    """Returns grad_x, grad_weight, grad_bias (fp32, or float64 for float64 x) and grad_residual; empty where not
    needed.

    grad_residual is needed only with a mask: without one it is grad_y itself.
    """
    x = layout.dense(x)
    g = behind_relu(grad_y, x, weight, bias, mean, var, mask, eps, relu)
    grad_x, grad_weight, grad_bias = _bn_gradients(g, x, weight, mean, var, training, eps)
    vector = vector_dtype(x)
    return (
        torch.empty_like(x).copy_(grad_x) if need_x else x.new_empty(0),
        grad_weight.to(vector) if need_affine else x.new_empty(0, dtype=vector),
        grad_bias.to(vector) if need_affine else x.new_empty(0, dtype=vector),
        torch.empty_like(x).copy_(g) if need_residual and mask is not None else x.new_empty(0),
    )


def add_act(x: Tensor, residual: Tensor, relu: bool) -> Tensor:
    """y = act(x + residual)."""
    x = layout.dense(x)
    return torch.empty_like(x).copy_(_activate(x.double() + residual.double(), relu))


def add_act_backward(grad_y: Tensor, y: Tensor) -> Tensor:
    """The gradient of both inputs of a ReLU-activated sum: grad_y where not (y <= 0)."""
    y = layout.dense(y)
    return torch.empty_like(y).copy_(torch.where(y <= 0, 0.0, grad_y.double()))


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """The convolution of torch.nn.functional.conv2d in float64."""
    return F.conv2d(
        x.double(), weight.double(), None if bias is None else bias.double(), stride, padding, dilation, groups
    )


def conv_bias_act(
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
    """y = act(conv(x, weight) + bias + residual)."""
    z = convolution(x, weight, bias, stride, padding, dilation, groups)
    if residual is not None:
        z = z + residual.double()
    return layout.in_format(_activate(z, relu).to(x.dtype), conv_format(x, weight))


def conv_format(x: Tensor, weight: Tensor) -> torch.memory_format:
    """The layout of a convolution's output: channels_last if the input or the weight is."""
    if weight.layout is torch.strided and layout.memory_format(weight) is torch.channels_last:
        return torch.channels_last
    return layout.memory_format(x)


def conv_bn_act(
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
    """bn_act of a convolution: returns y, the raw convolution output (both in x's dtype), mean, var and mask."""
    raw = convolution(x, conv_weight, conv_bias, stride, padding, dilation, groups)
    raw = layout.in_format(raw, conv_format(x, conv_weight))
    y, mean, var, mask = bn_act(raw, weight, bias, running_mean, running_var, residual, training, eps, relu, save_mask)
    return y.to(x.dtype), raw.to(x.dtype), mean, var, mask


def conv_bn_act_backward(
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
    """Returns grad_x (plus addend), grad_conv_weight, grad_conv_bias, grad_weight, grad_bias, grad_residual; empty
    where not needed."""
    needed = [need_x, need_conv_weight, need_conv_bias]
    grad_raw, grad_weight, grad_bias, grad_residual = bn_act_backward(
        grad_y,
        raw.double(),
        weight,
        bias,
        mean,
        var,
        mask,
        training,
        eps,
        relu,
        any(needed),
        need_affine,
        need_residual,
    )
    grads: list[Tensor] = []
    if any(needed):
        sizes = [conv_weight.shape[0]] if need_conv_bias else None
        inputs = (grad_raw, x.double(), conv_weight.double())
        grads = [
            *torch.ops.aten.convolution_backward(
                *inputs, sizes, stride, padding, dilation, False, [0, 0], groups, needed
            )
        ]
        if need_x and addend is not None:
            grads[0] = grads[0] + addend.double()
    empty = x.new_empty(0)
    vector = vector_dtype(x)
    like = (x, conv_weight, conv_weight)
    return (
        *(
            g.to(t.dtype) if need else empty.clone()
            for g, t, need in zip(grads or (empty,) * 3, like, needed, strict=True)
        ),
        grad_weight.to(vector),
        grad_bias.to(vector),
        grad_residual.to(x.dtype),
    )


def update_running_stats_(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    var: Tensor,
    num_batches_tracked: Tensor | None,
    momentum: float,
    count: int,
) -> None:
    """running = (1 - f) * running + f * batch, with the unbiased variance; f = momentum, or 1 / num_batches_tracked if
    given.

    Nothing happens for an empty batch, as in eager.
    """
    if count == 0:
        return
    factor = momentum if num_batches_tracked is None else 1.0 / num_batches_tracked.double()
    unbiased = var * (count / max(count - 1, 1))
    running_mean.copy_(running_mean.double() * (1.0 - factor) + mean * factor)
    running_var.copy_(running_var.double() * (1.0 - factor) + unbiased * factor)


def update_all_running_stats_(
    running_means: list[Tensor],
    running_vars: list[Tensor],
    means: list[Tensor],
    vars: list[Tensor],
    momenta: list[float],
    counts: list[int],
) -> None:
    """update_running_stats_ of many layers, none of them twice."""
    layers = zip(running_means, running_vars, means, vars, momenta, counts, strict=True)
    for running_mean, running_var, mean, var, momentum, count in layers:
        update_running_stats_(running_mean, running_var, mean, var, None, momentum, count)
