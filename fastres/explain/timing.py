"""How long each unit of a model takes, fused and by its original forward."""

from __future__ import annotations

import time
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import nn

from fastres import observe
from fastres.explain import units as parts
from fastres.explain.record import Step, floating

#: Seconds that the rounds may take; at least three run, and at most fifteen.
SECONDS = 6.0


@dataclass(frozen=True)
class Times:
    """Medians over the rounds, in milliseconds.

    Attributes:
        eager, fused: of the whole step, with nothing else going on.
        units: (eager, fused) of each unit, from steps in which time is taken at every unit; None: what lies between.
        rounds: how many.
    """

    eager: float
    fused: float
    units: dict[str | None, tuple[float, float]]
    rounds: int


def measure(step: Step, units: dict[str, nn.Module]) -> Times:
    """Runs the step again and again, eager and fused by turns: first as it is, then with a look at the clock at every
    unit."""
    tensors = floating(step.inputs) or list(step.model.parameters())
    cuda = bool(tensors) and tensors[0].is_cuda
    networks = [name for name, module in units.items() if parts.is_network(module)]

    last = networks[0] if networks and step.gradients else None
    clock = _Clock(cuda)

    def once(fused: bool) -> dict[str | None, float]:
        nonlocal clock
        inputs, clock = step.copies(), _Clock(cuda)
        with nullcontext() if fused else observe.original_forwards():
            if cuda:
                torch.cuda.synchronize()
            clock.mark(None)
            output = step.forward(inputs)
            clock.mark(None)
            step.backward(output, inputs)
            clock.mark("")
        return clock.times(last)

    def by_turns(rounds: int) -> tuple[list[dict[str | None, float]], list[dict[str | None, float]]]:
        pairs = [(once(False), once(True)) for _ in range(rounds)]
        return [eager for eager, _ in pairs], [fused for _, fused in pairs]

    for fused in (True, False, True, True):  # weights are folded, the calls of a network recorded and replayed
        start = time.perf_counter()
        once(fused)
    rounds = max(3, min(15, int(SECONDS / 4 / max(time.perf_counter() - start, 1e-6))))
    wholes = [median(sum(run.values()) for run in runs) for runs in by_turns(rounds)]
    with parts.entered(units, lambda name: clock.mark(name)):  # put on once: a hook more is a change to a traced block
        once(True)
        eager, now = by_turns(rounds)
    medians = {
        name: (median(run.get(name, 0.0) for run in eager), median(run.get(name, 0.0) for run in now))
        for name in {name for run in (*eager, *now) for name in run}
    }
    return Times(wholes[0], wholes[1], medians, rounds)


@dataclass
class _Clock:
    """Notes when the model comes to a unit; on a GPU by events in its stream, which nobody waits for meanwhile."""

    cuda: bool
    marks: list[tuple[Any, str | None]] = field(default_factory=list)

    def mark(self, name: str | None) -> None:
        if self.cuda:
            new: Any = torch.cuda.Event
            event = new(enable_timing=True)
            event.record()
            self.marks.append((event, name))
        else:
            self.marks.append((time.perf_counter(), name))

    def times(self, last: str | None) -> dict[str | None, float]:
        """Milliseconds in each unit. last: whose the time after the last unit is, a network's stem in backward."""
        if self.cuda:
            torch.cuda.synchronize()
        *marks, (end, _) = self.marks
        found: dict[str | None, float] = defaultdict(float)
        following = [moment for moment, _ in marks[1:]] + [end]
        for i, ((start, name), stop) in enumerate(zip(marks, following, strict=True)):
            milliseconds = start.elapsed_time(stop) if self.cuda else (stop - start) * 1e3
            found[last if name is None and last is not None and i == len(marks) - 1 else name] += milliseconds
        return dict(found)
