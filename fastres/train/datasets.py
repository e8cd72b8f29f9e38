"""Labelled images: what the loop trains on and what it tests with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastres.errors import UserError
from fastres.train import augment, cifar
from fastres.train.folder import ImageFolder

if TYPE_CHECKING:
    from fastres.train.options import Options

__all__ = ["ArrayImages", "Data", "Images", "digits", "load", "synthetic"]

DIGITS_TEST = 397
#: Mean and standard deviation of each channel over the training images.
NORMALISATION = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "folder": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # of ImageNet, as pre-trained networks expect
}


class Images(Protocol):
    """A data set that gives whole batches, as the fetcher of torch's DataLoader asks for them."""

    def __len__(self) -> int: ...

    def set_epoch(self, seed: int, epoch: int) -> None:
        """Chooses the random numbers of the augmentation."""

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor] | UserError:
        """Images, uint8 (N, 3, H, W), and labels, int64 (N). An error is returned, because a DataLoader's worker that
        raises one wraps its message into a traceback."""


class ArrayImages:
    """Images in memory.

    Args:
        images: uint8 (N, 3, H, W). labels: int64 (N). augment: "none", "crop" or "crop-flip".
    """

    def __init__(self, images: Tensor, labels: Tensor, augment: str = "none") -> None:
        self.images, self.labels, self.augment = images, labels, augment
        self._numbers = np.empty((0, 3))

    def __len__(self) -> int:
        return len(self.images)

    def set_epoch(self, seed: int, epoch: int) -> None:
        if self.augment != "none":
            self._numbers = np.random.default_rng((seed, epoch, 1)).random((len(self), 3))

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        images = self.images[torch.as_tensor(indices)]
        if self.augment != "none":
            numbers = self._numbers[list(indices)]
            images = augment.pad_crop(images, numbers[:, :2])
            if self.augment == "crop-flip":
                images = augment.flip(images, numbers[:, 2])
        return images, self.labels[torch.as_tensor(indices)]


@dataclass
class Data:
    """Images for training and for the test.

    Attributes:
        train, test: the images. classes: their names. mean, std: by which a channel is normalised, for values in 0..1.
    """

    train: Images
    test: Images
    classes: list[str]
    mean: Sequence[float]
    std: Sequence[float]


def load(options: Options) -> Data:
    """Reads the data set that the options name.

    Raises:
        UserError: if it is not there, corrupt, or a package is missing that reads it.
    """
    if options.data == "digits":
        return digits(options.augment)
    if options.data == "synthetic":
        return synthetic(options.size, seed=options.seed, augment=options.augment)
    if options.root is None:
        raise UserError(f"--data {options.data} needs --root: where the images are")
    root = Path(options.root)
    if options.data == "folder":
        train = ImageFolder(root, ("train",), options.size, random=options.augment != "none")
        test = ImageFolder(root, ("val", "test"), options.size)
        test.rename_classes(train.classes)
        return Data(train, test, train.classes, *NORMALISATION[options.data])
    kind = cifar.KINDS[options.data]
    (x, y), (test_x, test_y), classes = cifar.read(root, kind)
    train_images, test_images = ArrayImages(x, y, options.augment), ArrayImages(test_x, test_y)
    return Data(train_images, test_images, classes, *NORMALISATION[options.data])


def digits(augment: str = "none") -> Data:
    """The 1,797 scans of handwritten digits of scikit-learn, 8x8 upscaled to 32x32; always the same 397 are the test.

    Raises:
        UserError: if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError(f"the digits come with scikit-learn ({error}): pip install 'fastres[train]'") from error
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) * (255 / 16)
    x = F.interpolate(x, size=32, mode="bilinear", align_corners=False).round().byte().expand(-1, 3, -1, -1)
    y = torch.tensor(labels, dtype=torch.int64)
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(x)))  # RandomState: never changes with NumPy
    test, train = order[:DIGITS_TEST], order[DIGITS_TEST:]
    values = x[train, 0].float() / 255
    mean, std = [values.mean().item()] * 3, [values.std().item()] * 3
    names = [str(digit) for digit in range(10)]
    return Data(ArrayImages(x[train], y[train], augment), ArrayImages(x[test], y[test]), names, mean, std)


def synthetic(
    size: int = 32, *, classes: int = 10, train: int = 512, test: int = 128, seed: int = 0, augment: str = "none"
) -> Data:
    """Patterns with noise, for trying things out: a class is a random grid of 4x4 coloured patches.

    Args:
        size: height and width. classes, train, test: how many classes and images. seed: of patterns, labels and noise.
    """
    random = np.random.default_rng((seed, 2))
    patterns = torch.from_numpy(random.uniform(64, 192, (classes, 3, 4, 4))).float()
    patterns = F.interpolate(patterns, size=size, mode="nearest")
    labels = torch.from_numpy(random.integers(0, classes, train + test))
    noise = torch.from_numpy(random.normal(0, 48, (train + test, 3, size, size))).float()
    images = (patterns[labels] + noise).clamp(0, 255).byte()
    names = [f"pattern {i}" for i in range(classes)]
    first = ArrayImages(images[:train], labels[:train], augment)
    return Data(first, ArrayImages(images[train:], labels[train:]), names, (0.5,) * 3, (0.25,) * 3)
