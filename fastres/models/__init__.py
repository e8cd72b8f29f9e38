"""Residual networks by name or by constructor, with torchvision's parameter names, and their checkpoints."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from fastres.errors import UserError
from fastres.models.checkpoint import load_checkpoint
from fastres.models.cifar import (
    CifarResNet,
    ZeroPadShortcut,
    resnet20,
    resnet32,
    resnet44,
    resnet56,
    resnet110,
    resnet1202,
)
from fastres.models.resnet import (
    BasicBlock,
    Bottleneck,
    ResNet,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
    wide_resnet50_2,
    wide_resnet101_2,
)

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "CifarResNet",
    "ResNet",
    "ZeroPadShortcut",
    "create_model",
    "image_size",
    "list_models",
    "load_checkpoint",
    "resnet101",
    "resnet110",
    "resnet1202",
    "resnet152",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet34",
    "resnet44",
    "resnet50",
    "resnet56",
    "resnext101_32x8d",
    "resnext50_32x4d",
    "wide_resnet101_2",
    "wide_resnet50_2",
]

_IMAGENET = {
    constructor.__name__: constructor
    for constructor in (
        resnet18,
        resnet34,
        resnet50,
        resnet101,
        resnet152,
        resnext50_32x4d,
        resnext101_32x8d,
        wide_resnet50_2,
        wide_resnet101_2,
    )
}
_CIFAR = {
    constructor.__name__: constructor for constructor in (resnet20, resnet32, resnet44, resnet56, resnet110, resnet1202)
}
_CONSTRUCTORS: dict[str, Callable[..., ResNet | CifarResNet]] = {**_IMAGENET, **_CIFAR}


def list_models() -> list[str]:
    """The names that `create_model` knows, shallow to deep within each family."""
    return list(_CONSTRUCTORS)


def create_model(name: str, **kwargs: Any) -> ResNet | CifarResNet:
    """Makes a model with random weights.

    Args:
        name: one of `list_models()`.
        kwargs: for its constructor: num_classes, fused and the options of `ResNet` or `CifarResNet`.

    Raises:
        UserError: if there is no such model; the message lists which there are.
    """
    if name not in _CONSTRUCTORS:
        close = difflib.get_close_matches(str(name).lower(), _CONSTRUCTORS, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(f"no model named {name!r}; {hint}there are {', '.join(_CONSTRUCTORS)}")
    return _CONSTRUCTORS[name](**kwargs)


def image_size(name: str) -> int:
    """Height and width in pixels of the images that a model is made for: 32 for those of CIFAR, else 224."""
    return 32 if name in _CIFAR else 224
