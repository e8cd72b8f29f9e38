"""The network of a run."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

import fastres
from fastres import models
from fastres.errors import UserError

__all__ = ["build", "check_named", "check_takes"]


def build(name: str, classes: int, *, fused: bool, seed: int) -> nn.Module:
    """A network with seeded weights, channels_last.

    Args:
        name: a model of fastres.models, or "package.module:callable", which is called with num_classes=.
        classes: how many logits it gives. fused: run `fastres.fuse_` on it; the weights are the same.

    Raises:
        UserError: if there is no such model.
    """
    torch.manual_seed(seed)
    if ":" not in name:
        model: nn.Module = models.create_model(name, num_classes=classes, fused=False)
    else:
        module, _, attribute = name.partition(":")
        try:
            model = getattr(importlib.import_module(module), attribute)(num_classes=classes)
        except Exception as error:  # whatever the module does when it is imported or called
            raise UserError(f"no model {name}: {type(error).__name__}: {error}") from error
        if not isinstance(model, nn.Module):
            raise UserError(f"{name} gave a {type(model).__name__}, not an nn.Module")
    if fused:
        fastres.fuse_(model)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # the stubs lack it
    return model


def check_named(model: str, given: dict[str, Any]) -> None:
    """Raises UserError if a checkpoint's model would be imported from elsewhere, unless the user has named it too."""
    if ":" in model and given.get("model") != model:
        raise UserError(f"the checkpoint asks for code of {model}; if that is yours, allow it with --model {model}")


def check_takes(model: nn.Module, size: tuple[int, int], classes: int) -> None:
    """Raises UserError if the model does not give logits (1, classes) for an image (1, 3, *size)."""
    training = model.training
    try:
        with torch.no_grad():
            logits = model.eval()(torch.zeros(1, 3, *size))
    except (RuntimeError, ValueError) as error:
        why = str(error).splitlines()[0]
        raise UserError(f"the model does not take images of {size[0]} x {size[1]} pixels: {why}") from error
    finally:
        model.train(training)
    if not isinstance(logits, torch.Tensor) or logits.shape != (1, classes):
        found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise UserError(f"the data has {classes} classes, the model gives {found}, not (1, {classes})")
