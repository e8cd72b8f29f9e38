"""C = act((A B u + A2 B2) * scale + bias + residual): the matrix product behind 1x1 convolutions and their gradients.

A [rows, depth] is an activation: its rows are pixels (operands.py says which). relu(batch_norm(A)) may stand for it;
or, where A is the gradient of a batch norm's output, that of its input. B [depth, columns] is a weight with any
strides. Products are summed in fp32, first those of A B, then of A2 B2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastres.kernels.triton import tuning
from fastres.kernels.triton.launch import launch, multiprocessors
from fastres.kernels.triton.operands import (
    GEOMETRY,
    NormGradient,
    Sampling,
    activated,
    differentiated,
    geometry,
    precision,
    sampled,
)
from fastres.kernels.triton.tiles import store_mask, tiles_of


@triton.jit
def add_product(
    sums,
    a,
    raw,
    norm,
    b,
    pixel,
    exists,
    column,
    columns,
    depth,
    stride_depth,
    stride_column,
    PRECISION: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """sums + A B of a tile, whose rows of A are the pixels `pixel`."""
    channel = tl.arange(0, BLOCK_DEPTH)
    offset = pixel[:, None] * depth + channel[None, :]
    place = a + offset
    if raw is not None:
        beside = raw + offset
    weight = b + channel[:, None] * stride_depth + column[None, :] * stride_column
    for first in range(0, depth, BLOCK_DEPTH):
        inside = channel < depth - first
        present = exists[:, None] & inside[None, :]
        values = tl.load(place + first, present, other=0.0)
        if raw is not None:
            passed = tl.load(beside + first, present, other=0.0)
            values = differentiated(values, passed, norm, present, first + channel, depth)
        elif norm is not None:
            values = activated(values, norm, first + channel, depth)
        factors = tl.load(weight + first * stride_depth, inside[:, None] & (column < columns)[None, :], other=0.0)
        sums = tl.dot(values, factors, sums, input_precision=PRECISION)
    return sums


@triton.jit
def finished(sums, scale, bias, residual, offset, exists, column, columns):
    """sums * scale + bias + residual of a tile, each where given."""
    inside = column < columns
    if bias is not None:
        shift = tl.load(bias + column, inside, other=0.0).to(tl.float32)[None, :]
        if scale is not None:
            factor = tl.broadcast_to(tl.load(scale + column, inside, other=0.0)[None, :], sums.shape)
            sums = tl.fma(sums, factor, tl.broadcast_to(shift, sums.shape))
        else:
            sums += shift
    if residual is not None:
        sums += tl.load(residual + offset, exists, other=0.0).to(tl.float32)
    return sums


@triton.jit
def store_statistics(partial, values, exists, count, program, programs, column, columns):
    """Of one tile, what batch_norm.statistics_kernel leaves: k, mean - k, squares around the mean, count."""
    k = tl.sum(tl.where(exists, values, 0.0), axis=0) / count
    k = tl.where(tl.abs(k) < float("inf"), k, 0.0)  # if it is not finite, the sums will say so
    distance = tl.where(exists, values - k[None, :], 0.0)
    total = tl.sum(distance, axis=0)
    mean = total / count
    squares = tl.sum(distance * distance, axis=0) - total * mean
    place = partial + tl.cast(program, tl.int64) * columns + column
    plane = tl.cast(programs, tl.int64) * columns
    inside = column < columns
    tl.store(place, k, inside)
    tl.store(place + plane, mean, inside)
    tl.store(place + 2 * plane, squares, inside)
    tl.store(place + 3 * plane, tl.zeros_like(k) + count, inside)


@triton.jit(do_not_specialize=GEOMETRY)
def product_kernel(
    a,
    raw,  # if given, A is the gradient of a batch norm's output, and raw that one's input
    norm,
    b,
    depth,
    b_stride_depth,
    b_stride_column,
    a2,
    norm2,
    b2,
    unit,  # if given, one fp32 value that A B is multiplied by before A2 B2 is added
    depth2,
    b2_stride_depth,
    b2_stride_column,
    out,
    scale,
    bias,
    residual,
    mask,  # if given, what the ReLU lets through is written to it
    partial,  # if given, fp32 [4, tiles of rows, columns]: statistics of the values written, as statistics_kernel's
    rows,
    columns,
    height,
    width,
    out_height,
    out_width,
    stride_h,
    stride_w,
    GATHER: tl.constexpr,  # rows of A are sampled pixels
    SCATTER: tl.constexpr,  # rows of the result, and of the residual, are
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """One tile. Programs of the same rows follow each other, so that A is read from memory once."""
    column_tiles = tl.cdiv(columns, BLOCK_COLUMNS)
    program = tl.program_id(0) // column_tiles
    column = tl.program_id(0) % column_tiles * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    first = tl.cast(program, tl.int64) * BLOCK_ROWS
    row = tl.arange(0, BLOCK_ROWS)
    count = tl.minimum(rows - first, BLOCK_ROWS).to(tl.int32)
    pixel, target = row, row
    if GATHER:
        pixel = sampled(first + row, height, width, out_height, out_width, stride_h, stride_w)
    else:
        a += first * depth
        if raw is not None:
            raw += first * depth
    if SCATTER:
        target = sampled(first + row, height, width, out_height, out_width, stride_h, stride_w)
    else:
        out += first * columns
        if residual is not None:
            residual += first * columns
    sums = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    sums = add_product(
        sums,
        a,
        raw,
        norm,
        b,
        pixel,
        row < count,
        column,
        columns,
        depth,
        b_stride_depth,
        b_stride_column,
        PRECISION,
        BLOCK_DEPTH,
    )
    if unit is not None:
        sums *= tl.load(unit)
    if a2 is not None:
        a2 += first * depth2
        sums = add_product(
            sums,
            a2,
            None,
            norm2,
            b2,
            row,
            row < count,
            column,
            columns,
            depth2,
            b2_stride_depth,
            b2_stride_column,
            PRECISION,
            BLOCK_DEPTH,
        )
    offset = target[:, None] * columns + column[None, :]
    exists = (row < count)[:, None] & (column < columns)[None, :]
    z = finished(sums, scale, bias, residual, offset, exists, column, columns)
    if mask is not None:
        mask += first * tl.cdiv(columns, 8)
        store_mask(mask, exists & ~(z <= 0.0), row, column, count, 1, columns, True)
    if RELU:
        z = tl.where(z <= 0.0, 0.0, z)
    values = z.to(out.dtype.element_ty)
    tl.store(out + offset, values, exists)
    if partial is not None:
        programs = tiles_of(rows, BLOCK_ROWS)
        store_statistics(partial, values.to(tl.float32), exists, count, program, programs, column, columns)


@dataclass(frozen=True)
class Pair:
    """The factors of one product.

    Attributes:
        a: activation dense in channels_last; rows of `depth` values.
        b: [depth, columns] in a's dtype, with any strides.
        norm: as operands.norm_of makes it: relu(batch_norm(a)) stands for a.
        behind: of the first pair, without gather: a is the gradient of that batch norm's output, and the gradient of
            its input stands for it.
    """

    a: Tensor
    b: Tensor
    norm: Tensor | None = None
    behind: NormGradient | None = None


def blocks(
    x: Tensor, rows: int, columns: int, depth: int, norm: bool, taps: int = 1, behind: bool = False
) -> dict[str, Any]:
    """The tile of a program, its warps and its pipeline; the depth of a product is that of `taps` pixels.

    128 x 128 results by 64 of depth are what two groups of 4 warps of an H100 (wgmma) keep in registers, with three
    steps of both factors in 96 KB of shared memory. Where the depth is no more than 128, reading and writing results
    takes longer than computing them: then 64 columns, with which two programs fit on a multiprocessor and one computes
    while the other waits. Fewer columns where there are no more, fewer rows where there would not be a program for each
    multiprocessor. A batch norm before the product takes registers too: half the depth, and four steps; three where it
    is the gradient of one, which reads two activations. fp32 takes half the depth, for the same bytes, and 64 columns;
    where it is not TF32, products are not made by matrix units, and 64 rows leave them enough registers. A batch
    norm before several taps in fp32 takes one step at a time, or it spills.
    """
    wide = x.element_size() == 4
    exact = wide and precision() == "ieee"
    block_columns = min(max(triton.next_power_of_2(columns), 16), 64 if wide or depth * taps <= 128 else 128)
    half = wide or norm or behind
    block_depth = min(max(triton.next_power_of_2(depth), 16), 32 if half else 64)
    block_rows = 64 if exact else 128
    if triton.cdiv(rows, block_rows) * triton.cdiv(columns, block_columns) < multiprocessors(x):
        block_rows = min(64, max(triton.next_power_of_2(rows), 16))
    return {
        "BLOCK_ROWS": block_rows,
        "BLOCK_COLUMNS": block_columns,
        "BLOCK_DEPTH": block_depth,
        "num_warps": 8 if block_rows * block_columns >= (4096 if exact else 8192) else 4,
        "num_stages": 1 if wide and norm and taps > 1 else 4 if norm and not wide else 3,
    }


def tuned(
    x: Tensor, rows: int, columns: int, depth: int, norm: bool, taps: int = 1, behind: bool = False
) -> dict[str, Any]:
    """The tile of blocks(), or the one that was measured (tuning.py)."""

    def key() -> str:
        words = f"product: 2^{rows.bit_length() - 1} rows, {columns} columns, {taps} x {depth} deep"
        return words + ", norm" * norm + ", behind" * behind

    plain = blocks(x, rows, columns, depth, norm, taps, behind)
    return tuning.choose_tile(key, x, plain, ("BLOCK_ROWS", "BLOCK_COLUMNS"), "BLOCK_DEPTH")


def product(
    first: Pair,
    out: Tensor,
    second: Pair | None = None,
    *,
    unit: Tensor | None = None,
    gather: Sampling | None = None,
    scatter: Sampling | None = None,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    relu: bool = False,
    statistics: bool = False,
) -> Tensor | None:
    """Writes act((A B u + A2 B2) * scale + bias + residual) to `out`.

    Args:
        first, second: the factors of both products; A2 has the rows of the result.
        out: activation dense in channels_last; rows of `columns` values.
        unit: u, fp32 [1], for a B that its dtype could not hold otherwise; 1 if not given.
        gather: which pixels of the first A are its rows; all if not given.
        scatter: which pixels of `out` are written, where they are not all.
        scale, bias: [columns]; scale fp32, and only with a bias.
        residual: like `out`.
        mask: uint8, of `out`'s values as fastres/layout.py describes; what the ReLU lets through is written to it.
        statistics: with it the result is what statistics.combine_statistics takes, of the values written.
    """
    depth, columns = first.b.shape
    rows = out.numel() // columns if scatter is None else first.a.numel() // depth
    behind = first.behind
    block = tuned(out, rows, columns, depth, first.norm is not None, behind=behind is not None)
    row_tiles, column_tiles = triton.cdiv(rows, block["BLOCK_ROWS"]), triton.cdiv(columns, block["BLOCK_COLUMNS"])
    shape = (4, row_tiles, columns)
    partial = torch.empty(shape, dtype=torch.float32, device=out.device) if statistics else None
    b2 = None if second is None else second.b
    launch(
        product_kernel,
        (row_tiles * column_tiles,),
        a=first.a,
        raw=None if behind is None else behind.raw,
        norm=first.norm if behind is None else behind.coefficients,
        b=first.b,
        depth=depth,
        b_stride_depth=first.b.stride(0),
        b_stride_column=first.b.stride(1),
        a2=None if second is None else second.a,
        norm2=None if second is None else second.norm,
        b2=b2,
        unit=unit,
        depth2=0 if b2 is None else b2.shape[0],
        b2_stride_depth=0 if b2 is None else b2.stride(0),
        b2_stride_column=0 if b2 is None else b2.stride(1),
        out=out,
        scale=scale,
        bias=bias,
        residual=residual,
        mask=mask,
        partial=partial,
        rows=rows,
        columns=columns,
        **geometry(gather or scatter),
        GATHER=gather is not None,
        SCATTER=scatter is not None,
        RELU=relu,
        PRECISION=precision(),
        **block,
    )
    return partial
