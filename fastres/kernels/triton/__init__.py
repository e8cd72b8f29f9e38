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

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def unavailable() -> str | None:
    """Why there are no Triton kernels in this process, or None."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    return None


def why_not(x: Tensor, *args: Any) -> str | None:
    if x.dtype not in _DTYPES:
        return f"{x.dtype} activations"
    return "empty batch" if x.numel() == 0 else None


def kernel(module: str, op: str) -> Callable[..., Any]:
    """The function `op` of a module of this package, which is imported when it is called first."""

    def run(*args: Any) -> Any:
        return getattr(importlib.import_module(f"{__name__}.{module}"), op)(*args)

    return run
