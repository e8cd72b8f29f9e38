"""The networks that the analyses compare: plain, post-activation (v1) and pre-activation (v2), of any depth 6n + 2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastres.errors import UserError
from fastres.models import BasicBlock, CifarResNet, PlainBasicBlock, PreActBasicBlock, PreActCifarResNet

__all__ = ["FAMILIES", "build", "check_depths", "check_families", "title"]

_KINDS = {
    "plain": (CifarResNet, PlainBasicBlock),
    "resnet": (CifarResNet, BasicBlock),
    "resnet_v2": (PreActCifarResNet, PreActBasicBlock),
}
#: Their names, which are those of fastres.models without the depth.
FAMILIES = tuple(_KINDS)


def build(family: str, depth: int, classes: int, *, seed: int, **options: Any) -> CifarResNet:
    """A network for small images (He et al. 2015, section 4.2), not fused. The same seed gives networks of "plain" and
    "resnet" the same weights.

    Args:
        family: one of `FAMILIES`. depth: 6n + 2 for n blocks of two convolutions in each of three stages.
        classes: how many logits. seed: of the weights. options: of `CifarResNet`, such as shortcut="B".
    """
    network, block = _KINDS[family]
    torch.manual_seed(seed)
    layers = ((depth - 2) // 6,) * 3
    return network(block, layers, classes, **options)


def title(family: str, depth: int) -> str:
    """plain-56, ResNet-56, ResNet-56 v2."""
    if family == "plain":
        return f"plain-{depth}"
    return f"ResNet-{depth}" + (" v2" if family == "resnet_v2" else "")


def check_depths(depths: Sequence[int], least: int = 1) -> list[int]:
    """The depths in rising order, each once.

    Args:
        least: how many there have to be.

    Raises:
        UserError: if there is no network of some depth, or there are too few.
    """
    for depth in depths:
        if depth < 8 or (depth - 2) % 6:
            raise UserError(f"no network has depth {depth}: it must be 6n + 2, as 8, 14, 20, 32, 44, 56 or 110")
    found = sorted(set(depths))
    if len(found) < least:
        raise UserError(f"--depths needs at least {least} different depths to compare")
    return found


def check_families(families: Sequence[str]) -> list[str]:
    """The families, each once. Raises UserError if there is no such family."""
    for family in families:
        if family not in FAMILIES:
            raise UserError(f"no family of networks is named {family!r}; there are {', '.join(FAMILIES)}")
    return list(dict.fromkeys(families))
