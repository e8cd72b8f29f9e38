"""The claims of the residual-network papers, measured: each analysis is a function that gives a `Report`.

    report = fastres.analysis.architecture(model="resnet50")
    print(report)
    report.write("runs/architecture")  # CSV, PNG, one HTML page

`fastres analyze NAME` does the same from the command line.
"""

from __future__ import annotations

from collections.abc import Callable

from fastres.analysis.activation_order import activation_order
from fastres.analysis.architecture import architecture
from fastres.analysis.batch_norm import batch_norm
from fastres.analysis.degradation import degradation
from fastres.analysis.gradient_flow import gradient_flow
from fastres.analysis.lesion import lesion
from fastres.analysis.paths import paths
from fastres.analysis.report import Plot, Report, Table
from fastres.analysis.responses import responses
from fastres.analysis.shortcuts import shortcuts

__all__ = [
    "ANALYSES",
    "Plot",
    "Report",
    "Table",
    "activation_order",
    "architecture",
    "batch_norm",
    "degradation",
    "gradient_flow",
    "lesion",
    "paths",
    "responses",
    "shortcuts",
]

#: By the name that `fastres analyze` takes.
ANALYSES: dict[str, Callable[..., Report]] = {
    "degradation": degradation,
    "gradient-flow": gradient_flow,
    "shortcuts": shortcuts,
    "batch-norm": batch_norm,
    "activation-order": activation_order,
    "lesion": lesion,
    "paths": paths,
    "responses": responses,
    "architecture": architecture,
}
