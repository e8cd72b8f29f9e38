"""What a swapped model costs whose guard always refuses, beside the same model before the swap.

    python benchmarks/guard_overhead.py                                    ResNet-18, batch 1, inference and training
    python benchmarks/guard_overhead.py resnet50 --json benchmarks/results/guard-overhead.json

Both have the same hooks, on the last child that each guard asks about, so it asks all its questions before it refuses;
explain says that nothing ran fused. Each lives in a process of its own, with the same weights and images, in the order
of channels; they take turns, in an order that alternates. A round's overhead is the ratio of its two medians less 1,
so that what slows the machine down for a while slows both. Needs a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

import fastres
from fastres import images as photographs
from fastres.bench import harness, machine, report
from fastres.bench.contenders import ChannelsLast
from fastres.bench.process import ContenderError, Process
from fastres.bench.stats import quantile
from fastres.bench.task import Task, prepared_model, write_files
from fastres.errors import UserError

#: How a contender is named, and its class in its own process.
CONTENDERS = {"eager": "guard_overhead:Hooked", "refused": "guard_overhead:Refused"}
_TIMEOUT = 300.0


def nothing(*args: Any) -> None:
    """A forward hook."""


class Hooked(ChannelsLast):
    """The eager model, with a hook on every child that would end a guard's questions."""

    title = "eager, with hooks"

    def prepare(self) -> None:
        super().prepare()
        self.model.get_submodule("conv1").register_forward_hook(nothing)  # of the stem, which is asked about twice
        for module in self.model.modules():
            last = [child for name, child in module.named_children() if name[:2] == "bn" or name == "maxpool"][-1:]
            for child in last:
                child.register_forward_hook(nothing)


class Refused(Hooked):
    """The same, swapped."""

    title = "fastres, refused"

    def prepare(self) -> None:
        super().prepare()
        fastres.fuse_(self.model)
        found = fastres.explain(self.model, self.images)
        if found.fused or not found.total:
            raise RuntimeError(f"{found.fused} operations ran fused")


def measure(task: Task, rounds: int, seconds: float) -> dict[str, Any]:
    """Both contenders, in turns of `seconds` each.

    Raises:
        ContenderError: if one fails, dies or hangs.
    """
    processes: dict[str, Process] = {}
    try:
        for name, where in CONTENDERS.items():
            processes[name] = Process(where, task.threads, task.folder, name)
            processes[name].receive(_TIMEOUT)  # its imports
            processes[name].ask(_TIMEOUT, do="setup", task=task.to_json())
        first = median(processes["eager"].ask(_TIMEOUT, do="run", iterations=5)["samples"])
        iterations = max(1, round(seconds / first))
        for process in processes.values():
            process.ask(_TIMEOUT, do="run", iterations=iterations)  # warm
        samples: dict[str, list[list[float]]] = {name: [] for name in CONTENDERS}
        busy, clock = machine.busy_seconds(), time.monotonic()
        used = 0.0
        for number in range(rounds):
            for name in list(CONTENDERS)[:: 1 if number % 2 else -1]:
                answer = processes[name].ask(_TIMEOUT, do="run", iterations=iterations)
                samples[name].append(answer["samples"])
                used += answer["cpu"]
        wall = time.monotonic() - clock
    finally:
        for process in processes.values():
            process.end()
    end = machine.busy_seconds()
    other = None if busy is None or end is None else max(0.0, end - busy - used) / (wall * (os.cpu_count() or 1))
    return summary(samples) | {"iterations": iterations, "other_cpu_share": other, "samples": samples}


def summary(samples: dict[str, list[list[float]]]) -> dict[str, Any]:
    """Medians in seconds; the overhead as a share, with the middle half of the rounds'."""
    medians = {name: [median(found) for found in rounds] for name, rounds in samples.items()}
    shares = [ours / eager - 1 for eager, ours in zip(medians["eager"], medians["refused"], strict=True)]
    seconds = {name: median(found) for name, found in medians.items()}
    return {
        "seconds": seconds,
        "overhead": median(shares),
        "overhead_low": quantile(shares, 0.25),
        "overhead_high": quantile(shares, 0.75),
        "overhead_seconds": median(shares) * seconds["eager"],
    }


def run(options: harness.Options, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """A table for each model and mode.

    Raises:
        UserError: for an unknown model, or a value out of range.
        ContenderError: if a contender fails.
    """
    options.check()
    here = str(Path(__file__).resolve().parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    tables = []
    for model in options.models:
        batch = options.batches["infer"][0]
        images = photographs.photographs(max(batch, 4), options.size)
        with tempfile.TemporaryDirectory(prefix="fastres-guard-") as folder:
            write_files(prepared_model(model, images), images, folder)
            for mode in options.modes:
                task = Task(model, mode, batch, "float32", "cpu", options.size, options.threads, folder)
                about = {key: value for key, value in task.to_json().items() if key not in ("folder", "exports")}
                tables.append({**about, "title": task.title, **measure(task, rounds, seconds)})
    return tables


def line(table: dict[str, Any]) -> str:
    other = table["other_cpu_share"]
    busy = "" if other is None or other < 0.05 else f"; other processes used {other:.0%} of the processors"
    return (
        f"{table['title']}, {table['size']} px, {table['threads']} threads: eager "
        f"{table['seconds']['eager'] * 1e3:.2f} ms, refused {table['seconds']['refused'] * 1e3:.2f} ms, overhead "
        f"{table['overhead']:+.2%} ({table['overhead_low']:+.2%} to {table['overhead_high']:+.2%}), "
        f"{table['overhead_seconds'] * 1e6:+.0f} us{busy}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="(default: resnet18)")
    parser.add_argument("--mode", choices=("infer", "train", "both"), default="both", help="(default: both)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="(default: 1)")
    parser.add_argument("--size", type=int, default=224, metavar="N", help="height and width (default: 224)")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="(default: one per core)")
    parser.add_argument("--rounds", type=int, default=60, metavar="N", help="(default: 60)")
    parser.add_argument("--seconds", type=float, default=0.3, metavar="X", help="of one turn (default: 0.3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    given = parser.parse_args()
    started = datetime.now(timezone.utc)
    described = machine.describe()
    modes = ["infer", "train"] if given.mode == "both" else [given.mode]
    try:
        if given.rounds < 1 or given.size < 1:
            raise UserError("--rounds and --size must be above zero")
        options = harness.Options(
            models=given.models or ["resnet18"],
            modes=modes,
            batches={mode: [given.batch] for mode in ("infer", "train")},
            size=given.size,
            threads=given.threads,
        )
        tables = run(options, given.rounds, given.seconds)
    except (UserError, ContenderError) as error:
        print(f"guard_overhead.py: error: {error}", file=sys.stderr)
        return 2
    print("\n".join(map(line, tables)))
    if given.json:
        result = {
            "schema": 1,
            "date": started.isoformat(timespec="seconds"),
            "command": shlex.join(["python", "benchmarks/guard_overhead.py", *sys.argv[1:]]),
            "machine": described,
            "tables": tables,
        }
        report.write_json(result, given.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
