"""Memory layout of activations, as every op, kernel and test sees it.

A dense 4-D activation is a list of *runs* of contiguous values: N*H*W runs of C values in channels_last, N*C runs of
H*W values otherwise. A 1-bit mask has one row a run, so that rows start at a byte of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor


def memory_format(x: Tensor) -> torch.memory_format:
    """The format ATen chooses for an output made like `x` (c10's suggest_memory_format)."""
    return torch._prims_common.suggest_memory_format(x)


def dense(x: Tensor) -> Tensor:
    """`x` itself if it is dense in NCHW or NHWC order, else a dense copy in the order eager would use."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous(memory_format=memory_format(x))


def is_channels_last(x: Tensor) -> bool:
    """True if a dense `x` is to be read as N*H*W runs of C values."""
    return x.shape[1] > 1 and x.is_contiguous(memory_format=torch.channels_last)


def like(x: Tensor, channels_last: bool) -> Tensor:
    """`x`, copied if it is not dense in the given order."""
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def plain(weight: Tensor) -> Tensor:
    """`weight`, copied if its strides are not those of a new tensor in NCHW or NHWC order.

    They may differ where a size is 1 although the tensor is dense: oneDNN then computes wrong values (PyTorch 2.13).
    """
    _, c, h, w = weight.shape
    if weight.stride() in ((c * h * w, h * w, w, 1), (c * h * w, 1, w * c, c)):
        return weight
    return weight.clone(memory_format=memory_format(weight))


def in_format(x: Tensor, order: torch.memory_format) -> Tensor:
    """`x` dense in the given order; where NCHW and NHWC are the same (one channel, or 1x1 maps), with NCHW strides, as
    eager's."""
    x = x.contiguous(memory_format=order)
    return x.view(-1).view(x.shape) if x.is_contiguous() else x


def mask_bytes(x: Tensor) -> int:
    """Size of the 1-bit mask of a dense `x`."""
    n, c, h, w = x.shape
    return n * h * w * ((c + 7) // 8) if is_channels_last(x) else n * c * ((h * w + 7) // 8)


def pack_mask(keep: Tensor, channels_last: bool) -> Tensor:
    """Packs a boolean [N, C, H, W] tensor into bits, value 0 of a run in bit 0 of its first byte."""
    n, c, h, w = keep.shape
    runs = keep.permute(0, 2, 3, 1).reshape(n * h * w, c) if channels_last else keep.reshape(n * c, h * w)
    runs = torch.nn.functional.pad(runs, (0, -runs.shape[1] % 8))
    runs = runs.reshape(runs.shape[0], runs.shape[1] // 8, 8)
    bit = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=keep.device)
    return (runs * bit).sum(-1, dtype=torch.uint8).flatten()


def unpack_mask(mask: Tensor, shape: torch.Size, channels_last: bool) -> Tensor:
    """The boolean [N, C, H, W] tensor that `pack_mask` packed."""
    n, c, h, w = shape
    runs, length = (n * h * w, c) if channels_last else (n * c, h * w)
    bit = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=mask.device)
    size = (length + 7) // 8
    keep = (mask.reshape(runs, size, 1).bitwise_and(bit) != 0).reshape(runs, size * 8)[:, :length]
    return keep.reshape(n, h, w, c).permute(0, 3, 1, 2) if channels_last else keep.reshape(n, c, h, w)
