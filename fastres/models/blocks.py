"""The building blocks of residual networks (He et al. 2015 and 2016), in the plain eager form.

F is a branch of two or three convolutions, s the shortcut, which is the identity where nothing changes its size:

    v1, v1.5 (post-activation)  y = relu(F(x) + s(x))    F = bn(conv(relu(bn(conv(x)))))
    v2 (pre-activation)         y = F(x) + s(x)          F = conv(relu(bn(conv(relu(bn(x))))))
    plain                       y = relu(F(x))           what the papers compare with

Names of parameters and the order in which modules are made are torchvision's. Nothing here is fused: `fastres.fuse_`
swaps the classes afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeAlias

from torch import Tensor, nn

__all__ = [
    "BasicBlock",
    "BatchNormReLU",
    "Bottleneck",
    "PlainBasicBlock",
    "PlainBottleneck",
    "PreActBasicBlock",
    "PreActBottleneck",
    "ZeroPadShortcut",
    "make_shortcut",
]

NormLayer: TypeAlias = Callable[[int], nn.Module]


def conv3x3(in_planes: int, out_planes: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_planes, out_planes, 3, stride, dilation, dilation, groups, bias=False)


def conv1x1(in_planes: int, out_planes: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_planes, out_planes, 1, stride, bias=False)


# Shortcuts -----------------------------------------------------------------------------------------------------------


class ZeroPadShortcut(nn.Module):
    """Shortcut option A, without parameters: every stride-th pixel of x, followed by zeros for the channels it lacks.

    Args:
        channels: of the output, at least those of the input. stride: 1 or more.
    """

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.channels, self.stride = channels, stride

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return nn.functional.pad(x, (0, 0, 0, 0, 0, self.channels - x.shape[1]))

    def extra_repr(self) -> str:
        return f"{self.channels}, stride={self.stride}"


def make_shortcut(
    option: str,
    in_planes: int,
    out_planes: int,
    stride: int = 1,
    *,
    preactivation: bool = False,
    norm_layer: NormLayer = nn.BatchNorm2d,
) -> nn.Module | None:
    """What a block takes as its `downsample`; None is the identity. He et al. 2015, section 4.1:

    Args:
        option: "A": the identity, padded with zeros where sizes change. "B": a projection (1x1 convolution) where sizes
            change, else the identity. "C": a projection in every block.
        in_planes, out_planes, stride: of the block.
        preactivation: for a block of v2, whose projection has no batch norm: its input is normalised already.
        norm_layer: of a projection.

    Raises:
        ValueError: if there is no such option.
    """
    if option not in ("A", "B", "C"):
        raise ValueError(f'shortcut must be "A", "B" or "C", got {option!r}')
    if option != "C" and stride == 1 and in_planes == out_planes:
        return None
    if option == "A":
        return ZeroPadShortcut(out_planes, stride)
    projection = conv1x1(in_planes, out_planes, stride)
    return projection if preactivation else nn.Sequential(projection, norm_layer(out_planes))


# Post-activation: v1 and v1.5 ----------------------------------------------------------------------------------------


class BasicBlock(nn.Module):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)), two 3x3 convolutions: the block of ResNet-18 and -34.

    Args:
        inplanes: input channels. planes: output channels. stride: of conv1 and the shortcut.
        downsample: the shortcut (`make_shortcut`), or None for the identity.
        groups, base_width, dilation: only 1, 64 and 1; they are here so that both blocks are made alike.
        norm_layer: makes a normalisation layer for so many channels; `nn.BatchNorm2d` by default.

    Raises:
        ValueError: for any other groups or base_width.
        NotImplementedError: for any other dilation.
    """

    expansion: ClassVar[int] = 1
    preactivation: ClassVar[bool] = False
    residual: ClassVar[bool] = True

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        _check_basic(type(self), groups, base_width, dilation)
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = norm_layer(planes)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        identity = x if self.downsample is None else self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    """1x1 reduction, 3x3, 1x1 expansion to 4 * planes channels, plus the shortcut: the block of ResNet-50 and deeper.

    Args:
        inplanes: input channels. planes: output channels / 4. stride: of conv2 (or conv1) and the shortcut.
        downsample: the shortcut (`make_shortcut`), or None for the identity.
        groups, base_width: of the 3x3 convolution, which has planes * base_width / 64 * groups channels.
        dilation: of the 3x3 convolution.
        norm_layer: makes a normalisation layer for so many channels; `nn.BatchNorm2d` by default.
        stride_in_1x1: v1, as in the paper: the stride is that of conv1. By default it is that of conv2 (v1.5, as in
            torchvision), which sees all pixels and costs some 6 % more.
    """

    expansion: ClassVar[int] = 4
    preactivation: ClassVar[bool] = False
    residual: ClassVar[bool] = True

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer = nn.BatchNorm2d,
        stride_in_1x1: bool = False,
    ) -> None:
        super().__init__()
        width = int(planes * (base_width / 64.0)) * groups
        stride1, stride2 = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = conv1x1(inplanes, width, stride1)
        self.bn1 = norm_layer(width)
        self.conv2 = conv3x3(width, width, stride2, groups, dilation)
        self.bn2 = norm_layer(width)
        self.conv3 = conv1x1(width, planes * self.expansion)
        self.bn3 = norm_layer(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        identity = x if self.downsample is None else self.downsample(x)
        out += identity
        return self.relu(out)


# Plain ---------------------------------------------------------------------------------------------------------------


class PlainBasicBlock(BasicBlock):
    """BasicBlock without its shortcut: relu(bn2(conv2(relu(bn1(conv1(x)))))), with the same parameters.

    Args: as in `BasicBlock`, without downsample.
    """

    residual = False

    def __init__(self, inplanes: int, planes: int, stride: int = 1, **options: Any) -> None:
        super().__init__(inplanes, planes, stride, None, **options)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)))


class PlainBottleneck(Bottleneck):
    """Bottleneck without its shortcut, with the same parameters. Args: as in `Bottleneck`, without downsample."""

    residual = False

    def __init__(self, inplanes: int, planes: int, stride: int = 1, **options: Any) -> None:
        super().__init__(inplanes, planes, stride, None, **options)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.relu(self.bn3(self.conv3(out)))


# Pre-activation: v2 --------------------------------------------------------------------------------------------------


class PreActBasicBlock(nn.Module):
    """conv2(relu(bn2(conv1(relu(bn1(x)))))) + shortcut: nothing but the addition is on the identity's path.

    A shortcut with a `downsample` starts from relu(bn1(x)), as in the authors' code; the identity from x.

    Args:
        inplanes: input channels. planes: output channels. stride: of conv1 and the shortcut.
        downsample, groups, base_width, dilation, norm_layer: as in `BasicBlock`.

    Attributes:
        bn1: None in the first block of a network: the stem has activated its input, "before splitting into two paths".
    """

    expansion: ClassVar[int] = 1
    preactivation: ClassVar[bool] = True
    residual: ClassVar[bool] = True

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        _check_basic(type(self), groups, base_width, dilation)
        self.bn1: nn.Module | None = norm_layer(inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn2 = norm_layer(planes)
        self.conv2 = conv3x3(planes, planes)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        activated = x if self.bn1 is None else self.relu(self.bn1(x))
        out = self.conv1(activated)
        out = self.conv2(self.relu(self.bn2(out)))
        identity = x if self.downsample is None else self.downsample(activated)
        out += identity
        return out


class PreActBottleneck(nn.Module):
    """conv3(relu(bn3(conv2(relu(bn2(conv1(relu(bn1(x)))))))) + shortcut: the bottleneck of v2.

    Args: as in `Bottleneck`. The shortcut and bn1 are as in `PreActBasicBlock`.
    """

    expansion: ClassVar[int] = 4
    preactivation: ClassVar[bool] = True
    residual: ClassVar[bool] = True

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer = nn.BatchNorm2d,
        stride_in_1x1: bool = False,
    ) -> None:
        super().__init__()
        width = int(planes * (base_width / 64.0)) * groups
        stride1, stride2 = (stride, 1) if stride_in_1x1 else (1, stride)
        self.bn1: nn.Module | None = norm_layer(inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.conv1 = conv1x1(inplanes, width, stride1)
        self.bn2 = norm_layer(width)
        self.conv2 = conv3x3(width, width, stride2, groups, dilation)
        self.bn3 = norm_layer(width)
        self.conv3 = conv1x1(width, planes * self.expansion)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        activated = x if self.bn1 is None else self.relu(self.bn1(x))
        out = self.conv1(activated)
        out = self.conv2(self.relu(self.bn2(out)))
        out = self.conv3(self.relu(self.bn3(out)))
        identity = x if self.downsample is None else self.downsample(activated)
        out += identity
        return out


class BatchNormReLU(nn.Module):
    """relu(bn(x)): what follows the last block of a network of v2. Args: norm, the normalisation layer."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.bn = norm
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(x))


#: What a network can be made of.
Block: TypeAlias = type[BasicBlock] | type[Bottleneck] | type[PreActBasicBlock] | type[PreActBottleneck]


def _check_basic(kind: type[nn.Module], groups: int, base_width: int, dilation: int) -> None:
    if groups != 1 or base_width != 64:
        raise ValueError(f"{kind.__name__} only supports groups=1 and base_width=64")
    if dilation > 1:
        raise NotImplementedError(f"Dilation > 1 not supported in {kind.__name__}")
