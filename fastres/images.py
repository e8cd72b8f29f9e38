"""Real input: photographs as network input, and batch-norm statistics that fit them."""

from __future__ import annotations

import functools
import math
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from fastres.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["SUFFIXES", "calibrate_", "open_image", "photographs", "synthetic"]

Model = TypeVar("Model", bound=nn.Module)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
#: What is looked for in a file, whatever its name: Pillow knows formats that it hands to other programs (EPS).
_FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


def photographs(n: int, size: int = 224, *, folder: str | os.PathLike[str] | None = None, seed: int = 0) -> Tensor:
    """Random crops of photographs, as a network trained on ImageNet expects them.

    Crops are drawn as for training (8 to 100 % of the area, aspect 3:4 to 4:3, flipped or not) and resized with
    antialiasing. With fewer photographs than n, each gives several crops. Crop i depends on seed and i only: a larger
    batch starts with the smaller one.

    Args:
        n: number of images. size: height and width in pixels.
        folder: a folder of images, searched recursively in sorted order, hidden files left out;
            by default the two photographs that scikit-learn ships.
        seed: of the crops.

    Returns:
        float32 tensor (n, 3, size, size), RGB, normalised with ImageNet's mean and standard deviation.

    Raises:
        UserError: if n or size is below 1, there is no such folder, it has no images, an image cannot be decoded (the
            message names it), or Pillow or scikit-learn is missing.
    """
    if n < 1 or size < 1:
        raise UserError(f"need at least one image of at least one pixel, got n={n} and size={size}")
    sources = _bundled() if folder is None else _files(Path(folder))
    batch = torch.empty(n, 3, size, size)
    for first, open_image in enumerate(sources[:n]):
        image = open_image()  # decoded once for all its crops
        for index in range(first, n, len(sources)):
            batch[index] = _crop(image, size, random.Random(f"{seed}/{index}"))
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    return batch.sub_(mean.view(3, 1, 1)).div_(std.view(3, 1, 1))


def synthetic(n: int, size: int = 224, *, seed: int = 0) -> Tensor:
    """What stands in for photographs where nothing can decode them: noise in which, as in photographs, structures of
    every size weigh the same. float32 (n, 3, size, size), with mean 0 and variance 1."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.zeros(n, 3, size, size)
    width = 1
    while width <= size:
        noise = torch.randn(n, 3, width, width, generator=generator)
        images += nn.functional.interpolate(noise, (size, size), mode="bilinear", align_corners=False)
        width *= 2
    return (images - images.mean((2, 3), keepdim=True)).div_(images.std((2, 3), keepdim=True).clamp_min_(1e-6))


def _bundled() -> list[Callable[[], Image]]:
    try:
        from PIL.Image import fromarray
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise UserError(
            f"the default photographs need scikit-learn and Pillow ({error}): pip install 'fastres[bench]'"
        ) from error
    return [functools.partial(fromarray, image) for image in load_sample_images().images]


def _files(folder: Path) -> list[Callable[[], Image]]:
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder" if folder.exists() else f"no such folder: {folder}")
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )
    if not files:
        raise UserError(f"no images in {folder} (looked for {' '.join(SUFFIXES)})")
    return [functools.partial(open_image, path) for path in files]


def open_image(path: Path, extra: str = "bench") -> Image:
    """A photograph in a file, decoded: RGB, turned as its EXIF says.

    Args:
        extra: of fastres, that brings Pillow; for the message.

    Raises:
        UserError: if it is none, damaged, of more than 8 bits a channel, or larger than Pillow's limit (179 million
            pixels: more would be a decompression bomb); the message names the file.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise UserError(f"reading images needs Pillow ({error}): pip install 'fastres[{extra}]'") from error
    try:
        if not path.is_file():
            raise ValueError("not a regular file" if path.exists() else "no such file")
        with Image.open(path, formats=_FORMATS) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"more than 8 bits per channel (mode {image.mode})")  # Pillow would clip to white
            return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # a damaged file makes Pillow's decoders raise nearly anything
        # Pillow's own message for an unknown format repeats the path; the type says it shorter.
        reason = "unknown or damaged format" if type(error).__name__ == "UnidentifiedImageError" else error
        raise UserError(f"cannot read image {path}: {reason or type(error).__name__}") from error


def _crop(image: Image, size: int, rng: random.Random) -> Tensor:
    """Inception's random resized crop: (3, size, size) in 0..1."""
    import numpy as np
    from PIL.Image import Resampling, Transpose

    aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    area = image.width * image.height * rng.uniform(0.08, 1)
    width = min(math.sqrt(area * aspect), image.width)
    height = min(math.sqrt(area / aspect), image.height)
    left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
    crop = image.resize((size, size), Resampling.BICUBIC, box=(left, top, left + width, top + height))
    if rng.random() < 0.5:
        crop = crop.transpose(Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.array(crop)).permute(2, 0, 1) / 255


def calibrate_(model: Model, images: Tensor, *, batch_size: int = 8) -> Model:
    """Replaces the running statistics of every batch norm by those of some images.

    Without this the activations of a randomly initialised deep network grow from block to block in eval mode: its
    statistics say mean 0, variance 1. As in `torch.optim.swa_utils.update_bn`, they become plain averages over the
    batches; other layers (dropout) stay in eval mode. Momentum and modes are put back, and the statistics too if the
    model raises.

    Args:
        model: in place. Layers without running statistics are left alone.
        images: (N, C, H, W), moved to the device and dtype of the model batch by batch.
        batch_size: images at a time, at most; batches are of equal size, give or take one.

    Returns:
        The model.

    Raises:
        UserError: if there are no images, or batch_size is below 1.
    """
    if len(images) < 1 or batch_size < 1:
        raise UserError(f"need at least one image and batch_size 1, got {len(images)} and {batch_size}")
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    modes = [(module, module.training) for module in model.modules()]
    momenta = [norm.momentum for norm in norms]
    statistics = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers(recurse=False)]
    like = next(model.parameters(), images)
    try:
        model.eval()
        for norm in norms:
            norm.train().reset_running_stats()
            norm.momentum = None  # a cumulative average
        with torch.no_grad():
            # No short last batch: every batch weighs the same, and one image may be too few for statistics.
            for batch in torch.tensor_split(images, math.ceil(len(images) / batch_size)):
                model(batch.to(like.device, like.dtype))
    except BaseException:
        for buffer, saved in statistics:
            buffer.copy_(saved)
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, training in modes:
            module.training = training
    return model
