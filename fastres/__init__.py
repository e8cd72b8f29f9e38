"""fastres: one call makes a residual network faster, and proves that its numbers did not change.

    import fastres
    report = fastres.fuse_(model)      # in place; fastres.unfuse_(model) gives it back
    print(report)

fastres.functional has the fused functions, fastres.nn modules of them, fastres.models residual networks,
fastres.verify the proof.
"""

from fastres import config, functional, models, nn
from fastres import ops as _ops  # noqa: F401  registers torch.ops.fastres
from fastres.canary import CanaryError, CanaryWarning, canary
from fastres.decisions import TuneReport
from fastres.explain import ExplainReport, explain
from fastres.folding import packed_bytes
from fastres.fuse import disabled, fuse_, refresh_, unfuse_
from fastres.graphs import graphed
from fastres.kernels.table import use_kernels
from fastres.memory import cached_bytes, empty_cache
from fastres.report import FuseReport
from fastres.running_statistics import snapshot_statistics, statistics_once
from fastres.tune import load_tuning_, tune_
from fastres.verify import verify

__version__ = "0.1.0"

__all__ = [
    "CanaryError",
    "CanaryWarning",
    "ExplainReport",
    "FuseReport",
    "TuneReport",
    "cached_bytes",
    "canary",
    "config",
    "disabled",
    "empty_cache",
    "explain",
    "functional",
    "fuse_",
    "graphed",
    "load_tuning_",
    "models",
    "nn",
    "packed_bytes",
    "refresh_",
    "snapshot_statistics",
    "statistics_once",
    "tune_",
    "unfuse_",
    "use_kernels",
    "verify",
]
