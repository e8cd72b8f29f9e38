"""Convolutions of any window as one matrix product (implicit GEMM), for channels_last activations.

A row of A is a pixel of the output; its depth are the channels of the pixels under the window, tap by tap, read where
they are. Padding is 0 behind the batch norm and ReLU that may stand before the convolution, as in fastres/reference.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastres import layout
from fastres.kernels.triton.launch import launch
from fastres.kernels.triton.operands import GEOMETRY, activated, precision
from fastres.kernels.triton.product import finished, store_statistics, tuned
from fastres.kernels.triton.statistics import combine_statistics
from fastres.kernels.triton.tiles import tiles_of


@triton.jit(do_not_specialize=(*GEOMETRY, "padding_h", "padding_w", "dilation_h", "dilation_w"))
def convolution_kernel(
    x,
    norm,
    weight,  # [columns, KERNEL_H, KERNEL_W, depth]
    out,
    bias,
    residual,
    partial,  # as of product.product_kernel
    rows,
    columns,
    depth,
    height,
    width,
    out_height,
    out_width,
    stride_h,
    stride_w,
    padding_h,
    padding_w,
    dilation_h,
    dilation_w,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """One tile. Programs of the same rows follow each other, so that x is read from memory once."""
    column_tiles = tl.cdiv(columns, BLOCK_COLUMNS)
    program = tl.program_id(0) // column_tiles
    column = tl.program_id(0) % column_tiles * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    first = tl.cast(program, tl.int64) * BLOCK_ROWS
    row = tl.arange(0, BLOCK_ROWS)
    count = tl.minimum(rows - first, BLOCK_ROWS).to(tl.int32)
    line = (first + row) // out_width
    top = (line % out_height).to(tl.int32) * stride_h - padding_h
    left = ((first + row) % out_width).to(tl.int32) * stride_w - padding_w
    image = x + line // out_height * height * width * depth
    channel = tl.arange(0, BLOCK_DEPTH)
    factors = weight + column[None, :] * (KERNEL_H * KERNEL_W * depth) + channel[:, None]
    steps = tl.cdiv(depth, BLOCK_DEPTH)
    sums = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for step in range(0, KERNEL_H * KERNEL_W * steps):
        tap, start = step // steps, step % steps * BLOCK_DEPTH
        line_in, place_in = top + tap // KERNEL_W * dilation_h, left + tap % KERNEL_W * dilation_w
        real = (row < count) & (line_in >= 0) & (line_in < height) & (place_in >= 0) & (place_in < width)
        inside = channel < depth - start
        exists = real[:, None] & inside[None, :]
        place = (image + (line_in.to(tl.int64) * width + place_in) * depth)[:, None] + (start + channel)[None, :]
        values = tl.load(place, exists, other=0.0)
        if norm is not None:
            values = tl.where(exists, activated(values, norm, start + channel, depth), 0.0)
        some = tl.load(factors + tap * depth + start, inside[:, None] & (column < columns)[None, :], other=0.0)
        sums = tl.dot(values, some, sums, input_precision=PRECISION)
    out += first * columns
    if residual is not None:
        residual += first * columns
    offset = row[:, None] * columns + column[None, :]
    exists = (row < count)[:, None] & (column < columns)[None, :]
    z = finished(sums, None, bias, residual, offset, exists, column, columns)
    if RELU:
        z = tl.where(z <= 0.0, 0.0, z)
    result = z.to(out.dtype.element_ty)
    tl.store(out + offset, result, exists)
    if partial is not None:
        programs = tiles_of(rows, BLOCK_ROWS)
        store_statistics(partial, result.to(tl.float32), exists, count, program, programs, column, columns)


def convolution_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    relu: bool = False,
    norm: Tensor | None = None,
    statistics: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """act(conv(x, weight) + bias + residual), and its mean and biased variance (float64 [K]; empty unless asked for).

    Args:
        x: [N, C, H, W]
        weight: [K, C, R, S]
        bias: [K]
        residual: like the result.
        norm: as operands.norm_of makes it: relu(batch_norm(x)) stands for x.
    """
    x, w = layout.like(x, True), layout.like(weight.to(x.dtype), True)
    (n, depth, height, width), (columns, _, *kernel) = x.shape, w.shape
    out_height, out_width = (
        (size + 2 * p - d * (r - 1) - 1) // s + 1
        for size, p, d, r, s in zip((height, width), padding, dilation, kernel, stride, strict=True)
    )
    y = torch.empty(
        (n, columns, out_height, out_width), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )
    rows = n * out_height * out_width
    block = tuned(y, rows, columns, depth, norm is not None, kernel[0] * kernel[1])
    row_tiles, column_tiles = triton.cdiv(rows, block["BLOCK_ROWS"]), triton.cdiv(columns, block["BLOCK_COLUMNS"])
    shape = (4, row_tiles, columns)
    partial = torch.empty(shape, dtype=torch.float32, device=x.device) if statistics else None
    launch(
        convolution_kernel,
        (row_tiles * column_tiles,),
        x=x,
        norm=norm,
        weight=w.permute(0, 2, 3, 1).flatten(1),
        out=y,
        bias=bias,
        residual=None if residual is None else layout.like(residual.to(x.dtype), True),
        partial=partial,
        rows=rows,
        columns=columns,
        depth=depth,
        height=height,
        width=width,
        out_height=out_height,
        out_width=out_width,
        stride_h=stride[0],
        stride_w=stride[1],
        padding_h=padding[0],
        padding_w=padding[1],
        dilation_h=dilation[0],
        dilation_w=dilation[1],
        KERNEL_H=kernel[0],
        KERNEL_W=kernel[1],
        RELU=relu,
        PRECISION=precision(),
        **block,
    )
    none = torch.empty(0, dtype=torch.float64, device=x.device)
    mean, var = (none, none.clone()) if partial is None else combine_statistics(partial, rows)
    return layout.in_format(y, torch.channels_last), mean, var
