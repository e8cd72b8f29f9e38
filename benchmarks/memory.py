"""Memory of a training step: what is saved for the backward pass, and the peak of resident memory.

    python benchmarks/memory.py resnet18 resnet50 --batch 4
    make bench-cpu ARGS=memory

Eager channels_last, fastres, and fastres with memory="low", each in a process of its own, with the same weights and
images. *Saved* counts every storage that autograd keeps for the backward pass once (saved-tensor hooks), without
parameters and buffers. *Peak* is resident memory during two steps (forward, backward, SGD with momentum) after the
first, above what the process had after its imports: weights, gradients and the optimizer's state are part of it.
*Time* is the median of a step over rounds in which the contenders take turns.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from fastres import images as photographs
from fastres.bench import harness, report
from fastres.bench.process import ContenderError, Process
from fastres.bench.table import CONTENDERS, MEMORY_CONTENDERS, contender_class
from fastres.bench.task import Task, prepared_model, write_files
from fastres.errors import UserError

MODELS = ("resnet18", "resnet50")
#: key -> class of the contenders.
MEMORY = {name: CONTENDERS[name] for name in harness.ALWAYS} | MEMORY_CONTENDERS
_TIMEOUT = 300.0
_ROUNDS = 5


def measure(names: Sequence[str], task: Task, rounds: int = _ROUNDS) -> list[dict[str, Any]]:
    """Saved bytes, peak and time of contenders, each in a new process.

    Raises:
        ContenderError: if one fails, dies or hangs.
    """
    processes: list[Process] = []
    rows = []
    try:
        for name in names:
            processes.append(Process(MEMORY[name], task.threads, task.folder, name))
            process = processes[-1]
            process.receive(_TIMEOUT)  # its imports
            process.ask(_TIMEOUT, do="setup", task=task.to_json())
            process.ask(_TIMEOUT, do="run", iterations=2)
            memory = process.ask(_TIMEOUT, do="memory")
            rows.append(
                {
                    "name": name,
                    "title": contender_class(name).title,
                    "peak_bytes": memory["peak"],
                    "peak_over_imports_bytes": max(0, memory["peak"] - memory["baseline"]),
                    "samples": [],
                }
            )
        for _ in range(rounds):
            for process, row in zip(processes, rows, strict=True):
                row["samples"] += process.ask(_TIMEOUT, do="run", iterations=1)["samples"]
        for process, row in zip(processes, rows, strict=True):
            saved = process.ask(_TIMEOUT, do="saved")  # last: it keeps every storage until it has counted
            row |= {
                "saved_bytes": saved["bytes"],
                "saved_storages": saved["storages"],
                "seconds": median(row["samples"]),
            }
    finally:
        for process in processes:
            process.end()
    return rows


def compare(rows: list[dict[str, Any]]) -> None:
    """Add to every row its ratios to the first."""
    for row in rows:
        for key, ratio in (
            ("saved_bytes", "saved_ratio"),
            ("peak_over_imports_bytes", "peak_over_imports_ratio"),
            ("seconds", "seconds_ratio"),
        ):
            row[ratio] = row[key] / rows[0][key]


def run(models: list[str], batch: int, size: int, threads: int, rounds: int = _ROUNDS) -> list[dict[str, Any]]:
    """One table a model: its contenders, eager channels_last first.

    Raises:
        UserError: for an unknown model, or a batch or size below 1.
        ContenderError: if a contender fails.
    """
    options = harness.Options(models=models, modes=["train"], batches={"train": [batch]}, size=size, threads=threads)
    options.check()
    if size < 1:
        raise UserError(f"--size must be above zero, not {size}")
    tables = []
    images = photographs.photographs(batch, size)
    for model in models:
        with tempfile.TemporaryDirectory(prefix="fastres-memory-") as folder:
            write_files(prepared_model(model, images), images, folder)
            task = Task(model, "train", batch, "float32", "cpu", size, options.threads, folder)
            rows = measure(list(MEMORY), task, rounds)
        compare(rows)
        about = {key: value for key, value in task.to_json().items() if key not in ("folder", "exports")}
        tables.append({**about, "title": task.title, "contenders": rows})
    return tables


def show(console: Console, tables: list[dict[str, Any]]) -> None:
    table = Table(title="memory of a training step", title_justify="left", box=None, header_style="bold")
    columns = ("network", "contender", "saved MiB", "x eager", "storages", "peak MiB", "x eager", "ms", "x eager")
    for name in columns:
        table.add_column(name, justify="left" if name in columns[:2] else "right")
    for found in tables:
        for row in found["contenders"]:
            table.add_row(
                f"{found['model']}, batch {found['batch']}, {found['size']} px",
                row["title"],
                f"{row['saved_bytes'] / 2**20:,.1f}",
                f"{row['saved_ratio']:.2f}",
                str(row["saved_storages"]),
                f"{row['peak_over_imports_bytes'] / 2**20:,.0f}",
                f"{row['peak_over_imports_ratio']:.2f}",
                f"{row['seconds'] * 1e3:,.0f}",
                f"{row['seconds_ratio']:.2f}",
            )
    console.print(table)
    console.print()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"(default: {' '.join(MODELS)})")
    parser.add_argument("--batch", type=int, default=4, metavar="N", help="(default: 4)")
    parser.add_argument("--size", type=int, default=224, metavar="N", help="height and width (default: 224)")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="(default: one per core)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    options = parser.parse_args()
    try:
        tables = run(options.models or list(MODELS), options.batch, options.size, options.threads)
    except (UserError, ContenderError) as error:
        print(f"memory.py: error: {error}", file=sys.stderr)
        return 2
    show(Console(width=max(Console().width, report.WIDTH)), tables)
    if options.json:
        report.write_json({"schema": 1, "tables": tables}, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
