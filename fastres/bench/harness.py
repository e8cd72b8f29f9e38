"""Runs the contenders beside each other and collects what they answer.

Every contender stays in one process for a model and mode. In each round every contender runs a few iterations while
the others wait in a blocking read; the order is rotated from round to round, so that nobody always runs on a processor
that its predecessor has heated.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from typing import Any

from fastres import images as photographs
from fastres.bench import machine, stats
from fastres.bench.process import ContenderError, Process
from fastres.bench.task import DTYPES, Task, prepared_model, write_files
from fastres.errors import UserError

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
_REFERENCE = "fastres.bench.contenders:Reference"
BASELINE = "channels_last"  # the stronger of PyTorch's eager forms, on which speed-ups and break-even are counted
OURS = "fastres"
ALWAYS = (BASELINE, OURS)

_TURN_SECONDS = 0.25  # a turn is at least one iteration
_LONG_SECONDS = 1.0
_SETTLE_SECONDS = 0.03  # until a contender's threads have stopped spinning after its turn
_MIN_ROUNDS = 3
_CALIBRATION_IMAGES = 16  # whatever the batch sizes are, so that the weights are always the same
_RUN_TIMEOUT = 120.0


@dataclass
class Options:
    """What to run; see `fastres bench --help`."""

    models: list[str] = field(default_factory=lambda: ["resnet18", "resnet50"])
    modes: list[str] = field(default_factory=lambda: ["infer", "train"])
    batches: dict[str, list[int]] = field(default_factory=lambda: {"infer": [1, 16], "train": [16]})
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 0
    contenders: list[str] = field(default_factory=lambda: list(CONTENDERS))
    rounds: int = 15
    seconds: float = 12.0
    size: int = 224
    checkpoint: str | None = None
    images: str | None = None
    seed: int = 0
    timeout: float = 300.0

    def check(self) -> None:
        """Fill in defaults that depend on the machine.

        Raises:
            UserError: for a value that makes no sense.
        """
        for what, value in (
            ("rounds", self.rounds),
            ("seconds", self.seconds),
            ("timeout", self.timeout),
            ("size", self.size),
        ):
            if value <= 0:
                raise UserError(f"--{what} must be above zero, not {value}")
        if any(batch < 1 for mode in self.modes for batch in self.batches[mode]):
            raise UserError("--batch must be at least 1")
        if self.threads < 0:
            raise UserError(f"--threads must be above zero, not {self.threads}")
        if self.dtype not in DTYPES:
            raise UserError(f"--dtype must be one of {', '.join(DTYPES)}, not {self.dtype}")
        if unknown := [name for name in self.contenders if name not in CONTENDERS]:
            raise UserError(f"no contender is named {', '.join(unknown)}; there are {', '.join(CONTENDERS)}")
        if self.device == "cuda":
            import torch

            if not torch.cuda.is_available():
                raise UserError("--device cuda: this PyTorch sees no CUDA device")
        self.threads = self.threads or machine.physical_cores()


Say = Callable[[str, float], None]  # what is being done, and the share of all tables that is done


class Entry:
    """One contender in one table."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.kind = _class(name)
        self.status, self.reason = "ok", ""
        self.samples: list[list[float]] = []
        self.facts: dict[str, Any] = {}
        self.iterations = 1
        self.idle_cpu = self.idle = 0.0

    def fail(self, status: str, reason: str) -> None:
        self.status, self.reason = status, reason


def _class(name: str) -> Any:
    module, _, attribute = CONTENDERS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


class Group:
    """The processes of one model and mode; each lives through all batch sizes."""

    def __init__(self, names: list[str], threads: int, folder: str) -> None:
        self.threads, self.folder = threads, folder
        self.processes: dict[str, Process] = {}
        self.imports: dict[str, float] = {}
        for name in names:  # all start at once: imports are not compared
            self.start(name)

    def start(self, name: str) -> Process:
        kind = CONTENDERS.get(name, _REFERENCE)
        self.processes[name] = Process(kind, self.threads, self.folder, name)
        return self.processes[name]

    def ready(self, name: str) -> Process:
        """The process of a contender after its imports; a new one if it died in an earlier table."""
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
            return self.ready(_REFERENCE).ask(timeout, do="setup", task=task.to_json())
        except ContenderError as error:
            return {"failed": str(error), "onnx_failed": "no export", "pnnx_failed": "no export"}

    def end(self, *names: str) -> None:
        """End the named processes, or all."""
        for name in names or self.processes:
            self.processes[name].end()


class Table:
    """One task, its contenders' entries, and the commands that measure them."""

    def __init__(
        self, task: Task, group: Group, entries: list[Entry], options: Options, exported: dict[str, Any]
    ) -> None:
        self.task, self.group, self.entries, self.options, self.exported = task, group, entries, options, exported

    def run(self, say: Callable[[str], None]) -> None:
        """Set up every contender, then measure all in interleaved rounds. Fills in the entries."""
        for entry in self.running():
            say(f"set-up of {entry.kind.title}")
            self.attempt(entry, self.set_up)
        for entry in self.running():
            say(f"warm-up of {entry.kind.title}")
            self.attempt(entry, self.warm_up)
        start = time.monotonic()
        for index in itertools.count():
            running = self.running()
            if not running or self.enough(running, index, time.monotonic() - start):
                break
            shift = index % len(running)
            for entry in running[shift:] + running[:shift]:
                say(f"round {index + 1}, {entry.kind.title}")
                self.attempt(entry, self.turn)
        for entry in self.running():
            self.attempt(entry, self.ask_memory)

    def enough(self, running: list[Entry], done: int, seconds: float) -> bool:
        """Whether there are rounds enough, or no time for another after `done` that took `seconds`."""
        rounds = min(len(entry.samples) for entry in running)
        if rounds < min(_MIN_ROUNDS, self.options.rounds):
            return False
        return rounds >= self.options.rounds or seconds * (done + 1) / done > self.options.seconds

    def running(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.status == "ok"]

    def attempt(self, entry: Entry, action: Callable[[Entry, Process], None]) -> None:
        """Let one contender do something while the others wait. A failure is its result; the others go on."""
        if entry.status != "ok":
            return
        try:
            action(entry, self.group.processes[entry.name])
        except ContenderError as error:
            entry.fail("failed", str(error))
        time.sleep(_SETTLE_SECONDS)

    def set_up(self, entry: Entry, _: Process) -> None:
        export = getattr(entry.kind, "exported_by", "")
        if reason := self.exported.get(f"{export}_failed"):
            raise ContenderError(f"export: {reason}")
        process = self.group.ready(entry.name)
        answer = process.ask(self.options.timeout, do="setup", task=self.task.to_json())
        seconds = answer["seconds"] + self.group.imports[entry.name] + self.exported.get(f"{export}_seconds", 0.0)
        entry.facts = {**answer, "setup_seconds": seconds}

    def warm_up(self, entry: Entry, process: Process) -> None:
        """One or a few iterations after the one of the set-up, to see how many fit into a turn."""
        first = process.ask(_RUN_TIMEOUT, do="run", iterations=1)["samples"][0]
        if first >= _LONG_SECONDS:  # as good as any other: count it as a round
            entry.samples.append([first])
        elif first < _TURN_SECONDS:
            first = min(process.ask(_RUN_TIMEOUT, do="run", iterations=3)["samples"])
        entry.iterations = max(1, int(_TURN_SECONDS / first))

    def turn(self, entry: Entry, process: Process) -> None:
        # An iteration that does not count first: the caches hold the others' data. Long iterations do not feel it.
        lead_in = 1 if entry.iterations > 1 else 0
        answer = process.ask(_RUN_TIMEOUT, do="run", iterations=entry.iterations + lead_in)
        entry.samples.append(answer["samples"][lead_in:])
        entry.idle_cpu += answer["idle_cpu"]
        entry.idle += answer["idle"]

    def ask_memory(self, entry: Entry, process: Process) -> None:
        entry.facts.update(process.ask(_RUN_TIMEOUT, do="memory"))


def _row(entry: Entry, task: Task) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": entry.name,
        "title": entry.kind.title,
        "status": entry.status,
        "reason": entry.reason,
    }
    if entry.status != "ok":
        return row
    time_ = stats.timing(entry.samples)
    facts = entry.facts
    return row | {
        "median_seconds": time_.median,
        "low_seconds": time_.low,
        "high_seconds": time_.high,
        "images_per_second": task.batch / time_.median,
        "setup_seconds": facts["setup_seconds"],
        "peak_bytes": facts["peak"],
        "peak_over_imports_bytes": max(0, facts["peak"] - facts["baseline"]),
        "error": facts.get("error"),
        "same_top1": facts.get("same_top1"),
        "loss_error": facts.get("loss_error"),
        "idle_cpu_share": entry.idle_cpu / entry.idle if entry.idle else 0.0,
        "samples": entry.samples,
    }


def _timing(row: dict[str, Any]) -> stats.Timing:
    return stats.Timing(row["median_seconds"], row["low_seconds"], row["high_seconds"])


def compare(rows: list[dict[str, Any]], batch: int) -> str | None:
    """Add to every row its ratio to eager channels_last and to the best peer, and the break-even. Returns the best
    peer's name."""
    good = {row["name"]: row for row in rows if row["status"] == "ok"}
    base = good.get(BASELINE)
    peers = [row for row in good.values() if row["name"] != OURS]
    best = min(peers, key=lambda row: row["median_seconds"], default=None)
    for row in good.values():
        time_ = _timing(row)
        for key, other in (("vs_eager", base), ("vs_best_peer", best)):
            if other is not None and other is not row:
                against = _timing(other)
                row[key] = {"ratio": stats.speedup(time_, against), "verdict": stats.verdict(time_, against)}
        if base is not None and base is not row:
            setups = row["setup_seconds"], base["setup_seconds"]
            row["break_even_images"] = stats.break_even_images(setups[0], time_, setups[1], _timing(base), batch)
    return best["name"] if best else None


def run(options: Options, say: Say = lambda text, share: None) -> dict[str, Any]:
    """Run the benchmark.

    Args:
        options: what to run.
        say: is told what is being done and how far it is.

    Returns:
        Everything that is to be known: the content of the JSON file (see benchmarks/README.md).

    Raises:
        UserError: for an unknown model, a missing or corrupt checkpoint, unreadable images, a value out of range.
    """
    options.check()
    started = datetime.now(timezone.utc)
    clock = time.monotonic()
    described = machine.describe()  # before anything of ours loads the machine
    tables: list[dict[str, Any]] = []
    count = len(options.models) * sum(len(options.batches[mode]) for mode in options.modes)
    most = max(_CALIBRATION_IMAGES, *(batch for mode in options.modes for batch in options.batches[mode]))
    with tempfile.TemporaryDirectory(prefix="fastres-bench-") as root:
        images = photographs.photographs(most, options.size, folder=options.images, seed=options.seed)
        folders = []
        for model in options.models:  # all before the first is measured: a typing error must not cost minutes
            folders.append(tempfile.mkdtemp(dir=root))
            prepared = prepared_model(model, images[:_CALIBRATION_IMAGES], options.checkpoint, options.seed)
            write_files(prepared, images, folders[-1])
        for model, folder in zip(options.models, folders, strict=True):
            for mode in options.modes:
                tables += _run_mode(
                    model, mode, options, folder, lambda text, done: say(text, done / count), len(tables)
                )
            shutil.rmtree(folder)
    return {
        "schema": 1,
        "date": started.isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - clock, 1),
        "command": shlex.join(["fastres", *sys.argv[1:]]),
        "machine": described,
        "options": asdict(options),
        "tables": tables,
    }


def _run_mode(model: str, mode: str, options: Options, folder: str, say: Say, done: int) -> list[dict[str, Any]]:
    """The tables of one model and mode."""

    def task(batch: int) -> Task:
        return Task(model, mode, batch, options.dtype, options.device, options.size, options.threads, folder)

    skipped = {name: _class(name).why_not(mode, options.dtype, options.device) for name in options.contenders}
    names = [name for name in options.contenders if skipped[name] is None]
    batches = options.batches[mode]
    group = Group([*names, _REFERENCE], options.threads, folder)
    tables: list[dict[str, Any]] = []
    exported = []
    try:
        for batch in batches:
            say(f"{task(batch).title}: float64 reference", done)
            exported.append(group.reference(task(batch), options.timeout))
        group.end(_REFERENCE)
        for facts, batch in zip(exported, batches, strict=True):
            current, finished = task(batch), done + len(tables)
            entries = [Entry(name) for name in options.contenders]
            for entry in entries:
                if (reason := skipped[entry.name]) is not None:
                    entry.fail("skipped", reason)
            tell = functools.partial(_tell, say, current.title, finished)
            Table(current, group, entries, options, facts).run(tell)
            rows = [_row(entry, current) for entry in entries]
            about = {key: value for key, value in current.to_json().items() if key != "folder"}
            tables.append({**about, "title": current.title, "best_peer": compare(rows, batch), "contenders": rows})
    finally:
        group.end()
    return tables


def _tell(say: Say, title: str, done: float, text: str) -> None:
    say(f"{title}: {text}", done)
