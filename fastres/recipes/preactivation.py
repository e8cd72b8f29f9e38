"""The fused forwards of pre-activation residual networks, v2 (He et al. 2016).

A batch norm that precedes its convolution cannot be folded into it: the ReLU is between them. So the first one of a
block is an op of its own, the others are fused with the convolution before them, and the last convolution adds the
shortcut.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastres import guard, sites
from fastres.models.blocks import ZeroPadShortcut
from fastres.recipes.residual import CifarForward, FusedModule, StemForward, children_of, shortcut_of


def _children(block: Any) -> dict[str, Any]:
    """What the fused forward stands in for, by name, without a bn1 that is None."""
    return {name: child for name, child in children_of(block).items() if child is not None or name != "bn1"}


def _blocked(block: Any, x: Tensor, children: dict[str, Any]) -> bool:
    """Whether the block's own forward has to run."""
    return guard.blocked(block, x, shortcut=block.downsample, once=children.values(), **children) is not None


def _first(block: Any, bn1: Any, conv1: Any, bn2: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """relu(bn2(conv1(a))) and the shortcut, where a = relu(bn1(x)), or x if there is no bn1."""
    fork: list[Tensor] = []
    activated = x if bn1 is None else sites.bn_act(bn1, x, act="relu", recompute=True)
    y = sites.conv_bn_act(conv1, bn2, activated, act="relu", recompute=True, fork=fork)
    if bn1 is not None and block.downsample is None:
        return y, x
    return y, shortcut_of(block, fork[0])


class PreActBasicBlockForward(FusedModule):
    """conv2(relu(bn2(conv1(relu(bn1(x)))))) + shortcut."""

    forward_names = frozenset({"bn1", "relu", "conv1", "bn2", "conv2", "downsample"})
    fused_children = ("bn1", "relu", "conv1", "bn2", "conv2")
    optional_children = frozenset({"bn1"})

    def forward(self: Any, x: Tensor) -> Tensor:
        children = _children(self)
        if _blocked(self, x, children):
            return super().forward(x)  # type: ignore[misc]
        *bn1, _, conv1, bn2, conv2 = children.values()
        y, shortcut = _first(self, bn1[0] if bn1 else None, conv1, bn2, x)
        return sites.conv_add(conv2, y, shortcut)


class PreActBottleneckForward(FusedModule):
    """conv3(relu(bn3(conv2(relu(bn2(conv1(relu(bn1(x)))))))) + shortcut."""

    forward_names = frozenset({"bn1", "relu", "conv1", "bn2", "conv2", "bn3", "conv3", "downsample"})
    fused_children = ("bn1", "relu", "conv1", "bn2", "conv2", "bn3", "conv3")
    optional_children = frozenset({"bn1"})

    def forward(self: Any, x: Tensor) -> Tensor:
        children = _children(self)
        if _blocked(self, x, children):
            return super().forward(x)  # type: ignore[misc]
        *bn1, _, conv1, bn2, conv2, bn3, conv3 = children.values()
        y, shortcut = _first(self, bn1[0] if bn1 else None, conv1, bn2, x)
        y = sites.conv_bn_act(conv2, bn3, y, act="relu", recompute=True)
        return sites.conv_add(conv3, y, shortcut)


class BatchNormReLUForward(FusedModule):
    """relu(bn(x))."""

    forward_names = frozenset({"bn", "relu"})
    fused_children = ("bn", "relu")
    adds = False

    def forward(self: Any, x: Tensor) -> Tensor:
        if guard.blocked(self, x, bn=self.bn, relu=self.relu) is not None:
            return super().forward(x)  # type: ignore[misc]
        return sites.bn_act(self.bn, x, act="relu")


_FORWARDS = (
    PreActBasicBlockForward.forward,
    PreActBottleneckForward.forward,
    BatchNormReLUForward.forward,
    ZeroPadShortcut.forward,
)


class PreActStemForward(StemForward):
    """The whole network: its stem fused as in v1, and a batch norm with ReLU after the last block."""

    forward_names = StemForward.forward_names | {"norm"}
    parts = (*StemForward.parts, "norm")
    forwards = _FORWARDS

    def _features(self: Any, x: Tensor) -> Tensor:
        return self.norm(super()._features(x))


class PreActCifarForward(CifarForward):
    """The same for small images."""

    forward_names = CifarForward.forward_names | {"norm"}
    parts = (*CifarForward.parts, "norm")
    forwards = _FORWARDS

    def _features(self: Any, x: Tensor) -> Tensor:
        return self.norm(super()._features(x))
