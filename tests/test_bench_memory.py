"""What a training step saves, counted on nets where it is known, and benchmarks/memory.py."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fastres.kernels import extension
from fastres.saved import SavedTensors

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
memory = importlib.import_module("memory")


def test_saved_tensors_of_a_known_net() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    x = torch.randn(2, 3, 8, 8)
    with SavedTensors(model) as saved:
        loss = model(x).sum()
    # the input; the convolution's output; mean and 1 / deviation; the ReLU's output, the classifier's input too
    map_ = 2 * 4 * 6 * 6
    assert saved.bytes == 4 * (x.numel() + map_ + 4 + 4 + map_)
    assert saved.storages == 5
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_part_of_a_storage_keeps_all_of_it() -> None:
    weight, x = nn.Parameter(torch.randn(4)), torch.randn(10, 4)
    model = nn.Module()
    model.weight = weight
    with SavedTensors(model) as saved:
        (x[0] * weight + x[1] * weight).sum()
    assert (saved.bytes, saved.storages) == (x.nbytes, 1)


@pytest.mark.slow
@pytest.mark.skipif(not extension.available(), reason=f"fastres runs eager code: {extension.load_error()}")
def test_memory_of_eager_and_fastres() -> None:
    (table,) = memory.run(["resnet18"], batch=2, size=32, threads=1, rounds=1)
    eager, ours, low = table["contenders"]
    assert (eager["name"], ours["name"], low["name"]) == ("channels_last", "fastres", "fastres_low")
    assert eager["saved_ratio"] == eager["peak_over_imports_ratio"] == eager["seconds_ratio"] == 1.0
    assert low["saved_bytes"] < 0.5 * ours["saved_bytes"]
    assert ours["saved_ratio"] == ours["saved_bytes"] / eager["saved_bytes"] < 1.0  # the stem's activation is not kept
    for row in table["contenders"]:
        # the stem's pooled output and more; weights, gradients and momentum
        assert (
            row["saved_bytes"] > 2 * 64 * 8 * 8 * 4
            and len(row["samples"]) == 1
            and 134e6 < row["peak_over_imports_bytes"] < row["peak_bytes"]
        )


@pytest.mark.parametrize("arguments", [["resnet19"], ["--batch", "0"], ["--size", "-1"], ["--size", "0"]], ids=str)
def test_bad_options_are_one_line(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["memory.py", *arguments])
    assert memory.main() == 2
    error = capsys.readouterr().err
    assert error.startswith("memory.py: error: ") and len(error.splitlines()) == 1
