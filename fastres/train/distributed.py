"""The processes of a run: one, or as many as torchrun started."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from fastres.errors import UserError

__all__ = ["SyncBatchNorm2d", "World", "synchronise_batch_norm", "world"]


@dataclass(frozen=True)
class World:
    """This process among all processes.

    Attributes:
        device: of this process. rank: its number. size: how many there are.
    """

    device: torch.device
    rank: int = 0
    size: int = 1

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sum of each value over all processes, the same on every one."""
        if self.size == 1:
            return [float(value) for value in values]
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(total)
        return total.tolist()

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model itself, or with several processes one that averages gradients over them."""
        if self.size == 1:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices)

    @torch.no_grad()
    def average_buffers(self, model: nn.Module) -> None:
        """Gives running statistics, which every process has of its own images, their mean over all processes.

        After every step, so that weights averaged over time and the test see the same model everywhere.
        """
        buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        if self.size == 1 or not buffers:
            return
        flat = torch.cat([buffer.flatten() for buffer in buffers])
        distributed.all_reduce(flat)
        means = (flat / self.size).split([buffer.numel() for buffer in buffers])
        for buffer, mean in zip(buffers, means, strict=True):
            buffer.copy_(mean.view_as(buffer))


@contextmanager
def world(device: str) -> Iterator[World]:
    """Joins the processes that torchrun started, with NCCL on GPUs and gloo on the CPU; else it is one process.

    Args:
        device: "cpu" or "cuda".
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no GPU here")
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "cuda" and local >= torch.cuda.device_count():
        raise UserError(f"{local + 1} processes or more on a machine of {torch.cuda.device_count()} GPU(s)")
    place = torch.device(device, local) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(place)
    if size == 1:
        yield World(place)
        return
    distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield World(place, distributed.get_rank(), size)
    finally:
        distributed.destroy_process_group()


class _Sum(torch.autograd.Function):
    """The sum of a tensor over all processes. Its gradient is the sum of the gradients over all processes."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        total = x.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> Tensor:
        total = grads[0].clone()
        distributed.all_reduce(total)
        return total


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch norm with the statistics of the images of all processes, for the CPU: PyTorch's own takes GPU tensors only.

    mean = sum(x) / n and var = sum((x - mean)^2) / n, both sums over all processes, in fp32.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        dims, shape = (0, 2, 3), (1, -1, 1, 1)
        value = x.float()
        count = x.new_tensor([x.numel() // x.shape[1]], dtype=torch.float32)
        total = _Sum.apply(torch.cat([value.sum(dims), count]))
        n = total[-1].detach()
        mean = total[:-1] / n
        centred = value - mean.view(shape)
        var = _Sum.apply(centred.square().sum(dims)) / n
        self._update_running_stats(mean.detach(), var.detach(), n)
        y = centred * (var + self.eps).rsqrt().view(shape)
        return (y * self.weight.view(shape) + self.bias.view(shape)).to(x.dtype)

    @torch.no_grad()
    def _update_running_stats(self, mean: Tensor, var: Tensor, n: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        assert self.momentum is not None
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var * n / (n - 1), self.momentum)
        self.num_batches_tracked.add_(1)


def synchronise_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """Lets every plain batch norm of `model` use the statistics of all processes. In place; parameters stay.

    Fused sites of these layers run in eager: the fused ops know the statistics of one process only.
    """
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) is nn.BatchNorm2d and module.affine and module.track_running_stats and module.momentum:
            module.__class__ = SyncBatchNorm2d
    return model
