"""Batches on their way from a data set to a network."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fastres.errors import UserError
from fastres.train.datasets import Images

__all__ = ["load_batches", "normalised", "per_channel"]


def load_batches(
    images: Images, batches: Iterable[Sequence[int]], workers: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels of each list of indices.

    Args:
        workers: processes that load them; 0: this one does. device: where they will go.

    Raises:
        UserError: if an image cannot be read.
    """
    loader: DataLoader[Any] = DataLoader(
        images,  # type: ignore[arg-type]  # a data set that gives whole batches
        batch_sampler=batches,  # type: ignore[arg-type]  # any iterable will do
        collate_fn=_unchanged,
        num_workers=workers,
        worker_init_fn=_default_signals,
        pin_memory=device.type == "cuda",
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def per_channel(values: Sequence[float], device: torch.device) -> Tensor:
    """Means or standard deviations for values in 0..1 as (1, 3, 1, 1) for values in 0..255."""
    return torch.tensor(values, device=device).view(1, 3, 1, 1) * 255


def normalised(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 (N, 3, H, W) to float32, channels_last, on the device of mean and std, which are `per_channel`."""
    x = images.to(mean.device, non_blocking=True).to(torch.float32, memory_format=torch.channels_last)
    return x.sub_(mean).div_(std)


def _default_signals(worker: int) -> None:
    """Ctrl-C reaches all processes of a terminal; those that load images go on, because the step does. SIGTERM ends
    them: they may have inherited a handler that does not."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _unchanged(batch: Any) -> Any:
    return batch
