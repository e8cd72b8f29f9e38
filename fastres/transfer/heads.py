"""The head of a network: the linear layer, or small MLP, that turns features into logits. And a network without it."""

from __future__ import annotations

import copy
import os
from typing import TypeVar

import torch
from torch import Tensor, nn

import fastres
from fastres.errors import UserError
from fastres.models import checkpoint

__all__ = ["MLP", "feature_extractor", "head_name", "load_backbone", "make_head", "replace_head"]

Model = TypeVar("Model", bound=nn.Module)


class MLP(nn.Sequential):
    """relu(x W1 + b1) W2 + b2: features (N, features) to logits (N, classes), over `hidden` values."""

    def __init__(self, features: int, hidden: int, classes: int) -> None:
        super().__init__(nn.Linear(features, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, classes))


def make_head(features: int, classes: int, hidden: int = 0) -> nn.Linear | MLP:
    """A head with random weights: linear, or with a hidden layer. Raises UserError for a size below 1."""
    if classes < 1 or hidden < 0:
        raise UserError(f"a head needs at least one class, and no hidden layer or one: {classes} and {hidden} given")
    return MLP(features, hidden, classes) if hidden else nn.Linear(features, classes)


def head_name(model: nn.Module) -> str:
    """Where the head is: the last linear layer or `MLP` ("fc" in our models, torchvision's ResNets and timm's).

    Raises:
        UserError: if there is none.
    """
    found, inside = None, False
    for name, module in model.named_modules():
        inside = inside and name.startswith(f"{found}.")
        if not inside and isinstance(module, (nn.Linear, MLP)):
            found, inside = name, isinstance(module, MLP)
    if not found:
        raise UserError(f"{type(model).__name__} has no linear layer that could be its head")
    return found


def replace_head(model: Model, classes: int, hidden: int = 0) -> Model:
    """Gives a network, in place, a new head with random weights.

    Args:
        model: its head is found by `head_name`; dtype and device stay.
        classes: number of logits. hidden: width of a hidden layer; 0: none, a linear head.

    Returns:
        The model.

    Raises:
        UserError: if it has no head, or for a size below 1.
    """
    name = head_name(model)
    old = model.get_submodule(name)
    weight = next(old.parameters())
    new = make_head(weight.shape[1], classes, hidden).to(weight.device, weight.dtype).train(old.training)
    model.set_submodule(name, new)
    return model


def feature_extractor(model: Model, *, fuse: bool = True) -> Model:
    """A copy of a network without its head: images (N, 3, H, W) to features (N, D), those that the head would get.

    It is frozen and in eval mode, and its residual blocks run fused: under `torch.no_grad()` every convolution has its
    batch norm folded in.

    Args:
        model: stays as it is. fuse: False: in eager PyTorch.

    Raises:
        UserError: if it has no head.
    """
    backbone = copy.deepcopy(model)
    backbone.set_submodule(head_name(backbone), nn.Identity())
    backbone.eval().requires_grad_(False)
    if fuse:
        fastres.fuse_(backbone)
    else:
        fastres.unfuse_(backbone)
    backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # the stubs lack it
    return backbone


def load_backbone(model: nn.Module, path: str | os.PathLike[str]) -> list[str]:
    """Loads all weights but the head's from a file, all or nothing; see `fastres.models.load_checkpoint`.

    Names of our models are torchvision's, which are those of timm's ResNets too.

    Args:
        model: receives the weights; its head stays as it is. path: the file.

    Returns:
        The keys of the file's head, with shapes: what was dropped.

    Raises:
        FileNotFoundError: if there is no such file.
        UserError: if it cannot be read, or anything but the head does not fit; the message names the keys.
    """
    expected = model.state_dict()
    state = checkpoint.read_state_dict(path, expected)
    prefix = f"{head_name(model)}."
    dropped = {key: value for key, value in state.items() if key.startswith(prefix)}
    own = {key: value for key, value in expected.items() if key.startswith(prefix)}
    merged: dict[str, Tensor] = {**{k: v for k, v in state.items() if k not in dropped}, **own}
    checkpoint.check_fits(merged, expected, path)
    model.load_state_dict(merged)
    return [f"{key} {tuple(value.shape)}" for key, value in dropped.items()]
