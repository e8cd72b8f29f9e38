"""fastres: one call makes a residual network faster, and proves that its numbers did not change.

    import fastres
    report = fastres.fuse_(model)      # in place; fastres.unfuse_(model) gives it back
    print(report)

fastres.functional has the fused functions, fastres.nn modules of them, fastres.models residual networks,
fastres.verify the proof.
"""

from fastres import config, functional, models, nn
from fastres import ops as _ops  # noqa: F401  registers torch.ops.fastres
from fastres.explain import ExplainReport, explain
from fastres.folding import packed_bytes
from fastres.fuse import disabled, fuse_, refresh_, unfuse_
from fastres.graphs import graphed
from fastres.kernels.table import use_kernels
from fastres.memory import cached_bytes, empty_cache
from fastres.report import FuseReport
from fastres.verify import verify

__version__ = "0.1.0"

__all__ = [
    "ExplainReport",
    "FuseReport",
    "cached_bytes",
    "config",
    "disabled",
    "empty_cache",
    "explain",
    "functional",
    "fuse_",
    "graphed",
    "models",
    "nn",
    "packed_bytes",
    "refresh_",
    "unfuse_",
    "use_kernels",
    "verify",
]
