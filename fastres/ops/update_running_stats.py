"""fastres::update_running_stats_: the one op that writes running statistics, called once per forward in training.

fastres::update_all_running_stats_ does it for many layers in one launch, where launches take the time: inside
`together`, calls wait for each other.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fastres.ops import registration

op = registration.define(
    "update_running_stats_(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor mean, Tensor var, "
    "Tensor? num_batches_tracked, float momentum, SymInt count) -> ()",
    lambda *args: None,
)
all_op = registration.define(
    "update_all_running_stats_(Tensor(a!)[] running_means, Tensor(b!)[] running_vars, Tensor[] means, Tensor[] vars, "
    "float[] momenta, SymInt[] counts) -> ()",
    lambda *args: None,
)


class _Waiting:
    """What one forward of a network has to write at its end."""

    def __init__(self) -> None:
        self.updates: list[tuple[Tensor, Tensor, Tensor, Tensor, float, int]] = []
        self.counters: list[Tensor] = []

    def write(self) -> None:
        updates, counters = self.updates, self.counters
        self.updates, self.counters = [], []
        if counters:
            torch._foreach_add_(counters, 1)
        if updates:
            all_op(*map(list, zip(*updates, strict=True)))


class _Thread(threading.local):
    waiting: _Waiting | None = None


_thread = _Thread()


@contextmanager
def together() -> Iterator[None]:
    """Running statistics and counters of batches are written once, when the `with` block ends, also by an exception:
    those of the layers that ran."""
    before, _thread.waiting = _thread.waiting, _Waiting()
    try:
        yield
    finally:
        waiting, _thread.waiting = _thread.waiting, before
        waiting.write()


def call(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    var: Tensor,
    num_batches_tracked: Tensor | None,
    momentum: float,
    count: int,
) -> None:
    """update_running_stats_, now or at the end of `together`."""
    waiting = _thread.waiting
    if waiting is None or num_batches_tracked is not None:
        op(running_mean, running_var, mean, var, num_batches_tracked, momentum, count)
        return
    if any(other[0] is running_mean or other[1] is running_var for other in waiting.updates):
        waiting.write()  # a layer that runs twice is updated twice, one after the other
    waiting.updates.append((running_mean, running_var, mean, var, momentum, count))


def count_batch(counter: Tensor) -> None:
    """counter += 1, now or at the end of `together`."""
    waiting = _thread.waiting
    if waiting is None:
        counter.add_(1)
    else:
        if any(other is counter for other in waiting.counters):
            waiting.write()
        waiting.counters.append(counter)
