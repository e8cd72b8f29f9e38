"""The convolution ops with the Triton kernels: fastres/kernels/aten.py."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastres.kernels import aten
from fastres.kernels.triton import batch_norm, elementwise

conv_bn_act = aten.conv_bn_act(batch_norm.bn_act)
conv_bn_act_backward = aten.conv_bn_act_backward(batch_norm.bn_act_backward)


def conv_bias_act(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *options: Any) -> Tensor:
    *geometry, relu = options
    y = aten.convolve(x, weight, bias, tuple(geometry))
    if residual is not None:
        return elementwise.add_act(y, residual, relu)
    return y.relu_() if relu else y
