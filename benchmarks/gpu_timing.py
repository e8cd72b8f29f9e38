"""How benchmarks/gpu.py times a call: by the device's own clock (CUDA events), on data that lies in no cache.

- Calls rotate over sets of buffers which together are four times as large as the L2 cache, and a result is kept until
  its set is used again: so inputs come from memory, and outputs go there.
- A turn is a few calls between two events. The device sleeps before the first event until the host has queued them all,
  so that a small kernel's time is not that of its launch.
- Contenders take turns, in rounds whose order rotates. A time is the median over the rounds.

Without a CUDA device the wall clock is read instead: that shows that everything runs, and no more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fastres.bench import stats

Call = Callable[[int], Any]  # call(i) works on the i-th set of buffers and returns what it wrote
Times = dict[str, Any]  # name -> {"seconds", "low_seconds", "high_seconds", "samples"} or {"failed": why}

_L2_TIMES, _MOST_SETS = 4, 64
_MOST_CALLS = 40  # of a turn: some launches each, and the device queues about a thousand
_CYCLES_A_SECOND = 2e9  # of the clock that a sleeping device counts; at most, so it never sleeps too short


@dataclass(frozen=True)
class Stopwatch:
    """Times calls on a device.

    Attributes:
        device: "cuda" or "cpu".
        rounds: turns of every contender.
        turn_seconds: about how long one is.
    """

    device: str
    rounds: int = 7
    turn_seconds: float = 0.01

    def sets(self, size: int) -> int:
        """How many sets of buffers there must be if one has `size` bytes."""
        if self.device != "cuda":
            return 2
        cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        return min(max(2, -(-_L2_TIMES * cache // size)), _MOST_SETS)

    def measure(self, calls: Mapping[str, Call], sets: int) -> Times:
        """Times of all calls. One that raises has the reason in place of a time."""
        found: Times = {}
        plans: dict[str, tuple[int, float]] = {}
        for name, call in calls.items():
            try:
                plans[name] = self._plan(call, sets)
            except Exception as error:  # whatever a library or a compiler raises: the others go on
                found[name] = {"failed": reason(error)}
        samples: dict[str, list[float]] = {name: [] for name in plans}
        names = list(plans)
        for index in range(self.rounds):
            shift = index % max(len(names), 1)
            for name in names[shift:] + names[:shift]:
                try:
                    samples[name].append(self._turn(calls[name], sets, *plans[name]))
                except Exception as error:
                    found[name] = {"failed": reason(error)}
        for name in names:
            if name in found:
                continue
            seconds = samples[name]
            timing = stats.timing([[value] for value in seconds])
            about = {"seconds": timing.median, "low_seconds": timing.low, "high_seconds": timing.high}
            found[name] = {**about, "samples": seconds}
        return {name: found[name] for name in calls}

    def _plan(self, call: Call, sets: int) -> tuple[int, float]:
        """After a call on every set: how many calls a turn has, and the host's seconds for one."""
        for index in range(sets):
            call(index)
        self._synchronize()
        start = time.perf_counter()
        for index in range(3):
            call(index % sets)
        host = (time.perf_counter() - start) / 3
        self._synchronize()
        seconds = (time.perf_counter() - start) / 3
        return max(1, min(_MOST_CALLS, int(self.turn_seconds / seconds))), host

    def _turn(self, call: Call, sets: int, count: int, host: float) -> float:
        """Seconds of one call, on average over `count` calls."""
        kept: list[Any] = [None] * sets
        if self.device != "cuda":
            start = time.perf_counter()
            for index in range(count):
                kept[index % sets] = call(index % sets)
            return (time.perf_counter() - start) / count
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(_CYCLES_A_SECOND * (1.5 * host * count + 1e-4)))
        first.record()
        for index in range(count):
            kept[index % sets] = call(index % sets)
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3 / count

    def _synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def reason(error: BaseException) -> str:
    """An exception in one line."""
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text[:160]}"


def ratio(times: Times, of: str, against: str) -> float | None:
    """How many times as fast `of` is as `against`; None where one of them has no time."""
    pair = [times.get(name, {}).get("seconds") for name in (against, of)]
    return None if None in pair else pair[0] / pair[1]
