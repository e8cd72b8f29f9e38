"""add_act and its backward in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastres import layout
from fastres.kernels.triton.launch import launch

#: Values of a program: 32 for each thread of its 4 warps.
_BLOCK = 4096


@triton.jit
def add_act_kernel(x, residual, y, size, RELU: tl.constexpr, BLOCK: tl.constexpr):
    """y = act(x + residual)."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < size
    z = tl.load(x + offset, inside).to(tl.float32) + tl.load(residual + offset, inside).to(tl.float32)
    if RELU:
        z = tl.where(z <= 0.0, 0.0, z)
    tl.store(y + offset, z.to(y.dtype.element_ty), inside)


@triton.jit
def add_act_backward_kernel(grad, y, grad_x, size, BLOCK: tl.constexpr):
    """grad_x = grad where not (y <= 0)."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < size
    g = tl.load(grad + offset, inside)
    kept = tl.where(tl.load(y + offset, inside).to(tl.float32) <= 0.0, 0.0, g.to(tl.float32))
    tl.store(grad_x + offset, kept.to(grad_x.dtype.element_ty), inside)


def add_act(x: Tensor, residual: Tensor, relu: bool) -> Tensor:
    x = layout.dense(x)
    y = torch.empty_like(x)
    grid = (triton.cdiv(x.numel(), _BLOCK),)
    residual = layout.like(residual, layout.is_channels_last(x))
    launch(add_act_kernel, grid, x=x, residual=residual, y=y, size=x.numel(), RELU=relu, BLOCK=_BLOCK)
    return y


def add_act_backward(grad_y: Tensor, y: Tensor) -> Tensor:
    y = layout.dense(y)
    grad_x = torch.empty_like(y)
    grid = (triton.cdiv(y.numel(), _BLOCK),)
    grad = layout.like(grad_y.to(y.dtype), layout.is_channels_last(y))
    launch(add_act_backward_kernel, grid, grad=grad, y=y, grad_x=grad_x, size=y.numel(), BLOCK=_BLOCK)
    return grad_x
