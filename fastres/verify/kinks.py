"""Inputs at which a gradient is well defined in float32.

ReLU and max-pooling have kinks. Where rounding puts a value on the other side of one, the gradient jumps, in eager as
in fused code: one such value in a million changes a gradient by 1e-3, a thousand times its rounding error. So before
gradients of a site are compared, the few pixels of its input that lead to such values are moved a little.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres.verify.run import Call, run

#: Distance from a kink that no rounding of a few fp32 layers bridges, relative to the layer's root mean square.
MARGIN = 2.0**-15
#: How far a pixel is moved, relative to the root mean square of the input: far enough, and so little that the batch
#: statistics stay what they are and push no other value near a kink.
STEP = 2.0**-10
ROUNDS = 12


def avoid(oracle: nn.Module, call: Call, seed: int) -> tuple[Call, int]:
    """Moves pixels of the first 4-D argument until no value comes near a kink in nn.ReLU and nn.MaxPool2d.

    Args:
        oracle: the block in plain float64. call: its arguments in fp32; not written to.

    Returns:
        The moved arguments, and how many values are still near a kink (0, or a few whose batch statistics moved).
    """
    x = next((t for _, t in call.tensors() if t.dim() == 4), None)
    if x is None or x.numel() == 0:
        return call, 0
    moved = x.clone()
    call = call.map(lambda t: moved if t is x else t)
    generator = torch.Generator().manual_seed(seed)
    step = STEP * float(x.double().square().mean().sqrt())
    found: list[tuple[Tensor, torch.Size]] = []
    hooks = [
        module.register_forward_pre_hook(
            lambda m, args: found.append((_near_kinks(m, args[0].detach()), args[0].shape))
        )
        for module in oracle.modules()
        if type(module) in (nn.ReLU, nn.MaxPool2d)
    ]
    try:
        for _ in range(ROUNDS):
            found.clear()
            run(oracle, call.double(), gradients=False, seed=seed, round_to=torch.float64, autocast=None)
            left = sum(len(places) for places, _ in found)
            if left == 0:
                break
            for places, shape in found:
                _move(moved, places, shape, step, generator)
    finally:
        for hook in hooks:
            hook.remove()
    return call, left


def _near_kinks(module: nn.Module, z: Tensor) -> Tensor:
    """Places [K, 3] (image, row, column) of z [N, C, H, W] where a rounding decides what the module does."""
    if z.dim() != 4:
        return z.new_empty(0, 3, dtype=torch.long)
    margin = MARGIN * z.square().mean().sqrt()
    if isinstance(module, nn.MaxPool2d):
        return _near_ties(module, z, margin)
    near = (z.abs() <= margin) & (z != 0)  # what is exactly 0 in float64 is a sum of zeros, and so in fp32
    return near.nonzero()[:, [0, 2, 3]]


def _near_ties(pool: nn.MaxPool2d, z: Tensor, margin: Tensor) -> Tensor:
    """Where the largest value of a window is about as large as the second, unless both are the zeros that ReLU made."""
    window: Any = pool.kernel_size
    stride: Any = pool.stride
    padding: Any = pool.padding
    plain = pool.dilation == 1 and not pool.ceil_mode and all(isinstance(n, int) for n in (window, stride, padding))
    if not plain or window == 1:
        return z.new_empty(0, 3, dtype=torch.long)
    padded = F.pad(z, [padding] * 4, value=-torch.inf) if padding else z
    windows = padded.unfold(2, window, stride).unfold(3, window, stride)  # [N, C, OH, OW, window, window]
    places = []
    for image in range(len(z)):
        best = windows[image].flatten(3).topk(2, dim=3)
        (largest, second), index = best.values.unbind(3), best.indices[..., 0]
        near = (largest - second <= margin) & (largest != 0)
        corner = near.nonzero()[:, 1:] * stride - padding
        place = corner + torch.stack([index[near] // window, index[near] % window], dim=1)
        places.append(F.pad(place, (1, 0), value=image))
    return torch.cat(places)


def _move(x: Tensor, places: Tensor, shape: torch.Size, step: float, generator: torch.Generator) -> None:
    """Adds noise to the pixels of x that lie under places of a map of `shape`."""
    image, row, column = places.unbind(1)
    row, column = row * x.shape[2] // shape[2], column * x.shape[3] // shape[3]
    noise = torch.randn(len(places), x.shape[1], generator=generator) * step
    x[image, :, row, column] += noise.to(x.device, x.dtype)
