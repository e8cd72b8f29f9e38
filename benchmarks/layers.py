"""The convolutions of the ResNets at 224 x 224: shape, what follows, and how often each occurs.

Every operator benchmark takes its shapes from here, so that a time can be weighted by what it is worth in a network.
"""

from __future__ import annotations

from dataclasses import dataclass

DEPTHS = (18, 34, 50, 101, 152)


@dataclass(frozen=True)
class Layer:
    """One convolution.

    Attributes:
        name: stage and role.
        c, h, w: channels, height and width of the input (N is the batch).
        k, r, stride: output channels, kernel size and stride; the padding is r // 2.
        then: what follows: "bn_relu", "bn_add_relu" (the end of a block), "bn" (a shortcut) or "bn_relu_maxpool" (the
            stem).
        counts: how often it occurs in ResNet-18, -34, -50, -101, -152.
    """

    name: str
    c: int
    h: int
    w: int
    k: int
    r: int
    stride: int
    then: str
    counts: tuple[int, int, int, int, int]

    @property
    def out(self) -> tuple[int, int, int]:
        """Channels, height and width of the output."""
        return self.k, -(-self.h // self.stride), -(-self.w // self.stride)

    @property
    def macs(self) -> int:
        """Multiply-adds for one image."""
        k, h, w = self.out
        return k * h * w * self.c * self.r * self.r

    def count(self, depth: int) -> int:
        """How often it occurs in the network of this depth."""
        return self.counts[DEPTHS.index(depth)]


def _layer(name: str, c: int, h: int, k: int, r: int, stride: int, then: str, *counts: int) -> Layer:
    n18, n34, n50, n101, n152 = counts
    return Layer(name, c, h, h, k, r, stride, then, (n18, n34, n50, n101, n152))


LAYERS = (
    #      name               C    H     K  R  s  then               18 34 50 101 152
    _layer("stem", 3, 224, 64, 7, 2, "bn_relu_maxpool", 1, 1, 1, 1, 1),
    # blocks of two 3x3 convolutions
    _layer("1.first", 64, 56, 64, 3, 1, "bn_relu", 2, 3, 0, 0, 0),
    _layer("1.second", 64, 56, 64, 3, 1, "bn_add_relu", 2, 3, 0, 0, 0),
    _layer("2.first_down", 64, 56, 128, 3, 2, "bn_relu", 1, 1, 0, 0, 0),
    _layer("2.first", 128, 28, 128, 3, 1, "bn_relu", 1, 3, 0, 0, 0),
    _layer("2.second", 128, 28, 128, 3, 1, "bn_add_relu", 2, 4, 0, 0, 0),
    _layer("2.shortcut", 64, 56, 128, 1, 2, "bn", 1, 1, 0, 0, 0),
    _layer("3.first_down", 128, 28, 256, 3, 2, "bn_relu", 1, 1, 0, 0, 0),
    _layer("3.first", 256, 14, 256, 3, 1, "bn_relu", 1, 5, 0, 0, 0),
    _layer("3.second", 256, 14, 256, 3, 1, "bn_add_relu", 2, 6, 0, 0, 0),
    _layer("3.shortcut", 128, 28, 256, 1, 2, "bn", 1, 1, 0, 0, 0),
    _layer("4.first_down", 256, 14, 512, 3, 2, "bn_relu", 1, 1, 0, 0, 0),
    _layer("4.first", 512, 7, 512, 3, 1, "bn_relu", 1, 2, 0, 0, 0),
    _layer("4.second", 512, 7, 512, 3, 1, "bn_add_relu", 2, 3, 0, 0, 0),
    _layer("4.shortcut", 256, 14, 512, 1, 2, "bn", 1, 1, 0, 0, 0),
    # bottlenecks: 1x1 reduce, 3x3 (with the stride), 1x1 expand
    _layer("1.reduce_in", 64, 56, 64, 1, 1, "bn_relu", 0, 0, 1, 1, 1),
    _layer("1.reduce", 256, 56, 64, 1, 1, "bn_relu", 0, 0, 2, 2, 2),
    _layer("1.middle", 64, 56, 64, 3, 1, "bn_relu", 0, 0, 3, 3, 3),
    _layer("1.expand", 64, 56, 256, 1, 1, "bn_add_relu", 0, 0, 3, 3, 3),
    _layer("1.shortcut", 64, 56, 256, 1, 1, "bn", 0, 0, 1, 1, 1),
    _layer("2.reduce_in", 256, 56, 128, 1, 1, "bn_relu", 0, 0, 1, 1, 1),
    _layer("2.reduce", 512, 28, 128, 1, 1, "bn_relu", 0, 0, 3, 3, 7),
    _layer("2.middle_down", 128, 56, 128, 3, 2, "bn_relu", 0, 0, 1, 1, 1),
    _layer("2.middle", 128, 28, 128, 3, 1, "bn_relu", 0, 0, 3, 3, 7),
    _layer("2.expand", 128, 28, 512, 1, 1, "bn_add_relu", 0, 0, 4, 4, 8),
    _layer("2.shortcut", 256, 56, 512, 1, 2, "bn", 0, 0, 1, 1, 1),
    _layer("3.reduce_in", 512, 28, 256, 1, 1, "bn_relu", 0, 0, 1, 1, 1),
    _layer("3.reduce", 1024, 14, 256, 1, 1, "bn_relu", 0, 0, 5, 22, 35),
    _layer("3.middle_down", 256, 28, 256, 3, 2, "bn_relu", 0, 0, 1, 1, 1),
    _layer("3.middle", 256, 14, 256, 3, 1, "bn_relu", 0, 0, 5, 22, 35),
    _layer("3.expand", 256, 14, 1024, 1, 1, "bn_add_relu", 0, 0, 6, 23, 36),
    _layer("3.shortcut", 512, 28, 1024, 1, 2, "bn", 0, 0, 1, 1, 1),
    _layer("4.reduce_in", 1024, 14, 512, 1, 1, "bn_relu", 0, 0, 1, 1, 1),
    _layer("4.reduce", 2048, 7, 512, 1, 1, "bn_relu", 0, 0, 2, 2, 2),
    _layer("4.middle_down", 512, 14, 512, 3, 2, "bn_relu", 0, 0, 1, 1, 1),
    _layer("4.middle", 512, 7, 512, 3, 1, "bn_relu", 0, 0, 2, 2, 2),
    _layer("4.expand", 512, 7, 2048, 1, 1, "bn_add_relu", 0, 0, 3, 3, 3),
    _layer("4.shortcut", 1024, 14, 2048, 1, 2, "bn", 0, 0, 1, 1, 1),
)


def layers(depth: int) -> list[Layer]:
    """The convolutions of ResNet-`depth`, each once; `Layer.count` says how often it occurs."""
    return [layer for layer in LAYERS if layer.count(depth)]


def activations(depth: int, then: str) -> dict[tuple[int, int, int], int]:
    """Outputs (channels, height, width) after which `then` follows, with the number of times in ResNet-`depth`; large
    ones first."""
    found: dict[tuple[int, int, int], int] = {}
    for layer in layers(depth):
        if layer.then == then:
            found[layer.out] = found.get(layer.out, 0) + layer.count(depth)
    return dict(sorted(found.items(), key=lambda item: -item[0][0] * item[0][1] * item[0][2]))
