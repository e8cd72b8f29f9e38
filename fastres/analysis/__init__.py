"""The claims of the residual-network papers, measured: each analysis is a function that gives a `Report`.

    report = fastres.analysis.architecture(model="resnet50")
    print(report)
    report.write("runs/architecture")  # CSV, PNG, one HTML page

`fastres analyze NAME` does the same from the command line.
"""

from __future__ import annotations

from collections.abc import Callable

from fastres.analysis.architecture import architecture
from fastres.analysis.lesion import lesion
from fastres.analysis.paths import paths
from fastres.analysis.report import Plot, Report, Table
from fastres.analysis.responses import responses

__all__ = ["ANALYSES", "Plot", "Report", "Table", "architecture", "lesion", "paths", "responses"]

#: By the name that `fastres analyze` takes.
ANALYSES: dict[str, Callable[..., Report]] = {
    "lesion": lesion,
    "paths": paths,
    "responses": responses,
    "architecture": architecture,
}
