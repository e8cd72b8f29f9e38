"""bn_act_maxpool and its backward in Triton: the normalised activation is never written.

Forward reads each value of x for every window over it, mostly from the cache. Backward collects the gradient of a pixel
from the windows over it whose byte says that the pixel was their maximum; twice, once to reduce and once to apply, for
that costs a quarter of writing it and reading it again.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastres import layout
from fastres.kernels.triton import batch_norm
from fastres.kernels.triton.batch_norm import coefficients, normalise
from fastres.kernels.triton.launch import launch
from fastres.kernels.triton.statistics import moments
from fastres.kernels.triton.tiles import Rows, rows_of, tiles_of


@triton.jit
def place_of(image, pixel, channel, pixels, channels, CHANNELS_LAST: tl.constexpr):
    """Offset of [image, :, pixel] and [channel] in an activation with so many pixels an image."""
    if CHANNELS_LAST:
        return (image.to(tl.int64) * pixels + pixel) * channels + channel
    else:
        return (image.to(tl.int64) * channels + channel) * pixels + pixel


@triton.jit
def maxpool_kernel(
    x,
    y,
    index,
    mean,
    var,
    weight,
    bias,
    eps,
    rows,  # output pixels of all images
    channels,
    height,
    width,
    out_height,
    out_width,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    RELU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """y = max over a window of act(batch_norm(x)), index = its place in the window; NaN is the largest."""
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    near, scale, shift, _ = coefficients(mean, var, weight, bias, channel, channel < channels, eps)
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    out_pixels = out_height * out_width
    image, out_pixel = row // out_pixels, (row % out_pixels).to(tl.int32)
    top, left = (out_pixel // out_width) * STRIDE - PADDING, (out_pixel % out_width) * STRIDE - PADDING
    inside = (row < rows)[:, None] & (channel < channels)[None, :]
    best = tl.full((BLOCK_ROWS, BLOCK_CHANNELS), float("-inf"), tl.float32)
    first = tl.maximum(-top, 0) * KERNEL + tl.maximum(-left, 0)
    where = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), tl.int32) + first[:, None]
    for i in range(
        KERNEL
    ):  # a loop: unrolled, all rows of the window would be on their way at once, and registers spill
        for j in tl.static_range(KERNEL):
            h, w = top + i, left + j
            exists = ((h >= 0) & (h < height) & (w >= 0) & (w < width))[:, None] & inside
            offset = place_of(
                image[:, None], (h * width + w)[:, None], channel[None, :], height * width, channels, CHANNELS_LAST
            )
            z = normalise(tl.load(x + offset, exists, other=0.0), near, scale, shift)
            if RELU:
                z = tl.where(z <= 0.0, 0.0, z)
            larger = exists & ((z > best) | (z != z))
            best = tl.where(larger, z, best)
            where = tl.where(larger, i * KERNEL + j, where)
    offset = place_of(image[:, None], out_pixel[:, None], channel[None, :], out_pixels, channels, CHANNELS_LAST)
    tl.store(y + offset, best.to(y.dtype.element_ty), inside)
    tl.store(index + offset, where.to(tl.uint8), inside)


@triton.jit
def pooled_gradient(
    grad,
    index,
    image,
    h,
    w,
    channel,
    inside,
    channels,
    out_height,
    out_width,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """The gradient of a tile of pixels (h, w): of the windows over it those that it is the maximum of."""
    g = tl.zeros(inside.shape, tl.float32)
    last_h, last_w = (h + PADDING) // STRIDE, (w + PADDING) // STRIDE
    for i in tl.static_range((KERNEL + STRIDE - 1) // STRIDE):
        for j in tl.static_range((KERNEL + STRIDE - 1) // STRIDE):
            out_h, out_w = last_h - i, last_w - j
            place_h, place_w = h + PADDING - out_h * STRIDE, w + PADDING - out_w * STRIDE
            covers = (out_h >= 0) & (out_h < out_height) & (place_h < KERNEL)
            covers = covers & (out_w >= 0) & (out_w < out_width) & (place_w < KERNEL)
            exists = covers[:, None] & inside
            offset = place_of(
                image[:, None],
                (out_h * out_width + out_w)[:, None],
                channel[None, :],
                out_height * out_width,
                channels,
                CHANNELS_LAST,
            )
            chosen = tl.load(index + offset, exists, other=255).to(tl.int32) == (place_h * KERNEL + place_w)[:, None]
            g += tl.where(exists & chosen, tl.load(grad + offset, exists, other=0.0).to(tl.float32), 0.0)
    return g


@triton.jit
def reduce_pooled_gradient_kernel(
    grad,
    index,
    x,
    mean,
    var,
    weight,
    bias,
    eps,
    partial,  # as reduce_gradient_kernel's
    rows,  # pixels of all images
    channels,
    height,
    width,
    out_height,
    out_width,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    RELU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    near, scale, shift, _ = coefficients(mean, var, weight, bias, channel, channel < channels, eps)
    sums = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), tl.float32)
    products = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), tl.float32)
    pixels = height * width
    for turn in range(program, tiles_of(rows, BLOCK_ROWS), programs):
        row = tl.cast(turn, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        inside = (row < rows)[:, None] & (channel < channels)[None, :]
        image, pixel = row // pixels, (row % pixels).to(tl.int32)
        h, w = pixel // width, pixel % width
        g = pooled_gradient(
            grad, index, image, h, w, channel, inside, channels, out_height, out_width, KERNEL, STRIDE, PADDING,
            CHANNELS_LAST,
        )  # fmt: skip
        offset = place_of(image[:, None], pixel[:, None], channel[None, :], pixels, channels, CHANNELS_LAST)
        values = tl.load(x + offset, inside, other=0.0).to(tl.float32)
        if RELU:
            g = tl.where(normalise(values, near, scale, shift) <= 0.0, 0.0, g)
        sums += g
        products += tl.where(inside, g * (values - near[None, :]), 0.0)
    place = partial + program.to(tl.int64) * channels + channel
    tl.store(place, tl.sum(sums, axis=0), channel < channels)
    tl.store(place + programs.to(tl.int64) * channels, tl.sum(products, axis=0), channel < channels)


@triton.jit
def apply_pooled_gradient_kernel(
    grad,
    index,
    x,
    mean,
    var,
    weight,
    bias,
    eps,
    factors,  # as apply_gradient_kernel's
    grad_x,
    rows,
    channels,
    height,
    width,
    out_height,
    out_width,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    TRAINING: tl.constexpr,
    RELU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    near, scale, shift, _ = coefficients(mean, var, weight, bias, channel, channel < channels, eps)
    factor = tl.load(factors + channel, channel < channels, other=0.0)[None, :]
    constant = tl.load(factors + channels + channel, channel < channels, other=0.0)[None, :]
    slope = tl.load(factors + 2 * channels + channel, channel < channels, other=0.0)[None, :]
    pixels = height * width
    tiles = tiles_of(rows, BLOCK_ROWS)
    for turn in range(program, tiles, programs):
        row = tl.cast(tiles - 1 - turn, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        inside = (row < rows)[:, None] & (channel < channels)[None, :]
        image, pixel = row // pixels, (row % pixels).to(tl.int32)
        h, w = pixel // width, pixel % width
        g = pooled_gradient(
            grad, index, image, h, w, channel, inside, channels, out_height, out_width, KERNEL, STRIDE, PADDING,
            CHANNELS_LAST,
        )  # fmt: skip
        offset = place_of(image[:, None], pixel[:, None], channel[None, :], pixels, channels, CHANNELS_LAST)
        values = g
        if TRAINING or RELU:
            values = tl.load(x + offset, inside, other=0.0).to(tl.float32)
        if RELU:
            g = tl.where(normalise(values, near, scale, shift) <= 0.0, 0.0, g)
        if TRAINING:
            g = (g - constant) - slope * (values - near[None, :])
        tl.store(grad_x + offset, (g * factor).to(grad_x.dtype.element_ty), inside)


def _window(x: Tensor, out: Tensor, kernel: int, stride: int, padding: int) -> dict[str, int]:
    """What all kernels here take of the two activations and the windows."""
    return {
        "channels": x.shape[1],
        "height": x.shape[2],
        "width": x.shape[3],
        "out_height": out.shape[2],
        "out_width": out.shape[3],
        "KERNEL": kernel,
        "STRIDE": stride,
        "PADDING": padding,
    }


def _blocks(cut: Rows, values: int) -> dict[str, Any]:
    """A tile of so many values at most."""
    rows = max(1, min(cut.block_rows, values // cut.block_channels))
    return {"CHANNELS_LAST": cut.channels_last, "BLOCK_ROWS": rows, "BLOCK_CHANNELS": cut.block_channels}


def bn_act_maxpool(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    eps: float,
    relu: bool,
    kernel: int,
    stride: int,
    padding: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = layout.dense(x)
    n, c, h, w = x.shape
    cut = rows_of(x)
    mean, var = moments(x, cut, running_mean, running_var, training)
    size = tuple((extent + 2 * padding - kernel) // stride + 1 for extent in (h, w))
    order = torch.channels_last if cut.channels_last else torch.contiguous_format
    y = torch.empty((n, c, *size), dtype=x.dtype, device=x.device, memory_format=order)
    index = torch.empty_like(y, dtype=torch.uint8)
    blocks = _blocks(cut, 2048)
    rows = n * size[0] * size[1]
    launch(
        maxpool_kernel,
        (triton.cdiv(rows, blocks["BLOCK_ROWS"]), triton.cdiv(c, blocks["BLOCK_CHANNELS"])),
        x=x,
        y=y,
        index=index,
        mean=mean,
        var=var,
        weight=batch_norm.vector(weight),
        bias=batch_norm.vector(bias),
        eps=eps,
        rows=rows,
        RELU=relu,
        **_window(x, y, kernel, stride, padding),
        **blocks,
    )
    return y, mean, var, index


def bn_act_maxpool_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    index: Tensor,
    training: bool,
    eps: float,
    relu: bool,
    kernel: int,
    stride: int,
    padding: int,
    need_x: bool,
    need_affine: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    x = layout.dense(x)
    cut = replace(rows_of(x), rows=x.numel() // x.shape[1])
    tensors: dict[str, Any] = {
        "grad": layout.like(grad_y.to(x.dtype), cut.channels_last),
        "index": layout.like(index, cut.channels_last),
        "x": x,
        "mean": mean,
        "var": var,
        "weight": batch_norm.vector(weight),
        "bias": batch_norm.vector(bias),
        "eps": eps,
    }
    blocks = _blocks(cut, 2048)
    programs = min(triton.cdiv(cut.rows, blocks["BLOCK_ROWS"]), 2 * cut.programs)
    grid = (programs, triton.cdiv(cut.channels, cut.block_channels))
    arguments = {"rows": cut.rows, "RELU": relu, **_window(x, grad_y, kernel, stride, padding), **blocks}
    partial = torch.empty((2, programs, cut.channels), dtype=torch.float32, device=x.device)
    launch(reduce_pooled_gradient_kernel, grid, **tensors, partial=partial, **arguments)
    grad_weight, grad_bias, factors = batch_norm.combine_gradient(partial, cut, tensors, training, need_x, need_affine)
    if not need_x:
        return x.new_empty(0), grad_weight, grad_bias
    grad_x = torch.empty_like(x)
    launch(
        apply_pooled_gradient_kernel,
        grid,
        **tensors,
        factors=factors,
        grad_x=grad_x,
        TRAINING=training,
        **arguments,
    )
    return grad_x, grad_weight, grad_bias
