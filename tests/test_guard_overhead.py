"""benchmarks/guard_overhead.py: both models do the same work, and the arithmetic of the overhead."""

import sys
from pathlib import Path

import pytest
import torch
from _compare import some_kernels, watched

import fastres

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import guard_overhead  # noqa: E402


def test_pair():
    """Every guard asks all its questions, refuses, and the numbers are eager's."""
    torch.manual_seed(0)
    eager = fastres.models.resnet18(num_classes=4, fused=False).eval().to(memory_format=torch.channels_last)
    images = torch.ones(1, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    with some_kernels(), torch.no_grad():
        pair = guard_overhead.pair(eager, images)
        assert pair[0] is eager and all(a is b for a, b in zip(pair[0].parameters(), pair[1].parameters(), strict=True))
        want = eager(images)
        with watched() as seen:
            found = pair[1](images)
    assert len(seen) >= 9 and all(reason and reason.startswith("hooks on ") for _, reason in seen)
    assert {reason for _, reason in seen} == {"hooks on bn2", "hooks on maxpool"}
    assert torch.equal(want, found)


def test_measure():
    (infer, train) = guard_overhead.run(["resnet18"], ["infer", "train"], batch=1, size=64, pairs=3)
    for table in (infer, train):
        assert {name: len(found) for name, found in table["samples"].items()} == {"eager": 3, "refused": 3}
        assert table["overhead_low"] <= table["overhead"] <= table["overhead_high"]


def test_summary():
    eager, refused = [0.010] * 300 + [0.030] * 100, [0.0101] * 200 + [0.0103] * 100 + [0.0306] * 100
    found = guard_overhead.summary(eager, refused)
    assert found["overhead"] == pytest.approx(0.02) and found["seconds"]["eager"] == 0.010
    # order statistics 200 -+ 20 of shares that are 0.01 up to number 200, then 0.03 and 0.06
    assert (found["overhead_low"], found["overhead_high"]) == (pytest.approx(0.01), pytest.approx(0.03))
    table = {"model": "resnet18", "mode": "infer", "batch": 1, "size": 224, "threads": 2, "pairs": 400, **found}
    assert "overhead +2.00% (+1.00% to +3.00%), +200 us, 400 pairs" in guard_overhead.line(table)
