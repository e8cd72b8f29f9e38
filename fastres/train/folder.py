"""Folders of images as ImageNet has them: train/CLASS/*.jpg and val/CLASS/*.jpg."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastres.errors import UserError
from fastres.images import SUFFIXES, open_image
from fastres.train import augment

__all__ = ["ImageFolder"]


class ImageFolder:
    """Images whose folder is their class; read from the disk when they are asked for.

    Args:
        root: the folder of the folders. names: what the folder of the classes may be called, the first that is there.
        size: height and width in pixels. random: random resized crops, mirrored or not; else the middle.

    Attributes:
        classes: the names of the classes, sorted.

    Raises:
        UserError: if there is no such folder, or a class without images.
    """

    def __init__(self, root: Path, names: Sequence[str], size: int, random: bool = False) -> None:
        try:
            import PIL  # noqa: F401
        except ImportError as error:
            raise UserError(f"reading images needs Pillow ({error}): pip install 'fastres[train]'") from error
        self.folder = next((root / name for name in names if (root / name).is_dir()), None)
        if self.folder is None:
            raise UserError(f"no folder {' or '.join(str(root / name) for name in names)}")
        self.size, self.random = size, random
        self.classes = sorted(p.name for p in self.folder.iterdir() if p.is_dir() and not p.name.startswith("."))
        if not self.classes:
            raise UserError(f"{self.folder} has no folders: there should be one for each class")
        self.files: list[Path] = []
        self.labels: list[int] = []
        for label, name in enumerate(self.classes):
            files = sorted(
                p
                for p in (self.folder / name).rglob("*")
                if p.suffix.lower() in SUFFIXES and not p.name.startswith(".") and not p.is_dir()
            )
            if not files:
                raise UserError(f"no images in {self.folder / name} (looked for {' '.join(SUFFIXES)})")
            self.files += files
            self.labels += [label] * len(files)
        self._seed = (0, 0)

    def rename_classes(self, classes: list[str]) -> None:
        """Takes over the numbering of another folder's classes; UserError if this folder has a class it lacks."""
        if unknown := [name for name in self.classes if name not in classes]:
            raise UserError(f"{self.folder} has classes that are not trained: {', '.join(unknown[:5])}")
        self.labels = [classes.index(self.classes[label]) for label in self.labels]
        self.classes = classes

    def __len__(self) -> int:
        return len(self.files)

    def set_epoch(self, seed: int, epoch: int) -> None:
        self._seed = (seed, epoch)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor] | UserError:
        try:
            images = torch.from_numpy(np.stack([self._image(i) for i in indices]))
        except UserError as error:
            return error
        labels = torch.tensor([self.labels[i] for i in indices])
        return images.permute(0, 3, 1, 2), labels

    def _image(self, index: int) -> np.ndarray:
        """uint8 (size, size, 3), RGB."""
        image = open_image(self.files[index], "train")
        if self.random:
            image = augment.random_resized_crop(image, self.size, np.random.default_rng((*self._seed, 1, index)))
        else:
            image = augment.center_crop(image, self.size)
        return np.asarray(image)
