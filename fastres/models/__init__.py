"""Residual networks by name or by constructor, with torchvision's parameter names, and their checkpoints.

    model = fastres.models.resnet50()                        # fused; fused=False for the plain one
    model = fastres.models.resnet50_v2(shortcut="A")         # pre-activation, shortcuts without parameters
    model = fastres.models.create_model("plain56")           # by name; `list_models` has them all

blocks.py has the building blocks, resnet.py and cifar.py the networks, lowlevel.py the same without nn.Module.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from fastres.errors import UserError
from fastres.models import cifar, resnet
from fastres.models.blocks import (
    BasicBlock,
    BatchNormReLU,
    Bottleneck,
    PlainBasicBlock,
    PlainBottleneck,
    PreActBasicBlock,
    PreActBottleneck,
    ZeroPadShortcut,
    make_shortcut,
)
from fastres.models.checkpoint import load_checkpoint
from fastres.models.cifar import (
    CifarResNet,
    PreActCifarResNet,
    plain20,
    plain32,
    plain44,
    plain56,
    plain110,
    plain1202,
    resnet20,
    resnet20_v2,
    resnet32,
    resnet32_v2,
    resnet44,
    resnet44_v2,
    resnet56,
    resnet56_v2,
    resnet110,
    resnet110_v2,
    resnet1202,
    resnet1202_v2,
)
from fastres.models.resnet import (
    PreActResNet,
    ResNet,
    plain18,
    plain34,
    plain50,
    plain101,
    plain152,
    resnet18,
    resnet18_v1,
    resnet18_v2,
    resnet34,
    resnet34_v1,
    resnet34_v2,
    resnet50,
    resnet50_v1,
    resnet50_v2,
    resnet101,
    resnet101_v1,
    resnet101_v2,
    resnet152,
    resnet152_v1,
    resnet152_v2,
    resnext50_32x4d,
    resnext101_32x8d,
    wide_resnet50_2,
    wide_resnet101_2,
)

__all__ = [
    "BasicBlock",
    "BatchNormReLU",
    "Bottleneck",
    "CifarResNet",
    "PlainBasicBlock",
    "PlainBottleneck",
    "PreActBasicBlock",
    "PreActBottleneck",
    "PreActCifarResNet",
    "PreActResNet",
    "ResNet",
    "ZeroPadShortcut",
    "create_model",
    "describe",
    "image_size",
    "list_models",
    "load_checkpoint",
    "make_shortcut",
    "plain101",
    "plain110",
    "plain1202",
    "plain152",
    "plain18",
    "plain20",
    "plain32",
    "plain34",
    "plain44",
    "plain50",
    "plain56",
    "resnet101",
    "resnet101_v1",
    "resnet101_v2",
    "resnet110",
    "resnet110_v2",
    "resnet1202",
    "resnet1202_v2",
    "resnet152",
    "resnet152_v1",
    "resnet152_v2",
    "resnet18",
    "resnet18_v1",
    "resnet18_v2",
    "resnet20",
    "resnet20_v2",
    "resnet32",
    "resnet32_v2",
    "resnet34",
    "resnet34_v1",
    "resnet34_v2",
    "resnet44",
    "resnet44_v2",
    "resnet50",
    "resnet50_v1",
    "resnet50_v2",
    "resnet56",
    "resnet56_v2",
    "resnext101_32x8d",
    "resnext50_32x4d",
    "wide_resnet101_2",
    "wide_resnet50_2",
]

_CONSTRUCTORS: dict[str, Callable[..., ResNet | CifarResNet]] = {
    constructor.__name__: constructor for constructor in (*resnet.MODELS, *cifar.MODELS)
}


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
    return _constructor(name)(**kwargs)


def describe(name: str) -> str:
    """One line about the model called `name`: its network, its blocks, its parameters. Raises UserError if there is none."""
    return (_constructor(name).__doc__ or "").partition(".\n")[0]


def image_size(name: str) -> int:
    """Height and width in pixels of the images that the model `name` is made for: 32 for those of CIFAR, else 224."""
    return 32 if _CONSTRUCTORS.get(name) in cifar.MODELS else 224


def _constructor(name: str) -> Callable[..., ResNet | CifarResNet]:
    if name not in _CONSTRUCTORS:
        close = difflib.get_close_matches(str(name).lower(), _CONSTRUCTORS, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(f"no model named {name!r}; {hint}there are {', '.join(_CONSTRUCTORS)}")
    return _CONSTRUCTORS[name]
