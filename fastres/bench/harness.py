"""Runs the benchmark: prepares models and images, measures one table after the other, compares, and says where it ran.

Every contender lives in one process for all tables of a model, see table.py.
"""

from __future__ import annotations

import functools
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
from fastres.bench.table import CONTENDERS, GPU_CONTENDERS, REFERENCE, Entry, Group, Limits, Table, contender_class
from fastres.bench.task import DTYPES, Task, prepared_model, write_files
from fastres.errors import UserError
from fastres.models import image_size

BASELINE = "channels_last"  # the stronger of PyTorch's eager forms, on which speed-ups and break-even are counted
OURS = "fastres"
ALWAYS = (BASELINE, OURS)

_CALIBRATION_IMAGES = 16  # whatever the batch sizes are, so that the weights are always the same


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
    seconds: float = 8.0
    size: int = 0  # of the images; 0: what each model is made for
    checkpoint: str | None = None
    images: str | None = None
    synthetic: bool = False  # images that need neither scikit-learn nor Pillow
    seed: int = 0
    timeout: float = 300.0
    reference: bool = True  # whether errors against float64 are measured
    saved: bool = False  # whether what a training step saves for backward is counted

    def check(self) -> None:
        """Fill in defaults that depend on the machine.

        Raises:
            UserError: for a value that makes no sense.
        """
        for what, value in (
            ("rounds", self.rounds),
            ("seconds", self.seconds),
            ("timeout", self.timeout),
        ):
            if value <= 0:
                raise UserError(f"--{what} must be above zero, not {value}")
        if any(batch < 1 for mode in self.modes for batch in self.batches[mode]):
            raise UserError("--batch must be at least 1")
        if self.size < 0:
            raise UserError(f"--size must be above zero, not {self.size}")
        if self.threads < 0:
            raise UserError(f"--threads must be above zero, not {self.threads}")
        if self.dtype not in (*DTYPES, "tf32"):
            raise UserError(f"--dtype must be one of {', '.join(DTYPES)}, tf32, not {self.dtype}")
        if self.dtype == "tf32" and self.device != "cuda":
            raise UserError("--dtype tf32 needs --device cuda")
        if unknown := [name for name in self.contenders if name not in CONTENDERS | GPU_CONTENDERS]:
            raise UserError(f"no contender is named {', '.join(unknown)}; there are {', '.join(CONTENDERS)}")
        if self.device == "cuda":
            import torch

            if not torch.cuda.is_available():
                raise UserError("--device cuda: this PyTorch sees no CUDA device")
        self.threads = self.threads or machine.physical_cores()


Say = Callable[[str, float], None]  # what is being done, and the share of all tables that is done


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
        **({"saved_bytes": facts["saved_bytes"]} if "saved_bytes" in facts else {}),
        "samples": entry.samples,
    }


def _timing(row: dict[str, Any]) -> stats.Timing:
    return stats.Timing(row["median_seconds"], row["low_seconds"], row["high_seconds"])


def compare(rows: list[dict[str, Any]], batch: int) -> str | None:
    """Add to every row its ratio to eager channels_last and to the best peer, and the break-even. Returns the best
    peer's name."""
    good = {row["name"]: row for row in rows if row["status"] == "ok"}
    base = good.get(BASELINE)
    peers = [row for row in good.values() if not row["name"].startswith(OURS)]
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
        folders = []
        for model in options.models:  # all before the first is measured: a typing error must not cost minutes
            folders.append(tempfile.mkdtemp(dir=root))
            size = options.size or image_size(model)
            if options.synthetic:
                images = photographs.synthetic(most, size, seed=options.seed)
            else:
                images = photographs.photographs(most, size, folder=options.images, seed=options.seed)
            prepared = prepared_model(model, images[:_CALIBRATION_IMAGES], options.checkpoint, options.seed)
            write_files(prepared, images, folders[-1])
        for model, folder in zip(options.models, folders, strict=True):
            tables += _run_model(model, options, folder, functools.partial(_tell, say, count, len(tables)))
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


def _tell(say: Say, count: int, before: int, text: str, done: int) -> None:
    say(text, (before + done) / count)


def _run_model(model: str, options: Options, folder: str, tell: Callable[[str, int], None]) -> list[dict[str, Any]]:
    """The tables of one model. `tell` is told what is being done, and the number of tables that are done."""
    kinds = {name: contender_class(name) for name in options.contenders}
    skipped = {
        mode: {name: kind.why_not(mode, options.dtype, options.device) for name, kind in kinds.items()}
        for mode in options.modes
    }
    names = [name for name in kinds if any(skipped[mode][name] is None for mode in options.modes)]
    exports = sorted({kinds[name].exported_by for name in names} - {""})
    about = (options.dtype, options.device, options.size or image_size(model), options.threads)
    tasks = [
        Task(model, mode, batch, *about, folder, exports) for mode in options.modes for batch in options.batches[mode]
    ]
    limits = Limits(options.rounds, options.seconds, options.timeout, options.saved and options.modes == ["train"])
    tables: list[dict[str, Any]] = []
    references = []
    group = Group([*names, *([REFERENCE] if options.reference else [])], options.threads, folder)
    try:
        for task in tasks if options.reference else ():
            tell(f"{task.title}: float64 reference", 0)
            references.append(group.reference(task, options.timeout))
        if options.reference:
            group.end(REFERENCE)
        else:
            references = [{} for _ in tasks]
        for task, facts in zip(tasks, references, strict=True):
            if tables and tables[-1]["mode"] != task.mode:
                group.end(*(name for name in names if kinds[name].one_mode or skipped[task.mode][name]))
            entries = [Entry(name, skipped[task.mode][name]) for name in options.contenders]
            table = Table(task, group, entries, facts, limits)
            table.run(functools.partial(_prefixed, tell, task.title, len(tables)))
            tables.append(_table(table))
    finally:
        group.end()
    return tables


def _prefixed(tell: Callable[[str, int], None], title: str, done: int, text: str) -> None:
    tell(f"{title}: {text}", done)


def _table(table: Table) -> dict[str, Any]:
    """A finished table as it goes into the result file."""
    task = table.task
    rows = [_row(entry, task) for entry in table.entries]
    about = {key: value for key, value in task.to_json().items() if key not in ("folder", "exports")}
    about |= {"title": task.title, "best_peer": compare(rows, task.batch), "other_cpu_share": table.others}
    return {**about, "reference_failed": table.exported.get("failed"), "contenders": rows}
