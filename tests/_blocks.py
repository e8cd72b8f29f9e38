"""Residual blocks written as other libraries write them, small, for tests of fuse_ on classes it has never seen."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

WIDTH = 8


def conv3(stride=1, groups=1):
    return nn.Conv2d(WIDTH, WIDTH, 3, stride, 1, groups=groups, bias=False)


class Block(nn.Module):
    """A convolution, batch norm and ReLU, and what a test makes of it."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu, self.calls = conv3(), nn.BatchNorm2d(WIDTH), nn.ReLU(), 0
        self.register_buffer("count", torch.zeros(()))

    def run(self, x):
        return self.relu(self.bn(self.conv(x)))


class Gate(nn.Module):
    """Squeeze-and-excitation."""

    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Conv2d(WIDTH, 4, 1), nn.ReLU(inplace=True), nn.Conv2d(4, WIDTH, 1)

    def forward(self, x):
        return x * self.fc2(self.act(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()


class DropPath(nn.Module):
    def __init__(self, drop_prob=0.0):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(1 - self.drop_prob)
        return x * keep / (1 - self.drop_prob)


class TimmBasic(nn.Module):
    """timm.models.resnet.BasicBlock."""

    def __init__(self, stride=1, se=False, drop_path=None, act=nn.ReLU):
        super().__init__()
        self.conv1, self.bn1, self.drop_block = conv3(stride), nn.BatchNorm2d(WIDTH), nn.Identity()
        self.act1, self.aa, self.conv2, self.bn2 = act(inplace=True), nn.Identity(), conv3(), nn.BatchNorm2d(WIDTH)
        self.se = Gate() if se else None
        self.act2 = act(inplace=True)
        self.downsample = None
        if stride != 1:
            pool = nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False)
            self.downsample = nn.Sequential(pool, nn.Conv2d(WIDTH, WIDTH, 1, bias=False), nn.BatchNorm2d(WIDTH))
        self.drop_path = drop_path

    def forward(self, x):
        shortcut = x
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.drop_block(x)
        x = self.act1(x)
        x = self.aa(x)
        x = self.conv2(x)
        x = self.bn2(x)
        if self.se is not None:
            x = self.se(x)
        if self.drop_path is not None:
            x = self.drop_path(x)
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        x += shortcut
        x = self.act2(x)
        return x


class ConvLayer(nn.Module):
    """transformers' ResNetConvLayer, mmcv's ConvModule and their like."""

    def __init__(self, stride=1, kernel=3, activation=True):
        super().__init__()
        self.convolution = nn.Conv2d(WIDTH, WIDTH, kernel, stride, kernel // 2, bias=False)
        self.normalization = nn.BatchNorm2d(WIDTH)
        self.activation = nn.ReLU() if activation else nn.Identity()

    def forward(self, hidden_state):
        return self.activation(self.normalization(self.convolution(hidden_state)))


class HuggingFaceBasic(nn.Module):
    """transformers' ResNetBasicLayer."""

    def __init__(self, stride=1):
        super().__init__()
        self.shortcut = ConvLayer(stride, 1, activation=False) if stride != 1 else nn.Identity()
        self.layer = nn.Sequential(ConvLayer(stride), ConvLayer(activation=False))
        self.activation = nn.ReLU()

    def forward(self, hidden_state):
        residual = hidden_state
        hidden_state = self.layer(hidden_state)
        residual = self.shortcut(residual)
        hidden_state += residual
        hidden_state = self.activation(hidden_state)
        return hidden_state


class ConvModule(nn.Module):
    """mmcv's: the order of conv, norm and act is an attribute, and the norm is found by name."""

    def __init__(self, stride=1, act=True):
        super().__init__()
        self.conv, self.bn, self.with_activation = conv3(stride), nn.BatchNorm2d(WIDTH), act
        self.order, self.norm_name = ("conv", "norm", "act"), "bn"
        if act:
            self.activate = nn.ReLU(inplace=True)

    @property
    def norm(self):
        return getattr(self, self.norm_name)

    def forward(self, x, activate=True, norm=True):
        for layer in self.order:
            if layer == "conv":
                x = self.conv(x)
            elif layer == "norm" and norm:
                x = self.norm(x)
            elif layer == "act" and activate and self.with_activation:
                x = self.activate(x)
        return x


class MmBlock(nn.Module):
    def __init__(self, stride=1):
        super().__init__()
        self.conv1, self.conv2 = ConvModule(), ConvModule(act=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(self.conv2(self.conv1(x)) + x)


class FrozenBatchNorm2d(nn.Module):
    """detectron2's and torchvision's."""

    def __init__(self, eps=1e-3):
        super().__init__()
        self.eps = eps
        for name, low, high in (
            ("weight", 0.5, 1.5),
            ("bias", -1, 1),
            ("running_mean", -1, 1),
            ("running_var", 0.5, 2),
        ):
            self.register_buffer(name, torch.empty(WIDTH).uniform_(low, high))

    def forward(self, x):
        weight, bias = self.weight.reshape(1, -1, 1, 1), self.bias.reshape(1, -1, 1, 1)
        scale = weight * (self.running_var.reshape(1, -1, 1, 1) + self.eps).rsqrt()
        return x * scale + (bias - self.running_mean.reshape(1, -1, 1, 1) * scale)


class Conv2d(nn.Conv2d):
    """detectron2's: a convolution that calls a norm and an activation."""

    def __init__(self, *args, norm=None, activation=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.norm, self.activation = norm, activation

    def forward(self, x):
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x


class Detectron2Bottleneck(nn.Module):
    """detectron2's BottleneckBlock."""

    def __init__(self, stride=1, norm=FrozenBatchNorm2d):
        super().__init__()
        self.shortcut = Conv2d(WIDTH, WIDTH, 1, stride, bias=False, norm=norm()) if stride != 1 else None
        self.conv1 = Conv2d(WIDTH, WIDTH, 1, bias=False, norm=norm())
        self.conv2 = Conv2d(WIDTH, WIDTH, 3, stride, 1, bias=False, norm=norm())
        self.conv3 = Conv2d(WIDTH, WIDTH, 1, bias=False, norm=norm())

    def forward(self, x):
        out = F.relu_(self.conv1(x))
        out = F.relu_(self.conv2(out))
        out = self.conv3(out)
        shortcut = x if self.shortcut is None else self.shortcut(x)
        out += shortcut
        return F.relu_(out)


class PreActivation(nn.Module):
    """As many write it: functional ReLUs, and the shortcut after the first activation where there is a projection."""

    def __init__(self, stride=1):
        super().__init__()
        self.bn1, self.conv1, self.bn2, self.conv2 = (
            nn.BatchNorm2d(WIDTH),
            conv3(stride),
            nn.BatchNorm2d(WIDTH),
            conv3(),
        )
        self.shortcut = nn.Conv2d(WIDTH, WIDTH, 1, stride, bias=False) if stride != 1 else None

    def forward(self, x):
        out = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = self.conv1(out)
        out = self.conv2(torch.relu(self.bn2(out)))
        return out + shortcut


class RegNet(nn.Module):
    """torchvision's: the projection first, and an addition that names no variable."""

    def __init__(self, stride=1):
        super().__init__()
        self.proj = (
            nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 1, stride, bias=False), nn.BatchNorm2d(WIDTH))
            if stride != 1
            else None
        )
        self.f = nn.Sequential(
            *(nn.Conv2d(WIDTH, WIDTH, 1), nn.BatchNorm2d(WIDTH), nn.ReLU(inplace=True)),
            *(conv3(stride, groups=2), nn.BatchNorm2d(WIDTH), nn.ReLU(inplace=True), Gate()),
            *(nn.Conv2d(WIDTH, WIDTH, 1), nn.BatchNorm2d(WIDTH)),
        )
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x):
        x = x + self.f(x) if self.proj is None else self.proj(x) + self.f(x)
        return self.activation(x)


def run():
    return nn.Sequential(
        conv3(), nn.BatchNorm2d(WIDTH), nn.ReLU(inplace=True), nn.MaxPool2d(2), conv3(), nn.BatchNorm2d(WIDTH)
    )


#: name -> how to make one with a stride.
BLOCKS = {
    "timm": TimmBasic,
    "timm_se": lambda stride=1: TimmBasic(stride, se=True, drop_path=DropPath(0.0)),
    "transformers": HuggingFaceBasic,
    "mmcv": MmBlock,
    "detectron2": Detectron2Bottleneck,
    "preactivation": PreActivation,
    "regnet": RegNet,
    "sequential": lambda stride=1: run(),
}
