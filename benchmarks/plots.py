"""PNG charts of the sweeps and of the table of layers; the others have the bars of fastres.bench.plot."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from fastres.bench import report

_TEXT, _OURS, _LAGGING = "#20262c", "#1b7f5c", "#d1603d"
#: Colour and marker of each contender: distinct in grey, too.
_STYLES = {
    "fastres": (_OURS, "o"),
    "eager": ("#8a8f98", "v"),
    "channels_last": ("#4b5563", "s"),
    "compile": ("#d1603d", "^"),
    "onnxruntime": ("#3b6fb6", "D"),
    "openvino": ("#8e5ea2", "P"),
    "ncnn": ("#c79a1b", "X"),
}
_AXES = {"batch": "images in a batch", "threads": "threads", "model": "layers of the ResNet"}
_SHORT = {"model": lambda value: value.removeprefix("resnet")}


def sweep(result: dict[str, Any], along: str, path: Path) -> None:
    """Milliseconds an image against `along` ("batch", "threads" or "model"; lower is better), one line a contender,
    with the spread as an error bar; a panel for each setting of the rest."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: dict[str, list[dict[str, Any]]] = {}
    for table in result["tables"]:
        panels.setdefault(_panel(table, along), []).append(table)
    columns = min(len(panels), 2)
    height = -(-len(panels) // columns)
    figure = Figure(figsize=(5.4 * columns, 3.6 * height + 1.1), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(height, columns, squeeze=False).ravel()
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    lines: dict[str, Any] = {}
    for axis, (name, tables) in zip(axes, panels.items(), strict=False):
        values = [table[along] for table in tables]
        for key, title in {row["name"]: row["title"] for table in tables for row in table["contenders"]}.items():
            points = [(i, table["batch"], _row(table, key)) for i, table in enumerate(tables)]
            points = [(i, batch, row) for i, batch, row in points if row]
            if points:
                lines.setdefault(title, _line(axis, key, points))
        axis.set_xticks(range(len(values)), [_SHORT.get(along, str)(value) for value in values])
        axis.set_xlim(-0.25, len(values) - 0.75)
        axis.set_ylim(bottom=0)
        axis.set_title(name, fontsize=10, loc="left", color=_TEXT)
        axis.set_xlabel(_AXES[along], fontsize=9)
        axis.set_ylabel("ms an image (lower is better)", fontsize=9)
        axis.tick_params(labelsize=8.5)
        axis.grid(axis="y", color="#e4e7eb", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(
        lines.values(), lines, loc="outside lower center", ncols=min(len(lines), 6), fontsize=9, frameon=False
    )
    save(figure, report.machine_line(result), path, 66 * columns)


def _panel(table: dict[str, Any], along: str) -> str:
    """What stays the same within a panel."""
    threads = "1 thread" if table["threads"] == 1 else f"{table['threads']} threads"
    said = {"model": table["model"], "batch": f"batch {table['batch']}", "threads": threads}
    fixed = [text for field, text in said.items() if field != along]
    return ", ".join([*fixed, table["dtype"], f"{table['size']} px"])


def _row(table: dict[str, Any], name: str) -> dict[str, Any] | None:
    return next((row for row in table["contenders"] if row["name"] == name and row["status"] == "ok"), None)


def _line(axis: Any, name: str, points: list[tuple[int, int, dict[str, Any]]]) -> Any:
    color, marker = _STYLES[name]
    ours = name == "fastres"
    middle = [row["median_seconds"] / batch * 1e3 for _, batch, row in points]
    spread = [
        [value - row["low_seconds"] / batch * 1e3 for value, (_, batch, row) in zip(middle, points, strict=True)],
        [row["high_seconds"] / batch * 1e3 - value for value, (_, batch, row) in zip(middle, points, strict=True)],
    ]
    return axis.errorbar(
        [i for i, _, _ in points],
        middle,
        yerr=spread,
        color=color,
        marker=marker,
        markersize=6 if ours else 4.5,
        linewidth=2.4 if ours else 1.3,
        elinewidth=0.8,
        zorder=3 if ours else 2,
    )


def layers(result: dict[str, Any], lagging: float, path: Path) -> None:
    """The share of the floor of every layer, a panel a batch size; layers under `lagging` in another colour."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tables = result["tables"]
    rows = max(len(table["layers"]) for table in tables)
    figure = Figure(figsize=(1.6 + 4.2 * len(tables), 0.19 * rows + 1.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(tables), squeeze=False, sharey=True).ravel()
    for axis, table in zip(axes, tables, strict=True):
        shares = [100 * layer["of_floor"] for layer in table["layers"]]
        places = range(len(shares), 0, -1)
        colors = [_LAGGING if share < 100 * lagging else _OURS for share in shares]
        axis.barh(places, shares, color=colors, height=0.74)
        for place, share, layer in zip(places, shares, table["layers"], strict=True):
            ours = f"{layer['seconds']['fastres'] * 1e3:.2f} ms, {layer['ratio']:.2f}x oneDNN"
            text = f"{layer['method']}, {ours}, {layer['limit']}"
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
            about = {"xytext": (3, 0), "textcoords": "offset points", "va": "center", "fontsize": 6.5, "bbox": box}
            axis.annotate(text, (share, place), **about)
        axis.axvline(100 * lagging, color=_TEXT, linewidth=0.8, linestyle=":")
        axis.set_yticks(list(places), [layer["shape"] for layer in table["layers"]], fontsize=7)
        axis.set_ylim(0.3, len(shares) + 0.7)
        axis.set_xlim(0, max(100, *shares) * 1.7)
        axis.set_xlabel(f"% of the floor (red: under {100 * lagging:.0f})", fontsize=8.5)
        threads = "1 thread" if table["threads"] == 1 else f"{table['threads']} threads"
        axis.set_title(f"batch {table['batch']}, float32, {threads}", fontsize=10, loc="left", color=_TEXT)
        axis.tick_params(axis="x", labelsize=8)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    save(figure, report.machine_line(result), path, 60 * len(tables))


def save(figure: Any, header: str, path: Path, width: int) -> None:
    """Under `header`, which is broken into lines of `width` letters."""
    figure.suptitle("\n".join(textwrap.wrap(header, width)), fontsize=9, x=0.01, ha="left", color=_TEXT)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
