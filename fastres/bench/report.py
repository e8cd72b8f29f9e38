"""The result of a benchmark as tables for a terminal, and as files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastres.bench import machine

if TYPE_CHECKING:
    from rich.console import RenderableType


def milliseconds(seconds: float) -> str:
    """Three digits that matter: "4.31 ms", "43.1 ms", "431 ms", "4.31 s"."""
    value, unit = (seconds, "s") if seconds >= 1 else (seconds * 1e3, "ms")
    return f"{value:.2f} {unit}" if value < 10 else f"{value:.1f} {unit}" if value < 100 else f"{value:.0f} {unit}"


def _spread(row: dict[str, Any]) -> str:
    low, high = (row[key] / row["median_seconds"] - 1 for key in ("low_seconds", "high_seconds"))
    return f"{low * 100:+.0f}..{high * 100:+.0f} %"


def ratio(comparison: dict[str, Any] | None) -> str:
    """A comparison that `harness.compare` made: "1.62x", or "no diff."; "1" for what is compared with itself."""
    if comparison is None:
        return "1"
    return "no diff." if comparison["verdict"] == "no difference" else f"{comparison['ratio']:.2f}x"


def _break_even(row: dict[str, Any]) -> str:
    if "break_even_images" not in row:
        return "-"
    images = row["break_even_images"]
    return "never" if images is None else f"{images:,}"


def _error(row: dict[str, Any]) -> str:
    return "-" if row.get("error") is None else f"{row['error']:.1e}"


def cells(row: dict[str, Any]) -> list[str]:
    """The cells of one contender's row, under `COLUMNS`; a contender that did not run has its reason in the second."""
    if row["status"] != "ok":
        return [row["title"], f"{row['status']}: {row['reason']}"]
    return [
        row["title"],
        milliseconds(row["median_seconds"]),
        _spread(row),
        f"{row['images_per_second']:.1f}",
        ratio(row.get("vs_eager")),
        ratio(row.get("vs_best_peer")),
        f"{row['setup_seconds']:.1f} s",
        _break_even(row),
        f"{row['peak_over_imports_bytes'] / 2**20:,.0f}",
        _error(row),
    ]


COLUMNS = ("contender", "time", "spread", "images/s", "x eager", "x best", "set-up", "pays after", "MiB", "error")

WIDTH = 112  # columns of the widest table

LEGEND = """\
time        median over the rounds of one iteration; spread: the middle half of the rounds (all, below five)
x eager     times as fast as eager channels_last; x best: as the fastest contender that is not fastres
no diff.    no difference: the spreads overlap
pays after  images until a set-up longer than that of eager channels_last has paid for itself
MiB         peak resident memory while running, above what the process had after its imports
error       relative L2, against float64: of the logits, or of all gradients of the first step"""


def settings(task: dict[str, Any]) -> str:
    threads = "1 thread" if task["threads"] == 1 else f"{task['threads']} threads"
    return f"{task['size']} x {task['size']}, {task['dtype']}, {task['device']}, {threads}"


def tables(result: dict[str, Any]) -> Iterator[RenderableType]:
    """One rich table for each task, and a line of text under it."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    for task in result["tables"]:
        about = f"{task['title']}, {settings(task)}"
        table = Table(
            title=about,
            title_justify="left",
            title_style="bold",
            box=SIMPLE_HEAD,
            pad_edge=False,
            collapse_padding=True,
        )
        for index, name in enumerate(COLUMNS):
            table.add_column(name, justify="right" if index else "left", no_wrap=True)
        remarks = []
        for row in task["contenders"]:
            if row["status"] == "ok":
                table.add_row(*cells(row), style="bold green" if row["name"] == "fastres" else None)
            else:
                remarks.append(": ".join(cells(row)))
        yield table
        yield "\n".join([*summary(task), *remarks, *warnings(task)]) + "\n"


def summary(task: dict[str, Any]) -> list[str]:
    """What the table says about fastres, in a sentence."""
    rows = {row["name"]: row for row in task["contenders"]}
    ours = rows.get("fastres", {"status": ""})
    if ours["status"] != "ok":
        return []
    parts = []
    for key, other in (("vs_eager", "eager channels_last"), ("vs_best_peer", "the best peer")):
        if key in ours:
            found = ours[key]
            same = found["verdict"] == "no difference"
            name = f"{other} ({rows[task['best_peer']]['title']})" if key == "vs_best_peer" else other
            parts.append(f"no difference to {name}" if same else f"{found['ratio']:.2f}x {name}")
    return ["fastres: " + "; ".join(parts)] if parts else []


def warnings(task: dict[str, Any]) -> list[str]:
    """What speaks against the numbers of this table."""
    found = []
    busy = [row["title"] for row in task["contenders"] if row.get("idle_cpu_share", 0.0) > 0.02]
    if busy:
        found.append(f"warning: not idle between its turns: {', '.join(busy)}")
    others = task.get("other_cpu_share") or 0.0
    if others > 0.05:
        found.append(
            f"warning: other processes used {others:.0%} of the processors meanwhile: do not trust these times"
        )
    if task.get("reference_failed"):
        found.append(f"no errors: the float64 reference failed: {task['reference_failed']}")
    return found


def machine_line(result: dict[str, Any]) -> str:
    """One line that says where and with what it was measured."""
    found = result["machine"]
    versions = found["versions"]
    libraries = [
        f"{name} {versions[name]}" for name in ("torch", "onnxruntime", "openvino", "ncnn") if name in versions
    ]
    isa = [
        flag for flag in found["cpu"]["isa"] if flag in ("avx2", "avx512f", "avx512_bf16", "amx_tile", "asimd", "sve")
    ]
    where = [found["cpu"]["model"], f"{found['cpu']['cores']} cores", " ".join(isa)]
    if gpu := found.get("gpu"):
        libraries = [f"{name} {versions[name]}" for name in ("torch", "triton") if name in versions]
        libraries += [f"CUDA {gpu['cuda']}", f"cuDNN {gpu['cudnn']}", f"driver {gpu['driver']}"]
        where = [gpu["name"]]
    return ", ".join(filter(None, [*where, *libraries, result["date"][:10]]))


def default_stem(date: str) -> Path:
    """Path without suffix for the result files.

    Inside a checkout of fastres benchmarks/results/local/<date>-<processor>, elsewhere
    fastres-bench-<date>-<processor> in the current folder.
    """
    name = f"{date[:16].replace(':', '')}-{machine.slug()}"
    for folder in (Path.cwd(), *Path.cwd().parents):
        if (folder / "benchmarks" / "layers.py").is_file() and (folder / "fastres" / "bench").is_dir():
            return folder / "benchmarks" / "results" / "local" / name
    return Path(f"fastres-bench-{name}")


def write_json(result: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
