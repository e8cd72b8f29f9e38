"""Tensors for the tests of Triton's matrix products, and how their results are judged."""

import torch
import torch.nn.functional as F
from _triton import DEVICE

from fastres.testing import budget, relative_error

NHWC = torch.channels_last
#: Of an activation and the output channels of a 1x1 convolution: (images, channels, height, width, output channels).
SHAPES = [(2, 3, 5, 7, 17), (1, 17, 9, 8, 64), (2, 64, 9, 9, 65), (1, 65, 11, 12, 130), (1, 130, 6, 6, 3)]


def activation(n, c, h, w, dtype, *, mean=0.0, std=1.0):
    return (torch.randn(n, c, h, w) * std + mean).to(DEVICE, dtype).contiguous(memory_format=NHWC)


def matrix(k, c, dtype):
    return (torch.randn(k, c) / c**0.5).to(DEVICE, dtype)


def vector(c, *, positive=False):
    return (torch.rand(c) + 0.5 if positive else torch.randn(c)).to(DEVICE)


def conv(x, w, stride=(1, 1), **options):
    """A 1x1 convolution with the matrix w [K, C]."""
    return F.conv2d(x, w[:, :, None, None], stride=stride, **options)


def assert_as_exact(got, truth, witness, dtype, name="", **options):
    """That `got` is not off by more than twice what eager's `witness` is, or a few roundings."""
    error, limit = relative_error(got, truth), budget(relative_error(witness, truth), dtype, **options)
    assert error <= limit, f"{name}: error {error:.2e}, budget {limit:.2e}"
