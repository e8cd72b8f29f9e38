"""A trained network to take apart: trained shortly, or read from a checkpoint; and its error on images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastres import models
from fastres.analysis import training
from fastres.errors import UserError
from fastres.train import network
from fastres.train.datasets import Data, Images

__all__ = ["Batches", "batches", "check_counts", "error", "get"]

#: Images, normalised float32 (N, 3, H, W), channels_last, and labels (N).
Batches = Sequence[tuple[Tensor, Tensor]]


def get(
    name: str, data: Data, *, checkpoint: str = "", epochs: int, batch: int, lr: float, seed: int
) -> tuple[nn.Module, str]:
    """A network, fused, in eval mode, and a phrase that says how it was trained.

    Args:
        name: of fastres.models, or "package.module:callable", which is called with num_classes=.
        data: what it is trained on. checkpoint: weights to read instead of training; "": train.
        epochs, batch, lr, seed: of the training; seed is also that of the first weights.

    Raises:
        UserError: if there is no such network, it does not take the images, or the checkpoint does not fit.
    """
    model = network.build(name, len(data.classes), fused=True, seed=seed)
    image = _read(data.test, [0])[0]
    network.check_takes(model, (image.shape[2], image.shape[3]), len(data.classes))
    if checkpoint:
        models.load_checkpoint(model, checkpoint)
        return model.eval(), f"{name} with the weights of {checkpoint}"
    last = training.train(model, name, data, epochs=epochs, batch=batch, lr=lr, seed=seed)[-1]
    return model.eval(), f"{name} after {epochs} epochs, training error {last['train_error']:.1f} %"


def check_counts(least: int, **counts: int) -> None:
    """Raises UserError if an option is below `least`."""
    for name, count in counts.items():
        if count < least:
            raise UserError(f"--{name} must be at least {least}, not {count}")


def batches(images: Images, data: Data, *, count: int, batch: int = 128, shuffle: int | None = None) -> Batches:
    """Some images of a data set, without augmentation if they are those of the test.

    Args:
        images: data.train or data.test. count: how many at most; they are spread evenly over the set.
        batch: images in each batch. shuffle: a seed, to draw them at random instead.
    """
    n = len(images)
    if shuffle is None:
        chosen = torch.linspace(0, n - 1, min(count, n)).round().long()
    else:
        images.set_epoch(shuffle, 0)  # of the augmentation
        chosen = torch.randperm(n, generator=torch.Generator().manual_seed(shuffle))[:count]
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (data.mean, data.std))
    found = []
    for indices in chosen.split(batch):
        x, y = _read(images, indices.tolist())
        x = (x.float() / 255 - mean) / std
        found.append((x.contiguous(memory_format=torch.channels_last), y))
    return found


@torch.no_grad()
def error(model: nn.Module, test: Batches) -> float:
    """The share of images that are misclassified, in per cent. NaN counts as wrong."""
    wrong = sum(int((_classes(model(x)) != y).sum()) for x, y in test)
    return 100 * wrong / sum(len(y) for _, y in test)


def _classes(logits: Tensor) -> Tensor:
    return torch.where(logits.isnan().any(1), -1, logits.argmax(1))


def _read(images: Images, indices: list[int]) -> tuple[Tensor, Tensor]:
    found = images.__getitems__(indices)
    if isinstance(found, UserError):
        raise found
    return found
