"""bn_act and its backward in Triton. Formulas: fastres/reference.py.

Statistics take two levels in a fixed order, without atomics, so results repeat bit for bit: every program sums x - k
and (x - k)^2 of its rows in fp32, where k is the mean of its first tile (sums around a point near the mean do not
cancel); then a program for a few channels combines the partial means and squares in float64 (Chan, Golub and LeVeque
1983).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastres import layout
from fastres.kernels.triton.launch import launch
from fastres.kernels.triton.tiles import NUM_WARPS, Rows, in_image, load_mask, rows_of, store_mask, tile

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
    for first in range(program * BLOCK_ROWS, rows, programs * BLOCK_ROWS):
        row = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_ROWS)
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
    for first in range(program * BLOCK_ROWS, rows, programs * BLOCK_ROWS):
        row = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_ROWS)
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
    for first in range(program * BLOCK_ROWS, rows, programs * BLOCK_ROWS):
        row = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_ROWS)
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
    factors,  # fp32 [3, channels]: grad_x = factors[0] * g + factors[1] * (x - mean) + factors[2]
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
            slope = -scale * inverse * inverse * product / count
            constant = -scale * total / count + slope * left_out
        tl.store(factors + channel, scale, inside)
        tl.store(factors + channels + channel, slope.to(tl.float32), inside)
        tl.store(factors + 2 * channels + channel, constant.to(tl.float32), inside)


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
    slope = tl.load(factors + channels + channel, inside, other=0.0)[None, :]
    constant = tl.load(factors + 2 * channels + channel, inside, other=0.0)[None, :]
    tiles = tl.cdiv(rows, BLOCK_ROWS)
    for turn in range(program, tiles, programs):
        row = tl.cast(tiles - 1 - turn, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        offset, exists, byte, bit = tile(row, channel, rows, pixels, channels, CHANNELS_LAST)
        g = tl.load(grad + offset, exists, other=0.0).to(tl.float32)
        values = g
        if TRAINING or RELU == 1:
            values = tl.load(x + offset, exists, other=0.0).to(tl.float32)
        g = (
            behind_relu(g, values, mask, near, scale, shift, row, channel, rows, pixels, channels, RELU, CHANNELS_LAST)
            * factor
        )
        if TRAINING:
            g += slope * (values - near[None, :]) + constant
        tl.store(grad_x + offset, g.to(grad_x.dtype.element_ty), exists)


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


#: Of the kernels that combine what programs left: a few channels each, so that many of them run.
_COMBINE = {"BLOCK_PROGRAMS": 128, "BLOCK_CHANNELS": 8}


def _combine_grid(channels: int) -> tuple[int]:
    return (triton.cdiv(channels, _COMBINE["BLOCK_CHANNELS"]),)


def vector(t: Tensor | None) -> Tensor | None:
    """A per-channel tensor as kernels read it."""
    return None if t is None else t.contiguous()


def statistics(x: Tensor, cut: Rows) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of a dense x over N, H, W: float64 [C]."""
    c = cut.channels
    partial = torch.empty((4, cut.programs, c), dtype=torch.float32, device=x.device)
    mean, var = (torch.empty(c, dtype=torch.float64, device=x.device) for _ in range(2))
    launch(statistics_kernel, cut.grid, num_warps=NUM_WARPS, x=x, partial=partial, **cut.arguments())
    launch(
        combine_statistics_kernel,
        _combine_grid(c),
        partial=partial,
        mean=mean,
        var=var,
        programs=cut.programs,
        channels=c,
        count=cut.count,
        **_COMBINE,
    )
    return mean, var


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
    if training:
        mean, var = statistics(x, cut)
    else:
        assert running_mean is not None and running_var is not None
        mean, var = (t.to(torch.float64, copy=True).contiguous() for t in (running_mean, running_var))
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


def gradients(
    cut: Rows,
    tensors: dict[str, Any],
    training: bool,
    relu: int,
    need_x: bool,
    need_affine: bool,
    masked: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_x, grad_weight, grad_bias; empty where not needed. tensors: grad, x, mask, mean, var, weight, bias, eps."""
    x, c = tensors["x"], cut.channels
    grad_weight, grad_bias = (
        torch.empty(c if need_affine else 0, dtype=torch.float32, device=x.device) for _ in range(2)
    )
    factors = torch.empty((3, c), dtype=torch.float32, device=x.device) if need_x else None
    arguments = cut.arguments()
    partial = torch.empty((2, cut.programs, c), dtype=torch.float32, device=x.device)
    launch(
        reduce_gradient_kernel,
        cut.grid,
        num_warps=NUM_WARPS,
        **tensors,
        masked=masked,
        partial=partial,
        RELU=relu,
        **arguments,
    )
    launch(
        combine_gradient_kernel,
        _combine_grid(c),
        partial=partial,
        **{name: tensors[name] for name in ("mean", "var", "weight", "eps")},
        grad_weight=grad_weight if need_affine else None,
        grad_bias=grad_bias if need_affine else None,
        factors=factors,
        programs=cut.programs,
        channels=c,
        count=cut.count,
        TRAINING=training,
        **_COMBINE,
    )
    grad_x = torch.empty_like(x) if need_x else x.new_empty(0)
    if need_x:
        if masked is not None:  # it holds the gradient behind the ReLU
            tensors, relu = {**tensors, "grad": masked, "mask": None}, NO_RELU
        launch(
            apply_gradient_kernel,
            cut.grid,
            num_warps=NUM_WARPS,
            **tensors,
            factors=factors,
            grad_x=grad_x,
            TRAINING=training,
            RELU=relu,
            **arguments,
        )
    return grad_x, grad_weight, grad_bias


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
    tensors = {
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
    grads = gradients(cut, tensors, training, mode, need_x, need_affine, masked)
    return (*grads, x.new_empty(0) if masked is None else masked)


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
