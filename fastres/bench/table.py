"""One table of the benchmark: its contenders' processes, and the rounds in which they take turns.

In each round every contender runs a few iterations while the others wait in a blocking read. The order is rotated from
round to round, so that nobody always runs on a processor that its predecessor has heated.
"""

from __future__ import annotations

import importlib
import itertools
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from fastres.bench import machine
from fastres.bench.process import ContenderError, Process
from fastres.bench.task import Task

#: key -> class, in the order of the tables. `eager`, the contiguous layout, is what people have who never heard of
#: channels_last.
CONTENDERS = {
    "eager": "fastres.bench.contenders:Eager",
    "channels_last": "fastres.bench.contenders:ChannelsLast",
    "compile": "fastres.bench.contenders:Compile",
    "onnxruntime": "fastres.bench.peers:OnnxRuntime",
    "openvino": "fastres.bench.peers:OpenVino",
    "ncnn": "fastres.bench.peers:Ncnn",
    "fastres": "fastres.bench.contenders:Fastres",
}
#: Those that only GPUs know; `benchmarks/gpu.py` names them.
GPU_CONTENDERS = {
    "autotune": "fastres.bench.graphs:Autotune",
    "reduce_overhead": "fastres.bench.graphs:ReduceOverhead",
    "tensorrt": "fastres.bench.graphs:TensorRt",
    "fastres_cuda": "fastres.bench.graphs:FastresCuda",
    "fastres_graph": "fastres.bench.graphs:FastresGraph",
    "fastres_graphed": "fastres.bench.graphs:FastresGraphed",
}
#: Those of benchmarks/memory.py alone.
MEMORY_CONTENDERS = {"fastres_low": "fastres.bench.contenders:FastresLow"}
REFERENCE = "fastres.bench.contenders:Reference"

_TURN_SECONDS = 0.2  # a turn is at least one iteration
_LONG_SECONDS = 0.5  # an iteration that does not need warm caches to be timed
_SETTLE_SECONDS = 0.03  # until a contender's threads have stopped spinning after its turn
_MIN_ROUNDS = 3
_RUN_TIMEOUT = 120.0


class Limits(NamedTuple):
    """How long a table may take: rounds at most, seconds for all rounds (three run at least), seconds for one
    set-up. saved: whether to count what is saved for backward."""

    rounds: int
    seconds: float
    timeout: float
    saved: bool = False


class Entry:
    """One contender in one table."""

    def __init__(self, name: str, skipped: str | None = None) -> None:
        self.name = name
        self.kind = contender_class(name)
        self.status, self.reason = ("ok", "") if skipped is None else ("skipped", skipped)
        self.samples: list[list[float]] = []
        self.facts: dict[str, Any] = {}
        self.iterations = 1
        self.cpu = self.idle_cpu = self.idle = 0.0  # processor seconds in and between turns, seconds between turns


def contender_class(name: str) -> Any:
    """The class of a contender by its key."""
    module, _, attribute = (CONTENDERS | GPU_CONTENDERS | MEMORY_CONTENDERS)[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


class Group:
    """The processes of one model; each lives through all tables unless it dies or is ended."""

    def __init__(self, names: list[str], threads: int, folder: str) -> None:
        self.threads, self.folder = threads, folder
        self.processes: dict[str, Process] = {}
        self.imports: dict[str, float] = {}
        for name in names:  # all start at once: imports are not compared
            self.start(name)

    def start(self, name: str) -> Process:
        kind = (CONTENDERS | GPU_CONTENDERS).get(name, REFERENCE)
        self.processes[name] = Process(kind, self.threads, self.folder, name)
        return self.processes[name]

    def ready(self, name: str) -> Process:
        """The process of a contender after its imports; a new one if it died or was ended."""
        process = self.processes[name]
        if not process.alive:
            self.imports.pop(name, None)
            process = self.start(name)
        if name not in self.imports:
            try:
                self.imports[name] = process.receive(_RUN_TIMEOUT)["seconds"]
            except ContenderError:
                process.end()
                raise
        return process

    def reference(self, task: Task, timeout: float) -> dict[str, Any]:
        """Let a process write float64 results and exported models. Without them there are no errors and fewer
        contenders."""
        try:
            return self.ready(REFERENCE).ask(timeout, do="setup", task=task.to_json())
        except ContenderError as error:
            return {"failed": str(error), "onnx_failed": "no export", "pnnx_failed": "no export"}

    def end(self, *names: str) -> None:
        """End the named processes, or all. One that is needed again is started again."""
        for name in names or self.processes:
            self.processes[name].end()


class Table:
    """One task, its contenders' entries, and the commands that measure them."""

    def __init__(
        self, task: Task, group: Group, entries: list[Entry], exported: dict[str, Any], limits: Limits
    ) -> None:
        self.task, self.group, self.entries, self.exported, self.limits = task, group, entries, exported, limits
        self.others: float | None = None  # the share of the processors that other processes used during the rounds

    def run(self, say: Callable[[str], None]) -> None:
        """Set up every contender, then measure all in interleaved rounds. Fills in the entries."""
        for entry in self.running():
            say(f"set-up of {entry.kind.title}")
            self.attempt(entry, self.set_up)
        for entry in self.running():
            say(f"warm-up of {entry.kind.title}")
            self.attempt(entry, self.warm_up)
        busy, start = machine.busy_seconds(), time.monotonic()
        for index in itertools.count():
            running = self.running()
            if not running or self.enough(running, index, time.monotonic() - start):
                break
            shift = index % len(running)
            for entry in running[shift:] + running[:shift]:
                say(f"round {index + 1}, {entry.kind.title}")
                self.attempt(entry, self.turn)
        ours = sum(entry.cpu + entry.idle_cpu for entry in self.entries)
        self.others = _others(busy, time.monotonic() - start, ours)
        for entry in self.running():
            self.attempt(entry, self.ask_memory)

    def enough(self, running: list[Entry], done: int, seconds: float) -> bool:
        """Whether there are rounds enough, or no time for another after `done` that took `seconds`."""
        rounds = min(len(entry.samples) for entry in running)
        if rounds < min(_MIN_ROUNDS, self.limits.rounds):
            return False
        return rounds >= self.limits.rounds or seconds * (done + 1) / done > self.limits.seconds

    def running(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.status == "ok"]

    def attempt(self, entry: Entry, action: Callable[[Entry, Process], None]) -> None:
        """Let one contender do something while the others wait. A failure is its result; the others go on."""
        if entry.status != "ok":
            return
        try:
            action(entry, self.group.processes[entry.name])
        except ContenderError as error:
            entry.status, entry.reason = "failed", str(error)
        time.sleep(_SETTLE_SECONDS)

    def set_up(self, entry: Entry, _: Process) -> None:
        export = entry.kind.exported_by
        if reason := self.exported.get(f"{export}_failed"):
            raise ContenderError(f"export: {reason}")
        process = self.group.ready(entry.name)
        answer = process.ask(self.limits.timeout, do="setup", task=self.task.to_json())
        seconds = answer["seconds"] + self.group.imports[entry.name] + self.exported.get(f"{export}_seconds", 0.0)
        entry.facts = {**answer, "setup_seconds": seconds}

    def warm_up(self, entry: Entry, process: Process) -> None:
        """One or a few iterations after the one of the set-up, to see how many fit into a turn."""
        first = process.ask(_RUN_TIMEOUT, do="run", iterations=1)["samples"][0]
        if first >= _LONG_SECONDS:  # as good as any other: count it as a round
            entry.samples.append([first])
        else:
            first = min(process.ask(_RUN_TIMEOUT, do="run", iterations=3)["samples"])
        entry.iterations = max(1, int(_TURN_SECONDS / first))

    def turn(self, entry: Entry, process: Process) -> None:
        # An iteration that does not count first: the caches hold the others' data, and on a GPU memory has to be
        # allocated. Long iterations on a CPU do not feel it.
        lead_in = 1 if entry.iterations > 1 or self.task.device == "cuda" else 0
        answer = process.ask(_RUN_TIMEOUT, do="run", iterations=entry.iterations + lead_in)
        entry.samples.append(answer["samples"][lead_in:])
        entry.cpu += answer["cpu"]
        entry.idle_cpu += answer["idle_cpu"]
        entry.idle += answer["idle"]

    def ask_memory(self, entry: Entry, process: Process) -> None:
        entry.facts.update(process.ask(_RUN_TIMEOUT, do="memory"))
        if self.limits.saved:  # last: it keeps every storage until it has counted
            entry.facts["saved_bytes"] = process.ask(_RUN_TIMEOUT, do="saved")["bytes"]


def _others(busy: float | None, seconds: float, ours: float) -> float | None:
    """The share of the processors that processes other than the contenders have used, where the system tells."""
    now = machine.busy_seconds()
    if busy is None or now is None or seconds < 1:
        return None
    return max(0.0, (now - busy - ours) / (seconds * (os.cpu_count() or 1)))
