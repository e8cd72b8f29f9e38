"""The engines that `fastres bench` compares with compute the same network: a slow or wrong peer would flatter us."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fastres.bench.contenders import Reference
from fastres.bench.peers import Ncnn, OnnxRuntime, OpenVino, Peer
from fastres.bench.task import Task, prepared_model, write_files


class TinyNet(nn.Module):
    """What the exporters must get right: a stem with pooling, Winograd's shape, a residual sum, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.body = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.stem(x))
        return self.head(torch.relu(self.body(x) + x))


@pytest.mark.parametrize("peer", [OnnxRuntime, OpenVino, Ncnn], ids=lambda peer: peer.title)
def test_peers_compute_the_network(peer: type[Peer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := peer.why_not("infer", "float32", "cpu"):
        pytest.skip(reason)
    monkeypatch.setitem(sys.modules, "tiny", sys.modules[__name__])
    torch.manual_seed(0)
    images = torch.randn(3, 3, 40, 40)
    write_files(prepared_model("tiny:TinyNet", images), images, tmp_path)
    exports = [peer.exported_by]
    task = Task("tiny:TinyNet", "infer", 3, "float32", "cpu", 40, 1, str(tmp_path), exports)
    reference = Reference(task)
    reference.setup()
    facts = reference.after_setup()
    assert f"{peer.exported_by}_failed" not in facts, facts
    contender = peer(task)
    contender.setup()
    found = contender.after_setup()
    assert 0 < found["error"] < 2e-6 and found["same_top1"] == 1.0


def test_openvino_takes_part_in_half_precision() -> None:
    """In fp32 where the processor has none, which is then its strongest precision."""
    for dtype in ("bfloat16", "float16"):
        assert OpenVino.why_not("infer", dtype, "cpu") == OpenVino.why_not("infer", "float32", "cpu")
    assert OnnxRuntime.why_not("infer", "bfloat16", "cpu") is not None
