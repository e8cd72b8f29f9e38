"""Figures in one style, drawn without a display."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastres.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["COLORS", "axes", "cycle"]

#: Told apart by the colour-blind too; the first is for what the figure is about.
COLORS = ("#1b7f5c", "#d1495b", "#2f6690", "#e0a030", "#7b5ea7", "#6b7a88")


def axes(columns: int = 1, rows: int = 1, *, width: float = 4.5, height: float = 3.4) -> tuple[Figure, Any]:
    """A figure and its axes, as `plt.subplots(rows, columns, squeeze=False)[1].flat` gives them.

    Args:
        columns, rows: of axes. width, height: of each, in inches.

    Raises:
        UserError: without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(f"the figures need matplotlib ({error}): pip install 'fastres[analysis]'") from error
    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    FigureCanvasAgg(figure)
    found = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in found:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    return figure, found


def cycle(count: int) -> list[str]:
    """So many colours; they come again after the last."""
    return [COLORS[i % len(COLORS)] for i in range(count)]
