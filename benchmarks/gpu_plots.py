"""PNG charts of benchmarks/gpu.py: a roofline with every kernel, the normalising ops, the networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import plots
from gpu_timing import reason

from fastres.bench import plot, report

_TEXT, _OURS, _OTHER, _LAGGING = "#20262c", "#1b7f5c", "#8a8f98", "#d1603d"
_STYLES = {  # of kernels in the roofline
    "bn_act": (_OURS, "o"),
    "bn_add_act": (_OURS, "s"),
    "bn_add_bn_act": (_OURS, "P"),
    "add_act": (_OURS, "^"),
    "bn_act_maxpool": (_OURS, "D"),
    "forward": ("#3b6fb6", "o"),
    "grad_input": ("#3b6fb6", "s"),
    "grad_weight": ("#3b6fb6", "^"),
    "ours forward": (_LAGGING, "o"),
    "ours grad_input": (_LAGGING, "s"),
    "ours grad_weight": (_LAGGING, "^"),
}
_WANTED = 0.85  # of the copy's bandwidth: what the large layers are to reach
#: FLOP of the ops for each value: there are some, so that they have a place in the roofline.
_FLOPS_A_VALUE = {"forward": 6, "backward": 10, "eval": 3}


def draw(units: dict[str, Any], path: Path) -> Iterator[tuple[Path, str]]:
    """Draws what there are results for, beside the file `path`. Gives each chart, and why it is not there, or ""."""
    charts: tuple[tuple[str, Callable[..., bool]], ...] = (
        ("roofline", roofline),
        ("ops", ops),
        ("networks", networks),
    )
    for name, chart in charts:
        file = path.with_name(f"{path.stem}-{name}.png")
        try:
            if chart(units, file):
                yield file, ""
        except Exception as error:  # most likely matplotlib is missing: no chart is no reason to lose results
            yield file, f"no chart: {reason(error)}"


def _done(units: dict[str, Any], stage: str) -> list[dict[str, Any]]:
    return [unit for name, unit in units.items() if name.startswith(f"{stage}/") and "failed" not in unit]


def _figure(width: float, height: float, **options: Any) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(squeeze=False, **options).ravel()


def roofline(units: dict[str, Any], path: Path) -> bool:
    """Every kernel in bf16: FLOP/s over FLOP for each byte that it cannot avoid to move, under both ceilings."""
    found = _done(units, "ceilings")
    products, normalising = _done(units, "convolutions"), [u for u in _done(units, "ops") if u["dtype"] == "bfloat16"]
    if not found or not (products or normalising):
        return False
    copy, peak = found[0]["copy"], found[0]["flops"]["bfloat16"]
    figure, (axis,) = _figure(8.4, 5.8)
    ends = [0.3, peak / copy, 3000]
    axis.plot(ends, [min(peak, copy * x) for x in ends], color=_TEXT, linewidth=1.4)
    points: dict[str, list[tuple[float, float]]] = {}
    for unit in products:
        for one in unit["rows"]:
            for name in (name for name in one["rates"] if name in _STYLES):
                points.setdefault(name, []).append((one["flops"] / one["bytes"], one["rates"][name]))
    for unit in normalising:
        for one in unit["rows"]:
            if one["bandwidth"]:
                c, h, w = one["shape"]
                intensity = _FLOPS_A_VALUE[one["mode"]] * unit["batch"] * c * h * w / one["bytes"]
                points.setdefault(one["op"], []).append((intensity, intensity * one["bandwidth"]))
    for name, places in points.items():
        color, marker = _STYLES[name]
        label = name if "_act" in name else f"convolution, {name}"
        axis.scatter(*zip(*places, strict=True), color=color, marker=marker, s=26, alpha=0.75, label=label)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("FLOP for each byte that must be moved", fontsize=9)
    axis.set_ylabel("FLOP/s", fontsize=9)
    title = f"copy {copy / 1e12:.2f} TB/s, bf16 product {peak / 1e12:.0f} TFLOP/s"
    axis.set_title(title, fontsize=10, loc="left", color=_TEXT)
    axis.legend(fontsize=8, frameon=False)
    axis.grid(color="#e4e7eb", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    plots.save(figure, report.machine_line(found[0]), path, 96)
    return True


def ops(units: dict[str, Any], path: Path) -> bool:
    """The share of the copy's bandwidth of every op and shape, a panel a dtype."""
    tables = _done(units, "ops")
    if not tables:
        return False
    most = max(len(table["rows"]) for table in tables)
    figure, axes = _figure(1.8 + 4.6 * len(tables), 0.17 * most + 1.6, ncols=len(tables))
    for axis, table in zip(axes, tables, strict=True):
        rows = table["rows"]
        places = range(len(rows), 0, -1)
        shares = [100 * (one["of_copy"] or 0) for one in rows]
        axis.barh(places, shares, color=[_OURS if s >= 100 * _WANTED else _LAGGING for s in shares], height=0.74)
        for place, share, one in zip(places, shares, rows, strict=True):
            ratios = [f"{one[key]:.2f}x {key[3:]}" for key in ("vs_eager", "vs_compile") if one[key]]
            about = {"xytext": (3, 0), "textcoords": "offset points", "va": "center", "fontsize": 6}
            axis.annotate(", ".join(ratios), (share, place), **about)
        axis.axvline(100 * _WANTED, color=_TEXT, linewidth=0.8, linestyle=":")
        names = [f"{one['op']} {one['mode']} {'x'.join(map(str, one['shape']))}" for one in rows]
        axis.set_yticks(list(places), names, fontsize=6.5)
        axis.set_ylim(0.3, len(rows) + 0.7)
        axis.set_xlim(0, max(100, *shares) * 1.6)
        axis.set_xlabel("% of the bandwidth of a copy", fontsize=8.5)
        axis.set_title(f"batch {table['batch']}, {table['dtype']}", fontsize=10, loc="left", color=_TEXT)
        axis.tick_params(axis="x", labelsize=8)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    plots.save(figure, report.machine_line(tables[0]), path, 60 * len(tables))
    return True


def networks(units: dict[str, Any], path: Path) -> bool:
    """Bars as those of `fastres bench`, a panel a point."""
    tables = [table for table in _done(units, "networks") if any(row["status"] == "ok" for row in table["contenders"])]
    if not tables:
        return False
    plot.write({**tables[0], "tables": tables}, path)
    return True
