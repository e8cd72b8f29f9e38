"""Whole networks beside their peers, against batch size, threads, depth, dtype and instruction set.

A part of `benchmarks/cpu.py` is a list of points; a point is one table of `fastres bench`. Points that several parts
share are measured once. Points that differ in the batch size only run in the same processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from fastres import models
from fastres.bench import harness, report
from fastres.bench.table import contender_class

BATCHES = (1, 2, 4, 8, 16, 32, 64)
THREADS = (1, 2)
DEPTHS = (18, 34, 50, 101, 152)
PAIR = ("resnet18", "resnet50")

#: Environment that holds a library to AVX2 on a processor with more. The oneDNN in PyTorch and in OpenVINO obeys its
#: variable (tried with SSE41); OV_CPU_MAX_ISA is for OpenVINO's other kernels, in builds that know it. ONNX Runtime and
#: ncnn choose by themselves and have no switch.
AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",  # PyTorch and Inductor
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "OV_CPU_MAX_ISA": "AVX2",
    "FASTRES_CPU_ISA": "avx2",
}
NOT_HELD = ("onnxruntime", "ncnn")


@dataclass(frozen=True)
class Point:
    """One table: see `fastres.bench.task.Task`. `avx2`: everyone is held to AVX2."""

    model: str
    mode: str
    batch: int
    threads: int
    dtype: str = "float32"
    size: int = 224
    avx2: bool = False


@dataclass(frozen=True)
class Part:
    """What one result file holds.

    Attributes:
        name, title: for the command line, and above its table.
        points: its tables.
        along: the field that changes within a panel of its plot: "batch", "threads", "model"; "" where they are no
            sweep, and the plot has bars.
        skipped: why it cannot be measured here, or "".
    """

    name: str
    title: str
    points: tuple[Point, ...]
    along: str = ""
    skipped: str = ""


def parts(threads: int, cpu: dict[str, Any]) -> tuple[Part, ...]:
    """Every part.

    Args:
        threads: of all parts but the one that changes them.
        cpu: what `machine.cpu` says: which parts make no sense here.
    """
    wide = any(flag.startswith("avx512") for flag in cpu["isa"])
    bf16 = any(flag in cpu["isa"] for flag in ("avx512_bf16", "amx_bf16", "bf16"))
    networks = [Point(model, "infer", batch, threads) for model in PAIR for batch in (1, 16)]
    networks.insert(2, Point("resnet34", "infer", 16, threads))
    if "resnet20" in models.list_models():
        networks.append(Point("resnet20", "infer", 1, threads, size=32))
    networks += [Point(model, "train", 16, threads) for model in PAIR]
    low = [Point(model, "infer", batch, threads, "bfloat16") for model in PAIR for batch in (1, 16)]
    low += [Point(model, "train", 16, threads, "bfloat16") for model in PAIR]
    held = [Point(model, "infer", batch, threads, avx2=True) for model in PAIR for batch in (1, 16)]
    return (
        Part("networks", "whole networks", tuple(networks)),
        Part(
            "batch",
            "inference against the batch size",
            tuple(Point(model, "infer", batch, threads) for model in PAIR for batch in BATCHES),
            along="batch",
        ),
        Part(
            "threads",
            "inference against threads",
            tuple(Point(model, "infer", batch, n) for model in PAIR for batch in (1, 16) for n in THREADS),
            along="threads",
            skipped="" if cpu["cores"] >= max(THREADS) else "this machine has one core",
        ),
        Part(
            "depth",
            "inference against depth",
            tuple(Point(f"resnet{depth}", "infer", batch, threads) for batch in (1, 16) for depth in DEPTHS),
            along="model",
        ),
        Part(
            "avx2",
            "everyone held to AVX2",
            tuple(held),
            skipped="" if wide else "this processor has nothing above AVX2: all other parts are this comparison",
        ),
        Part(
            "bf16",
            "bf16 inference, and training under autocast",
            tuple(low),
            skipped="" if bf16 else "this processor has no bf16 instructions",
        ),
    )


def smaller(part: Part) -> Part:
    """The same part for a smoke run: images of at most 64 px, at most four at once."""
    points = (replace(point, size=min(point.size, 64), batch=min(point.batch, 4)) for point in part.points)
    return replace(part, points=tuple(dict.fromkeys(points)))


def runs(points: Sequence[Point]) -> list[list[Point]]:
    """Different points, grouped into runs that differ in the batch size only, small batches first."""
    found: dict[Point, list[Point]] = {}
    for point in dict.fromkeys(points):
        found.setdefault(replace(point, batch=0), []).append(point)
    return [sorted(group, key=lambda point: point.batch) for group in found.values()]


def measure(
    points: Sequence[Point], contenders: Sequence[str], seconds: float, rounds: int, say: harness.Say
) -> list[dict[str, Any]]:
    """Measure points of one run. Returns their tables, in the order of `points`.

    Raises:
        UserError: for an unknown model, or a value out of range.
    """
    first = points[0]
    options = harness.Options(
        models=[first.model],
        modes=[first.mode],
        batches={first.mode: [point.batch for point in points]},
        dtype=first.dtype,
        threads=first.threads,
        size=first.size,
        contenders=[name for name in contenders if not (first.avx2 and name in NOT_HELD)],
        seconds=seconds,
        rounds=rounds,
    )
    with _environment(AVX2 if first.avx2 else {}):
        result = harness.run(options, say)
    for table in result["tables"]:
        table["held_to_avx2"] = first.avx2
        if first.avx2:
            table["title"] += ", AVX2"
            table["contenders"] += [_not_held(name) for name in NOT_HELD if name in contenders]
    return result["tables"]


def _not_held(name: str) -> dict[str, Any]:
    title = contender_class(name).title
    return {"name": name, "title": title, "status": "skipped", "reason": "cannot be held to AVX2"}


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """These environment variables, for the processes that start meanwhile."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def show(console: Console, part: Part, tables: Sequence[dict[str, Any]]) -> None:
    """Milliseconds of one iteration, a row a table, a column a contender; and what speaks against them."""
    rows = {row["name"]: row["title"] for table in tables for row in table["contenders"]}
    shared, titles = headings(tables)
    title = f"{part.title}: ms of an iteration ({shared})"
    rich = Table(title=title, title_justify="left", box=None, header_style="bold")
    rich.add_column("network")
    for name in (*rows.values(), "x eager", "x best peer"):
        rich.add_column(name.replace("eager channels_last", "eager"), justify="right")
    remarks = []
    for title, table in zip(titles, tables, strict=True):
        found = {row["name"]: row for row in table["contenders"] if row["status"] == "ok"}
        ours = found.get(harness.OURS, {})
        rich.add_row(
            title,
            *(_milliseconds(found[name]) if name in found else "-" for name in rows),
            *(report.ratio(ours[key]) if key in ours else "-" for key in ("vs_eager", "vs_best_peer")),
        )
        failed = [row for row in table["contenders"] if row["status"] != "ok"]
        remarks += [f"{row['title']} {row['status']}: {row['reason']}" for row in failed]
        remarks += [f"{title}: {warning}" for warning in report.warnings(table)]
    console.print(rich)
    for remark in dict.fromkeys(remarks):
        console.print(remark)
    console.print()


def headings(tables: Sequence[dict[str, Any]]) -> tuple[str, list[str]]:
    """The settings that all tables have, and for each table its title with the settings in which it differs."""
    texts: list[dict[str, str]] = []
    for table in tables:
        threads = "1 thread" if table["threads"] == 1 else f"{table['threads']} threads"
        texts.append({"threads": threads, "dtype": table["dtype"], "size": f"{table['size']} px"})
    shared = [key for key in texts[0] if len({text[key] for text in texts}) == 1]
    own = [[text[key] for key in text if key not in shared] for text in texts]
    titles = [", ".join([table["title"], *more]) for table, more in zip(tables, own, strict=True)]
    return ", ".join(texts[0][key] for key in shared), titles


def _milliseconds(row: dict[str, Any]) -> str:
    value = row["median_seconds"] * 1e3
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"
