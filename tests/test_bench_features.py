"""benchmarks/features.py: what it measures, and what it says."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastres.recipes.residual import FusedModule

pytest.importorskip("rich")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
features = importlib.import_module("features")


def test_contenders_get_a_backbone() -> None:
    model = features.resnet20()
    assert not model.training and not any(isinstance(module, FusedModule) for module in model.modules())
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 64)


def test_the_faster_layout_is_what_counts() -> None:
    def row(name: str, speed: float) -> dict[str, Any]:
        return {"name": name, "status": "ok", "reason": "", "images_per_second": speed}

    rows = [row("eager", 20.0), row("channels_last", 10.0), row("fastres", 30.0)]
    table = {"title": "t", "model": "features:resnet18", "batch": 16, "size": 224, "contenders": rows}
    (line,) = features.summary({"tables": [table]})
    assert line == "resnet18, batch 16, 224 px: fused 30.0 images/s, eager 20.0: 1.50 times as fast"
    rows[1] = {"name": "channels_last", "status": "failed", "reason": "died of SIGKILL"}
    assert features.summary({"tables": [table]}) == ["t: died of SIGKILL"]


@pytest.mark.parametrize("arguments", [["resnet19"], ["--batch", "0"], ["--size", "-1"]], ids=str)
def test_bad_options_are_one_line(arguments: list[str], monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["features.py", *arguments])
    assert features.main() == 2
    error = capsys.readouterr().err
    assert error.startswith("features.py: error: ") and len(error.splitlines()) == 1
