"""1x1 convolutions and their gradients in Triton, for channels_last activations. Formulas: fastres/reference.py.

With strides a 1x1 convolution reads some pixels only: the products take their addresses, nothing is copied.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastres import layout
from fastres.kernels.triton.operands import NormGradient, Sampling, sampling_of
from fastres.kernels.triton.product import Pair, product
from fastres.kernels.triton.row_product import row_product
from fastres.kernels.triton.statistics import combine_statistics


def _sampling(x: torch.Size, stride: tuple[int, int]) -> Sampling | None:
    return None if stride == (1, 1) else sampling_of(tuple(x), stride)


def _empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def conv1x1_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: tuple[int, int] = (1, 1),
    relu: bool = False,
    norm: Tensor | None = None,
    statistics: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """act(conv(x, weight) + bias + residual), and its mean and biased variance (float64 [K]; empty unless asked for).

    Args:
        x: [N, C, H, W]
        weight: [K, C, 1, 1]
        bias: [K]
        residual: like the result.
        norm: as operands.norm_of makes it: relu(batch_norm(x)) stands for x.
    """
    x, w = layout.like(x, True), weight.flatten(1).to(x.dtype)
    sampling = _sampling(x.shape, stride)
    size = x.shape[2:] if sampling is None else (sampling.out_height, sampling.out_width)
    y = _empty((x.shape[0], w.shape[0], *size), x)
    partial = product(
        Pair(x, w.T, norm),
        y,
        gather=sampling,
        bias=bias,
        residual=None if residual is None else layout.like(residual.to(x.dtype), True),
        relu=relu,
        statistics=statistics,
    )
    none = torch.empty(0, dtype=torch.float64, device=x.device)
    mean, var = (none, none.clone()) if partial is None else combine_statistics(partial, y.numel() // y.shape[1])
    return layout.in_format(y, torch.channels_last), mean, var


def conv1x1_grad_input(
    grad_y: Tensor,
    weight: Tensor,
    shape: torch.Size,
    *,
    stride: tuple[int, int] = (1, 1),
    behind: NormGradient | None = None,
) -> Tensor:
    """The gradient of the input, whose shape is [N, C, H, W].

    Args:
        behind: as operands.norm_gradient_of makes it: grad_y is the gradient of that batch norm's output.
    """
    g, w = layout.like(grad_y, True), weight.flatten(1).to(grad_y.dtype)
    sampling = _sampling(shape, stride)
    grad_x = _empty((*shape,), g)
    if sampling is not None:
        grad_x.zero_()
    product(Pair(g, w, behind=behind), grad_x, scatter=sampling)
    return layout.in_format(grad_x, torch.channels_last)


def conv1x1_grad_weight(
    grad_y: Tensor,
    x: Tensor,
    *,
    stride: tuple[int, int] = (1, 1),
    norm: Tensor | None = None,
    behind: NormGradient | None = None,
) -> Tensor:
    """The gradient of the weight, [K, C, 1, 1] in x's dtype; norm: as of conv1x1_forward, behind: of
    conv1x1_grad_input."""
    k, c = grad_y.shape[1], x.shape[1]
    grad_weight, _ = row_product(
        layout.like(grad_y.to(x.dtype), True),
        layout.like(x, True),
        k,
        c,
        dtype=x.dtype,
        gather=_sampling(x.shape, stride),
        norm=norm,
        behind=behind,
    )
    return grad_weight.view(k, c, 1, 1)
