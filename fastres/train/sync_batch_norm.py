"""Batch norm with the statistics of the images of all processes."""

from __future__ import annotations

import torch
from torch import Tensor, distributed, nn

__all__ = ["SyncBatchNorm2d", "synchronise_batch_norm"]


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
    """For the CPU: PyTorch's own takes GPU tensors only.

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
