"""The CUDA C++ kernels (csrc/cuda): arguments put into the form they take, and why they do not serve a call.

They take fp32, bf16 and fp16 activations, dense in NCHW or NHWC order, and vectors of any floating dtype.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastres import layout
from fastres.kernels import aten, cpu, extension

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_VECTORS = (*_DTYPES, torch.float64)


@cache
def device_error(index: int) -> str | None:
    """Why the kernels cannot run on a device, in the words of CUDA: its driver is older than the binary, or there is no
    kernel for its architecture."""
    error = torch.ops.fastres_cuda.error(index)
    if not error:
        return None
    major, minor = torch.cuda.get_device_capability(index)
    return f"cuda:{index} (sm_{major}{minor}): {error}"


def unavailable() -> str | None:
    """Why there are no CUDA kernels in this process, or None."""
    if reason := extension.cuda_load_error():
        return reason
    if not torch.cuda.is_available():
        return "no CUDA device"
    errors = [device_error(index) for index in range(torch.cuda.device_count())]
    return "; ".join(filter(None, errors)) if all(errors) else None


def why_not(x: Tensor, *args: Any) -> str | None:
    return cpu.why_not(x) or (device_error(x.device.index) if x.is_cuda else None)


def conv_bn_act_why_not(x: Tensor, conv_weight: Tensor, *args: Any) -> str | None:
    return cpu.conv_bn_act_why_not(x, conv_weight) or why_not(x)


def conv_bn_act_backward_why_not(grad_y: Tensor, x: Tensor, conv_weight: Tensor, raw: Tensor, *args: Any) -> str | None:
    return why_not(raw)


def update_why_not(running_mean: Tensor, running_var: Tensor, *args: Any) -> str | None:
    if running_mean.dtype not in _VECTORS or running_var.dtype is not running_mean.dtype:
        return f"{running_mean.dtype} and {running_var.dtype} running statistics"
    return device_error(running_mean.device.index) if running_mean.is_cuda else None


def update_all_why_not(running_means: list[Tensor], *args: Any) -> str | None:
    for running_mean in running_means:
        if reason := update_why_not(running_mean, running_mean):
            return reason
    return None


def _vector(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def bn_act(
    x: Tensor,
    weight: Any,
    bias: Any,
    mean: Any,
    var: Any,
    residual: Tensor | None,
    training: bool,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = layout.dense(x)
    channels_last = layout.is_channels_last(x)
    residual = None if residual is None else layout.like(residual, channels_last)
    mean, var = (None, None) if training else (_vector(mean), _vector(var))
    return torch.ops.fastres_cuda.bn_act.default(
        x, _vector(weight), _vector(bias), mean, var, residual, training, *options, channels_last
    )


def bn_act_backward(
    grad_y: Tensor, x: Tensor, weight: Any, bias: Any, mean: Tensor, var: Tensor, mask: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = layout.dense(x)
    channels_last = layout.is_channels_last(x)
    grad_y = layout.like(grad_y.to(x.dtype), channels_last)
    return torch.ops.fastres_cuda.bn_act_backward.default(
        grad_y, x, _vector(weight), _vector(bias), mean, var, mask, *options, channels_last
    )


def bn_add_bn_act(
    x: Tensor,
    weight: Any,
    bias: Any,
    mean: Any,
    var: Any,
    other: Tensor,
    other_weight: Any,
    other_bias: Any,
    other_mean: Any,
    other_var: Any,
    training: bool,
    other_training: bool,
    *options: Any,
) -> tuple[Tensor, ...]:
    x = layout.dense(x)
    channels_last = layout.is_channels_last(x)
    statistics, other_statistics = (
        (None, None) if batch else (_vector(m), _vector(v))
        for batch, m, v in ((training, mean, var), (other_training, other_mean, other_var))
    )
    return torch.ops.fastres_cuda.bn_add_bn_act.default(
        x,
        _vector(weight),
        _vector(bias),
        *statistics,
        layout.like(other, channels_last),
        _vector(other_weight),
        _vector(other_bias),
        *other_statistics,
        training,
        other_training,
        *options,
        channels_last,
    )


def bn_add_bn_act_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Any,
    mean: Tensor,
    var: Tensor,
    other: Tensor,
    other_weight: Any,
    other_mean: Tensor,
    other_var: Tensor,
    *options: Any,
) -> tuple[Tensor, ...]:
    x = layout.dense(x)
    channels_last = layout.is_channels_last(x)
    return torch.ops.fastres_cuda.bn_add_bn_act_backward.default(
        layout.like(grad_y.to(x.dtype), channels_last),
        x,
        _vector(weight),
        mean,
        var,
        layout.like(other, channels_last),
        _vector(other_weight),
        other_mean,
        other_var,
        *options,
        channels_last,
    )


def add_act(x: Tensor, residual: Tensor, relu: bool) -> Tensor:
    x = layout.dense(x)
    channels_last = layout.is_channels_last(x)
    return torch.ops.fastres_cuda.add_act.default(x, layout.like(residual, channels_last), relu, channels_last)


def add_act_backward(grad_y: Tensor, y: Tensor) -> Tensor:
    y = layout.dense(y)
    channels_last = layout.is_channels_last(y)
    return torch.ops.fastres_cuda.add_act_backward.default(
        layout.like(grad_y.to(y.dtype), channels_last), y, channels_last
    )


def bn_act_maxpool(
    x: Tensor, weight: Any, bias: Any, mean: Any, var: Any, training: bool, *options: Any
) -> tuple[Tensor, ...]:
    x = layout.dense(x)
    mean, var = (None, None) if training else (_vector(mean), _vector(var))
    return torch.ops.fastres_cuda.bn_act_maxpool.default(
        x, _vector(weight), _vector(bias), mean, var, training, *options, layout.is_channels_last(x)
    )


def bn_act_maxpool_backward(
    grad_y: Tensor, x: Tensor, weight: Any, bias: Any, mean: Tensor, var: Tensor, index: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    x = layout.dense(x)
    channels_last = layout.is_channels_last(x)
    return torch.ops.fastres_cuda.bn_act_maxpool_backward.default(
        layout.like(grad_y.to(x.dtype), channels_last),
        x,
        _vector(weight),
        _vector(bias),
        mean,
        var,
        layout.like(index, channels_last),
        *options,
        channels_last,
    )


def update_running_stats_(*args: Any) -> None:
    torch.ops.fastres_cuda.update_running_stats_.default(*args)


def update_all_running_stats_(*args: Any) -> None:
    torch.ops.fastres_cuda.update_all_running_stats_.default(*args)


conv_bias_act = aten.conv_bias_act(add_act)
conv_bn_act = aten.conv_bn_act(bn_act)
conv_bn_act_backward = aten.conv_bn_act_backward(bn_act_backward)
