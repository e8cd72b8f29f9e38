"""The CUDA C++ kernels that make both passes of a batch norm in one launch (csrc/cuda/persistent.cu): arguments put
into the form they take, and why they do not serve a call.

They take channels_last activations of 8, 16, ... channels that fit into the shared memory of the whole device, and
batch statistics. Never measured: they serve where kernels/choices says so, or where they are forced.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastres import layout, reference
from fastres.kernels import aten, cuda

_WORD = 16  # bytes of an access


@cache
def _fits(device: int, dtype: torch.dtype, images: int, channels: int, pixels: int, backward: bool) -> bool:
    name = str(dtype).removeprefix("torch.")
    return torch.ops.fastres_cuda.fits_on_chip(device, name, images, channels, pixels, backward)


def _shape_why_not(x: Tensor, images: int, channels: int, pixels: int, backward: bool) -> str | None:
    """Of an activation on the device and of the dtype of x."""
    if channels % 8:
        return f"{channels} channels, no multiple of 8"
    device = x.device.index if x.is_cuda else 0
    if not _fits(device, x.dtype, images, channels, pixels, backward):
        return "larger than the memory on the chip"
    return None


def _activation_why_not(x: Tensor, training: bool, backward: bool) -> str | None:
    if not training:
        return "running statistics: one pass is enough"
    if not layout.is_channels_last(layout.dense(x)):
        return "not channels_last"  # of NCHW a block has one channel: a launch of all channels is too large
    images, channels, height, width = x.shape
    return _shape_why_not(x, images, channels, height * width, backward)


def why_not(x: Tensor, *args: Any) -> str | None:
    """Of bn_act."""
    return cuda.why_not(x) or _activation_why_not(x, args[5], False)


def backward_why_not(grad_y: Tensor, x: Tensor, *args: Any) -> str | None:
    """Of bn_act_backward."""
    training, need_x = args[5], args[8]
    return cuda.why_not(x) or ("no gradient of x" if not need_x else _activation_why_not(x, training, True))


def conv_bn_act_why_not(x: Tensor, conv_weight: Tensor, *args: Any) -> str | None:
    if reason := cuda.conv_bn_act_why_not(x, conv_weight):
        return reason
    stride, padding, dilation, _, training = args[6:11]
    if not training:
        return "running statistics: one pass is enough"
    if reference.conv_format(x, conv_weight) is not torch.channels_last:
        return "not channels_last"
    pixels = 1
    for i in range(2):
        kernel = dilation[i] * (conv_weight.shape[2 + i] - 1) + 1
        pixels *= (x.shape[2 + i] + 2 * padding[i] - kernel) // stride[i] + 1
    return _shape_why_not(x, x.shape[0], conv_weight.shape[0], pixels, False)


def conv_bn_act_backward_why_not(grad_y: Tensor, x: Tensor, conv_weight: Tensor, raw: Tensor, *args: Any) -> str | None:
    training, need = args[9], args[12:15]
    return cuda.why_not(raw) or (
        "no gradient of the convolution" if not any(need) else _activation_why_not(raw, training, True)
    )


def _aligned(t: Tensor) -> Tensor:
    """A channels_last activation in memory that is read 16 bytes at a time."""
    t = layout.like(t, True)
    return t if t.data_ptr() % _WORD == 0 else t.clone(memory_format=torch.preserve_format)


def _vector(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def bn_act(
    x: Tensor, weight: Any, bias: Any, mean: Any, var: Any, residual: Tensor | None, training: bool, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    residual = None if residual is None else _aligned(residual)
    return torch.ops.fastres_cuda.bn_act_persistent.default(
        _aligned(x), _vector(weight), _vector(bias), residual, *options
    )


def bn_act_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Any,
    bias: Any,
    mean: Tensor,
    var: Tensor,
    mask: Tensor | None,
    training: bool,
    eps: float,
    relu: bool,
    need_x: bool,
    need_affine: bool,
    need_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.ops.fastres_cuda.bn_act_persistent_backward.default(
        _aligned(grad_y.to(x.dtype)),
        _aligned(x),
        _vector(weight),
        _vector(bias),
        mean,
        var,
        mask,
        eps,
        relu,
        need_affine,
        need_residual,
    )


conv_bn_act = aten.conv_bn_act(bn_act)
conv_bn_act_backward = aten.conv_bn_act_backward(bn_act_backward)
