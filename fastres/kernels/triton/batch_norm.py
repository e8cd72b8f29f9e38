"""bn_act and its backward in Triton. Formulas: fastres/reference.py.

Sums take two levels in a fixed order, without atomics: results repeat bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastres import layout
from fastres.kernels.triton.launch import launch
from fastres.kernels.triton.statistics import COMBINE, combine_grid, moments
from fastres.kernels.triton.tiles import NUM_WARPS, Rows, load_mask, rows_of, store_mask, tile, tiles_of

#: Where the gradient of a ReLU comes from: there is none, its input is computed again from x, or a mask.
NO_RELU, RECOMPUTED, MASKED = 0, 1, 2


@triton.jit
def coefficients(mean, var, weight, bias, channel, exists, eps):
    """fp32 vectors with batch_norm(x) = (x - mean) * scale + shift, and the float64 1 / sqrt(var + eps).

    The mean is rounded to fp32; what that leaves out is in shift.
    """
    exact = tl.load(mean + channel, exists, other=0.0).to(tl.float64)
    near = exact.to(tl.float32)
    inverse = tl.rsqrt(tl.load(var + channel, exists, other=1.0).to(tl.float64) + eps)
    scale = inverse
    if weight is not None:
        scale = inverse * tl.load(weight + channel, exists, other=0.0).to(tl.float64)
    shift = (near.to(tl.float64) - exact) * scale
    if bias is not None:
        shift += tl.load(bias + channel, exists, other=0.0).to(tl.float64)
    return near, scale.to(tl.float32), shift.to(tl.float32), inverse


@triton.jit
def normalise(x, mean, scale, shift):
    """(x - mean) * scale + shift of a tile: the same bits in forward and in backward."""
    return tl.fma(x.to(tl.float32) - mean[None, :], tl.broadcast_to(scale[None, :], x.shape), shift[None, :])


@triton.jit
def apply_kernel(
    x,
    y,
    residual,
    mask,
    mean,
    var,
    weight,
    bias,
    eps,
    rows,
    pixels,
    channels,
    RELU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """y = act(batch_norm(x) + residual), and the mask of what the ReLU lets through if there is room for it."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    near, scale, shift, inverse = coefficients(mean, var, weight, bias, channel, channel < channels, eps)
    for turn in range(program, tiles_of(rows, BLOCK_ROWS), programs):
        row = tl.cast(turn, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        offset, exists, byte, bit = tile(row, channel, rows, pixels, channels, CHANNELS_LAST)
        z = normalise(tl.load(x + offset, exists, other=0.0), near, scale, shift)
        if residual is not None:
            z += tl.load(residual + offset, exists, other=0.0).to(tl.float32)
        if mask is not None:
            keep = exists & ~(z <= 0.0)
            store_mask(mask, keep, row, channel, rows, pixels, channels, CHANNELS_LAST)
        if RELU:
            z = tl.where(z <= 0.0, 0.0, z)
        tl.store(y + offset, z.to(y.dtype.element_ty), exists)


@triton.jit
def behind_relu(
    g,
    values,
    mask,
    near,
    scale,
    shift,
    row,
    channel,
    rows,
    pixels,
    channels,
    RELU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """What the ReLU lets through of the gradient g; values: those of x."""
    if RELU == 1:
        g = tl.where(normalise(values, near, scale, shift) <= 0.0, 0.0, g)
    if RELU == 2:
        g = tl.where(load_mask(mask, row, channel, rows, pixels, channels, CHANNELS_LAST), g, 0.0)
    return g


@triton.jit
def reduce_gradient_kernel(
    grad,
    x,
    mask,
    mean,
    var,
    weight,
    bias,
    eps,
    masked,  # if given, the gradient behind the ReLU is written to it
    partial,  # fp32 [2, programs, channels]: sums of g and of g * (x - mean)
    rows,
    pixels,
    channels,
    RELU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    near, scale, shift, _ = coefficients(mean, var, weight, bias, channel, channel < channels, eps)
    # two rows of a tile, which one thread holds, are summed up at once: sums take half the registers
    sums = tl.zeros((BLOCK_ROWS // 2, BLOCK_CHANNELS), tl.float32)
    products = tl.zeros((BLOCK_ROWS // 2, BLOCK_CHANNELS), tl.float32)
    for turn in range(program, tiles_of(rows, BLOCK_ROWS), programs):
        row = tl.cast(turn, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        offset, exists, byte, bit = tile(row, channel, rows, pixels, channels, CHANNELS_LAST)
        values = tl.load(x + offset, exists, other=0.0).to(tl.float32)
        g = tl.load(grad + offset, exists, other=0.0).to(tl.float32)
        g = behind_relu(g, values, mask, near, scale, shift, row, channel, rows, pixels, channels, RELU, CHANNELS_LAST)
        if masked is not None:
            tl.store(masked + offset, g.to(masked.dtype.element_ty), exists)
        product = tl.where(exists, g * (values - near[None, :]), 0.0)
        sums += tl.sum(tl.reshape(g, (2, BLOCK_ROWS // 2, BLOCK_CHANNELS)), axis=0)
        products += tl.sum(tl.reshape(product, (2, BLOCK_ROWS // 2, BLOCK_CHANNELS)), axis=0)
    place = partial + program.to(tl.int64) * channels + channel
    tl.store(place, tl.sum(sums, axis=0), channel < channels)
    tl.store(place + programs.to(tl.int64) * channels, tl.sum(products, axis=0), channel < channels)


@triton.jit
def combine_gradient_kernel(
    partial,
    mean,
    var,
    weight,
    grad_weight,
    grad_bias,
    factors,  # fp32 [3, channels]: grad_x = factors[0] * (g - factors[1] - factors[2] * (x - mean))
    eps,
    programs,
    channels,
    count,
    TRAINING: tl.constexpr,
    BLOCK_PROGRAMS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inside = channel < channels
    plane = tl.cast(programs, tl.int64) * channels
    sums = tl.zeros((BLOCK_PROGRAMS, BLOCK_CHANNELS), tl.float64)
    products = tl.zeros((BLOCK_PROGRAMS, BLOCK_CHANNELS), tl.float64)
    for first in range(0, programs, BLOCK_PROGRAMS):
        program = first + tl.arange(0, BLOCK_PROGRAMS)
        exists = (program < programs)[:, None] & inside[None, :]
        place = partial + program[:, None] * channels + channel[None, :]
        sums += tl.load(place, exists, other=0.0).to(tl.float64)
        products += tl.load(place + plane, exists, other=0.0).to(tl.float64)
    exact = tl.load(mean + channel, inside, other=0.0).to(tl.float64)
    near, scale, _, inverse = coefficients(mean, var, weight, None, channel, inside, eps)
    total = tl.sum(sums, axis=0)
    left_out = near.to(tl.float64) - exact
    product = tl.sum(products, axis=0) + left_out * total  # of g and x - mean, exactly
    if grad_weight is not None:
        tl.store(grad_weight + channel, (product * inverse).to(tl.float32), inside)
        tl.store(grad_bias + channel, total.to(tl.float32), inside)
    if factors is not None:
        slope, constant = tl.zeros_like(total), tl.zeros_like(total)
        if TRAINING:
            slope = inverse * inverse * product / count
            constant = total / count + slope * left_out
        tl.store(factors + channel, scale, inside)
        tl.store(factors + channels + channel, constant.to(tl.float32), inside)
        tl.store(factors + 2 * channels + channel, slope.to(tl.float32), inside)


@triton.jit
def apply_gradient_kernel(
    grad,
    x,
    mask,
    mean,
    var,
    weight,
    bias,
    eps,
    factors,
    grad_x,
    rows,
    pixels,
    channels,
    TRAINING: tl.constexpr,
    RELU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """grad_x, from the last rows to the first: what the reduction read last is still in the cache."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inside = channel < channels
    near, scale, shift, _ = coefficients(mean, var, weight, bias, channel, inside, eps)
    factor = tl.load(factors + channel, inside, other=0.0)[None, :]
    constant = tl.load(factors + channels + channel, inside, other=0.0)[None, :]
    slope = tl.load(factors + 2 * channels + channel, inside, other=0.0)[None, :]
    tiles = tiles_of(rows, BLOCK_ROWS)
    for turn in range(program, tiles, programs):
        row = tl.cast(tiles - 1 - turn, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        offset, exists, byte, bit = tile(row, channel, rows, pixels, channels, CHANNELS_LAST)
        g = tl.load(grad + offset, exists, other=0.0).to(tl.float32)
        values = g
        if TRAINING or RELU == 1:
            values = tl.load(x + offset, exists, other=0.0).to(tl.float32)
        g = behind_relu(g, values, mask, near, scale, shift, row, channel, rows, pixels, channels, RELU, CHANNELS_LAST)
        if TRAINING:
            g = (g - constant) - slope * (values - near[None, :])
        tl.store(grad_x + offset, (g * factor).to(grad_x.dtype.element_ty), exists)


def vector(t: Tensor | None) -> Tensor | None:
    """A per-channel tensor as kernels read it."""
    return None if t is None else t.contiguous()


def bn_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    training: bool,
    eps: float,
    relu: bool,
    save_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = layout.dense(x)
    cut = rows_of(x)
    mean, var = moments(x, cut, running_mean, running_var, training)
    y = torch.empty_like(x)
    mask = torch.empty(layout.mask_bytes(x) if save_mask else 0, dtype=torch.uint8, device=x.device)
    launch(
        apply_kernel,
        cut.grid,
        num_warps=NUM_WARPS,
        x=x,
        y=y,
        residual=None if residual is None else layout.like(residual, cut.channels_last),
        mask=mask if save_mask else None,
        mean=mean,
        var=var,
        weight=vector(weight),
        bias=vector(bias),
        eps=eps,
        RELU=relu,
        **cut.arguments(),
    )
    return y, mean, var, mask


def reduce_gradient(tensors: dict[str, Any], cut: Rows, mode: int, masked: Tensor | None = None) -> Tensor:
    """What combine_gradient takes.

    Args:
        tensors: grad, x, mask, mean, var, weight, bias and eps of reduce_gradient_kernel.
        mode: NO_RELU, RECOMPUTED or MASKED.
        masked: like x; if given, the gradient behind the ReLU is written to it.
    """
    partial = torch.empty((2, cut.programs, cut.channels), dtype=torch.float32, device=tensors["x"].device)
    launch(
        reduce_gradient_kernel,
        cut.grid,
        num_warps=NUM_WARPS,
        **tensors,
        masked=masked,
        partial=partial,
        RELU=mode,
        **cut.arguments(),
    )
    return partial


def combine_gradient(
    partial: Tensor, cut: Rows, tensors: dict[str, Any], training: bool, need_x: bool, need_affine: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """grad_weight and grad_bias (empty where not needed), and the factors of grad_x."""
    c, device = cut.channels, partial.device
    grad_weight, grad_bias = (
        torch.empty(c if need_affine else 0, dtype=torch.float32, device=device) for _ in range(2)
    )
    factors = torch.empty((3, c), dtype=torch.float32, device=device) if need_x else None
    launch(
        combine_gradient_kernel,
        combine_grid(c),
        partial=partial,
        **{name: tensors[name] for name in ("mean", "var", "weight", "eps")},
        grad_weight=grad_weight if need_affine else None,
        grad_bias=grad_bias if need_affine else None,
        factors=factors,
        programs=partial.shape[1],
        channels=c,
        count=cut.count,
        TRAINING=training,
        **COMBINE,
    )
    return grad_weight, grad_bias, factors


def bn_act_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
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
    x = layout.dense(x)
    cut = rows_of(x)
    masked = torch.empty_like(x) if need_residual and mask is not None else None
    tensors: dict[str, Any] = {
        "grad": layout.like(grad_y.to(x.dtype), cut.channels_last),
        "x": x,
        "mask": mask,
        "mean": mean,
        "var": var,
        "weight": vector(weight),
        "bias": vector(bias),
        "eps": eps,
    }
    mode = MASKED if mask is not None else RECOMPUTED if relu else NO_RELU
    partial = reduce_gradient(tensors, cut, mode, masked)
    grad_weight, grad_bias, factors = combine_gradient(partial, cut, tensors, training, need_x, need_affine)
    empty = x.new_empty(0)
    if not need_x:
        return empty, grad_weight, grad_bias, empty.clone() if masked is None else masked
    if masked is not None:  # it holds the gradient behind the ReLU
        tensors |= {"grad": masked, "mask": None}
        mode = NO_RELU
    grad_x = torch.empty_like(x)
    launch(
        apply_gradient_kernel,
        cut.grid,
        num_warps=NUM_WARPS,
        **tensors,
        factors=factors,
        grad_x=grad_x,
        TRAINING=training,
        RELU=mode,
        **cut.arguments(),
    )
    return grad_x, grad_weight, grad_bias, empty if masked is None else masked
