"""Records launches instead of running them, and checks each. On meta tensors real sizes cost nothing, and no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastres.kernels.triton.launch import launching

#: Programs along the axes of a grid that CUDA and HIP take.
GRID_LIMITS = (2**31 - 1, 65535, 65535)


@dataclass(frozen=True)
class Argument:
    """A tensor as a kernel gets it, without its data."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    device: torch.device
    pointer: int  # modulo 16, which is what Triton specialises on
    storage: int  # bytes of the memory behind it

    def data_ptr(self) -> int:
        """For Triton's binder."""
        return self.pointer

    def ptr_range(self) -> int:
        """For Triton's binder: whether 32-bit offsets reach everything."""
        return self.storage

    @property
    def is_activation(self) -> bool:
        return len(self.shape) == 4

    def is_dense(self, channels_last: bool) -> bool:
        """Whether values follow each other in the given order, without gaps."""
        order = [*range(len(self.shape))]
        if channels_last:
            order = [order[0], *order[2:], order[1]]
        expected = 1
        for axis in reversed(order):
            if self.shape[axis] != 1 and self.stride[axis] != expected:
                return False
            expected *= self.shape[axis]
        return True


def argument_of(t: Tensor) -> Argument:
    # an allocator's blocks are aligned to more than 16 bytes, and the pointer of a meta tensor is its offset in one
    storage = t.untyped_storage().size()
    return Argument(t.dtype, tuple(t.shape), t.stride(), t.device, t.data_ptr() % 16, storage)


@dataclass(frozen=True)
class Launch:
    """One launch: what launch() was given, tensors as `Argument`."""

    kernel: Any
    grid: tuple[int, ...]
    options: dict[str, int]
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    def tensors(self) -> dict[str, Argument]:
        return {name: value for name, value in self.arguments.items() if isinstance(value, Argument)}


def _reads_strides(kernel: Any, name: str) -> bool:
    """Whether a kernel takes the strides of its argument `name`: as name_stride..., or stride_name..."""
    return any(other.startswith((f"{name}_stride", f"stride_{name}")) for other in kernel.arg_names)


def problems(launch: Launch) -> list[str]:
    """What is wrong with a launch: a grid that no device takes, arguments that are missing or unknown, tensors on
    several devices, strides that the kernel does not read, integers that do not fit."""
    found = []
    grid, names = launch.grid, set(launch.kernel.arg_names)
    if not 1 <= len(grid) <= 3:
        found.append(f"a grid of {len(grid)} axes")
    for axis, (programs, limit) in enumerate(zip(grid, GRID_LIMITS, strict=False)):
        if not 1 <= programs <= limit:
            found.append(f"{programs} programs along axis {axis} of the grid: not from 1 to {limit}")
    if missing := names - launch.arguments.keys():
        found.append(f"no {', '.join(sorted(missing))}")
    if unknown := launch.arguments.keys() - names:
        found.append(f"{', '.join(sorted(unknown))}: not an argument of the kernel")
    tensors = launch.tensors()
    if len(devices := {t.device for t in tensors.values()}) != 1:
        found.append(f"tensors on {len(devices)} devices")
    for name, t in tensors.items():
        if _reads_strides(launch.kernel, name):
            continue
        channels_last = launch.arguments.get("CHANNELS_LAST") if t.is_activation else False
        orders = (False, True) if channels_last is None else (channels_last,)
        if not any(t.is_dense(order) for order in orders):
            order = {None: "dense", True: "dense in channels_last", False: "contiguous"}[channels_last]
            found.append(f"{name}: shape {t.shape}, strides {t.stride}, not {order}")
    for parameter in launch.kernel.params:
        value = launch.arguments.get(parameter.name)
        if parameter.is_constexpr or isinstance(value, bool) or not isinstance(value, int):
            continue
        bits = 32 if parameter.annotation_type == "i32" else 64
        if not -(2 ** (bits - 1)) <= value < 2 ** (bits - 1):
            found.append(f"{parameter.name}: {value} does not fit into {bits} bits")
    return found


def record(kernel: Any, grid: tuple[int, ...], options: dict[str, int], arguments: dict[str, Any]) -> Launch:
    """The checked record of a launch.

    Raises:
        ValueError: problems() finds something.
    """
    values = {name: argument_of(v) if isinstance(v, Tensor) else v for name, v in arguments.items()}
    launch = Launch(kernel, grid, options, values)
    if found := problems(launch):
        raise ValueError(f"launch of {launch.name}: {'; '.join(found)}")
    return launch


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collects all launches in this context, checked, and runs none."""
    launches: list[Launch] = []
    with launching(lambda *launch: launches.append(record(*launch))):
        yield launches
