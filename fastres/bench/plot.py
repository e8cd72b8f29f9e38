"""The result of a benchmark as a bar chart: one panel a table, one bar a contender."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from fastres.bench import report

_OURS, _PEER, _BEST_PEER, _TEXT = "#1b7f5c", "#b8c0c8", "#6b7a88", "#20262c"


def _label(row: dict[str, Any]) -> str:
    speed = f"{row['images_per_second']:.3g}"
    against = row.get("vs_eager")
    if against is None:
        return speed
    same = against["verdict"] == "no difference"
    return f"{speed}  (no difference)" if same else f"{speed}  ({against['ratio']:.2f}x)"


def write(result: dict[str, Any], path: Path) -> None:
    """Draw images per second (longer is better), with the spread and the ratio to eager channels_last, into a PNG.

    Contenders that did not run have no bar.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = [task for task in result["tables"] if any(row["status"] == "ok" for row in task["contenders"])]
    if not tasks:
        return
    columns = min(len(tasks), 3)
    height = -(-len(tasks) // columns)
    most = max(len(task["contenders"]) for task in tasks)
    figure = Figure(figsize=(4.6 * columns, (0.9 + 0.36 * most) * height + 0.7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(height, columns, squeeze=False).ravel()
    for axis in axes[len(tasks) :]:
        axis.set_visible(False)
    for axis, task in zip(axes, tasks, strict=False):
        rows = [row for row in task["contenders"] if row["status"] == "ok"]
        speeds = [row["images_per_second"] for row in rows]
        slow = [speed - task["batch"] / row["high_seconds"] for speed, row in zip(speeds, rows, strict=True)]
        fast = [task["batch"] / row["low_seconds"] - speed for speed, row in zip(speeds, rows, strict=True)]
        names = [row["name"] for row in rows]
        best = task["best_peer"]
        colors = [_OURS if n.startswith("fastres") else _BEST_PEER if n == best else _PEER for n in names]
        places = range(len(rows), 0, -1)
        axis.barh(
            places, speeds, xerr=[slow, fast], color=colors, height=0.72, error_kw={"ecolor": _TEXT, "elinewidth": 0.8}
        )
        for place, row, speed, more in zip(places, rows, speeds, fast, strict=True):
            axis.annotate(
                _label(row),
                (speed + more, place),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=_TEXT,
            )
        axis.set_yticks(list(places), [row["title"] for row in rows], fontsize=8.5)
        about = "" if report.settings(task) == report.settings(tasks[0]) else f"\n{report.settings(task)}"
        axis.set_title(task["title"] + about, fontsize=10, loc="left", color=_TEXT)
        axis.set_xlim(0, max(speeds) * 1.5)
        axis.tick_params(axis="x", labelsize=8)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    first = tasks[0]
    about = f"images per second, {report.settings(first)}; ratio to eager channels_last"
    header = [line for text in (about, report.machine_line(result)) for line in textwrap.wrap(text, 58 * columns)]
    figure.suptitle("\n".join(header), fontsize=9, x=0.01, ha="left", color=_TEXT)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
