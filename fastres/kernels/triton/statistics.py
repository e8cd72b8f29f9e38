"""Mean and variance of what fastres/kernels/triton/product.py wrote, from the statistics of its many programs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastres.kernels.triton.batch_norm import combine_statistics_kernel
from fastres.kernels.triton.launch import launch

#: Programs whose statistics one program folds into one; more than four times as many are folded.
_FOLD = 64


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
        partial: fp32 [4, programs, C] as batch_norm.statistics_kernel and product.product_kernel leave it.
    """
    if partial.shape[1] > 4 * _FOLD:
        partial = _fold(partial)
    _, programs, channels = partial.shape
    mean, var = (torch.empty(channels, dtype=torch.float64, device=partial.device) for _ in range(2))
    launch(
        combine_statistics_kernel,
        (triton.cdiv(channels, 8),),
        partial=partial,
        mean=mean,
        var=var,
        programs=programs,
        channels=channels,
        count=count,
        BLOCK_PROGRAMS=128,
        BLOCK_CHANNELS=8,
    )
    return mean, var
