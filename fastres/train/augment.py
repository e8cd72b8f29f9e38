"""The augmentations of He et al. 2015, as functions of explicit random numbers.

The numbers of an image depend on (seed, epoch, index of the image) only, so a run is the same whatever the number of
processes, of loading workers, and of interruptions.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["center_crop", "flip", "pad_crop", "random_resized_crop"]

PAD = 4


def pad_crop(images: Tensor, numbers: np.ndarray) -> Tensor:
    """Pads each side with 4 black pixels and crops the old size at a random place (section 4.2).

    Args:
        images: (N, C, H, W). numbers: (N, 2) in [0, 1): the place, vertically and horizontally.
    """
    h, w = images.shape[2:]
    windows = F.pad(images, (PAD,) * 4).unfold(2, h, 1).unfold(3, w, 1)  # a view: (N, C, 9, 9, H, W)
    top, left = torch.from_numpy((numbers * (2 * PAD + 1)).astype(np.int64)).unbind(1)
    return windows[torch.arange(len(images)), :, top, left]


def flip(images: Tensor, numbers: np.ndarray) -> Tensor:
    """Mirrors images (N, C, H, W) left to right: those whose number in [0, 1), of `numbers` (N), is below 0.5."""
    mirrored = torch.from_numpy(numbers < 0.5).view(-1, 1, 1, 1)
    return torch.where(mirrored, images.flip(3), images)


def random_resized_crop(image: Image, size: int, random: np.random.Generator) -> Image:
    """A part of 8 to 100 % of the area with an aspect of 3:4 to 4:3, resized to (size, size), mirrored or not.

    As in Inception (Szegedy et al. 2015): ten tries, then the largest part in the middle with a permitted aspect.
    """
    from PIL.Image import Resampling, Transpose

    box = _random_box(image.width, image.height, random)
    image = image.resize((size, size), Resampling.BILINEAR, box=box, reducing_gap=2.0)
    return image.transpose(Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else image


def _random_box(width: int, height: int, random: np.random.Generator) -> tuple[float, float, float, float]:
    for _ in range(10):
        area = width * height * random.uniform(0.08, 1)
        aspect = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if w <= width and h <= height:
            left, top = random.uniform(0, width - w), random.uniform(0, height - h)
            return left, top, min(left + w, width), min(top + h, height)
    w, h = min(width, height * 4 / 3), min(height, width * 4 / 3)
    return (width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2


def center_crop(image: Image, size: int) -> Image:
    """For the test: the square in the middle of 224 / 256 of the shorter side, resized to (size, size)."""
    from PIL.Image import Resampling

    side = min(image.size) * 224 / 256
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return image.resize((size, size), Resampling.BILINEAR, box=(left, top, left + side, top + side), reducing_gap=2.0)
