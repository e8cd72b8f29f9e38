"""Batch norm with the statistics of all processes of a group, as torch.nn.SyncBatchNorm's, in the fused ops. On CPUs.

Forward, one all-gather of each process' (mean, variance, count), which may differ in count and may be empty; put
together in float64, in the order of the processes (Chan, Golub and LeVeque 1983, "Algorithms for computing the sample
variance"):

    count = sum n_p     mean = sum n_p mean_p / count     var = sum n_p (var_p + (mean_p - mean)^2) / count

Then the op as with running statistics. Backward, one all-reduce of the gradients of weight and bias, which are sums
over the pixels (fastres/reference.py); from the totals and count follows grad_x. The gradients of weight and bias that
are given back are those of this process, as DistributedDataParallel wants them.

All forms exchange the same: a process with few images may take another than its peers (conv1x1_bn_act needs many).
There are no gradients of gradients, and no tracing: torch.compile runs these functions as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastres.kernels import table
from fastres.ops import bn_act as bn_act_op
from fastres.ops import bn_act_maxpool as maxpool_op
from fastres.ops import conv1x1_bn_act as conv1x1_op
from fastres.ops import conv_bn_act as conv_op
from fastres.ops import recompute, registration
from fastres.ops.registration import Then

#: y, mean and biased variance (float64 [C]), and the number of values a channel that they are of.
Result = tuple[Tensor, Tensor, Tensor, int]


def _part(name: str, *args: Any) -> Any:
    return table.run(name, args)


def combine(statistics: tuple[Tensor, Tensor], count: int, group: Any) -> tuple[Tensor, Tensor, int]:
    """Mean, biased variance and count of all processes from those of this one; float64 [C]. The one exchange of
    forward."""
    mean, var = statistics
    mine = torch.cat([mean, var, mean.new_tensor([count])])
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, mine, group)
    channels = mean.numel()
    means, variances, counts = torch.stack(every).split([channels, channels, 1], 1)
    total = int(counts.sum())
    if total == 0:
        return mean, var, total
    middle = (counts * means).sum(0) / total
    return middle, (counts * (variances + (means - middle).square())).sum(0) / total, total


def _add_up(affine: Sequence[Tensor], group: Any) -> tuple[Tensor, Tensor]:
    """The gradients of weight and bias summed over all processes, float64. The one exchange of backward."""
    sums = torch.stack([grad.double() for grad in affine])
    dist.all_reduce(sums, group=group)
    return sums[0], sums[1]


def _normalise(
    x: Tensor, weight: Any, bias: Any, residual: Any, eps: float, relu: bool, save_mask: bool, group: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, int]:
    """y, mean, var, mask, count."""
    mean, var, count = combine(_part("bn_statistics", x), x.numel() // x.shape[1], group)
    y, _, _, mask = bn_act_op.op(x, weight, bias, mean, var, residual, False, eps, relu, save_mask)
    return y, mean, var, mask if save_mask else None, count


def _gradients(
    grad_y: Tensor, tensors: tuple[Any, ...], options: tuple[Any, ...], need_x: bool, need_residual: bool
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
    """grad_x, grad_weight, grad_bias, grad_residual; tensors: x, weight, bias, mean, var, mask; options: count, eps,
    relu, group."""
    *rest, mask = tensors
    count, eps, relu, group = options
    _, grad_weight, grad_bias, g = bn_act_op.backward_op(grad_y, *tensors, True, eps, relu, False, True, need_residual)
    if need_residual and mask is not None:  # grad_y behind the ReLU is there
        grad_y, mask, relu = g, None, False
    grad_x = None
    if need_x:
        totals = _add_up((grad_weight, grad_bias), group)
        grad_x = _part("bn_act_backward_apply", grad_y, *rest, mask, *totals, count, eps, relu)
    return grad_x, grad_weight, grad_bias, grad_y if need_residual else None


def _finish(then: Then, *results: Any) -> None:
    """Before anything is saved for backward: registration.differentiable says why."""
    if then is not None:
        then(results)


def _affine(need: Sequence[bool], tensors: Sequence[Any], grads: Sequence[Tensor]) -> Iterator[Tensor | None]:
    """The gradients of weight and bias = tensors that are needed."""
    return (grad.to(t.dtype) if n else None for n, t, grad in zip(need, tensors, grads, strict=True))


class _BnAct(torch.autograd.Function):
    """Arguments: those of fastres::bn_act, with group for training."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Result:
        x, weight, bias, _, _, residual, group, eps, relu, save_mask, then = args
        y, mean, var, mask, count = _normalise(x, weight, bias, residual, eps, relu, save_mask, group)
        _finish(then, y, mean, var, count)
        ctx.save_for_backward(x, weight, bias, mean, var, mask)
        ctx.options = (count, eps, relu, group)
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, *_: Any) -> tuple[Any, ...]:
        tensors, need = ctx.saved_tensors, ctx.needs_input_grad
        grad_x, *affine, grad_residual = _gradients(grad_y, tensors, ctx.options, need[0], need[5])
        return grad_x, *_affine(need[1:3], tensors[1:3], affine), None, None, grad_residual, *(None,) * 5


class _ConvBnAct(torch.autograd.Function):
    """Arguments: those of fastres::conv_bn_act, with group for training, and whether to give x back (see its
    call_forked)."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Any:
        *args, forked, then = given
        x, conv_weight, conv_bias, weight, bias, _, _, residual, *geometry, group, eps, relu, save_mask = args
        raw = _part("convolution", x, conv_weight, conv_bias, tuple(geometry))
        y, mean, var, mask, count = _normalise(raw, weight, bias, residual, eps, relu, save_mask, group)
        _finish(then, y, mean, var, count)
        recompute.save(ctx, x, (conv_weight, raw, weight, bias, mean, var, mask))
        ctx.geometry, ctx.options, ctx.forked = tuple(geometry), (count, eps, relu, group), forked
        ctx.mark_non_differentiable(raw, mean, var)
        ctx.set_materialize_grads(False)
        return y, raw, mean, var, count, *((x.view_as(x),) if forked else ())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None, *rest: Any) -> tuple[Any, ...]:
        addend = rest[-1] if ctx.forked else None
        if grad_y is None:
            return addend, *(None,) * 17
        x, (conv_weight, *tensors) = recompute.saved(ctx)
        need = ctx.needs_input_grad
        needed = need[:3]
        grad_raw, *affine, grad_residual = _gradients(grad_y, tuple(tensors), ctx.options, any(needed), need[7])
        grads: Any = (None,) * 3
        if any(needed):
            grads = _part("convolution_backward", grad_raw, x, conv_weight, need[2], ctx.geometry, needed, addend)
        return *grads, *_affine(need[3:5], tensors[1:3], affine), None, None, grad_residual, *(None,) * 10


class _Conv1x1BnAct(torch.autograd.Function):
    """Arguments: those of fastres::conv1x1_bn_act, with group for training."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Result:
        x, conv_weight, weight, bias, _, _, residual, group, eps, relu, save_mask, then = args
        mean, var, x_mean, covariance = _part("conv1x1_statistics", x, conv_weight)
        mean, var, count = combine((mean, var), x.numel() // x.shape[1], group)
        y, *_, mask = conv1x1_op.op(x, conv_weight, weight, bias, mean, var, residual, False, eps, relu, save_mask)
        _finish(then, y, mean, var, count)
        tensors = (conv_weight, weight, bias, mean, var, x_mean, covariance, mask if save_mask else None)
        recompute.save(ctx, x, tensors)
        ctx.options = (count, eps, group)
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, *_: Any) -> tuple[Any, ...]:
        x, (conv_weight, weight, bias, mean, var, x_mean, covariance, mask) = recompute.saved(ctx)
        count, eps, group = ctx.options
        need = ctx.needs_input_grad
        g, grad_conv_weight, products, sums = _part(
            "conv1x1_backward_reduce", grad_y, x, conv_weight, mean, x_mean, mask
        )
        deviation = (var + eps).sqrt()
        affine = products / deviation, sums
        grad_x = None
        if need[0] or need[1]:
            total_weight, total_bias = _add_up(affine, group)
            moments = (mean, var, x_mean, covariance)
            totals = (total_weight * deviation, total_bias)
            grad_x, grad_conv_weight = _part(
                "conv1x1_backward_apply",
                *(g, x, conv_weight, weight, *moments, grad_conv_weight, sums, *totals, count, eps, need[0], need[1]),
            )
        return (
            grad_x if need[0] else None,
            grad_conv_weight if need[1] else None,
            *_affine(need[2:4], (weight, bias), affine),
            *(None, None, g if need[6] else None),
            *(None,) * 5,
        )


class _BnActMaxpool(torch.autograd.Function):
    """Arguments: those of fastres::bn_act_maxpool, with group for training."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Result:
        x, weight, bias, _, _, group, *options, then = args
        mean, var, count = combine(_part("bn_statistics", x), x.numel() // x.shape[1], group)
        y, _, _, index = maxpool_op.op(x, weight, bias, mean, var, False, *options)
        _finish(then, y, mean, var, count)
        ctx.save_for_backward(x, weight, bias, mean, var, index)
        ctx.options, ctx.count, ctx.group = tuple(options), count, group
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, *_: Any) -> tuple[Any, ...]:
        x, weight, bias, mean, var, index = ctx.saved_tensors
        need, eps = ctx.needs_input_grad, ctx.options[0]
        tensors = (x, weight, bias, mean, var)
        # With given statistics: scale * g of reference.py. What the batch's add to it is a batch norm of x.
        grad_x, *affine = maxpool_op.backward_op(grad_y, *tensors, index, False, *ctx.options, need[0], True)
        if need[0]:
            factor = -(var + eps).rsqrt() / max(ctx.count, 1)
            if weight is not None:
                factor = factor * weight
            slope, offset = (factor * total for total in _add_up(affine, ctx.group))
            grad_x = bn_act_op.op(x, slope, offset, mean, var, grad_x, False, eps, False, False)[0]
        return grad_x if need[0] else None, *_affine(need[1:3], (weight, bias), affine), *(None,) * 9


def _untraced(function: Callable[..., Result]) -> Callable[..., Result]:
    """torch.compiler.disable, whose import takes seconds, where something compiles."""

    @functools.wraps(function)
    def run(*args: Any) -> Result:
        return torch.compiler.disable(function)(*args) if torch.compiler.is_compiling() else function(*args)

    return run


def _no_second_order(node: Any) -> Tensor:
    raise RuntimeError("there are no gradients of gradients through synchronised batch norm")


@_untraced
def bn_act(
    x: Tensor, weight: Any, bias: Any, residual: Any, group: Any, eps: float, relu: bool, save_mask: bool, then: Then
) -> Result:
    """act(batch_norm(x) + residual)"""
    args = (x, weight, bias, None, None, residual, group, eps, relu, save_mask)
    return registration.apply(bn_act_op.op, _BnAct, args, then)


@_untraced
def conv_bn_act(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Any,
    weight: Any,
    bias: Any,
    residual: Any,
    geometry: tuple[Any, ...],
    group: Any,
    eps: float,
    relu: bool,
    save_mask: bool,
    again: bool,
    fork: list[Tensor] | None,
    then: Then,
) -> Result:
    """act(batch_norm(conv(x)) + residual). again: let the op behind it compute the result again (recompute.py); fork:
    as in fastres.functional.conv_bn_act, which has put x in it."""
    forked = fork is not None and torch.is_grad_enabled() and registration.may_fork(x)
    args = (x, conv_weight, conv_bias, weight, bias, None, None, residual, *geometry)
    results = registration.apply(conv_op.op, _ConvBnAct, (*args, group, eps, relu, save_mask, forked), then)
    y, raw, mean, var, count, *others = results
    if fork is not None and others:
        fork[-1] = others[0]
    if again and residual is None:
        recompute.offer(y, (raw, weight, bias, mean, var), eps, relu, _no_second_order)
    return y, mean, var, count


@_untraced
def conv1x1_bn_act(
    x: Tensor,
    conv_weight: Tensor,
    weight: Any,
    bias: Any,
    residual: Any,
    group: Any,
    eps: float,
    relu: bool,
    then: Then,
) -> Result:
    """The same of a 1x1 convolution whose raw output is not kept."""
    args = (x, conv_weight, weight, bias, None, None, residual, group, eps, relu, relu)
    return registration.apply(conv1x1_op.op, _Conv1x1BnAct, args, then)


@_untraced
def bn_act_maxpool(
    x: Tensor,
    weight: Any,
    bias: Any,
    group: Any,
    eps: float,
    relu: bool,
    kernel: int,
    stride: int,
    padding: int,
    then: Then,
) -> Result:
    """max_pool2d(act(batch_norm(x)))"""
    args = (x, weight, bias, None, None, group, eps, relu, kernel, stride, padding)
    return registration.apply(maxpool_op.op, _BnActMaxpool, args, then)
