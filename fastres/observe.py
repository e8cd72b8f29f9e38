"""What fused blocks tell about themselves while fastres.explain or verify runs, and a switch for comparisons."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

#: What a block tells about itself, (block, reason or None), or None.
listener: Callable[[nn.Module, str | None], None] | None = None
#: Told which modules the next kernel stands for; with op, name and method of the kernel where it is not one that the
#: table is asked for. Or None.
recorder: Callable[..., None] | None = None
#: Inside `original_forwards`.
off = False


@contextmanager
def listening(to: Callable[[nn.Module, str | None], None]) -> Iterator[None]:
    """Calls `to(block, reason)` for every fused block that runs; reason is None on the fast path."""
    global listener
    before, listener = listener, to
    try:
        yield
    finally:
        listener = before


@contextmanager
def recording(by: Callable[..., None]) -> Iterator[None]:
    """Calls `by(modules)` before a kernel of the table is asked for to stand for these modules, and
    `by(modules, op, name, method)` when another one runs."""
    global recorder
    before, recorder = recorder, by
    try:
        yield
    finally:
        recorder = before


def stand_for(*modules: nn.Module) -> None:
    """What the next kernel stands for."""
    if recorder is not None:
        recorder(modules)


def ran(modules: tuple[nn.Module, ...], op: str, kernel: tuple[str, str] | None) -> None:
    """A kernel, given by name and method, does `op` in the place of `modules`; None: one that the table is asked
    for."""
    if recorder is not None:
        recorder(modules, *(() if kernel is None else (op, *kernel)))


@contextmanager
def original_forwards() -> Iterator[None]:
    """Inside, in the whole process, every block runs its original forward; folded weights stay where they are."""
    global off
    before, off = off, True
    try:
        yield
    finally:
        off = before
