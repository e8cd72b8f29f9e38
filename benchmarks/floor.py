"""What a convolution needs, and what the processor can do: the arithmetic behind the table of layers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import log2
from typing import NamedTuple

import torch
from torch import nn

from fastres import models

METHODS = {
    0: "oneDNN",
    1: "product",
    2: "F(4x4)",
    3: "F(2x2)",
    4: "groups",
    5: "rows",
}  # of kernels.convolution; 0: not ours


class Shape(NamedTuple):
    """A square convolution with padding r // 2: c channels of h x h to k channels, kernel r x r."""

    c: int
    h: int
    k: int
    r: int
    stride: int
    groups: int

    def __str__(self) -> str:
        groups = f", {self.groups} groups" if self.groups > 1 else ""
        return f"{self.r}x{self.r}/{self.stride} {self.c}-{self.k} at {self.h}{groups}"


class Layer(NamedTuple):
    """A shape, the first convolution that has it, and how often it occurs in each network."""

    shape: Shape
    name: str
    counts: dict[str, int]


class Work(NamedTuple):
    """What one call of a layer needs: its method, FLOP of the direct algorithm and of the method, bytes."""

    method: str
    direct_flops: int
    method_flops: int
    bytes: int


class Ceilings(NamedTuple):
    """What the processor can do: FLOP/s of a matrix product, bytes/s of copies by the bytes that they move."""

    flops: float
    bandwidth: dict[int, float]

    def floor(self, work: Work) -> tuple[float, str]:
        """Seconds that the work needs at least, and what says so: "compute" or "memory"."""
        times = {"compute": work.method_flops / self.flops, "memory": work.bytes / self.bandwidth_at(work.bytes)}
        limit = max(times, key=lambda name: times[name])
        return times[limit], limit

    def bandwidth_at(self, size: int) -> float:
        """Between the measured sizes, interpolated over the logarithm of the size."""
        known = sorted(self.bandwidth)
        if size <= known[0] or size >= known[-1]:
            return self.bandwidth[known[0] if size <= known[0] else known[-1]]
        above = next(i for i, bytes_ in enumerate(known) if bytes_ > size)
        low, high = known[above - 1], known[above]
        share = log2(size / low) / log2(high / low)
        return self.bandwidth[low] * (1 - share) + self.bandwidth[high] * share


def layers_of(networks: Sequence[str], size: int = 224) -> list[Layer]:
    """The convolutions of networks for images of `size`, each shape once, in the order in which they first occur.

    Raises:
        UserError: for an unknown network.
    """
    found: dict[Shape, Layer] = {}
    for network in networks:
        with torch.device("meta"):
            model = models.create_model(network, fused=False).eval()
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(partial(_count, found, network, name))
        model(torch.empty(1, 3, size, size, device="meta"))
    return list(found.values())


def _count(
    found: dict[Shape, Layer], network: str, name: str, conv: nn.Conv2d, args: tuple[torch.Tensor], out: torch.Tensor
) -> None:
    """Forward hook of one convolution."""
    c, h = args[0].shape[1:3]
    shape = Shape(c, h, conv.out_channels, conv.kernel_size[0], conv.stride[0], conv.groups)
    counts = found.setdefault(shape, Layer(shape, f"{network} {name}", {})).counts
    counts[network] = counts.get(network, 0) + 1


def work(shape: Shape, batch: int, method: int, itemsize: int = 4) -> Work:
    """What one call needs, by the method of kernels.convolution with this number; itemsize: bytes of a value."""
    c, h, k, r, stride, groups = shape
    out = -(-h // stride)
    multiplications = direct = batch * out * out * c // groups * k * r * r
    weights = k * c // groups * r * r
    name = METHODS.get(method, f"method {method}")
    tile = {"F(4x4)": 4, "F(2x2)": 2}.get(name)
    if tile:
        weights = c * k * (tile + 2) ** 2
        multiplications = batch * (-(-out // tile)) ** 2 * weights
    if name == "rows":  # F(4, 7) with stride 2 along the rows of outputs
        weights = 13 * c * k * r
        multiplications = batch * out * -(-out // 4) * weights
    moved = itemsize * (batch * h * h * c + batch * out * out * k + weights)
    return Work(name, 2 * direct, 2 * multiplications, moved)
