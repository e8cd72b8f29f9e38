"""Convolution weights with batch norm folded in and packed for the kernel, kept between inference calls and never
stale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastres import config, functional
from fastres.kernels import extension, onednn, table
from fastres.ops import registration

Geometry = tuple[list[int], list[int], list[int], int]


@dataclass(frozen=True, slots=True)
class _Entry:
    """Folded weights of one convolution, and what they were made from."""

    weight: Tensor | None  # packed; None if folding would overflow, and batch norm has to run by itself
    bias: Tensor
    order: torch.memory_format  # channels_last if the plain weight is: the layout the input is then put into
    made_from: tuple[Any, ...]
    tensors: tuple[Tensor, ...]  # held, so that no other tensor can get one of their ids


# A module's entry goes with the module. Copies and pickles of a model carry no folded weights.
_entries: WeakKeyDictionary[nn.Module, _Entry] = WeakKeyDictionary()


def forget(model: nn.Module) -> None:
    """Drops the folded weights of every convolution of `model`."""
    for module in model.modules():
        _entries.pop(module, None)


def geometry(conv: nn.Conv2d) -> Geometry:
    """stride, padding, dilation, groups as the ops take them; padding must be numbers."""
    assert not isinstance(conv.padding, str)
    return [*conv.stride], [*conv.padding], [*conv.dilation], conv.groups


def folded(conv: nn.Conv2d, bn: nn.BatchNorm2d, x: Tensor) -> tuple[Tensor, Tensor, torch.memory_format] | None:
    """Weight and bias for conv_bias_act, and the layout of its input; None where they cannot be kept or must not be
    folded.

    Kept under three witnesses: identity and version counter of every tensor, and a fingerprint of the values, because
    writes through `.data` and to inference tensors move no counter. The fingerprint reads batch norm's tensors whole,
    and of a large weight samples of every output and every input channel (csrc/cpu/fingerprint.cpp);
    `fastres.refresh_` is for any other write.
    """
    if not config.keep_folded_weights or torch.compiler.is_compiling() or registration.autocast_enabled(x.device.type):
        return None
    if x.device.type != "cpu" or not extension.available() or x.dtype is torch.float64 or not x.numel():
        return None
    if not any(kernel.name == "cpu" for kernel in table.kernels("conv_bias_act", "cpu")):
        return None
    sources = (conv.weight, conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var)
    tensors = [t for t in sources if t is not None]
    versions = tuple((id(t), -1 if t.is_inference() else t._version) for t in tensors)
    made_from = (versions, torch.ops.fastres_cpu.fingerprint.default(tensors), bn.eps, x.dtype)
    entry = _entries.get(conv)
    if entry is None or entry.made_from != made_from:
        entry = _entries[conv] = _fold(conv, bn, x, tensors, made_from)
    return None if entry.weight is None else (entry.weight, entry.bias, entry.order)


@torch.no_grad()
def _fold(conv: nn.Conv2d, bn: nn.BatchNorm2d, x: Tensor, tensors: list[Tensor], made_from: tuple[Any, ...]) -> _Entry:
    assert bn.running_mean is not None and bn.running_var is not None
    weight, bias = functional.fold(conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps)
    dtype = onednn.compute_dtype(x.dtype)
    weight, bias = weight.to(dtype), bias.to(dtype)
    packed = None
    if bool(weight.isfinite().all()) and bool(bias.isfinite().all()):
        packed = onednn.pack(weight, x.shape, *geometry(conv))
    channels_last = conv.weight.is_contiguous(memory_format=torch.channels_last) and not conv.weight.is_contiguous()
    order = torch.channels_last if channels_last else torch.contiguous_format
    return _Entry(packed, bias, order, made_from, tuple(tensors))
