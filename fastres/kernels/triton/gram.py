"""Mean and covariance of the channels of an activation, over its rows (pixels).

With k near the mean, d = x - k, and e = sum(d) / M over the M rows: mean = k + e, covariance = sum(d d^T) / M - e e^T,
in which little cancels. Products are summed in fp32, then in float64.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastres.kernels.triton import tuning
from fastres.kernels.triton.launch import launch
from fastres.kernels.triton.operands import activated, precision
from fastres.kernels.triton.row_product import splits, sum_splits
from fastres.kernels.triton.tiles import tiles_of


@triton.jit
def values_of(x, norm, first, channel, rows, channels, BLOCK_ROWS: tl.constexpr):
    """A tile of relu(batch_norm(x)), or of x, and which of it exists."""
    row = tl.arange(0, BLOCK_ROWS)
    exists = (row < rows - first)[:, None] & (channel < channels)[None, :]
    place = x + tl.cast(first, tl.int64) * channels + (row[:, None] * channels + channel[None, :])
    values = tl.load(place, exists, other=0.0)
    if norm is not None:
        values = activated(values, norm, channel, channels)
    return values, exists


@triton.jit
def point_near_mean(x, norm, channel, rows, channels, BLOCK_ROWS: tl.constexpr):
    """k, from the first rows: every program finds the same.

    Values of 16 bits have to be rounded again once k is subtracted, unless they are near k: their k is 0 where the mean
    is less than 4 standard deviations, so that sums of exact products lose little.
    """
    values, exists = values_of(x, norm, 0, channel, rows, channels, BLOCK_ROWS)
    values = tl.where(exists, values, 0.0).to(tl.float32)
    count = tl.minimum(rows, BLOCK_ROWS)
    mean = tl.sum(values, axis=0) / count
    if x.dtype.element_ty != tl.float32:
        distance = tl.where(exists, values - mean[None, :], 0.0)
        var = tl.sum(distance * distance, axis=0) / count
        mean = tl.where(mean * mean > 16.0 * var, mean, 0.0).to(x.dtype.element_ty).to(tl.float32)
    return tl.where(tl.abs(mean) < float("inf"), mean, 0.0)


@triton.jit
def gram_kernel(
    x,
    norm,
    partial,  # fp32 [splits, channels * channels + channels]: sums of d d^T, in tiles from the diagonal up, and of d
    near,  # fp32 [channels]: k
    rows,
    channels,
    DIAGONAL: tl.constexpr,  # there is one tile
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    tiles = tl.cdiv(channels, BLOCK_CHANNELS)
    i, j = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    if i > j:
        return
    split, splits = tl.program_id(1), tl.num_programs(1)
    left = i * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    right = j * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    k_left = point_near_mean(x, norm, left, rows, channels, BLOCK_ROWS)
    k_right = k_left
    if not DIAGONAL:
        k_right = point_near_mean(x, norm, right, rows, channels, BLOCK_ROWS)
    products = tl.zeros((BLOCK_CHANNELS, BLOCK_CHANNELS), tl.float32)
    sums = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), tl.float32)
    for turn in range(split, tiles_of(rows, BLOCK_ROWS), splits):
        first = turn * BLOCK_ROWS
        values, exists = values_of(x, norm, first, left, rows, channels, BLOCK_ROWS)
        a = tl.where(exists, values.to(tl.float32) - k_left[None, :], 0.0)
        sums += a
        a = a.to(x.dtype.element_ty)
        b = a
        if not DIAGONAL:
            values, exists = values_of(x, norm, first, right, rows, channels, BLOCK_ROWS)
            b = tl.where(exists, values.to(tl.float32) - k_right[None, :], 0.0).to(x.dtype.element_ty)
        products = tl.dot(tl.trans(a), b, products, input_precision=PRECISION)
    partial += tl.cast(split, tl.int64) * (channels * channels + channels)
    inside = (left < channels)[:, None] & (right < channels)[None, :]
    tl.store(partial + left[:, None] * channels + right[None, :], products, inside)
    if i == j:
        tl.store(partial + channels * channels + left, tl.sum(sums, axis=0), left < channels)
        tl.store(near + left, k_left, left < channels)  # the same from every split


@triton.jit
def finish_gram_kernel(total, near, mean, covariance, channels, count, BLOCK: tl.constexpr):
    """Of the sums `total` (as `partial` above, in float64). What lies below the diagonal is taken from above it."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = place < channels * channels
    i, j = place // channels, place % channels
    sums = total + channels * channels
    left = tl.load(sums + i, exists, other=0.0) / count
    right = tl.load(sums + j, exists, other=0.0) / count
    products = tl.load(total + tl.minimum(i, j) * channels + tl.maximum(i, j), exists, other=0.0)
    tl.store(covariance + place, products / count - left * right, exists)
    k = tl.load(near + i, exists, other=0.0).to(tl.float64)
    tl.store(mean + i, k + left, exists & (i == j))


def blocks(x: Tensor, channels: int) -> dict[str, Any]:
    """The tile of a program, as of row_product.blocks; with 128 channels fewer rows, of which there are two tiles."""
    wide = x.element_size() == 4
    block_channels = min(max(triton.next_power_of_2(channels), 16), 64 if wide else 128)
    return {
        "BLOCK_ROWS": 32 if wide or block_channels == 128 else 64,
        "BLOCK_CHANNELS": block_channels,
        "num_warps": 8 if block_channels == 128 or (wide and precision() == "ieee") else 4,
        "num_stages": 3,
    }


def gram(x: Tensor, norm: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean [C] and covariance [C, C] of an activation dense in channels_last, in float64.

    Args:
        norm: as operands.norm_of makes it: relu(batch_norm(x)) stands for x.
    """
    channels = x.shape[1]
    rows = x.numel() // channels
    normed = norm is not None

    def key() -> str:
        return f"gram: 2^{rows.bit_length() - 1} rows, {channels} channels" + ", normalised" * normed

    block = tuning.choose_tile(key, x, blocks(x, channels), ("BLOCK_CHANNELS",), "BLOCK_ROWS")
    tiles = triton.cdiv(channels, block["BLOCK_CHANNELS"])
    parts = splits(x, rows, tiles * (tiles + 1) // 2, block["BLOCK_ROWS"])
    partial = torch.empty((parts, channels * channels + channels), dtype=torch.float32, device=x.device)
    near = torch.empty(channels, dtype=torch.float32, device=x.device)
    launch(
        gram_kernel,
        (tiles * tiles, parts),
        x=x,
        norm=norm,
        partial=partial,
        near=near,
        rows=rows,
        channels=channels,
        DIAGONAL=tiles == 1,
        PRECISION=precision(),
        **block,
    )
    mean = torch.empty(channels, dtype=torch.float64, device=x.device)
    covariance = torch.empty((channels, channels), dtype=torch.float64, device=x.device)
    launch(
        finish_gram_kernel,
        (triton.cdiv(channels * channels, 1024),),
        total=sum_splits(partial, torch.float64),
        near=near,
        mean=mean,
        covariance=covariance,
        channels=channels,
        count=rows,
        BLOCK=1024,
    )
    return mean, covariance
