"""A program that uses the public interface, for mypy to check: what it says about types is part of the interface.

Not run by pytest; `make lint` checks it as `mypy --strict` would. A type that becomes Any, or another one, is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import fastres
from fastres import functional, models
from fastres.errors import UserError
from fastres.nn import AddAct, BnAct2d, ConvBnAct2d
from fastres.report import Row


def swap(model: nn.Module, x: Tensor) -> None:
    report = fastres.fuse_(model)
    assert_type(report, fastres.FuseReport)
    assert_type(report.rows, list[Row])
    assert_type(report.fused, int)
    assert_type(report.rows[0].reason, str)
    assert_type(fastres.explain(model, x), fastres.ExplainReport)
    assert_type(fastres.unfuse_(model), nn.Module)
    assert_type(fastres.refresh_(model), nn.Module)
    with fastres.disabled(model) as plain:
        assert_type(plain, nn.Module)
    kernels: AbstractContextManager[None] = fastres.use_kernels("reference")
    with kernels:
        model(x)
    graphed: Callable[[Tensor], Tensor] = fastres.graphed(model, x)
    assert_type(graphed(x), Tensor)


def memory(model: nn.Module) -> int:
    fastres.empty_cache()
    fastres.config.keep_folded_weights = False
    fastres.config.max_packed_bytes = None
    return fastres.packed_bytes(model) + fastres.packed_bytes() + fastres.cached_bytes()


def functions(x: Tensor, weight: Tensor, mean: Tensor, var: Tensor) -> None:
    assert_type(functional.conv_bn_act(x, weight, mean, var, padding=1, training=True), Tensor)
    assert_type(functional.conv_bias_act(x, weight, residual=x, stride=(1, 1), act="identity"), Tensor)
    assert_type(functional.bn_act(x, None, None, training=True, residual=x), Tensor)
    assert_type(functional.bn_act_maxpool(x, mean, var), Tensor)
    assert_type(functional.add_act(x, x), Tensor)
    norm = functional.BatchNorm(mean, var, training=True)
    assert_type(functional.bn_add_bn_act(x, norm, x, norm), Tensor)
    assert_type(functional.fold(weight, None, mean, var, None, None, 1e-5), tuple[Tensor, Tensor])


def networks(path: Path) -> nn.Module:
    model = models.resnet50(num_classes=10)
    assert_type(model, models.ResNet)
    assert_type(models.load_checkpoint(model, path), models.ResNet)
    small = models.resnet20(fused=False)
    assert_type(small, models.CifarResNet)
    assert_type(models.create_model("resnet18"), models.ResNet | models.CifarResNet)
    assert_type(models.list_models(), list[str])
    own: nn.Module = nn.Sequential(
        ConvBnAct2d(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), BnAct2d(nn.BatchNorm2d(8), act="identity"), AddAct()
    )
    return own


def proof(model: nn.Module, x: Tensor) -> bool:
    try:
        certificate = fastres.verify(model, x)
    except UserError:
        return False
    return certificate.ok


def main() -> None:
    model, x = models.resnet18(), torch.randn(1, 3, 64, 64)
    swap(model, x)
    print(memory(model), proof(model, x))
