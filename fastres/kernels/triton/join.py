"""bn_add_bn_act and its backward in Triton: both branches of a block normalised in one pass. Formulas:
fastres/reference_join.py.

Beside a batch norm of the shortcut and one that adds it, forward saves a write and a read of the normalised shortcut;
backward reads both branches, the gradient and the mask twice each, and writes nothing but the two results.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastres import layout
from fastres.kernels.triton.batch_norm import coefficients, combine_gradient, normalise, vector
from fastres.kernels.triton.launch import launch
from fastres.kernels.triton.statistics import moments
from fastres.kernels.triton.tiles import NUM_WARPS, Rows, load_mask, rows_of, store_mask, tile, tiles_of


@triton.jit
def join_kernel(
    x,
    mean,
    var,
    weight,
    bias,
    eps,
    other,
    other_mean,
    other_var,
    other_weight,
    other_bias,
    other_eps,
    y,
    mask,
    rows,
    pixels,
    channels,
    RELU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """y = act(batch_norm(x) + batch_norm(other)), and the mask of what the ReLU lets through if there is room for
    it."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inside = channel < channels
    near, scale, shift, inverse = coefficients(mean, var, weight, bias, channel, inside, eps)
    other_near, other_scale, other_shift, other_inverse = coefficients(
        other_mean, other_var, other_weight, other_bias, channel, inside, other_eps
    )
    for turn in range(program, tiles_of(rows, BLOCK_ROWS), programs):
        row = tl.cast(turn, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        offset, exists, byte, bit = tile(row, channel, rows, pixels, channels, CHANNELS_LAST)
        values = tl.load(x + offset, exists, other=0.0)
        others = tl.load(other + offset, exists, other=0.0)
        z = normalise(values, near, scale, shift) + normalise(others, other_near, other_scale, other_shift)
        if mask is not None:
            store_mask(mask, exists & ~(z <= 0.0), row, channel, rows, pixels, channels, CHANNELS_LAST)
        if RELU:
            z = tl.where(z <= 0.0, 0.0, z)
        tl.store(y + offset, z.to(y.dtype.element_ty), exists)


@triton.jit
def mean_of(mean, channel, exists):
    """The mean as normalise() takes it, rounded to fp32: [1, BLOCK_CHANNELS]."""
    return tl.load(mean + channel, exists, other=0.0).to(tl.float32)[None, :]


@triton.jit
def half(values, BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    """Pairs of rows of a tile, which one thread holds, summed up: sums over tiles take half the registers."""
    return tl.sum(tl.reshape(values, (2, BLOCK_ROWS // 2, BLOCK_CHANNELS)), axis=0)


@triton.jit
def reduce_join_kernel(
    grad,
    mask,
    x,
    mean,
    other,
    other_mean,
    partial,  # fp32 [4, programs, channels]: sums of g and of g * (x - mean), and both again for the other branch
    rows,
    pixels,
    channels,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inside = channel < channels
    near, other_near = mean_of(mean, channel, inside), mean_of(other_mean, channel, inside)
    sums = tl.zeros((BLOCK_ROWS // 2, BLOCK_CHANNELS), tl.float32)
    products = tl.zeros((BLOCK_ROWS // 2, BLOCK_CHANNELS), tl.float32)
    other_products = tl.zeros((BLOCK_ROWS // 2, BLOCK_CHANNELS), tl.float32)
    for turn in range(program, tiles_of(rows, BLOCK_ROWS), programs):
        row = tl.cast(turn, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        offset, exists, byte, bit = tile(row, channel, rows, pixels, channels, CHANNELS_LAST)
        g = tl.load(grad + offset, exists, other=0.0).to(tl.float32)
        values = tl.load(x + offset, exists, other=0.0).to(tl.float32)
        others = tl.load(other + offset, exists, other=0.0).to(tl.float32)
        if mask is not None:
            g = tl.where(load_mask(mask, row, channel, rows, pixels, channels, CHANNELS_LAST), g, 0.0)
        product = tl.where(exists, g * (values - near), 0.0)
        other_product = tl.where(exists, g * (others - other_near), 0.0)
        sums += half(g, BLOCK_ROWS, BLOCK_CHANNELS)
        products += half(product, BLOCK_ROWS, BLOCK_CHANNELS)
        other_products += half(other_product, BLOCK_ROWS, BLOCK_CHANNELS)
    place = partial + program.to(tl.int64) * channels + channel
    plane = programs.to(tl.int64) * channels
    total = tl.sum(sums, axis=0)
    tl.store(place, total, inside)
    tl.store(place + plane, tl.sum(products, axis=0), inside)
    tl.store(place + 2 * plane, total, inside)
    tl.store(place + 3 * plane, tl.sum(other_products, axis=0), inside)


@triton.jit
def branch_gradient(g, x, mean, factors, offset, exists, channel, channels, TRAINING: tl.constexpr):
    """The gradient of a tile of one branch, for the gradient g of its batch norm's output."""
    inside = channel < channels
    if TRAINING:
        constant = tl.load(factors + channels + channel, inside, other=0.0)[None, :]
        slope = tl.load(factors + 2 * channels + channel, inside, other=0.0)[None, :]
        values = tl.load(x + offset, exists, other=0.0).to(tl.float32)
        g = (g - constant) - slope * (values - mean_of(mean, channel, inside))
    return g * tl.load(factors + channel, inside, other=0.0)[None, :]


@triton.jit
def apply_join_gradient_kernel(
    grad,
    mask,
    x,
    mean,
    factors,  # as of combine_gradient_kernel
    grad_x,
    other,
    other_mean,
    other_factors,
    grad_other,
    rows,
    pixels,
    channels,
    TRAINING: tl.constexpr,
    OTHER_TRAINING: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """grad_x and grad_other, where given, from the last rows to the first: what the reduction read last is still in the
    cache."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    tiles = tiles_of(rows, BLOCK_ROWS)
    for turn in range(program, tiles, programs):
        row = tl.cast(tiles - 1 - turn, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        offset, exists, byte, bit = tile(row, channel, rows, pixels, channels, CHANNELS_LAST)
        g = tl.load(grad + offset, exists, other=0.0).to(tl.float32)
        if mask is not None:
            g = tl.where(load_mask(mask, row, channel, rows, pixels, channels, CHANNELS_LAST), g, 0.0)
        if grad_x is not None:
            value = branch_gradient(g, x, mean, factors, offset, exists, channel, channels, TRAINING)
            tl.store(grad_x + offset, value.to(grad_x.dtype.element_ty), exists)
        if grad_other is not None:
            value = branch_gradient(
                g, other, other_mean, other_factors, offset, exists, channel, channels, OTHER_TRAINING
            )
            tl.store(grad_other + offset, value.to(grad_other.dtype.element_ty), exists)


def _halved(cut: Rows) -> Rows:
    """Half of a tile for passes over one activation, and twice as many programs: values of two activations, or three,
    would take so many registers that a multiprocessor holds one program, which does nothing while it waits."""
    block_rows = max(8, cut.block_rows // 2)
    tiles = triton.cdiv(cut.rows, block_rows)
    return replace(cut, block_rows=block_rows, programs=min(tiles, 2 * cut.programs))


def bn_add_bn_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    other: Tensor,
    other_weight: Tensor | None,
    other_bias: Tensor | None,
    other_running_mean: Tensor | None,
    other_running_var: Tensor | None,
    training: bool,
    other_training: bool,
    eps: float,
    other_eps: float,
    relu: bool,
    save_mask: bool,
) -> tuple[Tensor, ...]:
    x = layout.dense(x)
    cut = rows_of(x)
    other = layout.like(other, cut.channels_last)
    mean, var = moments(x, cut, running_mean, running_var, training)
    other_mean, other_var = moments(other, cut, other_running_mean, other_running_var, other_training)
    y = torch.empty_like(x)
    mask = torch.empty(layout.mask_bytes(x) if save_mask else 0, dtype=torch.uint8, device=x.device)
    cut = _halved(cut)
    launch(
        join_kernel,
        cut.grid,
        num_warps=NUM_WARPS,
        x=x,
        mean=mean,
        var=var,
        weight=vector(weight),
        bias=vector(bias),
        eps=eps,
        other=other,
        other_mean=other_mean,
        other_var=other_var,
        other_weight=vector(other_weight),
        other_bias=vector(other_bias),
        other_eps=other_eps,
        y=y,
        mask=mask if save_mask else None,
        RELU=relu,
        **cut.arguments(),
    )
    return y, mean, var, other_mean, other_var, mask


def bn_add_bn_act_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    other: Tensor,
    other_weight: Tensor | None,
    other_mean: Tensor,
    other_var: Tensor,
    mask: Tensor | None,
    training: bool,
    other_training: bool,
    eps: float,
    other_eps: float,
    need_x: bool,
    need_affine: bool,
    need_other: bool,
    need_other_affine: bool,
) -> tuple[Tensor, ...]:
    x = layout.dense(x)
    cut = _halved(rows_of(x))
    tensors: dict[str, Any] = {
        "grad": layout.like(grad_y.to(x.dtype), cut.channels_last),
        "mask": mask,
        "x": x,
        "mean": mean,
        "other": layout.like(other, cut.channels_last),
        "other_mean": other_mean,
    }
    partial = torch.empty((4, cut.programs, cut.channels), dtype=torch.float32, device=x.device)
    launch(reduce_join_kernel, cut.grid, num_warps=NUM_WARPS, **tensors, partial=partial, **cut.arguments())
    grad_weight, grad_bias, factors = combine_gradient(
        partial[:2],
        cut,
        {"mean": mean, "var": var, "weight": vector(weight), "eps": eps},
        training,
        need_x,
        need_affine,
    )
    other_grad_weight, other_grad_bias, other_factors = combine_gradient(
        partial[2:],
        cut,
        {"mean": other_mean, "var": other_var, "weight": vector(other_weight), "eps": other_eps},
        other_training,
        need_other,
        need_other_affine,
    )
    grad_x, grad_other = (torch.empty_like(x) if need else None for need in (need_x, need_other))
    if need_x or need_other:
        launch(
            apply_join_gradient_kernel,
            cut.grid,
            num_warps=NUM_WARPS,
            **tensors,
            factors=factors,
            grad_x=grad_x,
            other_factors=other_factors,
            grad_other=grad_other,
            TRAINING=training,
            OTHER_TRAINING=other_training,
            **cut.arguments(),
        )
    nothing = x.new_empty(0)
    return (
        nothing if grad_x is None else grad_x,
        grad_weight,
        grad_bias,
        nothing.clone() if grad_other is None else grad_other,
        other_grad_weight,
        other_grad_bias,
    )
