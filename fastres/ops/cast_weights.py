"""Under autocast: copies of a network's convolution weights in its dtype, made by one multi-tensor call at the start of
a forward instead of a launch a layer."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastres.ops import registration


class _Thread(threading.local):
    copies: dict[int, tuple[Tensor, int, Tensor]]  # id of a weight -> it, its version, its copy

    def __init__(self) -> None:
        self.copies = {}


_thread = _Thread()


class _Cast(torch.autograd.Function):
    """A cast whose result is there already."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, copy: Tensor) -> Tensor:
        ctx.dtype = weight.dtype
        return copy.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None


@contextmanager
def together(weights: list[Tensor], x: Tensor) -> Iterator[None]:
    """Inside the `with` block `cast` gives copies that are made at its start, if autocast is on for the device of x."""
    dtype = registration.autocast_dtype(x)
    found = [
        w for w in weights if w.device == x.device and w.dtype is torch.float32 is not dtype and not w.is_inference()
    ]
    before, copies = _thread.copies, {}
    if found and registration.autocast_enabled(x.device.type):
        with torch.no_grad():
            made = [torch.empty_like(w, dtype=dtype) for w in found]
            torch._foreach_copy_(made, found)
        copies = {id(w): (w, w._version, copy) for w, copy in zip(found, made, strict=True)}
    _thread.copies = copies
    try:
        yield
    finally:
        _thread.copies = before


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """registration.to_dtype, with the copy that `together` has made."""
    found, version, copy = _thread.copies.get(id(weight), (None, 0, weight))
    if found is not weight or copy.dtype is not dtype or weight._version != version:
        return registration.to_dtype(weight, dtype)  # type: ignore[return-value]
    return _Cast.apply(weight, copy) if torch.is_grad_enabled() and weight.requires_grad else copy
