"""benchmarks/guard_overhead.py: both contenders do the same work, and the arithmetic of the overhead."""

import sys
from pathlib import Path

import pytest
import torch
from _compare import some_kernels, watched

import fastres

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import guard_overhead  # noqa: E402


def test_contenders():
    """Every guard asks all its questions, refuses, and the numbers are eager's."""
    results = []
    for kind in (guard_overhead.Hooked, guard_overhead.Refused):
        torch.manual_seed(0)
        contender = kind.__new__(kind)  # without the files of a task
        contender.model = fastres.models.resnet18(num_classes=4, fused=False).eval()
        contender.images = torch.ones(1, 3, 32, 32).contiguous(memory_format=torch.channels_last)
        with some_kernels(), torch.no_grad():
            contender.prepare()
            with watched() as seen:
                results.append(contender.call(contender.images))
    assert len(seen) >= 9 and all(reason and reason.startswith("hooks on ") for _, reason in seen)
    assert {reason for _, reason in seen} == {"hooks on bn2", "hooks on maxpool"}
    assert torch.equal(*results)


def test_summary():
    rounds = {"eager": [[0.010, 0.011, 0.010], [0.020] * 3, [0.010] * 3], "refused": [[0.0101], [0.0204], [0.0103]]}
    found = guard_overhead.summary(rounds)
    assert found["overhead"] == pytest.approx(0.02) and found["seconds"] == {"eager": 0.010, "refused": 0.0103}
    assert found["overhead_low"] == pytest.approx(0.015) and found["overhead_seconds"] == pytest.approx(2e-4)
    table = {"title": "resnet18 inference, batch 1", "size": 224, "threads": 2, "other_cpu_share": 0.5, **found}
    assert "overhead +2.00% (+1.50% to +2.50%), +200 us; other processes used 50%" in guard_overhead.line(table)
