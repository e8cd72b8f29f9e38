"""Cases, errors and budgets that tests, `fastres verify` and benchmarks share (DESIGN: everything is judged against
float64)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

#: Activations [N, C, H, W], the ugly ones included: odd channel counts, 1x1 maps, batch 1, more rows than one chunk of
#: work.
SHAPES = (
    (4, 64, 14, 14),
    (2, 17, 7, 5),
    (1, 65, 3, 3),
    (3, 3, 9, 11),
    (2, 8, 1, 1),
    (16, 1, 4, 4),
    (1, 16, 7, 7),
    (2, 130, 33, 35),
)


@dataclass(frozen=True)
class Case:
    """One input of an op: shape, dtype, layout."""

    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    layout: str

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))}-{str(self.dtype).removeprefix('torch.')}-{self.layout}"

    def tensor(self, *, mean: float = 0.0, std: float = 1.0, shape: tuple[int, ...] | None = None) -> Tensor:
        """Random values in this case's dtype and layout."""
        values = torch.randn(shape or self.shape) * std + mean
        return values.to(self.dtype).contiguous(memory_format=LAYOUTS[self.layout])


def cases(shapes: tuple[tuple[int, int, int, int], ...] = SHAPES) -> list[Case]:
    """Every shape in every dtype and layout."""
    return [Case(shape, dtype, layout) for shape in shapes for dtype in DTYPES for layout in LAYOUTS]


def relative_error(x: Tensor, truth: Tensor) -> float:
    """||x - truth|| / ||truth|| in float64; 0 for two empty tensors, inf if only one side is finite somewhere."""
    x, truth = x.detach().double(), truth.detach().double()
    if x.shape != truth.shape:
        return float("inf")
    finite = torch.isfinite(truth)
    if not torch.equal(finite, torch.isfinite(x)) or not torch.equal(
        x[~finite].nan_to_num(), truth[~finite].nan_to_num()
    ):
        return float("inf")
    scale = truth[finite].norm()
    error = (x[finite] - truth[finite]).norm()
    return float(error / scale) if scale > 0 else float(error)


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of one rounding to `dtype`."""
    return torch.finfo(dtype).eps / 2


#: What Winograd's F(4x4, 3x3) may be off by in float32; the direct way has an error of about 2e-7.
WINOGRAD = 5e-6


def budget(eager_error: float, dtype: torch.dtype, *, summed: bool = False, winograd: bool = False) -> float:
    """What a fused result may be off by: twice eager's error, or a few roundings where eager is luckier than that.

    `summed`: the result is a few sums whose terms cancel (gradients of weight and bias), where luck counts for more.
    `winograd`: a Winograd convolution may have been part of it.
    """
    limit = max(2 * eager_error, (16 if summed else 4) * unit_roundoff(dtype))
    return max(limit, WINOGRAD) if winograd and dtype is torch.float32 else limit
