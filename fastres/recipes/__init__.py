"""Blocks that fuse_ knows, one file a library. `RECIPES` names them without importing anything.

A recipe is an importable subclass of the block's own class that overrides `forward` and nothing else, so a swap of
`__class__` keeps children, parameters, state_dict, hooks, deepcopy and pickle as they were.
"""

from __future__ import annotations

import importlib

from torch import nn

_RESNETS = ("BasicBlock", "Bottleneck", "ResNet")

_OURS = {
    "blocks": (
        *("BasicBlock", "Bottleneck", "PlainBasicBlock", "PlainBottleneck"),
        *("PreActBasicBlock", "PreActBottleneck", "BatchNormReLU"),
    ),
    "resnet": ("ResNet", "PreActResNet"),
    "cifar": ("CifarResNet", "PreActCifarResNet"),
}

#: (module, class) -> (module of the recipe, fused class)
RECIPES: dict[tuple[str, str], tuple[str, str]] = {
    **{
        (f"fastres.models.{file}", name): ("fastres.recipes.models", f"Fused{name}")
        for file, names in _OURS.items()
        for name in names
    },
    **{("torchvision.models.resnet", name): ("fastres.recipes.torchvision", f"Fused{name}") for name in _RESNETS},
}


def fused_class(cls: type[nn.Module]) -> type[nn.Module] | None:
    """The fused subclass for exactly this class, or None. Subclasses have a forward of their own and are not
    matched."""
    found = RECIPES.get((cls.__module__, cls.__qualname__))
    return getattr(importlib.import_module(found[0]), found[1]) if found else None
