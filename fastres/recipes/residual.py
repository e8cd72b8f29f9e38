"""The fused forwards of post-activation residual networks and of plain ones (He et al. 2015), for every library that
writes them this way."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastres import error_notes, guard, sites, switches
from fastres.batch_norm import BatchNorm
from fastres.models.blocks import ZeroPadShortcut
from fastres.recipes import projection


class FusedModule:
    """What fuse_ and explain need to know of a fused class."""

    #: The method that the fused class overrides, and the names the original uses in it (others: no swap).
    forward_method: ClassVar[str] = "forward"
    forward_names: ClassVar[frozenset[str]]
    #: Children that the fused forward does not call, in the order of the forward; those of them that may be None; and
    #: whether it adds a residual.
    fused_children: ClassVar[tuple[str, ...]]
    optional_children: ClassVar[frozenset[str]] = frozenset()
    adds: ClassVar[bool] = True
    #: Whether all of the original forward runs if one of the fused children may not be replaced.
    whole: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Lets the errors of a forward name the module, and a block that is still blocked go on to its own forward."""
        super().__init_subclass__(**kwargs)

        def own(module: nn.Module) -> Callable[..., Any] | None:
            return super(cls, module).forward if guard.still_blocked(module) else None  # type: ignore[misc]

        if method := cls.__dict__.get(cls.forward_method):
            setattr(cls, cls.forward_method, error_notes.named(method, own if cls.whole else None))

    @classmethod
    def unfused_class(cls) -> type[nn.Module]:
        """The class that the module had before the swap, with what was mixed into it since (fully_shard does)."""
        return _unfused(cls)  # type: ignore[arg-type]

    def _get_name(self) -> str:
        return self.unfused_class().__name__  # repr shows the model as the user wrote it

    def __prepare_scriptable__(self) -> Any:
        """torch.jit.script asks for it before it compiles a module."""
        raise RuntimeError(
            f"torch.jit.script cannot compile {type(self).__name__}, which fastres.fuse_ swapped in for "
            f"{self._get_name()}: script inside `with fastres.disabled(model):`, or trace"
        )


@functools.cache
def _unfused(cls: Any) -> Any:
    swapped = [issubclass(base, FusedModule) and issubclass(base, nn.Module) for base in cls.__bases__]
    if not any(swapped):
        return cls.__mro__[cls.__mro__.index(FusedModule) + 1]
    bases = tuple(_unfused(base) if found else base for base, found in zip(cls.__bases__, swapped, strict=True))
    attributes = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__.replace("Fused", "", 1), bases, attributes)


def shortcut_of(block: Any, x: Tensor, found: projection.Projection | None = None) -> Any:
    """downsample(x), fused where it is a plain convolution or the projection `found`; x where there is none."""
    downsample = block.downsample
    if downsample is None:
        return x
    if type(downsample) is ZeroPadShortcut:
        return sites.zero_pad(downsample, x)
    if type(downsample) is nn.Conv2d:
        return sites.convolution(downsample, x)
    found = found or projection.of(block, x)
    return downsample(x) if found is None else sites.conv_bn_act(*found, x, act="identity")


def _end(block: Any, conv: nn.Conv2d, bn: BatchNorm, y: Tensor, x: Tensor) -> Tensor:
    """relu(bn(conv(y)) + shortcut of x)."""
    found = projection.of(block, x)
    if found is not None:
        joined = projection.join(conv, bn, y, *found, x)
        if joined is not None:
            return joined
    shortcut = shortcut_of(block, x, found)
    if shortcut is None:  # a user's downsample may return it; to the function below it would mean that there is none
        y = sites.conv_bn_act(conv, bn, y, act="identity")
        y += shortcut  # type: ignore[arg-type]  # eager's TypeError
    return sites.conv_bn_act(conv, bn, y, act="relu", residual=shortcut)


def children_of(block: Any) -> dict[str, Any]:
    """What the fused forward stands in for, by name. From the dictionary: Module.__getattr__ is slow."""
    try:
        modules = block._modules
        return {name: modules[name] for name in block.fused_children}
    except KeyError:  # replaced by something that is no module
        return {name: getattr(block, name) for name in block.fused_children}


def _blocked(block: Any, x: Tensor, children: dict[str, Any]) -> bool:
    """Whether the block's own forward has to run. `children`: in the order of the forward, the last batch norm last."""
    last = [*children.values()][-1:]
    return guard.blocked(block, x, shortcut=block.downsample, once=last, **children) is not None


class BasicBlockForward(FusedModule):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut)."""

    forward_names = frozenset({"conv1", "bn1", "relu", "conv2", "bn2", "downsample"})
    fused_children = ("conv1", "bn1", "relu", "conv2", "bn2")

    def forward(self: Any, x: Tensor) -> Tensor:
        children = children_of(self)
        if _blocked(self, x, children):
            return super().forward(x)  # type: ignore[misc]
        conv1, bn1, _, conv2, bn2 = children.values()
        fork: list[Tensor] = []
        y = sites.conv_bn_act(conv1, bn1, x, act="relu", recompute=True, fork=fork)
        return _end(self, conv2, bn2, y, fork[0])


class BottleneckForward(FusedModule):
    """relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + shortcut)."""

    forward_names = frozenset({"conv1", "bn1", "relu", "conv2", "bn2", "conv3", "bn3", "downsample"})
    fused_children = ("conv1", "bn1", "relu", "conv2", "bn2", "conv3", "bn3")

    def forward(self: Any, x: Tensor) -> Tensor:
        children = children_of(self)
        if _blocked(self, x, children):
            return super().forward(x)  # type: ignore[misc]
        conv1, bn1, _, conv2, bn2, conv3, bn3 = children.values()
        fork: list[Tensor] = []
        y = sites.conv_bn_act(conv1, bn1, x, act="relu", recompute=True, fork=fork)
        y = sites.conv_bn_act(conv2, bn2, y, act="relu", recompute=True)
        return _end(self, conv3, bn3, y, fork[0])


class PlainBasicBlockForward(FusedModule):
    """relu(bn2(conv2(relu(bn1(conv1(x)))))): no shortcut."""

    forward_names = frozenset({"conv1", "bn1", "relu", "conv2", "bn2"})
    fused_children = ("conv1", "bn1", "relu", "conv2", "bn2")
    adds = False

    def forward(self: Any, x: Tensor) -> Tensor:
        children = children_of(self)
        if guard.blocked(self, x, **children) is not None:
            return super().forward(x)  # type: ignore[misc]
        conv1, bn1, _, conv2, bn2 = children.values()
        y = sites.conv_bn_act(conv1, bn1, x, act="relu", recompute=True)
        return sites.conv_bn_act(conv2, bn2, y, act="relu")


class PlainBottleneckForward(FusedModule):
    """relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x))))))))): no shortcut."""

    forward_names = frozenset({"conv1", "bn1", "relu", "conv2", "bn2", "conv3", "bn3"})
    fused_children = ("conv1", "bn1", "relu", "conv2", "bn2", "conv3", "bn3")
    adds = False

    def forward(self: Any, x: Tensor) -> Tensor:
        children = children_of(self)
        if guard.blocked(self, x, **children) is not None:
            return super().forward(x)  # type: ignore[misc]
        conv1, bn1, _, conv2, bn2, conv3, bn3 = children.values()
        y = sites.conv_bn_act(conv1, bn1, x, act="relu", recompute=True)
        y = sites.conv_bn_act(conv2, bn2, y, act="relu", recompute=True)
        return sites.conv_bn_act(conv3, bn3, y, act="relu")


class StemForward(FusedModule):
    """The whole network, with its stem maxpool(relu(bn1(conv1(x)))) fused; the blocks fuse themselves."""

    forward_method = "_forward_impl"
    forward_names = frozenset(
        {"conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool", "flatten", "fc", "torch"}
    )
    fused_children = ("bn1", "relu", "maxpool")
    adds = False
    whole = False
    #: The children whose calls are replayed, and the forwards of the fused modules among them.
    parts: ClassVar[tuple[str, ...]] = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
    forwards: ClassVar[tuple[Any, ...]] = (
        BasicBlockForward.forward,
        BottleneckForward.forward,
        PlainBasicBlockForward.forward,
        PlainBottleneckForward.forward,
        ZeroPadShortcut.forward,
    )

    def _forward_impl(self: Any, x: Tensor) -> Tensor:
        with sites.together(self, x):
            x = sites.chain_of_blocks(self, self.parts, self.forwards, x, self._features)
        return self.fc(torch.flatten(self.avgpool(x), 1))

    def _features(self: Any, x: Tensor) -> Tensor:
        return self.layer4(self.layer3(self.layer2(self.layer1(self._stem(x)))))

    def _stem(self: Any, x: Tensor) -> Tensor:
        conv, bn, relu, maxpool = self.conv1, self.bn1, self.relu, self.maxpool
        if switches.reason(self, x) and guard.blocked(self, x):
            return maxpool(relu(bn(conv(x))))
        children = {"bn1": bn, "relu": relu, "maxpool": maxpool}
        still = not torch.compiler.is_compiling() and guard.still_blocked(self)
        y = None if still else sites.stem(self, x, conv, bn, relu, maxpool)
        if y is not None:
            return y
        # The input's dtype may be changed by conv1 (autocast): what counts is what batch norm gets.
        x = sites.convolution(conv, x)
        if not still and guard.blocked(self, x, **children) is None:
            return sites.bn_act_maxpool(bn, maxpool, x, act="relu")
        return maxpool(relu(bn(x)))


class CifarForward(StemForward):
    """The same for small images, whose stem is relu(bn1(conv1(x))), with three stages."""

    forward_method = "forward"
    forward_names = frozenset(
        {"conv1", "bn1", "relu", "layer1", "layer2", "layer3", "avgpool", "flatten", "fc", "torch"}
    )
    fused_children = ("conv1", "bn1", "relu")
    parts: ClassVar[tuple[str, ...]] = ("conv1", "bn1", "relu", "layer1", "layer2", "layer3")

    def forward(self: Any, x: Tensor) -> Tensor:
        if sites.plain_classifier(self.avgpool, self.fc):
            with sites.together(self, x):
                return sites.chain_of_blocks(self, (*self.parts, "avgpool", "fc"), self.forwards, x, self._logits)
        return self._forward_impl(x)

    def _features(self: Any, x: Tensor) -> Tensor:
        return self.layer3(self.layer2(self.layer1(self._stem(x))))

    def _logits(self: Any, x: Tensor) -> Tensor:
        return sites.classify(self.avgpool, self.fc, self._features(x))

    def _stem(self: Any, x: Tensor) -> Tensor:
        conv, bn, relu = self.conv1, self.bn1, self.relu
        if guard.blocked(self, x, conv=conv, bn=bn, relu=relu) is None:
            return sites.conv_bn_act(conv, bn, x, act="relu")
        return relu(bn(conv(x)))
