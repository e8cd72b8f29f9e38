"""conv_bias_act on NVIDIA GPUs by cuDNN, through ATen: convolution with bias, residual and ReLU in its epilogue."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastres import layout, reference
from fastres.kernels import aten, cpu

#: Calls that cuDNN had no engine for.
_refused: set[tuple[Any, ...]] = set()


def unavailable() -> str | None:
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device"
    return None if torch.backends.cudnn.is_available() else "this PyTorch has no cuDNN"


def why_not(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *options: Any) -> str | None:
    if reason := cpu.conv_bn_act_why_not(x, weight):
        return reason
    if not options[-1]:
        return "there is no ReLU to fuse"
    if not torch.backends.cudnn.enabled:
        return "cuDNN is switched off (torch.backends.cudnn)"
    return "cuDNN has no engine for it" if _key(x, weight, bias, residual, *options) in _refused else None


def _key(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *options: Any) -> tuple[Any, ...]:
    order = reference.conv_format(x, weight)
    return x.device, x.dtype, x.shape, weight.shape, order, bias is None, residual is None, str(options)


def conv_bias_act(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *options: Any) -> Tensor:
    *geometry, relu = options
    weight = layout.plain(weight)
    bias = None if bias is None else bias.to(x.dtype)
    try:
        y = _fused(x, weight, bias, None if residual is None else residual.to(x.dtype), geometry)
    except RuntimeError as error:
        if "engine" not in str(error) and "NOT_SUPPORTED" not in str(error):
            raise
        _refused.add(_key(x, weight, bias, residual, *options))
        y = aten.convolve(x, weight, bias, tuple(geometry))
        y = (y if residual is None else y.add_(residual)).relu_()
    return layout.in_format(y, reference.conv_format(x, weight))


def _fused(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, geometry: list[Any]) -> Tensor:
    if residual is None:
        return torch.ops.aten.cudnn_convolution_relu(x, weight, bias, *geometry)
    return torch.ops.aten.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *geometry)
