"""The processes of a run: one, or as many as torchrun started."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from fastres.errors import UserError

__all__ = ["World", "world"]


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
    """Joins the processes that torchrun started, with NCCL on GPUs and gloo on the CPU; else it is one process. A
    process group that is there already is used, and stays.

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
    if distributed.is_initialized():
        yield World(place, distributed.get_rank(), distributed.get_world_size())
        return
    distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield World(place, distributed.get_rank(), size)
    finally:
        distributed.destroy_process_group()
