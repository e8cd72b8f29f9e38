"""Fused functions: arguments checked, one op called. The counterpart of torch.nn.functional for this library.

All take activations [N, C, H, W] in float32, bfloat16, float16 or float64, contiguous or channels_last (fast), any
batch size, and are differentiable. `act` is "relu" or "identity". Errors have eager's types: ValueError for a wrong
rank, a bad eps or too few values a channel, NotImplementedError for a dtype without batch norm, RuntimeError for
shapes, dtypes or devices that do not fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastres import arguments, ops
from fastres.kernels import convolution, table
from fastres.ops import registration
from fastres.ops.bn_act_maxpool import pooled


def bn_act(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    act: str = "relu",
    num_batches_tracked: Tensor | None = None,
    recompute: bool = False,
    process_group: Any = None,
) -> Tensor:
    """Batch norm, then the residual, then the activation: act(batch_norm(x) + residual).

    Args:
        x: [N, C, H, W].
        running_mean, running_var: [C]; updated in place once if `training`; None, None for none.
        weight, bias: [C] or None for ones and zeros.
        residual: like x.
        training: use the statistics of this batch (biased variance; the running one is unbiased).
        momentum: share of the new statistics in the running ones.
        eps: added to the variance.
        act: "relu" or "identity".
        num_batches_tracked: if given, 1 / num_batches_tracked is used as momentum (cumulative average); read on its
        device.
        recompute: as in :func:`conv_bn_act`.
        process_group: if `training`, use the statistics of the batches of all processes of this group of
            torch.distributed, as torch.nn.SyncBatchNorm does: they may be of different sizes, or empty. All of them
            have to make this call, and its backward. CPU only (NotImplementedError); no gradients of gradients.

    Returns:
        [N, C, H, W] in x's dtype and layout.

    Source: Ioffe and Szegedy 2015 (arXiv 1502.03167); He et al. 2015 (arXiv 1512.03385), equation 1.
    """
    relu = arguments.relu(act)
    arguments.check_input(x)
    arguments.check_batch_norm(x, x.shape[1], running_mean, running_var, weight, bias, training, eps)
    group = arguments.check_batch(x, x.shape, training, process_group)
    arguments.check_residual(residual, x.shape, x)
    count = x.numel() // max(x.shape[1], 1) if group is None else None
    update = _update(running_mean, running_var, num_batches_tracked, momentum, training, count)
    save_mask = _needs_mask(relu, residual, x, weight, bias)
    if group is not None:
        return ops.synchronised.bn_act(x, weight, bias, residual, group, eps, relu, save_mask, update)[0]
    y, mean, var, _ = ops.bn_act.call(
        x, weight, bias, running_mean, running_var, residual, training, eps, relu, save_mask, then=update
    )
    if recompute and residual is None and _wants_gradient(x, weight, bias):
        ops.recompute.offer(y, (x, weight, bias, mean, var), eps, relu, ops.bn_act.again)
    return y


class BatchNorm(NamedTuple):
    """What a batch norm takes besides its input: as the arguments of :func:`bn_act` of the same names."""

    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5
    num_batches_tracked: Tensor | None = None


def bn_add_bn_act(x: Tensor, norm: BatchNorm, other: Tensor, other_norm: BatchNorm, *, act: str = "relu") -> Tensor:
    """act(norm(x) + other_norm(other)): the end of a residual block with a projection, in one pass over both branches.

    Where no kernel has that, in two: act(norm(x) + residual) with residual = other_norm(other), by :func:`bn_act`.

    Args:
        x, other: [N, C, H, W] of one shape and dtype.
        norm, other_norm: their batch norms; the running statistics of either are updated in place once if it trains,
            the other's first.

    Returns:
        [N, C, H, W] in x's dtype and layout.
    """
    relu = arguments.relu(act)
    for values, one in ((x, norm), (other, other_norm)):
        arguments.check_input(values)
        arguments.check_batch_norm(values, x.shape[1], *one[:4], one.training, one.eps)
        if one.training:
            arguments.check_values_per_channel(values.shape)
    arguments.check_residual(other, x.shape, x, "other")
    if not table.fused_kernel_serves("bn_add_bn_act", (x,)):
        residual = _bn_act(other, other_norm, None, "identity")
        return _bn_act(x, norm, residual, act)
    count = x.numel() // max(x.shape[1], 1)
    updates = [
        _update(*one[:2], one.num_batches_tracked, one.momentum, one.training, count, at)
        for one, at in ((other_norm, 3), (norm, 1))
    ]
    return ops.bn_add_bn_act.call(
        x,
        norm.weight,
        norm.bias,
        norm.running_mean,
        norm.running_var,
        other,
        other_norm.weight,
        other_norm.bias,
        other_norm.running_mean,
        other_norm.running_var,
        norm.training,
        other_norm.training,
        norm.eps,
        other_norm.eps,
        relu,
        relu and _wants_gradient(x, norm.weight, norm.bias, other, other_norm.weight, other_norm.bias),
        then=lambda results: [update(results) for update in updates if update is not None],
    )[0]


def _bn_act(x: Tensor, norm: BatchNorm, residual: Tensor | None, act: str) -> Tensor:
    return bn_act(
        x,
        *norm[:4],
        residual,
        training=norm.training,
        momentum=norm.momentum,
        eps=norm.eps,
        act=act,
        num_batches_tracked=norm.num_batches_tracked,
    )


def add_act(x: Tensor, residual: Tensor, *, act: str = "relu") -> Tensor:
    """act(x + residual) for two tensors [N, C, H, W] of one shape and dtype; the result has x's layout."""
    relu = arguments.relu(act)
    arguments.check_input(x)
    arguments.check_residual(residual, x.shape, x)
    return ops.add_act.call(x, residual, relu)


def conv_bias_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    act: str = "relu",
    recompute_conv: bool = False,
) -> Tensor:
    """act(conv2d(x, weight) + bias + residual): what a block is in inference once batch norm is folded into the
    convolution.

    Args:
        x: [N, C, H, W].
        weight: [K, C / groups, R, S]; bias: [K] or None.
        residual: like the output [N, K, OH, OW].
        stride, padding, dilation, groups: as in torch.nn.functional.conv2d, numbers or pairs.
        recompute_conv: if the result, which has no residual and no ReLU, is the input of bn_act_maxpool, that one does
            not save it, and it is computed again in backward.

    Returns:
        [N, K, OH, OW], channels_last if x or weight is.
    """
    relu = arguments.relu(act)
    arguments.check_input(x)
    geometry = arguments.geometry_of(stride, padding, dilation, groups)
    shape = arguments.check_convolution(x, weight, bias, geometry)
    arguments.check_residual(residual, shape, x)
    y = ops.conv_bias_act.call(x, weight, bias, residual, *geometry, relu)
    if recompute_conv and not relu and residual is None and _wants_gradient(x, weight, bias):
        ops.recompute.offer_made(y, (bias,), ops.conv_bias_act.remake, ops.conv_bias_act.again)
    return y


def conv_bn_act(
    x: Tensor,
    conv_weight: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    conv_bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    act: str = "relu",
    num_batches_tracked: Tensor | None = None,
    process_group: Any = None,
    recompute: bool = False,
    recompute_conv: bool = False,
    fork: list[Tensor] | None = None,
) -> Tensor:
    """act(batch_norm(conv2d(x)) + residual). Arguments as in :func:`conv_bias_act` and :func:`bn_act`.

    With running statistics and no gradient wanted, batch norm is folded into the convolution on the fly.

    Args:
        recompute: if the result is the input of another conv_bn_act, or of conv_bias_act, that one saves what it is
            made from in its place, and computes it again in backward, bit for bit: its memory is free in between. The
            result must not be written to in a way that autograd does not see (`.data`).
        recompute_conv: do not save the convolution's output for backward, but compute it again there (CPU and GPU, not
            under torch.compile, which decides itself, and not with a process group). With a residual that another such
            convolution has saved as its input (fork), the result is offered as with `recompute`.
        fork: x is appended to it, for the shortcut around this convolution: the gradient of that x is added to x's
            inside the convolution's backward, which saves a pass of autograd's.
    """
    relu = arguments.relu(act)
    arguments.check_input(x)
    geometry = arguments.geometry_of(stride, padding, dilation, groups)
    shape = arguments.check_convolution(x, conv_weight, conv_bias, geometry)
    arguments.check_batch_norm(x, shape[1], running_mean, running_var, weight, bias, training, eps)
    group = arguments.check_batch(x, shape, training, process_group)
    arguments.check_residual(residual, shape, x)
    gradient = _wants_gradient(x, conv_weight, conv_bias, weight, bias, residual)
    if fork is not None:
        fork.append(x)
    if not training and not gradient and x.dtype is torch.float32:
        assert running_mean is not None and running_var is not None
        folded = fold(conv_weight, conv_bias, running_mean, running_var, weight, bias, eps)
        return ops.conv_bias_act.call(x, *folded, residual, *geometry, relu)
    count = shape[0] * shape[2] * shape[3] if group is None else None
    by_moments = gradient and algebraic(x, conv_weight, conv_bias, geometry)
    save_mask = gradient and relu and residual is not None
    affine, running = (weight, bias), (running_mean, running_var)
    update = _update(*running, num_batches_tracked, momentum, training, count, 1 if group or by_moments else 2)
    if group is not None and by_moments:
        return ops.synchronised.conv1x1_bn_act(x, conv_weight, *affine, residual, group, eps, relu, update)[0]
    if group is not None:
        again = recompute and gradient
        return ops.synchronised.conv_bn_act(
            x, conv_weight, conv_bias, *affine, residual, geometry, group, eps, relu, save_mask, again, fork, update
        )[0]
    if by_moments:
        args = (x, conv_weight, *affine, *running, residual, training, eps, relu, relu)
        y = ops.conv1x1_bn_act.call(*args, then=update)[0]
    else:
        args = (x, conv_weight, conv_bias, *affine, *running, residual, *geometry, training, eps, relu, save_mask)
        plain, forking = ops.conv_bn_act.call, ops.conv_bn_act.call_forked
        if recompute_conv:
            plain, forking = ops.conv_bn_act.call_again, ops.conv_bn_act.call_again_forked
        y, raw, mean, var, _, *forked = (plain if fork is None else forking)(*args, then=update)
        if fork is not None:
            fork[-1] = forked[0]
        if recompute and gradient and residual is None:
            if recompute_conv:
                ops.recompute.offer_made(y, (), ops.conv_bn_act.remake, lambda node, _: ops.conv_bn_act.again(node))
            else:
                ops.recompute.offer(y, (raw, weight, bias, mean, var), eps, relu, ops.conv_bn_act.again)
    if recompute_conv and gradient and relu and _is_saved(residual):
        op = ops.conv1x1_bn_act if by_moments else ops.conv_bn_act
        ops.recompute.offer_made(y, (residual,), op.remake, op.again_with_residual)
    return y


def bn_act_maxpool(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    act: str = "relu",
    num_batches_tracked: Tensor | None = None,
    process_group: Any = None,
    kernel_size: int = 3,
    stride: int = 2,
    padding: int = 1,
) -> Tensor:
    """max_pool2d(act(batch_norm(x))): the tail of a ResNet's stem. Batch-norm arguments as in :func:`bn_act`.

    Args:
        kernel_size, stride, padding: of the pooling; kernel_size <= 15, padding <= kernel_size / 2, and at most 4
        windows over a
            pixel along an axis.

    Returns:
        [N, C, OH, OW] in x's dtype and layout.
    """
    relu = arguments.relu(act)
    arguments.check_input(x)
    arguments.check_batch_norm(x, x.shape[1], running_mean, running_var, weight, bias, training, eps)
    if not 1 <= kernel_size <= 15 or stride < 1 or -(-kernel_size // stride) > 4:
        raise RuntimeError(f"bn_act_maxpool: unsupported window: kernel_size {kernel_size}, stride {stride}")
    if not 0 <= padding <= kernel_size // 2:
        raise RuntimeError(
            f"pad should be at most half of effective kernel size, but got pad={padding}, kernel_size={kernel_size}"
        )
    group = arguments.check_batch(x, x.shape, training, process_group)
    if pooled(x.shape[2], kernel_size, stride, padding) < 1 or pooled(x.shape[3], kernel_size, stride, padding) < 1:
        raise RuntimeError(f"bn_act_maxpool: output size is too small for an input of {tuple(x.shape)}")
    count = x.numel() // max(x.shape[1], 1) if group is None else None
    options = (eps, relu, kernel_size, stride, padding)
    update = _update(running_mean, running_var, num_batches_tracked, momentum, training, count)
    if group is not None:
        return ops.synchronised.bn_act_maxpool(x, weight, bias, group, *options, update)[0]
    affine, running = (weight, bias), (running_mean, running_var)
    return ops.bn_act_maxpool.call(x, *affine, *running, training, *options, then=update)[0]


def fold(
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Batch norm with running statistics folded into a convolution, in float32 at least.

    scale = weight / sqrt(running_var + eps); returns conv_weight * scale and (conv_bias - running_mean) * scale + bias.
    """
    dtype = torch.promote_types(conv_weight.dtype, torch.float32)
    scale = (running_var.double() + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    shift = -running_mean if conv_bias is None else conv_bias - running_mean
    shift = shift * scale if bias is None else shift * scale + bias
    return (conv_weight * scale.reshape(-1, 1, 1, 1)).to(dtype), shift.to(dtype)


def algebraic(x: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, geometry: tuple[Any, ...]) -> bool:
    """Whether conv1x1_bn_act serves this convolution in training: a 1x1 that expands to four times the channels or
    more, and has so many pixels that products over channels alone cost little beside those over pixels. On CPUs its
    products are fp32, so half precision is left to oneDNN where that is faster.

    Args:
        x: [N, C, H, W]. conv_weight: [K, C / groups, R, S]. conv_bias: [K] or None.
        geometry: stride, padding, dilation (pairs, as lists) and groups.
    """
    k, c, r, s = conv_weight.shape
    return (
        (r, s) == (1, 1)
        and geometry == ([1, 1], [0, 0], [1, 1], 1)
        and conv_bias is None
        and k >= 4 * c
        and x.shape[0] * x.shape[2] * x.shape[3] >= 8 * c
        and not (table.device_type(x) == "cpu" and convolution.onednn_convolves(registration.autocast_dtype(x)))
        and table.fused_kernel_serves("conv1x1_bn_act", (x, conv_weight))
    )


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _is_saved(residual: Tensor | None) -> bool:
    """Whether the residual is the input of a block, which its first convolution has saved as it is."""
    return residual is not None and ops.recompute.is_saved(residual, ops.conv_bn_act.FORK)


def _needs_mask(relu: bool, residual: Tensor | None, *tensors: Tensor | None) -> bool:
    return relu and residual is not None and _wants_gradient(residual, *tensors)


def _update(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float,
    training: bool,
    count: int | None,
    at: int = 1,
) -> registration.Then:
    """Writes the running statistics, once an op has results: mean and variance are those number `at` and `at` + 1, and
    where count is None the one behind them is the count."""
    if not training or running_mean is None or running_var is None:
        return None

    def write(results: Any) -> None:
        mean, var = results[at : at + 2]
        values = results[at + 2] if count is None else count
        ops.update_running_stats.call(running_mean, running_var, mean, var, num_batches_tracked, momentum, values)

    return write
