"""The claims of the residual-network papers, measured: each analysis is a function that gives a `Report`.

    report = fastres.analysis.architecture(model="resnet50")
    print(report)
    report.write("runs/architecture")  # CSV, PNG, one HTML page

`fastres analyze NAME` does the same from the command line.
"""

from __future__ import annotations

from collections.abc import Callable

from fastres.analysis.report import Plot, Report, Table

__all__ = ["ANALYSES", "Plot", "Report", "Table"]

#: By the name that `fastres analyze` takes.
ANALYSES: dict[str, Callable[..., Report]] = {}
