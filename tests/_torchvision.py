"""Imports the real torchvision beside any build of torch.

torchvision's wheels hold operators compiled for CUDA. Beside a CPU build of torch they do not load, and
`import torchvision` fails, because it registers shapes for operators that are not there. Its models need none of them:
declaring their schemas is enough.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import torch

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


@functools.cache
def load() -> tuple[ModuleType | None, str]:
    """Returns (torchvision, "") or (None, the reason)."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None, "torchvision is not installed"
    _declare_operators(Path(spec.origin).parent)
    try:
        return importlib.import_module("torchvision"), ""
    except Exception as error:  # of another torch version, for one: whatever it raises is the reason
        return None, f"torchvision does not import: {type(error).__name__}: {str(error).splitlines()[0]}"


def _declare_operators(package: Path) -> None:
    for library in sorted(package.glob("_C*")):
        with contextlib.suppress(OSError):
            torch.ops.load_library(library)  # where it loads, torchvision has its own operators
    global _library  # the declarations live as long as this object
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for name, schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            _library.define(schema)
