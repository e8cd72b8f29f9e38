"""How every Triton kernel is launched: arguments by name, under the device of its tensors, on the current stream.

Nothing here waits for the device or allocates, so launches can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

#: (kernel, grid, options, arguments); options: those of Triton, num_warps and num_stages among them.
Launcher = Callable[[Any, tuple[int, ...], dict[str, int], dict[str, Any]], None]


def _on_device(kernel: Any, grid: tuple[int, ...], options: dict[str, int], arguments: dict[str, Any]) -> None:
    device = next(t.device for t in arguments.values() if isinstance(t, Tensor))
    if device.index == torch.cuda.current_device():
        kernel[grid](**arguments, **options)
    else:
        with torch.cuda.device(device):
            kernel[grid](**arguments, **options)


_launcher: Launcher = _on_device


def launch(kernel: Any, grid: tuple[int, ...], *, num_warps: int = 4, num_stages: int = 2, **arguments: Any) -> None:
    """Runs a kernel on the device of its first tensor.

    Args:
        kernel: a @triton.jit function.
        grid: programs along each axis.
        num_warps, num_stages: of a program, and of its software pipeline.
        arguments: all arguments of the kernel, by name.
    """
    options = {
        "num_warps": num_warps,
        "num_stages": num_stages,
        "enable_fp_fusion": True,
    }  # not by default from 3.10 on
    _launcher(kernel, grid, options, arguments)


@contextmanager
def launching(launcher: Launcher) -> Iterator[None]:
    """Hands all launches to `launcher` instead: to an interpreter, or to what records them."""
    global _launcher
    before, _launcher = _launcher, launcher
    try:
        yield
    finally:
        _launcher = before


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def multiprocessors(x: Tensor) -> int:
    """Of the device of x; of an H100 or H200 where x is not on one (kernels that are compiled or interpreted only)."""
    return _multiprocessors(x.device) if x.is_cuda else 132
