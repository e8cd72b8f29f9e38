"""What nn.BatchNorm2d and nn.SyncBatchNorm do in a call, from their attributes as they are now; and a SyncBatchNorm for
CPUs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastres import arguments, functional
from fastres.ops import registration, update_running_stats

BatchNorm = nn.BatchNorm2d | nn.SyncBatchNorm


class SyncBatchNorm(nn.SyncBatchNorm):
    """nn.SyncBatchNorm that synchronises activations [N, C, H, W] on CPUs too, where PyTorch's raises an error.

    In fused blocks both are the same; this one also serves where a block is not fused. `convert_sync_batchnorm` makes
    them.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not input.is_cpu or process_group(self) is None:
            return super().forward(input)
        return functional.bn_act(input, *running(self), self.weight, self.bias, act="identity", **options(self))


def convert_sync_batchnorm(module: nn.Module, process_group: Any = None) -> nn.Module:
    """nn.SyncBatchNorm.convert_sync_batchnorm with batch norms that take CPU tensors too; it keeps the parameters.

    DistributedDataParallel refuses CPU modules that contain an nn.SyncBatchNorm: wrap first, then convert `ddp.module`.

    Args:
        module: whose batch norms are replaced; if it is one itself, use what is returned.
        process_group: of torch.distributed, which shares its statistics; None: all processes.
    """
    module = nn.SyncBatchNorm.convert_sync_batchnorm(module, process_group)
    for child in module.modules():
        if type(child) is nn.SyncBatchNorm:
            child.__class__ = SyncBatchNorm
    return module


class Frozen:
    """What fused code takes for a frozen batch norm of another library: four buffers, constant also in training.

    Attributes:
        module: whose buffers they are.
        eps: its own, wherever it keeps it.
    """

    training, momentum, num_batches_tracked, track_running_stats = False, 0.0, None, True

    def __init__(self, module: nn.Module, eps: float) -> None:
        self.module, self.eps = module, eps
        self._parameters = self._buffers = module._buffers

    weight = property(lambda self: self._buffers["weight"])
    bias = property(lambda self: self._buffers["bias"])
    running_mean = property(lambda self: self._buffers["running_mean"])
    running_var = property(lambda self: self._buffers["running_var"])


#: The forwards that fused code stands in for.
FORWARDS: dict[type[nn.Module], Any] = {
    kind: kind.forward for kind in (nn.BatchNorm2d, nn.SyncBatchNorm, SyncBatchNorm)
}


def tensors(bn: BatchNorm) -> tuple[Tensor | None, ...]:
    """Weight, bias, running mean and variance."""
    try:
        parameters, buffers = bn._parameters, bn._buffers
        return parameters["weight"], parameters["bias"], buffers["running_mean"], buffers["running_var"]
    except KeyError:
        return bn.weight, bn.bias, bn.running_mean, bn.running_var


def blocked(bn: BatchNorm, x: Tensor) -> str | None:
    """Why fused code may not stand for `bn` with activations like x, or None."""
    weight, bias, mean, var = tensors(bn)
    if (mean is None) != (var is None):
        return "one of the running statistics is None"
    if bn.eps < 0 or (bn.eps == 0 and (bn.training or mean is None)):
        return f"eps {bn.eps}"  # eager's own error
    if not x.is_cpu and process_group(bn) is not None:
        return f"fused synchronised batch norm is for CPUs, input on {x.device}"
    device, dtype = x.device, None
    if isinstance(bn, Frozen) and (x.dtype is not mean.dtype or registration.autocast_enabled(device.type)):
        return f"input is {x.dtype}, frozen batch norm {mean.dtype}, autocast or not: eager's result is promoted"
    for t in (weight, bias, mean, var):
        if t is None:
            continue
        if type(t) is not nn.Parameter and type(t) is not Tensor:
            return f"a batch-norm tensor is a {type(t).__name__}"
        if t.device != device:
            return f"input on {device}, batch norm on {t.device}"
        if t.dtype is not dtype and (dtype is not None or not arguments.may_normalise(x.dtype, t.dtype)):
            return f"input is {x.dtype}, batch norm {t.dtype}"
        dtype = t.dtype
    return None


def note(bn: nn.Module) -> str:
    """What a report has to say of a batch norm that is fused, or ""."""
    if not isinstance(bn, nn.SyncBatchNorm):
        return ""
    return (
        "SyncBatchNorm: with a process group, the fused block synchronises on CPUs, where its own forward would raise; "
        "on other devices its own forward runs"
    )


def process_group(bn: BatchNorm) -> Any:
    """The processes whose statistics `bn` uses now, or None: as nn.SyncBatchNorm.forward."""
    if not isinstance(bn, nn.SyncBatchNorm) or not bn.training:
        return None
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    group = bn.process_group or torch.distributed.group.WORLD
    return group if torch.distributed.get_world_size(group) > 1 else None


def options(bn: BatchNorm) -> dict[str, Any]:
    """Counts the batch, as its forward, and returns what fastres.functional's batch norms take of it: whether batch
    statistics are used, and of which processes; the momentum, or the counter in its place; eps."""
    counter = bn.num_batches_tracked
    cumulative = bn.momentum is None and bn.training and bn.track_running_stats
    if bn.training and bn.track_running_stats and counter is not None:
        if cumulative:  # it is read by this call
            counter.add_(1)
        else:
            update_running_stats.count_batch(counter)
    return {
        "training": bn.training or (bn.running_mean is None and bn.running_var is None),
        "momentum": 0.0 if bn.momentum is None else bn.momentum,
        "num_batches_tracked": counter if cumulative else None,
        "process_group": process_group(bn),
        "eps": bn.eps,
    }


def running(bn: BatchNorm) -> tuple[Tensor | None, Tensor | None]:
    """The running statistics that a call uses or writes."""
    if bn.training and not bn.track_running_stats:
        return None, None
    return bn.running_mean, bn.running_var
