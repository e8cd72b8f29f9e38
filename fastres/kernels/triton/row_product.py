"""D = G^T A, summed over the rows (pixels) of two activations: the gradient of a 1x1 convolution's weight.

The rows are dealt out to programs, whose fp32 sums another kernel adds up in a fixed order, in float64.
"""

from __future__ import annotations

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
from fastres.kernels.triton.tiles import load_mask, tiles_of


@triton.jit(do_not_specialize=GEOMETRY)
def row_product_kernel(
    g,
    raw,  # if given, g is the gradient of a batch norm's output, raw that one's input, whose gradient stands for g
    raw_norm,
    mask,  # if given, g counts as 0 where the mask has no 1
    masked,  # if given, that g is written to it
    a,
    norm,
    centre,  # if given, fp32 [depth], which is subtracted from the rows of A
    partial,  # fp32 [splits, columns * depth (+ columns)]: G^T A, and the column sums of G
    rows,
    columns,
    depth,
    height,
    width,
    out_height,
    out_width,
    stride_h,
    stride_w,
    SUMS: tl.constexpr,
    GATHER: tl.constexpr,  # rows of A are sampled pixels
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """Programs of the same rows follow each other, so that G and A are read from memory once."""
    depth_tiles = tl.cdiv(depth, BLOCK_DEPTH)
    depth_tile = tl.program_id(0) % depth_tiles
    column = tl.program_id(0) // depth_tiles * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    channel = depth_tile * BLOCK_DEPTH + tl.arange(0, BLOCK_DEPTH)
    split, splits = tl.program_id(1), tl.num_programs(1)
    row = tl.arange(0, BLOCK_ROWS)
    here, there = row[:, None] * columns + column[None, :], row[:, None] * depth + channel[None, :]
    own = column < tl.where(depth_tile == 0, columns, 0)  # what is of G alone, one program of several writes
    sums = tl.zeros((BLOCK_COLUMNS, BLOCK_DEPTH), tl.float32)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for turn in range(split, tiles_of(rows, BLOCK_ROWS), splits):
        first = tl.cast(turn * BLOCK_ROWS, tl.int64)
        left = rows - turn * BLOCK_ROWS
        present = (row < left)[:, None]
        exists = present & (column < columns)[None, :]
        gradient = tl.load(g + first * columns + here, exists, other=0.0)
        if raw is not None:
            behind = tl.load(raw + first * columns + here, exists, other=0.0)
            gradient = differentiated(gradient, behind, raw_norm, exists, column, columns)
        if mask is not None:
            bits = mask + first * tl.cdiv(columns, 8)
            gradient = tl.where(load_mask(bits, row, column, left, 1, columns, True), gradient, 0.0)
        if gradient.dtype == tl.float32 and raw is None and mask is None:
            # Through registers: TF32 products of Hopper take G turned, which would be read value by value otherwise.
            gradient = tl.where(exists, gradient, 0.0)
        if masked is not None:
            tl.store(masked + first * columns + here, gradient, present & own[None, :])
        if SUMS:
            total += gradient.to(tl.float32)
        place = a + first * depth + there
        if GATHER:
            pixel = sampled(first + row, height, width, out_height, out_width, stride_h, stride_w)
            place = a + pixel[:, None] * depth + channel[None, :]
        values = tl.load(place, present & (channel < depth)[None, :], other=0.0)
        if norm is not None:
            values = activated(values, norm, channel, depth)
        if centre is not None:
            values -= tl.load(centre + channel, channel < depth, other=0.0)[None, :]
        sums = tl.dot(tl.trans(gradient), values, sums, input_precision=PRECISION)
    size = columns * depth
    if SUMS:
        size += columns
    partial += tl.cast(split, tl.int64) * size
    inside = (column < columns)[:, None] & (channel < depth)[None, :]
    tl.store(partial + column[:, None] * depth + channel[None, :], sums, inside)
    if SUMS:
        tl.store(partial + columns * depth + column, tl.sum(total, axis=0), own)


@triton.jit
def sum_kernel(partial, out, splits, size, BLOCK_SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """out [size] = the sum of partial [splits, size] over the splits, in float64."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK_SPLITS, BLOCK), tl.float64)
    for first in range(0, splits, BLOCK_SPLITS):
        split = first + tl.arange(0, BLOCK_SPLITS)
        exists = (split < splits)[:, None] & (place < size)[None, :]
        values = tl.load(partial + split.to(tl.int64)[:, None] * size + place[None, :], exists, other=0.0)
        total += values.to(tl.float64)
    tl.store(out + place, tl.sum(total, axis=0).to(out.dtype.element_ty), place < size)


def blocks(
    x: Tensor, columns: int, depth: int, sums: bool, norm: bool, behind: bool = False, gathered: bool = False
) -> dict[str, Any]:
    """The tile of a program: its results columns x depth, and rows at a step; otherwise as of product.blocks.

    Column sums are kept for each row of a step: where the tile is large, there is room for those of 32 rows. A
    batch norm before the product spills on Blackwell with 64 rows of a small tile. The gradient of one, for which two
    activations are read, takes half of the rows and of the warps too; in fp32, with rows that are gathered, one step at
    a time: copies of several on their way would be of 4 bytes each.
    """
    wide = x.element_size() == 4
    exact, most = wide and precision() == "ieee", 64 if wide else 128
    block_columns, block_depth = (min(max(triton.next_power_of_2(n), 16), most) for n in (columns, depth))
    results = block_columns * block_depth
    half = (sums and results == 128 * 128) or (norm and results == 64 * 64)
    many = results >= (4096 if exact else 8192) and not (behind and results == 8192)
    return {
        "BLOCK_ROWS": 32 if wide or half or behind else 64,
        "BLOCK_COLUMNS": block_columns,
        "BLOCK_DEPTH": block_depth,
        "num_warps": 8 if many else 4,
        "num_stages": 1 if wide and behind and gathered and not norm else 4 if half and not behind else 3,
    }


def splits(x: Tensor, rows: int, tiles: int, block_rows: int) -> int:
    """Into how many programs the rows of each of `tiles` results are dealt: two programs for each multiprocessor."""
    return max(1, min(triton.cdiv(rows, block_rows), 2 * multiprocessors(x) // tiles))


def sum_splits(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """[splits, size] -> [size]."""
    count, size = partial.shape
    out = torch.empty(size, dtype=dtype, device=partial.device)
    launch(
        sum_kernel,
        (triton.cdiv(size, 256),),
        partial=partial,
        out=out,
        splits=count,
        size=size,
        num_warps=8,
        BLOCK_SPLITS=32,
        BLOCK=256,
    )
    return out


def row_product(
    g: Tensor,
    a: Tensor,
    columns: int,
    depth: int,
    *,
    dtype: torch.dtype,
    gather: Sampling | None = None,
    mask: Tensor | None = None,
    masked: Tensor | None = None,
    norm: Tensor | None = None,
    behind: NormGradient | None = None,
    centre: Tensor | None = None,
    sums: bool = False,
) -> tuple[Tensor, Tensor]:
    """G^T A [columns, depth], and the column sums of G (empty unless asked for), in `dtype`.

    Args:
        g, a: activations dense in channels_last, rows of `columns` and of `depth` values, of one dtype.
        gather: which pixels of `a` are its rows; all if not given.
        mask: uint8, of g's values as fastres/layout.py describes: g counts as 0 where it has no 1.
        masked: like g; that g is written to it.
        norm: as operands.norm_of makes it: relu(batch_norm(a)) stands for a.
        behind: g is the gradient of that batch norm's output, and the gradient of its input stands for it.
        centre: fp32 [depth]: a - centre stands for a, which must be fp32.
    """
    rows = g.numel() // columns
    how = {"sums": sums, "norm": norm is not None, "behind": behind is not None, "gathered": gather is not None}

    def key() -> str:
        words = f"row product: 2^{rows.bit_length() - 1} rows, {columns} columns, {depth} deep"
        return ", ".join([words, *(word for word, given in how.items() if given)])

    plain = blocks(g, columns, depth, **how)
    block = tuning.choose_tile(key, g, plain, ("BLOCK_COLUMNS", "BLOCK_DEPTH"), "BLOCK_ROWS")
    tiles = triton.cdiv(columns, block["BLOCK_COLUMNS"]) * triton.cdiv(depth, block["BLOCK_DEPTH"])
    grid = tiles, splits(g, rows, tiles, block["BLOCK_ROWS"])
    size = columns * depth + (columns if sums else 0)
    partial = torch.empty((grid[1], size), dtype=torch.float32, device=g.device)
    launch(
        row_product_kernel,
        grid,
        g=g,
        raw=None if behind is None else behind.raw,
        raw_norm=None if behind is None else behind.coefficients,
        mask=mask,
        masked=masked,
        a=a,
        norm=norm,
        centre=centre,
        partial=partial,
        rows=rows,
        columns=columns,
        depth=depth,
        **geometry(gather),
        SUMS=sums,
        GATHER=gather is not None,
        PRECISION=precision(),
        **block,
    )
    total = sum_splits(partial, dtype)
    return total[: columns * depth].view(columns, depth), total[columns * depth :]
