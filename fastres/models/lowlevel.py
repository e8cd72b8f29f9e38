"""Residual networks by hand: F.conv2d, batch norm written out, parameters in a dict, no nn.Module. Read it from top to
bottom; the other files of this package say the same in modules, and the tests hold the two against each other.

    net = Architecture(block="basic", layers=(3, 3, 3), small_images=True, num_classes=10)     # ResNet-20
    state = initial_state(net)                             # names and shapes are those of the module's state_dict
    logits = forward(net, state, images, training=True)    # also updates the running statistics in `state`
    gradients = torch.autograd.grad(loss(logits), [state[name] for name in parameters(state)])

The names of the tensors (`layer1.0.conv2.weight`) are torchvision's, so `forward(net, model.state_dict(), images)` runs
the weights of any model of fastres.models, ResNeXt and Wide ResNet included.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Architecture", "forward", "initial_state", "parameters", "sgd_step_"]

State = dict[str, Tensor]

MOMENTUM = 0.1  # of the running statistics
EPS = 1e-5
#: What batch norm remembers between batches; everything else is learned.
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class Architecture:
    """Which network it is. The defaults are ResNet-50 as in torchvision.

    Attributes:
        block: "basic" (two 3x3 convolutions) or "bottleneck" (1x1, 3x3, 1x1).
        layers: blocks in each stage.
        version: "v1" (post-activation, stride in the first 1x1), "v1.5" (stride in the 3x3), "v2" (pre-activation,
            stride in the 3x3) or "plain" (no shortcuts).
        shortcut: "A" (zero padding), "B" (projections where sizes change) or "C" (projections everywhere).
        small_images: the stem and the widths for CIFAR: a 3x3 convolution; stages of 16, 32, 64 channels. Otherwise a
            7x7 convolution with stride 2 and max-pooling; stages of 64, 128, 256, 512 channels.
        num_classes: number of logits.
    """

    block: str = "bottleneck"
    layers: tuple[int, ...] = (3, 4, 6, 3)
    version: str = "v1.5"
    shortcut: str = "B"
    small_images: bool = False
    num_classes: int = 1000

    @property
    def expansion(self) -> int:
        """Channels of a block's output for each of its 3x3 convolution's."""
        return 4 if self.block == "bottleneck" else 1


# Layers --------------------------------------------------------------------------------------------------------------


def conv(x: Tensor, state: State, name: str, stride: int = 1) -> Tensor:
    """A convolution without bias that keeps the size but for the stride: padding k // 2."""
    weight = state[f"{name}.weight"]  # [out, in / groups, k, k]
    return F.conv2d(x, weight, stride=stride, padding=weight.shape[2] // 2, groups=x.shape[1] // weight.shape[1])


def batch_norm(x: Tensor, state: State, name: str, training: bool) -> Tensor:
    """weight * (x - mean) / sqrt(var + eps) + bias, for each channel of x [N, C, H, W].

    In training mean and (biased) variance are those of the batch, and the running ones move towards them, with the
    unbiased variance; otherwise they are the running ones (Ioffe and Szegedy 2015, arXiv 1502.03167).
    """
    if training:
        count = x.numel() // x.shape[1]
        mean = x.sum((0, 2, 3)) / count
        var = (x - mean[:, None, None]).square().sum((0, 2, 3)) / count
        with torch.no_grad():
            state[f"{name}.running_mean"].mul_(1 - MOMENTUM).add_(MOMENTUM * mean)
            state[f"{name}.running_var"].mul_(1 - MOMENTUM).add_(MOMENTUM * var * count / (count - 1))
            state[f"{name}.num_batches_tracked"].add_(1)
    else:
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    x_hat = (x - mean[:, None, None]) / torch.sqrt(var + EPS)[:, None, None]
    return state[f"{name}.weight"][:, None, None] * x_hat + state[f"{name}.bias"][:, None, None]


def relu(x: Tensor) -> Tensor:
    """max(x, 0), with gradient 0 at 0; NaN passes."""
    return torch.where(x <= 0, 0, x)


# Shortcuts and blocks ------------------------------------------------------------------------------------------------


def zero_pad(x: Tensor, channels: int, stride: int) -> Tensor:
    """Option A: every stride-th pixel, and zeros for the channels that x lacks."""
    x = x[:, :, ::stride, ::stride]
    n, c, h, w = x.shape
    return torch.cat([x, x.new_zeros(n, channels - c, h, w)], dim=1)


def shortcut(net: Architecture, x: Tensor, state: State, name: str, channels: int, stride: int, train: bool) -> Tensor:
    """W_s x of the paper's equation 2: the identity, zero padding or a projection."""
    changes = stride != 1 or x.shape[1] != channels
    if net.shortcut != "C" and not changes:
        return x
    if net.shortcut == "A":
        return zero_pad(x, channels, stride)
    if net.version == "v2":
        return conv(x, state, f"{name}.downsample", stride)
    return batch_norm(conv(x, state, f"{name}.downsample.0", stride), state, f"{name}.downsample.1", train)


def strides(net: Architecture, stride: int) -> tuple[int, ...]:
    """The stride of each convolution of a block."""
    if net.block == "basic":
        return stride, 1
    return (stride, 1, 1) if net.version == "v1" else (1, stride, 1)


def post_activation(
    net: Architecture, x: Tensor, state: State, name: str, channels: int, stride: int, train: bool
) -> Tensor:
    """v1, v1.5 and plain: conv, batch norm, ReLU, ...; the shortcut is added before the last ReLU."""
    y = x
    for i, s in enumerate(strides(net, stride), 1):
        y = batch_norm(conv(y, state, f"{name}.conv{i}", s), state, f"{name}.bn{i}", train)
        if i < len(strides(net, stride)):
            y = relu(y)
    if net.version != "plain":
        y = y + shortcut(net, x, state, name, channels, stride, train)
    return relu(y)


def pre_activation(
    net: Architecture, x: Tensor, state: State, name: str, channels: int, stride: int, train: bool
) -> Tensor:
    """v2: batch norm, ReLU, conv, ...; nothing follows the addition. The network's first block has no bn1: what it gets
    is activated already. A shortcut that is not the identity starts from the activation too."""
    first = f"{name}.bn1.weight" not in state
    activated = x if first else relu(batch_norm(x, state, f"{name}.bn1", train))
    y = activated
    for i, s in enumerate(strides(net, stride), 1):
        if i > 1:
            y = relu(batch_norm(y, state, f"{name}.bn{i}", train))
        y = conv(y, state, f"{name}.conv{i}", s)
    identity = net.shortcut != "C" and stride == 1 and x.shape[1] == channels
    return y + (x if identity else shortcut(net, activated, state, name, channels, stride, train))


# The network ---------------------------------------------------------------------------------------------------------


def stages(net: Architecture) -> Iterable[tuple[str, int, int]]:
    """Name, channels of the 3x3 convolutions and stride of every block, in order."""
    width = 16 if net.small_images else 64
    for stage, blocks in enumerate(net.layers):
        for i in range(blocks):
            yield f"layer{stage + 1}.{i}", width * 2**stage, 2 if stage > 0 and i == 0 else 1


def forward(net: Architecture, state: State, x: Tensor, training: bool = False) -> Tensor:
    """Logits [N, num_classes] of images [N, 3, H, W].

    training: use the statistics of this batch, and update the running ones, which are part of `state`, in place.
    """
    if net.small_images:
        x = relu(batch_norm(conv(x, state, "conv1"), state, "bn1", training))
    else:
        x = relu(batch_norm(conv(x, state, "conv1", stride=2), state, "bn1", training))
        x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
    block = pre_activation if net.version == "v2" else post_activation
    for name, width, stride in stages(net):
        x = block(net, x, state, name, width * net.expansion, stride, training)
    if net.version == "v2":
        x = relu(batch_norm(x, state, "norm.bn", training))
    x = x.mean((2, 3))
    return x @ state["fc.weight"].T + state["fc.bias"]


# Parameters ----------------------------------------------------------------------------------------------------------


def initial_state(net: Architecture, seed: int = 0) -> State:
    """Random weights: convolutions normal with standard deviation sqrt(2 / (out * k * k)) (He et al. 2015, arXiv
    1502.01852), batch norm 1 and 0, the linear layer uniform within 1 / sqrt(in). float32, parameters with gradients.
    """
    generator = torch.Generator().manual_seed(seed)
    state: State = {}

    def add_conv(name: str, c_in: int, c_out: int, k: int) -> None:
        weight = torch.randn(c_out, c_in, k, k, generator=generator)
        state[f"{name}.weight"] = weight * (2 / (c_out * k * k)) ** 0.5

    def add_batch_norm(name: str, c: int) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = torch.ones(c), torch.zeros(c)
        state[f"{name}.running_mean"], state[f"{name}.running_var"] = torch.zeros(c), torch.ones(c)
        state[f"{name}.num_batches_tracked"] = torch.tensor(0)

    c_in = 16 if net.small_images else 64
    add_conv("conv1", 3, c_in, 3 if net.small_images else 7)
    add_batch_norm("bn1", c_in)
    for name, width, stride in stages(net):
        c_out = width * net.expansion
        kernels, widths = ((3, 3), (width, width)) if net.block == "basic" else ((1, 3, 1), (width, width, c_out))
        c = c_in
        for i, (k, w) in enumerate(zip(kernels, widths, strict=True), 1):
            if net.version != "v2":
                add_batch_norm(f"{name}.bn{i}", w)
            elif (name, i) != ("layer1.0", 1):
                add_batch_norm(f"{name}.bn{i}", c)
            add_conv(f"{name}.conv{i}", c, w, k)
            c = w
        changes = stride != 1 or c_in != c_out
        if net.version != "plain" and (net.shortcut == "C" or (net.shortcut == "B" and changes)):
            projection = f"{name}.downsample" if net.version == "v2" else f"{name}.downsample.0"
            add_conv(projection, c_in, c_out, 1)
            if net.version != "v2":
                add_batch_norm(f"{name}.downsample.1", c_out)
        c_in = c_out
    if net.version == "v2":
        add_batch_norm("norm.bn", c_in)
    bound = c_in**-0.5
    state["fc.weight"] = (2 * torch.rand(net.num_classes, c_in, generator=generator) - 1) * bound
    state["fc.bias"] = (2 * torch.rand(net.num_classes, generator=generator) - 1) * bound
    for name in parameters(state):
        state[name].requires_grad_()
    return state


def parameters(state: State) -> list[str]:
    """The names of what is learned."""
    return [name for name in state if not name.endswith(STATISTICS)]


@torch.no_grad()
def sgd_step_(
    state: State, gradients: State, velocity: State, lr: float, momentum: float = 0.9, weight_decay: float = 1e-4
) -> None:
    """One step of stochastic gradient descent, in place: v = momentum * v + g + weight_decay * w; w = w - lr * v.

    Args:
        gradients: of every parameter, by name. velocity: v of every parameter; empty before the first step.
    """
    for name, g in gradients.items():
        step = g + weight_decay * state[name]
        velocity[name] = velocity[name] * momentum + step if name in velocity else step
        state[name] -= lr * velocity[name]
