"""Features of images: computed once by a frozen network, kept on the disk."""

from __future__ import annotations

import hashlib
import io
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fastres
from fastres.errors import UserError
from fastres.train.batches import load_batches, normalised, per_channel
from fastres.train.checkpoint import write_atomically
from fastres.train.datasets import ArrayImages, Images
from fastres.train.folder import ImageFolder

__all__ = ["Features", "cached", "extract", "key"]

#: Images at a time. Not an option: the size of a batch can change the last bit of a feature.
BATCH = 16


@dataclass(frozen=True)
class Features:
    """Features float32 (N, D) and labels int64 (N) of N images. seconds: that they took; 0.0 if read from the disk."""

    values: Tensor
    labels: Tensor
    seconds: float = 0.0


def extract(
    backbone: nn.Module,
    images: Images,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    device: torch.device | None = None,
    workers: int = 0,
) -> Features:
    """Runs a frozen network over a data set, in its order.

    Args:
        backbone: a `feature_extractor`, on the device. images: without augmentation. mean, std: of `Data`.
        workers: processes that load images.

    Raises:
        UserError: if an image cannot be read, or what the network gives is not (N, D), or not finite.
    """
    device = device or torch.device("cpu")
    shift, scale = per_channel(mean, device), per_channel(std, device)
    pieces = [list(range(i, min(i + BATCH, len(images)))) for i in range(0, len(images), BATCH)]
    values, labels = [], []
    start = time.perf_counter()
    with torch.no_grad():  # what lets the network run in inference form
        for done, (batch, label) in enumerate(load_batches(images, pieces, workers, device), 1):
            found = backbone(normalised(batch, shift, scale))
            if not isinstance(found, Tensor) or found.dim() != 2:
                shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise UserError(f"the network without its head gives {shape}, not a vector of features for each image")
            values.append(found.float().cpu())
            labels.append(label)
            _progress(done, len(pieces))
    features = Features(torch.cat(values), torch.cat(labels), time.perf_counter() - start)
    if not bool(features.values.isfinite().all()):
        raise UserError("the features are not finite: the weights do not suit these images")
    return features


def _progress(done: int, batches: int) -> None:
    if sys.stderr.isatty():
        end = "\n" if done == batches else ""
        print(f"\rfeatures: batch {done} of {batches}", end=end, file=sys.stderr, flush=True)


def cached(
    folder: Path,
    backbone: nn.Module,
    images: Images,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    device: torch.device | None = None,
    workers: int = 0,
) -> tuple[Features, str]:
    """`extract`, or what it gave for the same weights, images and versions before.

    Args:
        folder: of the cache, made if need be. Others: as in `extract`.

    Returns:
        The features, and a sentence about the cache: read, written, rebuilt because it was corrupt, or why not written.
    """
    name = key(backbone, images, mean, std)
    path = folder / f"{name[:24]}.npz"
    notice = ""
    if path.exists():
        try:
            return _read(path, name, len(images)), f"read from {path}"
        except ValueError as error:
            notice = f"{path} is unusable ({error}) and was made anew"
    features = extract(backbone, images, mean, std, device=device, workers=workers)
    buffer = io.BytesIO()
    np.savez(buffer, key=np.array(name), features=features.values.numpy(), labels=features.labels.numpy())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, buffer.getbuffer())
    except OSError as error:
        return features, f"not cached: cannot write {path}: {error.strerror}"
    return features, notice or f"written to {path}"


def _read(path: Path, name: str, count: int) -> Features:
    """The features in a cache file. Nothing in it is run: NumPy is told to refuse pickles.

    Raises:
        ValueError: if they are not those of `name`, of `count` images.
    """
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            found = {part: file[part] for part in ("key", "features", "labels")}
    except Exception as error:  # a damaged archive makes the reader raise nearly anything
        raise ValueError(f"corrupt: {type(error).__name__}") from error
    values, labels = found["features"], found["labels"]
    if found["key"].shape != () or str(found["key"]) != name:
        raise ValueError("made from other weights or images")
    if values.dtype != np.float32 or values.ndim != 2 or labels.dtype != np.int64:
        raise ValueError("not features and labels")
    if len(values) != count or labels.shape != (count,) or not np.isfinite(values).all():
        raise ValueError("incomplete")
    return Features(torch.from_numpy(values), torch.from_numpy(labels))


def key(backbone: nn.Module, images: Images, mean: Sequence[float], std: Sequence[float]) -> str:
    """A SHA-256 of all that features depend on: the layers and the weights, the images (files by path, length and time
    of change), their size and normalisation, versions, and whether the network is fused."""
    digest = hashlib.sha256()
    classes = [type(module).__qualname__ for module in backbone.modules()]  # differ where it is fused; repr does not
    device = next((parameter.device.type for parameter in backbone.parameters()), "cpu")
    versions = [1, fastres.__version__, torch.__version__]  # 1: of what a cache file holds
    about = [*versions, device, repr(backbone), classes, list(mean), list(std), BATCH]
    digest.update(json.dumps(about).encode())
    for name, tensor in backbone.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(_bytes(tensor))
    for part in _contents(images):
        digest.update(part)
    return digest.hexdigest()


def _contents(images: Images) -> Iterator[bytes]:
    if isinstance(images, ArrayImages):
        yield repr((tuple(images.images.shape), images.augment)).encode()
        yield _bytes(images.images)
        yield _bytes(images.labels)
    elif isinstance(images, ImageFolder):
        assert images.folder is not None
        yield repr((images.size, images.random)).encode()
        for path, label in zip(images.files, images.labels, strict=True):
            facts: Any = path.stat()
            yield repr((str(path.relative_to(images.folder)), facts.st_size, facts.st_mtime_ns, label)).encode()
    else:
        raise TypeError(f"no way to tell one {type(images).__name__} from another")


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
