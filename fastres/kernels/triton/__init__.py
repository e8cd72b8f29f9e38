"""The Triton kernels, for GPUs of NVIDIA and AMD: what kernels/table.py needs to know of them.

Triton itself and the modules beside this one are imported by the first call that they serve.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastres import reference
from fastres.kernels.cpu import conv_bn_act_backward_why_not, conv_bn_act_why_not, why_not

__all__ = [
    "bn_act_maxpool_backward_why_not",
    "bn_act_maxpool_why_not",
    "conv1x1_bn_act_backward_why_not",
    "conv1x1_bn_act_why_not",
    "conv_bn_act_backward_why_not",
    "conv_bn_act_why_not",
    "kernel",
    "unavailable",
    "why_not",
]


@functools.cache
def unavailable() -> str | None:
    """Why there are no Triton kernels in this process, or None."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    return None


def bn_act_maxpool_why_not(x: Tensor, *args: Any) -> str | None:
    if x.shape[2] * x.shape[3] >= 2**31:  # its kernels count the pixels of an image in 32 bits
        return "an image of 2^31 pixels or more"
    return why_not(x)


def bn_act_maxpool_backward_why_not(grad_y: Tensor, x: Tensor, *args: Any) -> str | None:
    return bn_act_maxpool_why_not(x)


def conv1x1_bn_act_why_not(x: Tensor, conv_weight: Tensor, *args: Any) -> str | None:
    if reason := why_not(x):
        return reason
    channels_last = reference.conv_format(x, conv_weight) is torch.channels_last and conv_weight.shape[0] > 1
    return None if channels_last else "not channels_last"


def conv1x1_bn_act_backward_why_not(grad_y: Tensor, x: Tensor, *args: Any) -> str | None:
    return conv1x1_bn_act_why_not(x, args[0])


def kernel(module: str, op: str) -> Callable[..., Any]:
    """The function `op` of a module of this package, which is imported when it is called first."""

    def run(*args: Any) -> Any:
        return getattr(importlib.import_module(f"{__name__}.{module}"), op)(*args)

    return run
