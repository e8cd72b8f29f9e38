"""Fused modules for models of your own. Each holds the real nn.Conv2d and nn.BatchNorm2d: checkpoints, hooks and
SyncBatchNorm conversion work as for the plain modules, and where the fast path may not run, they are simply called."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fastres import arguments, functional, guard, layout, observe, reasons, sites
from fastres.batch_norm import SyncBatchNorm, convert_sync_batchnorm
from fastres.error_notes import named

__all__ = ["AddAct", "BnAct2d", "ConvBnAct2d", "SyncBatchNorm", "convert_sync_batchnorm"]


def _activate(y: Tensor, act: str) -> Tensor:
    return F.relu(y) if act == "relu" else y


class ConvBnAct2d(nn.Module):
    """act(bn(conv(x)) + residual).

    Args:
        conv: the convolution. bn: its batch norm, of conv.out_channels features. act: "relu" or "identity".

    Raises:
        ValueError: if conv and bn do not fit, or for an unknown act.
    """

    def __init__(self, conv: nn.Conv2d, bn: nn.BatchNorm2d, act: str = "relu") -> None:
        super().__init__()
        if conv.out_channels != bn.num_features:
            raise ValueError(f"conv has {conv.out_channels} output channels, bn {bn.num_features} features")
        arguments.relu(act)
        self.conv, self.bn, self.act = conv, bn, act

    @named
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if guard.blocked(self, x, conv=self.conv, bn=self.bn) is None:
            return sites.conv_bn_act(self.conv, self.bn, x, act=self.act, residual=residual)
        y = self.bn(self.conv(x))
        if residual is not None:
            y += residual
        return _activate(y, self.act)

    def extra_repr(self) -> str:
        return f"act={self.act}"


class BnAct2d(nn.Module):
    """act(bn(x) + residual). Args: bn, the batch norm; act, "relu" or "identity"."""

    def __init__(self, bn: nn.BatchNorm2d, act: str = "relu") -> None:
        super().__init__()
        arguments.relu(act)
        self.bn, self.act = bn, act

    @named
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if guard.blocked(self, x, bn=self.bn) is None:
            return sites.bn_act(self.bn, x, act=self.act, residual=residual)
        y = self.bn(x)
        if residual is not None:
            y += residual
        return _activate(y, self.act)

    def extra_repr(self) -> str:
        return f"act={self.act}"


class AddAct(nn.Module):
    """act(x + residual). Args: act, "relu" or "identity"."""

    def __init__(self, act: str = "relu") -> None:
        super().__init__()
        arguments.relu(act)
        self.act = act

    @named
    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        same = isinstance(residual, Tensor) and x.shape == residual.shape and x.dtype is residual.dtype
        fits = same and layout.dense(x) is x
        reason = None if fits else reasons.because("shape", "the inputs differ in shape or dtype, or have gaps")
        if guard.blocked(self, x, reason) is None:
            observe.stand_for(self)
            return functional.add_act(x, residual, act=self.act)
        return _activate(x + residual, self.act)

    def extra_repr(self) -> str:
        return f"act={self.act}"
