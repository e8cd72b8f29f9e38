"""The check of scripts/sweep.py on small models of other libraries; and that it finds what is wrong."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _torchvision
import pytest
import torch
from torch import nn

import fastres
from fastres.kernels import extension
from fastres.report import Report

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import sweep  # noqa: E402
import sweep_check  # noqa: E402
import sweep_hugging_face  # noqa: E402
import sweep_models  # noqa: E402

needs_kernels = pytest.mark.skipif(not extension.available(), reason=f"no compiled kernels: {extension.load_error()}")


def _timm(name: str, **options: Any) -> nn.Module:
    import timm

    return timm.create_model(name, num_classes=10, **options)


def _torchvision_model(name: str) -> nn.Module:
    import torchvision

    return torchvision.models.get_model(name, weights=None, num_classes=10)


NARROW = {"channels": (16, 24, 32, 40)}
#: name -> (library, what builds it, least share of its operations that has to run fused).
SMALL: dict[str, tuple[str, Callable[[], nn.Module], float]] = {
    "timm resnet10t": ("timm", functools.partial(_timm, "resnet10t", **NARROW), 0.8),
    "timm resnet14t": ("timm", functools.partial(_timm, "resnet14t", **NARROW), 0.8),
    "timm seresnet18": ("timm", functools.partial(_timm, "seresnet18", **NARROW), 0.5),
    "timm resnetv2_18d": ("timm", functools.partial(_timm, "resnetv2_18d", **NARROW), 0.5),
    "timm regnetx_002": ("timm", functools.partial(_timm, "regnetx_002"), 0.8),
    "torchvision mobilenet_v3_small": (
        "torchvision",
        functools.partial(_torchvision_model, "mobilenet_v3_small"),
        0.3,
    ),
    "transformers ResNet": ("transformers", sweep_hugging_face.models()["ResNet, bottleneck"], 0.8),
    "transformers RegNet": ("transformers", sweep_hugging_face.models()["RegNet Y"], 0.5),
}


def library(name: str) -> None:
    """Skips the test where the library is not to be had, and says why."""
    if name in ("timm", "torchvision"):
        found, reason = _torchvision.load()
        if found is None:
            pytest.skip(reason)
    try:
        importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"no {name}: {error}")


@needs_kernels
@pytest.mark.parametrize("name", SMALL)
def test_small_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    needed, build, least = SMALL[name]
    library(needed)
    model = build()
    result = sweep_check.check(model, sweep.sample_input(model))
    assert not result.problems
    assert sum(result.fused.values()) >= least * sum(result.total.values()), result.reasons


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(self.bn(self.conv(x)))


class Wrong(Block):
    """Behaves, once something is left on it, a little differently."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y * (1 + 1e-6) if "wrong" in self.__dict__ else y


@pytest.mark.parametrize("what", ["values", "attribute", "class"])
def test_finds_what_is_wrong(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A swap that changes the numbers a little, that leaves something on a module, that is not undone."""

    def fuse(model: nn.Module) -> Any:
        for block in [m for m in model.modules() if isinstance(m, Wrong)]:
            if what == "class":
                block.relu.__class__ = nn.SiLU
            elif what == "attribute":
                block.left = True
            else:
                block.wrong = True
        return Report([])

    monkeypatch.setattr(fastres, "fuse_", fuse)
    result = sweep_check.check(nn.Sequential(Wrong(), nn.Flatten()), torch.randn(2, 3, 16, 16))
    expected = {"values": "float64: output", "attribute": "modules after", "class": "output after unfuse_ differs"}
    assert any(expected[what] in problem for problem in result.problems), result.problems


def test_right_swap_of_an_unknown_block_has_no_problems() -> None:
    result = sweep_check.check(nn.Sequential(Block(), nn.Flatten()), torch.randn(2, 3, 16, 16))
    assert not result.problems and result.total["conv"] == 1


def test_every_library_lists_models() -> None:
    for name in ("timm", "transformers"):
        library(name)
        models = sweep_models.all_models((name,))
        keys = [model.key for model in models]
        assert len(keys) == len(set(keys)) and len(keys) > 40
