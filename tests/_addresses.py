"""Which addresses a Triton kernel reads and writes, by the interpreter and without memory behind them.

Arguments are records of launches on tensors without data (record.py), so an activation may have more values than there
is memory. Each gets a range of addresses of its own; loads give zeros. Every access is checked: an offset that leaves
its tensor, because a bound is wrong or because it does not fit into 32 bits, is an error.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from _triton import interpretable, interpreter, interpreting

from fastres.kernels.triton.record import Argument, Launch

_RANGE = 1 << 44  # addresses of one argument
_INT32 = 1 << 31


@dataclasses.dataclass
class Seen:
    """Offsets, in elements, that a launch has read from and written to one argument."""

    argument: Argument
    read: list[np.ndarray] = dataclasses.field(default_factory=list)
    written: list[np.ndarray] = dataclasses.field(default_factory=list)

    @property
    def values(self) -> int:
        return self.argument.storage // self.argument.dtype.itemsize

    def all_written(self) -> np.ndarray:
        return np.concatenate(self.written) if self.written else np.empty(0, np.int64)

    def touched(self) -> np.ndarray:
        return np.concatenate([*self.read, *self.written]) if self.read or self.written else np.empty(0, np.int64)


class Memory:
    """Notes every access in `seen`, by the name of the argument."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        tensors = launch.tensors()
        self.names = list(tensors)
        self.seen = {name: Seen(t) for name, t in tensors.items()}
        #: What the kernel gets: the records, each with the start of its range.
        self.arguments = launch.arguments | {
            name: dataclasses.replace(t, pointer=(place + 1) * _RANGE)
            for place, (name, t) in enumerate(tensors.items())
        }

    def access(self, addresses: np.ndarray, mask: np.ndarray, written: bool) -> None:
        addresses = np.broadcast_to(addresses, mask.shape)[mask].astype(np.int64)
        if not addresses.size:
            return
        places = set((addresses // _RANGE).tolist())
        assert len(places) == 1 and 1 <= (place := places.pop()) <= len(self.names), (
            f"{self.launch.name}: an address before its tensor"
        )
        name = self.names[place - 1]
        seen = self.seen[name]
        offset, rest = np.divmod(addresses - place * _RANGE, seen.argument.dtype.itemsize)
        assert not rest.any(), f"{self.launch.name}: {name} at an address between values"
        assert offset.max() < seen.values, f"{self.launch.name}: {name}[{offset.max()}] of {seen.values} values"
        (seen.written if written else seen.read).append(offset)


def _checked_range(*bounds: Any) -> range:
    """range() as a compiled loop counts: the number behind the last too has to fit, into 32 bits if no bound has
    more."""
    found = range(*map(operator.index, bounds))
    wide = any(getattr(b, "dtype", None) is not None and b.dtype.primitive_bitwidth == 64 for b in bounds)
    assert wide or not len(found) or found[-1] + found.step < _INT32, (
        f"a loop to {found[-1]} by {found.step} in 32 bits"
    )
    return found


@contextmanager
def _noting(memory: Memory) -> Iterator[None]:
    def load(self: Any, pointers: Any, mask: Any, other: Any, *options: Any) -> Any:
        memory.access(pointers.data, mask.data, False)
        kind = pointers.get_element_ty()
        return interpreter.TensorHandle(np.zeros(pointers.data.shape, interpreter._get_np_dtype(kind)), kind)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *options: Any) -> None:
        memory.access(pointers.data, mask.data, True)

    builder = interpreter.InterpreterBuilder
    with pytest.MonkeyPatch.context() as patched, interpreting():
        patched.setattr(builder, "create_masked_load", load)
        patched.setattr(builder, "create_masked_store", store)
        yield


def programs(grid: tuple[int, ...]) -> Iterable[tuple[int, ...]]:
    return itertools.product(*(range(count) for count in grid))


def run(launch: Launch, which: Callable[[tuple[int, ...]], Iterable[tuple[int, ...]]] = programs) -> dict[str, Seen]:
    """Interprets these programs of a launch; what they have accessed, by argument.

    Raises:
        AssertionError: an access outside of a tensor, or a loop whose end does not fit into its counter.
    """
    memory = Memory(launch)
    grid = (*launch.grid, 1, 1)[:3]
    builder = interpreter.interpreter_builder
    with _noting(memory), interpretable(launch.kernel, memory.arguments) as program, pytest.MonkeyPatch.context() as m:
        m.setitem(launch.kernel.fn.__globals__, "range", _checked_range)
        builder.set_grid_dim(*grid)
        for place in which(grid):
            builder.set_grid_idx(*place)
            program()
    return memory.seen
