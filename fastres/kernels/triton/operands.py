"""How matrix products read an activation: its rows are pixels of a channels_last tensor, and a batch norm with a ReLU
may stand before it, or the gradient of one, which then is never stored.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastres.kernels.triton.batch_norm import (
    NO_RELU,
    RECOMPUTED,
    coefficients,
    combine_gradient,
    normalise,
    reduce_gradient,
    vector,
)
from fastres.kernels.triton.launch import launch
from fastres.kernels.triton.tiles import rows_of

#: Of @triton.jit: arguments whose value does not matter to the code, so that it is not compiled again for each.
GEOMETRY = ("height", "width", "out_height", "out_width", "stride_h", "stride_w")


@dataclass(frozen=True)
class Sampling:
    """The pixels of an activation [height, width] that a 1x1 convolution with strides reads."""

    height: int
    width: int
    out_height: int
    out_width: int
    stride_h: int
    stride_w: int


#: What kernels get that read every pixel.
EVERY_PIXEL = Sampling(1, 1, 1, 1, 1, 1)


def sampling_of(x: tuple[int, ...], stride: tuple[int, int]) -> Sampling:
    """Of an activation [N, C, H, W]."""
    height, width = x[2:]
    out_height, out_width = ((size - 1) // step + 1 for size, step in zip((height, width), stride, strict=True))
    return Sampling(height, width, out_height, out_width, *stride)


def geometry(sampling: Sampling | None) -> dict[str, int]:
    """The arguments of kernels that are named in GEOMETRY."""
    sampling = sampling or EVERY_PIXEL
    return {field.name: getattr(sampling, field.name) for field in fields(sampling)}


@triton.jit
def sampled(row, height, width, out_height, out_width, stride_h, stride_w):
    """Pixels of the input under the pixels `row` of the output of a 1x1 convolution with strides."""
    line = row // out_width
    return (line // out_height * height + line % out_height * stride_h) * width + row % out_width * stride_w


@triton.jit
def norm_kernel(norm, mean, var, weight, bias, eps, channels, BLOCK: tl.constexpr):
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < channels
    near, scale, shift, _ = coefficients(mean, var, weight, bias, channel, inside, eps)
    tl.store(norm + channel, near, inside)
    tl.store(norm + channels + channel, scale, inside)
    tl.store(norm + 2 * channels + channel, shift, inside)


def norm_of(mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """A batch norm as products take it: fp32 [3, C], batch_norm(x) = (x - norm[0]) * norm[1] + norm[2].

    Made once, not by every program: the float64 arithmetic behind it would take longer than their products.
    """
    channels = mean.numel()
    norm = torch.empty((3, channels), dtype=torch.float32, device=mean.device)
    launch(
        norm_kernel,
        (triton.cdiv(channels, 128),),
        norm=norm,
        mean=mean,
        var=var,
        weight=vector(weight),
        bias=vector(bias),
        eps=eps,
        channels=channels,
        BLOCK=128,
    )
    return norm


@triton.jit
def normalised(x, norm, channel, channels):
    """The batch norm `norm` of a tile x [row, channel], in fp32: the bits of batch_norm.apply_kernel."""
    inside = channel < channels
    near = tl.load(norm + channel, inside, other=0.0)
    scale = tl.load(norm + channels + channel, inside, other=0.0)
    shift = tl.load(norm + 2 * channels + channel, inside, other=0.0)
    return normalise(x, near, scale, shift)


@triton.jit
def activated(x, norm, channel, channels):
    """relu(batch_norm(x)) of a tile, rounded as if it had been stored; 0 in channels that do not exist."""
    z = normalised(x, norm, channel, channels)
    return tl.where(z <= 0.0, 0.0, z).to(x.dtype)


@dataclass(frozen=True)
class NormGradient:
    """A batch norm, with a ReLU or without, whose gradient products take on the way.

    Attributes:
        raw: its input, dense in channels_last.
        coefficients: fp32 [6, C]: norm_of's three, and those of its gradient as combine_gradient_kernel leaves them.
    """

    raw: Tensor
    coefficients: Tensor


def norm_gradient_of(
    grad: Tensor,
    raw: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    training: bool,
    eps: float,
    relu: bool,
) -> tuple[NormGradient, Tensor, Tensor]:
    """What products need to take the gradient of batch norm's output as that of its input; grad_weight and grad_bias.

    Args:
        grad, raw: the gradient of act(batch_norm(raw)), and raw; both dense in channels_last.
    """
    cut = rows_of(raw)
    tensors = {"mean": mean, "var": var, "weight": vector(weight), "bias": vector(bias), "eps": eps}
    mode = RECOMPUTED if relu else NO_RELU
    partial = reduce_gradient({"grad": grad, "x": raw, "mask": None, **tensors}, cut, mode)
    grad_weight, grad_bias, factors = combine_gradient(partial, cut, tensors, training, True, True)
    assert factors is not None
    if relu:
        norm = norm_of(mean, var, weight, bias, eps)
    else:  # 0 * (x - mean) + 1, which is positive: all of the gradient passes
        near = mean.float()
        norm = torch.stack((near, torch.zeros_like(near), torch.ones_like(near)))
    return NormGradient(raw, torch.cat((norm, factors))), grad_weight, grad_bias


@triton.jit
def differentiated(g, raw, norm, exists, channel, channels):
    """The gradient of a tile of a batch norm's input, for the gradient g of its (and its ReLU's) output, rounded as if
    it had been stored: the bits of batch_norm.apply_gradient_kernel; 0 where nothing exists."""
    inside = channel < channels
    near = tl.load(norm + channel, inside, other=0.0)
    scale = tl.load(norm + channels + channel, inside, other=0.0)
    shift = tl.load(norm + 2 * channels + channel, inside, other=0.0)
    factor = tl.load(norm + 3 * channels + channel, inside, other=0.0)[None, :]
    constant = tl.load(norm + 4 * channels + channel, inside, other=0.0)[None, :]
    slope = tl.load(norm + 5 * channels + channel, inside, other=0.0)[None, :]
    values = raw.to(tl.float32)
    behind = tl.where(normalise(values, near, scale, shift) <= 0.0, 0.0, g.to(tl.float32))
    behind = (behind - constant) - slope * (values - near[None, :])
    return tl.where(exists, behind * factor, 0.0).to(g.dtype)


def precision() -> str:
    """How products of fp32 values are computed: TF32 where PyTorch's convolutions may."""
    cudnn: Any = torch.backends.cudnn  # mypy does not see its attribute `conv`
    return "tf32" if cudnn.conv.fp32_precision == "tf32" else "ieee"
