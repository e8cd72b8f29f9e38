"""conv_bias_act on CPU: oneDNN's convolution with bias and residual in its epilogue, reached through ATen.

The weight may be packed (`prepare`): oneDNN's own blocked order, which a plain weight is put into on every call. Where
oneDNN has no bf16 or fp16 convolution on this processor, the activation is converted and the convolution runs in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastres import layout, reference


def unavailable() -> str | None:
    return None if torch.backends.mkldnn.is_available() else "this PyTorch was built without oneDNN"


def why_not(x: Tensor, weight: Tensor, *args: Any) -> str | None:
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{x.dtype} activations"
    if not torch.backends.mkldnn.enabled:
        return "oneDNN is switched off (torch.backends.mkldnn)"
    return "empty batch" if x.numel() == 0 else None


@cache
def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a convolution of this storage dtype runs: itself, or float32 where oneDNN cannot."""
    if dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return dtype
    if dtype is torch.float16 and torch.ops.mkldnn._is_mkldnn_fp16_supported():
        return dtype
    return torch.float32


@dataclass(frozen=True, slots=True)
class Packed:
    """A convolution with its weight in oneDNN's order: what `prepare` returns."""

    weight: Tensor
    bias: Tensor | None
    geometry: tuple[list[int], list[int], list[int], int]
    order: torch.memory_format
    nbytes: int

    @property
    def kernel(self) -> tuple[str, str]:
        return "onednn", ""

    def __call__(self, x: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
        x = x.contiguous(memory_format=self.order)
        return conv_bias_act(x, self.weight, self.bias, residual, *self.geometry, relu)


def prepare(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Packed:
    """Puts `weight` into oneDNN's order for inputs of about x's shape (right for all)."""
    dtype = compute_dtype(x.dtype)
    reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight  # its stub lacks the last argument
    packed = reorder(weight.to(dtype).to_mkldnn(), padding, stride, dilation, groups, list(x.shape))
    bias = None if bias is None else bias.to(dtype)
    nbytes = weight.numel() * dtype.itemsize  # at least: oneDNN may pad
    return Packed(packed, bias, (stride, padding, dilation, groups), reference.conv_format(x, weight), nbytes)


def conv_bias_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    relu: bool,
) -> Tensor:
    dtype, order = compute_dtype(x.dtype), reference.conv_format(x, weight)
    storage = x.dtype
    x = x.to(dtype)
    weight = weight if weight.is_mkldnn else layout.plain(weight.to(dtype))
    bias = None if bias is None else bias.to(dtype)
    geometry = (padding, stride, dilation, groups)
    if residual is None or residual.shape[2:] == (1, 1):  # in PyTorch 2.11 it cannot add to maps of one pixel
        y = torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *geometry, "none", [], "")
        y = y if residual is None else y.add_(residual)
    else:
        residual = residual.to(dtype).contiguous(memory_format=order)
        y = torch.ops.mkldnn._convolution_pointwise.binary(
            x, residual, weight, bias, *geometry, "add", 1.0, None, [], ""
        )
    if relu:
        y = y.relu_()  # not oneDNN's, which turns NaN into 0
    return layout.in_format(y.to(storage), order)
