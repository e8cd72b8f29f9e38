"""How kernels see a dense activation [N, C, H, W]: as rows (pixels) x channels, in tiles [BLOCK_ROWS, BLOCK_CHANNELS].

In channels_last a row is N*H*W's and its channels lie next to each other. In NCHW the rows of an image are padded to a
multiple of 8, so that the 8 bits of a mask's byte (fastres/layout.py) are rows of one tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from fastres import layout
from fastres.kernels.triton.launch import multiprocessors


@dataclass(frozen=True)
class Rows:
    """An activation as its kernels address it, and the tile for passes over it.

    A tile has 8192 values, 32 for each thread of 8 warps: with two programs on a multiprocessor 32 KB (of 2-byte
    values) are on their way, which is what keeps the memory of an H200 busy (4.3 TB/s at a latency of 0.8 us).
    """

    rows: int
    pixels: int  # H * W
    channels: int
    count: int  # values a channel
    channels_last: bool
    block_rows: int
    block_channels: int
    programs: int  # along the rows

    @property
    def grid(self) -> tuple[int, int]:
        return self.programs, triton.cdiv(self.channels, self.block_channels)

    def arguments(self) -> dict[str, int | bool]:
        """What kernels take of it."""
        return {
            "rows": self.rows,
            "pixels": self.pixels,
            "channels": self.channels,
            "CHANNELS_LAST": self.channels_last,
            "BLOCK_ROWS": self.block_rows,
            "BLOCK_CHANNELS": self.block_channels,
        }


NUM_WARPS = 8
_VALUES, _PROGRAMS_EACH = 8192, 2


def rows_of(x: Tensor) -> Rows:
    """How a dense x is cut."""
    n, c, h, w = x.shape
    channels_last = layout.is_channels_last(x)
    rows = n * h * w if channels_last else n * triton.cdiv(h * w, 8) * 8
    block_channels = min(max(triton.next_power_of_2(c), 8), 128) if channels_last else 4
    block_rows = _VALUES // block_channels
    if not channels_last or rows < block_rows:
        block_rows = max(8, min(block_rows, triton.next_power_of_2(rows)))
    tiles = triton.cdiv(rows, block_rows)
    wanted = triton.cdiv(_PROGRAMS_EACH * multiprocessors(x), triton.cdiv(c, block_channels))
    return Rows(rows, h * w, c, n * h * w, channels_last, block_rows, block_channels, min(tiles, wanted))


@triton.jit
def in_image(row, rows, pixels, CHANNELS_LAST: tl.constexpr):
    """Which rows are pixels of the activation."""
    if CHANNELS_LAST:
        return row < rows
    else:
        return (row < rows) & (row % (tl.cdiv(pixels, 8) * 8) < pixels)


@triton.jit
def tile(row, channel, rows, pixels, channels, CHANNELS_LAST: tl.constexpr):
    """Of a tile [row, channel]: offsets into the activation, which of them exist, byte and bit in its mask."""
    if CHANNELS_LAST:
        offset = row[:, None] * channels + channel[None, :]
        byte = row[:, None] * tl.cdiv(channels, 8) + (channel // 8)[None, :]
        bit = (channel % 8)[None, :]
    else:
        padded = tl.cdiv(pixels, 8) * 8
        pixel = row % padded
        run = (row // padded)[:, None] * channels + channel[None, :]
        offset = run * pixels + pixel[:, None]
        byte = run * (padded // 8) + (pixel // 8)[:, None]
        bit = (pixel % 8)[:, None]
    exists = in_image(row, rows, pixels, CHANNELS_LAST)[:, None] & (channel < channels)[None, :]
    return offset, exists, byte, bit


@triton.jit
def load_mask(mask, byte, bit, exists):
    """The bits of a 1-bit mask, as booleans."""
    return ((tl.load(mask + byte, exists, other=0).to(tl.int32) >> bit) & 1) != 0


@triton.jit
def store_mask(
    mask,
    keep,
    row,
    channel,
    rows,
    pixels,
    channels,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Packs the booleans of a tile into the mask; `keep` is false where the tile has no values."""
    bits = keep.to(tl.int32)
    if CHANNELS_LAST:
        packed = tl.reshape(bits << (channel % 8)[None, :], (BLOCK_ROWS, BLOCK_CHANNELS // 8, 8))
        first = tl.min(tl.reshape(channel, (BLOCK_CHANNELS // 8, 8)), axis=1)
        _, exists, byte, _ = tile(row, first, rows, pixels, channels, CHANNELS_LAST)
        tl.store(mask + byte, tl.sum(packed, axis=2).to(tl.uint8), exists)
    else:
        packed = tl.reshape(bits << (row % 8)[:, None].to(tl.int32), (BLOCK_ROWS // 8, 8, BLOCK_CHANNELS))
        first = tl.min(tl.reshape(row, (BLOCK_ROWS // 8, 8)), axis=1)
        _, exists, byte, _ = tile(first, channel, rows, pixels, channels, CHANNELS_LAST)
        tl.store(mask + byte, tl.sum(packed, axis=1).to(tl.uint8), exists)
