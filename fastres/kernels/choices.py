"""Which kernel serves an op first on a GPU architecture, where that was measured: choices/sm_NN.json (see README.md
there). Without a file the order of the table holds."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastres import layout

FOLDER = Path(__file__).with_name("choices")


@cache
def rules(index: int) -> dict[str, list[dict[str, Any]]]:
    """op -> its rules, for the architecture of a CUDA device."""
    if torch.version.cuda is None:
        return {}  # GPUs of AMD have other names
    major, minor = torch.cuda.get_device_capability(index)
    path = FOLDER / f"sm_{major}{minor}.json"
    return json.loads(path.read_text())["ops"] if path.is_file() else {}


def preferred(op: str, x: Tensor) -> str | None:
    """The kernel that was fastest for calls like this one, with x as first argument; None if nobody measured."""
    if not x.is_cuda:
        return None
    for rule in rules(x.device.index).get(op, ()):
        order = rule.get("channels_last")
        fits = order is None or (x.dim() == 4 and layout.is_channels_last(x) == order)
        if fits and x.nbytes <= rule.get("most_bytes", x.nbytes):
            return rule["kernel"]
    return None
