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
from fastres.errors import UserError

FOLDER = Path(__file__).with_name("choices")


@cache
def rules(index: int) -> dict[str, list[dict[str, Any]]]:
    """op -> its rules, for the architecture of a CUDA device."""
    if torch.version.cuda is None:
        return {}  # GPUs of AMD have other names
    major, minor = torch.cuda.get_device_capability(index)
    path = FOLDER / f"sm_{major}{minor}.json"
    return read(path) if path.is_file() else {}


def read(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The rules in a file, checked.

    Raises:
        UserError: if it cannot be read, or says anything else than choices/README.md does.
    """
    try:
        ops = json.loads(path.read_text())["ops"]
        wrong = [f"{op}: {rule}" for op, rules in ops.items() for rule in rules if not _is_rule(rule)]
    except (OSError, ValueError, RecursionError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no file of choices: {type(error).__name__}: {error}") from error
    if wrong:
        raise UserError(f"{path} has a rule that is none: {wrong[0]:.100}")
    return ops


def _is_rule(rule: Any) -> bool:
    kinds = {"kernel": str, "channels_last": bool, "most_bytes": int}
    return "kernel" in rule and all(type(value) is kinds.get(name) for name, value in rule.items())


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
