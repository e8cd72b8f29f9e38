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
from fastres.kernels.triton import tuning
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
            # tile() does not read it in channels_last: a constant, so that one compiled kernel serves all sizes
            "pixels": 1 if self.channels_last else self.pixels,
            "channels": self.channels,
            "CHANNELS_LAST": self.channels_last,
            "BLOCK_ROWS": self.block_rows,
            "BLOCK_CHANNELS": self.block_channels,
        }


NUM_WARPS = 8
#: Values of a tile and programs on a multiprocessor: the choice that Rows explains, then what tuning tries.
_CUTS = [{"values": v, "programs": p} for v, p in ((8192, 2), (8192, 4), (4096, 2), (4096, 4), (2048, 8))]


def rows_of(x: Tensor) -> Rows:
    """How a dense x is cut."""
    n, c, h, w = x.shape
    channels_last = layout.is_channels_last(x)
    rows = n * h * w if channels_last else n * triton.cdiv(h * w, 8) * 8

    def key() -> str:
        order = "channels_last" if channels_last else "contiguous"
        return f"rows: {c} channels, 2^{rows.bit_length() - 1} rows, {str(x.dtype).removeprefix('torch.')}, {order}"

    cut = tuning.choose(key, x.device, _CUTS[0], lambda: _CUTS)
    block_channels = min(max(triton.next_power_of_2(c), 8), 128) if channels_last else 4
    block_rows = cut["values"] // block_channels
    if not channels_last or rows < block_rows:
        block_rows = max(8, min(block_rows, triton.next_power_of_2(rows)))
    tiles = triton.cdiv(rows, block_rows)
    wanted = triton.cdiv(cut["programs"] * multiprocessors(x), triton.cdiv(c, block_channels))
    return Rows(rows, h * w, c, n * h * w, channels_last, block_rows, block_channels, min(tiles, wanted))


@triton.jit
def tiles_of(rows, BLOCK_ROWS: tl.constexpr):
    """How many tiles so many rows have, without a sum that might not fit into 32 bits.

    Loops count tiles, not rows, for the same reason: the row behind the last may be 2^31. To count rows in 64 bits
    would cost a quarter more registers.
    """
    return (rows - 1) // BLOCK_ROWS + 1


@triton.jit
def in_image(row, rows, pixels, CHANNELS_LAST: tl.constexpr):
    """Which rows are pixels of the activation."""
    if CHANNELS_LAST:
        return row < rows
    else:
        return (row < rows) & (row % (tl.cdiv(tl.cast(pixels, tl.int64), 8) * 8) < pixels)


@triton.jit
def tile(row, channel, rows, pixels, channels, CHANNELS_LAST: tl.constexpr):
    """Of a tile [row, channel]: offsets into the activation, which of them exist, byte and bit in its mask."""
    if CHANNELS_LAST:
        offset = row[:, None] * channels + channel[None, :]
        byte = row[:, None] * tl.cdiv(channels, 8) + (channel // 8)[None, :]
        bit = (channel % 8)[None, :]
    else:
        padded = tl.cdiv(tl.cast(pixels, tl.int64), 8) * 8
        pixel = row % padded
        run = (row // padded)[:, None] * channels + channel[None, :]
        offset = run * pixels + pixel[:, None]
        byte = run * (padded // 8) + (pixel // 8)[:, None]
        bit = (pixel % 8)[:, None]
    exists = in_image(row, rows, pixels, CHANNELS_LAST)[:, None] & (channel < channels)[None, :]
    return offset, exists, byte, bit


@triton.jit
def mask_bytes(row, channel, rows, pixels, channels, CHANNELS_LAST: tl.constexpr):
    """Offsets into the mask of the bytes of a tile, one for 8 channels (or 8 rows), and which of them exist."""
    BLOCK_ROWS: tl.constexpr = row.shape[0]
    BLOCK_CHANNELS: tl.constexpr = channel.shape[0]
    if CHANNELS_LAST:
        channel = tl.min(tl.reshape(channel, (BLOCK_CHANNELS // 8, 8)), axis=1)
    else:
        row = tl.min(tl.reshape(row, (BLOCK_ROWS // 8, 8)), axis=1)
    _, exists, byte, _ = tile(row, channel, rows, pixels, channels, CHANNELS_LAST)
    return byte, exists


@triton.jit
def load_mask(mask, row, channel, rows, pixels, channels, CHANNELS_LAST: tl.constexpr):
    """The bits of a tile of a 1-bit mask, as booleans. Every byte is loaded once."""
    BLOCK_ROWS: tl.constexpr = row.shape[0]
    BLOCK_CHANNELS: tl.constexpr = channel.shape[0]
    byte, exists = mask_bytes(row, channel, rows, pixels, channels, CHANNELS_LAST)
    packed = tl.load(mask + byte, exists, other=0).to(tl.int32)
    if CHANNELS_LAST:
        bits = (
            tl.broadcast_to(packed[:, :, None], (BLOCK_ROWS, BLOCK_CHANNELS // 8, 8)) >> tl.arange(0, 8)[None, None, :]
        )
    else:
        bits = (
            tl.broadcast_to(packed[:, None, :], (BLOCK_ROWS // 8, 8, BLOCK_CHANNELS)) >> tl.arange(0, 8)[None, :, None]
        )
    return tl.reshape(bits & 1, (BLOCK_ROWS, BLOCK_CHANNELS)) != 0


@triton.jit
def store_mask(mask, keep, row, channel, rows, pixels, channels, CHANNELS_LAST: tl.constexpr):
    """Packs the booleans of a tile into the mask; `keep` is false where the tile has no values."""
    BLOCK_ROWS: tl.constexpr = row.shape[0]
    BLOCK_CHANNELS: tl.constexpr = channel.shape[0]
    bits = keep.to(tl.int32)
    if CHANNELS_LAST:
        bits = tl.reshape(bits, (BLOCK_ROWS, BLOCK_CHANNELS // 8, 8)) << tl.arange(0, 8)[None, None, :]
        packed = tl.sum(bits, axis=2)
    else:
        bits = tl.reshape(bits, (BLOCK_ROWS // 8, 8, BLOCK_CHANNELS)) << tl.arange(0, 8)[None, :, None]
        packed = tl.sum(bits, axis=1)
    byte, exists = mask_bytes(row, channel, rows, pixels, channels, CHANNELS_LAST)
    tl.store(mask + byte, packed.to(tl.uint8), exists)
