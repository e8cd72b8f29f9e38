"""The curves of a run as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["write"]

_TRAIN, _TEST, _EMA, _TEXT = "#6b7a88", "#1b7f5c", "#d1495b", "#20262c"


def write(history: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draws errors and losses by epoch into a PNG: training dashed, test solid, as in He et al. 2015.

    Raises:
        ImportError: without matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    errors, losses = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    for axis, what in ((errors, "error"), (losses, "loss")):
        for part, color, style in (("train", _TRAIN, "--"), ("test", _TEST, "-"), ("ema_test", _EMA, "-")):
            if f"{part}_{what}" in history[0]:
                values = [row[f"{part}_{what}"] for row in history]
                label = {"train": "training", "test": "test", "ema_test": "test, averaged weights"}[part]
                axis.plot(epochs, values, style, color=color, label=f"{label}: {values[-1]:.3g} at the end", marker=".")
        axis.set_xlabel("epoch", fontsize=9, color=_TEXT)
        axis.set_title("error in per cent" if what == "error" else "loss", fontsize=10, loc="left", color=_TEXT)
        axis.legend(fontsize=8, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    if all(value > 0 for row in history for name, value in row.items() if name.endswith("loss")):
        losses.set_yscale("log")
    errors.set_ylim(0)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left", color=_TEXT)
    figure.savefig(path, dpi=130)
