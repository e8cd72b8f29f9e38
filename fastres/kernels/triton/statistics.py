"""Mean and variance of an activation over N, H, W, and the running statistics.

Two levels in a fixed order, without atomics, so results repeat bit for bit: every program sums x - k and (x - k)^2 of
its rows in fp32, where k is the mean of its first tile (sums around a point near the mean do not cancel); then a
program for a few channels combines the partial means and squares in float64 (Chan, Golub and LeVeque 1983).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastres.kernels.triton.launch import launch
from fastres.kernels.triton.tiles import NUM_WARPS, Rows, in_image, tile, tiles_of


@triton.jit
def statistics_kernel(
    x,
    partial,  # fp32 [4, programs, channels]: k, mean - k, the sum of squares around the mean, the number of values
    rows,
    pixels,
    channels,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    row = program.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    offset, exists, _, _ = tile(row, channel, rows, pixels, channels, CHANNELS_LAST)
    values = tl.load(x + offset, exists, other=0.0).to(tl.float32)
    present = in_image(row, rows, pixels, CHANNELS_LAST).to(tl.float32)
    k = tl.sum(values, axis=0) / tl.maximum(tl.sum(present), 1.0)
    k = tl.where(tl.abs(k) < float("inf"), k, 0.0)  # if it is not finite, the sums will say so
    sums = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), tl.float32)
    squares = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), tl.float32)
    count = tl.zeros((BLOCK_ROWS,), tl.float32)
    for turn in range(program, tiles_of(rows, BLOCK_ROWS), programs):
        row = tl.cast(turn, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        offset, exists, _, _ = tile(row, channel, rows, pixels, channels, CHANNELS_LAST)
        distance = tl.load(x + offset, exists, other=0.0).to(tl.float32) - k[None, :]
        distance = tl.where(exists, distance, 0.0)
        sums += distance
        squares += distance * distance
        count += in_image(row, rows, pixels, CHANNELS_LAST).to(tl.float32)
    n, total = tl.sum(count), tl.sum(sums, axis=0)
    mean = total / tl.maximum(n, 1.0)
    place = partial + program.to(tl.int64) * channels + channel
    plane = programs.to(tl.int64) * channels
    tl.store(place, k, channel < channels)
    tl.store(place + plane, mean, channel < channels)
    tl.store(place + 2 * plane, tl.sum(squares, axis=0) - total * mean, channel < channels)
    tl.store(place + 3 * plane, tl.zeros_like(k) + n, channel < channels)


@triton.jit
def combine_statistics_kernel(
    partial, mean, var, programs, channels, count, BLOCK_PROGRAMS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr
):
    """Mean and biased variance in float64, of partial means and squares."""
    channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    plane = tl.cast(programs, tl.int64) * channels
    total = tl.zeros((BLOCK_PROGRAMS, BLOCK_CHANNELS), tl.float64)
    for first in range(0, programs, BLOCK_PROGRAMS):
        program = first + tl.arange(0, BLOCK_PROGRAMS)
        exists = (program < programs)[:, None] & (channel < channels)[None, :]
        place = partial + program[:, None] * channels + channel[None, :]
        n = tl.load(place + 3 * plane, exists, other=0.0).to(tl.float64)
        k = tl.load(place, exists, other=0.0).to(tl.float64)
        total += n * (k + tl.load(place + plane, exists, other=0.0).to(tl.float64))
    middle = tl.sum(total, axis=0) / count
    total = tl.zeros((BLOCK_PROGRAMS, BLOCK_CHANNELS), tl.float64)
    for first in range(0, programs, BLOCK_PROGRAMS):
        program = first + tl.arange(0, BLOCK_PROGRAMS)
        exists = (program < programs)[:, None] & (channel < channels)[None, :]
        place = partial + program[:, None] * channels + channel[None, :]
        n = tl.load(place + 3 * plane, exists, other=0.0).to(tl.float64)
        k = tl.load(place, exists, other=0.0).to(tl.float64)
        distance = k + tl.load(place + plane, exists, other=0.0).to(tl.float64) - middle[None, :]
        squares = tl.load(place + 2 * plane, exists, other=0.0).to(tl.float64)
        total += tl.where(exists, squares + n * distance * distance, 0.0)
    tl.store(mean + channel, middle, channel < channels)
    tl.store(var + channel, tl.sum(total, axis=0) / count, channel < channels)


@triton.jit
def fold_statistics_kernel(
    partial, folded, programs, channels, BLOCK_PROGRAMS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr
):
    """Statistics of BLOCK_PROGRAMS programs as if one had taken them (Chan, Golub and LeVeque 1983), in float64."""
    part, parts = tl.program_id(0), tl.num_programs(0)
    program = tl.cast(part, tl.int64) * BLOCK_PROGRAMS + tl.arange(0, BLOCK_PROGRAMS)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    exists = (program < programs)[:, None] & (channel < channels)[None, :]
    place = partial + program[:, None] * channels + channel[None, :]
    plane = tl.cast(programs, tl.int64) * channels
    n = tl.load(place + 3 * plane, exists, other=0.0).to(tl.float64)
    mean = tl.load(place, exists, other=0.0).to(tl.float64)
    mean += tl.load(place + plane, exists, other=0.0).to(tl.float64)
    count = tl.sum(n, axis=0)
    middle = tl.sum(n * mean, axis=0) / tl.maximum(count, 1.0)
    distance = mean - middle[None, :]
    squares = tl.load(place + 2 * plane, exists, other=0.0).to(tl.float64) + n * distance * distance
    k = tl.where(tl.abs(middle) < float("inf"), middle, 0.0).to(tl.float32)
    place = folded + tl.cast(part, tl.int64) * channels + channel
    plane = tl.cast(parts, tl.int64) * channels
    inside = channel < channels
    tl.store(place, k, inside)
    tl.store(place + plane, (middle - k.to(tl.float64)).to(tl.float32), inside)
    tl.store(place + 2 * plane, tl.sum(tl.where(exists, squares, 0.0), axis=0).to(tl.float32), inside)
    tl.store(place + 3 * plane, count.to(tl.float32), inside)


@triton.jit
def update_running_stats_kernel(
    running_mean,
    running_mean_stride,
    running_var,
    running_var_stride,
    mean,
    var,
    num_batches_tracked,
    momentum,
    count,
    channels,
    BLOCK: tl.constexpr,
):
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < channels
    factor = tl.cast(momentum, tl.float64)
    if num_batches_tracked is not None:
        factor = 1.0 / tl.load(num_batches_tracked).to(tl.float64)
    size = tl.cast(count, tl.float64)
    unbiased = tl.load(var + channel, inside, other=0.0) * (size / tl.maximum(size - 1.0, 1.0))
    old = tl.load(running_mean + channel * running_mean_stride, inside, other=0.0).to(tl.float64)
    new = old * (1.0 - factor) + tl.load(mean + channel, inside, other=0.0) * factor
    tl.store(running_mean + channel * running_mean_stride, new.to(running_mean.dtype.element_ty), inside)
    old = tl.load(running_var + channel * running_var_stride, inside, other=0.0).to(tl.float64)
    new = old * (1.0 - factor) + unbiased * factor
    tl.store(running_var + channel * running_var_stride, new.to(running_var.dtype.element_ty), inside)


#: Programs whose statistics one program folds into one; more than four times as many are folded.
_FOLD = 64
#: Of the kernels that combine what programs left: a few channels each, so that many of them run.
COMBINE = {"BLOCK_PROGRAMS": 128, "BLOCK_CHANNELS": 8}


def combine_grid(channels: int) -> tuple[int]:
    return (triton.cdiv(channels, COMBINE["BLOCK_CHANNELS"]),)


def _fold(partial: Tensor) -> Tensor:
    _, programs, channels = partial.shape
    parts = triton.cdiv(programs, _FOLD)
    folded = partial.new_empty((4, parts, channels))
    launch(
        fold_statistics_kernel,
        (parts, triton.cdiv(channels, 32)),
        partial=partial,
        folded=folded,
        programs=programs,
        channels=channels,
        BLOCK_PROGRAMS=_FOLD,
        BLOCK_CHANNELS=32,
    )
    return folded


def combine_statistics(partial: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, float64 [C], of `count` values a channel.

    Args:
        partial: fp32 [4, programs, C] as statistics_kernel and product.product_kernel leave it.
    """
    if partial.shape[1] > 4 * _FOLD:
        partial = _fold(partial)
    _, programs, channels = partial.shape
    mean, var = (torch.empty(channels, dtype=torch.float64, device=partial.device) for _ in range(2))
    launch(
        combine_statistics_kernel,
        combine_grid(channels),
        partial=partial,
        mean=mean,
        var=var,
        programs=programs,
        channels=channels,
        count=count,
        **COMBINE,
    )
    return mean, var


def moments(
    x: Tensor, cut: Rows, running_mean: Tensor | None, running_var: Tensor | None, training: bool
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance to normalise a dense x with: of x over N, H, W, or the running ones; float64 [C]."""
    if not training:
        assert running_mean is not None and running_var is not None
        mean, var = (t.to(torch.float64, copy=True).contiguous() for t in (running_mean, running_var))
        return mean, var
    partial = torch.empty((4, cut.programs, cut.channels), dtype=torch.float32, device=x.device)
    launch(statistics_kernel, cut.grid, num_warps=NUM_WARPS, x=x, partial=partial, **cut.arguments())
    return combine_statistics(partial, cut.count)


def update_running_stats_(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    var: Tensor,
    num_batches_tracked: Tensor | None,
    momentum: float,
    count: int,
) -> None:
    if count == 0:
        return
    channels = mean.numel()
    launch(
        update_running_stats_kernel,
        (triton.cdiv(channels, 256),),
        running_mean=running_mean,
        running_mean_stride=running_mean.stride(0),
        running_var=running_var,
        running_var_stride=running_var.stride(0),
        mean=mean,
        var=var,
        num_batches_tracked=num_batches_tracked,
        momentum=momentum,
        count=count,
        channels=channels,
        BLOCK=256,
    )
