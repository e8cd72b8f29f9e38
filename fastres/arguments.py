"""Checks of the arguments of fused functions, with eager's kinds of errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastres.ops import registration

_ACTIVATIONS = {"relu": True, "identity": False}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def relu(act: str) -> bool:
    if act not in _ACTIVATIONS:
        raise ValueError(f"act must be one of {', '.join(map(repr, _ACTIVATIONS))}, got {act!r}")
    return _ACTIVATIONS[act]


def _pair(value: int | Sequence[int], name: str) -> list[int]:
    if isinstance(value, int):
        return [value, value]
    if isinstance(value, str) or len(value) != 2:
        raise ValueError(f"{name} must be a number or a pair of numbers, got {value!r}")
    return list(value)


def geometry_of(
    stride: int | Sequence[int], padding: int | Sequence[int], dilation: int | Sequence[int], groups: int
) -> tuple:
    return _pair(stride, "stride"), _pair(padding, "padding"), _pair(dilation, "dilation"), groups


def check_input(x: Tensor) -> None:
    if x.dim() != 4:
        raise ValueError(f"expected 4D input (got {x.dim()}D input)")
    if x.dtype not in _DTYPES:
        raise NotImplementedError(f'"batch_norm" not implemented for {x.dtype}')


def check_values_per_channel(shape: Sequence[int]) -> None:
    if shape[0] * shape[2] * shape[3] == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {torch.Size(shape)}")


def check_batch(x: Tensor, shape: Sequence[int], training: bool, process_group: Any) -> Any:
    """The group over which batch norm of [N, C, H, W] = shape is to be synchronised, or None; ValueError for too few
    values a channel."""
    if not training:
        return None
    if process_group is None:
        check_values_per_channel(shape)
    elif not x.is_cpu:
        raise NotImplementedError(f"synchronised batch norm of tensors on {x.device}: CPU only")
    return process_group


def check_batch_norm(
    x: Tensor,
    channels: int,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
) -> None:
    if eps < 0 or (training and eps == 0):
        rule = "positive during training" if training else "non-negative"
        raise ValueError(f"batch_norm eps must be {rule}, but got {eps}")
    if training and (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must either both be None or neither be None")
    names = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    for name, t in names.items():
        if t is None:
            if not training and name.startswith("running"):
                raise RuntimeError(f"{name} must be defined in evaluation mode")
            continue
        if t.numel() != channels:
            raise RuntimeError(f"{name} should contain {channels} elements not {t.numel()}")
        if t.device != x.device:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but x is on {x.device} and {name} on {t.device}"
            )
        if not may_normalise(x.dtype, t.dtype):
            raise RuntimeError(
                f"mixed dtype: expect {name} to be {x.dtype} or, with a half-precision input, float32; got {t.dtype}"
            )
    dtypes = {t.dtype for t in names.values() if t is not None}
    if len(dtypes) > 1:
        raise RuntimeError(f"mixed dtype: batch norm's tensors must share one dtype, got {sorted(map(str, dtypes))}")


def may_normalise(activation: torch.dtype, parameter: torch.dtype) -> bool:
    """Batch norm's tensors have the activation's dtype, or are float32 with a half-precision activation (autocast)."""
    return parameter is activation or (parameter is torch.float32 and activation is not torch.float64)


def check_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple) -> tuple[int, int, int, int]:
    """The shape of the convolution's output; RuntimeError if the arguments do not fit."""
    (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w), groups = geometry
    if weight.dim() != 4:
        raise RuntimeError(f"expected a 4D convolution weight, got {weight.dim()}D")
    k, c, r, s = weight.shape
    if min(k, c, r, s) < 1:
        raise RuntimeError(f"non-empty weight expected, got weight of size {list(weight.shape)}")
    if x.shape[1] != c * groups or k % groups:
        raise RuntimeError(
            f"Given groups={groups}, weight of size {list(weight.shape)}, expected input{list(x.shape)} to have "
            f"{c * groups} channels, but got {x.shape[1]} channels instead"
        )
    cast = registration.autocast_enabled(x.device.type)
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.dtype is not x.dtype and not cast:
            raise RuntimeError(f"Input type ({x.dtype}) and {name} type ({t.dtype}) should be the same")
        if t is not None and t.device != x.device:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but x is on {x.device} and {name} on {t.device}"
            )
    if bias is not None and tuple(bias.shape) != (k,):
        raise RuntimeError(f"expected bias to be 1-dimensional with {k} elements, got {list(bias.shape)}")
    if min(stride_h, stride_w) <= 0:
        raise RuntimeError("non-positive stride is not supported")
    out_h = (x.shape[2] + 2 * pad_h - dilation_h * (r - 1) - 1) // stride_h + 1
    out_w = (x.shape[3] + 2 * pad_w - dilation_w * (s - 1) - 1) // stride_w + 1
    if out_h < 1 or out_w < 1:
        raise RuntimeError(
            f"Calculated padded input size per channel: ({x.shape[2] + 2 * pad_h} x {x.shape[3] + 2 * pad_w}). "
            f"Kernel size: ({r} x {s}). Kernel size can't be greater than actual input size"
        )
    return x.shape[0], k, out_h, out_w


def check_residual(residual: Tensor | None, shape: Sequence[int], x: Tensor, name: str = "residual") -> None:
    if residual is None:
        return
    if tuple(residual.shape) != tuple(shape):
        raise RuntimeError(f"{name} must have the output's shape {tuple(shape)}, got {tuple(residual.shape)}")
    if residual.device != x.device:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but x is on {x.device} and {name} on {residual.device}"
        )
    if residual.dtype is not x.dtype and not registration.autocast_enabled(x.device.type):
        raise RuntimeError(f"{name} must have the input's dtype {x.dtype}, got {residual.dtype}")
