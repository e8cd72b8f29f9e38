"""Convolution weights with batch norm folded in and packed for the kernel, kept between inference calls and never
stale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastres import arguments, batch_norm, config, functional, managed, ops, reference, replay
from fastres.batch_norm import BatchNorm
from fastres.kernels import convolution, extension, table
from fastres.ops import registration

Geometry = tuple[list[int], list[int], list[int], int]


@dataclass(slots=True)
class _Entry:
    """Folded and packed weights of one convolution, and what they were made from."""

    run: table.PackedConvolution | None  # None if batch norm has to run by itself
    made_from: tuple[Any, ...]
    tensors: tuple[Tensor, ...]  # held, so that no other tensor can get one of their ids
    plan: Any  # kernel and method the weights are packed for
    inputs: tuple[Any, ...]  # the last inputs that had this plan
    shape: tuple[int, int, int, int]  # of the output for these


class Plain:
    """A convolution whose folded weight is kept in its order, not packed: for whichever kernel serves a call."""

    def __init__(self, weight: Tensor, bias: Tensor | None, where: Geometry) -> None:
        self.weight, self.bias, self.where = weight, bias, where

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    @property
    def kernel(self) -> None:
        return None

    def __call__(self, x: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
        return ops.conv_bias_act.op(x, self.weight, self.bias, residual, *self.where, relu)


# A module's entry goes with the module. Copies and pickles of a model carry no folded weights.
_entries: WeakKeyDictionary[nn.Module, _Entry] = WeakKeyDictionary()


def forget(model: nn.Module) -> None:
    """Drops the folded weights of every convolution of `model`."""
    for module in model.modules():
        _entries.pop(module, None)


def packed_bytes(model: nn.Module | None = None) -> int:
    """Bytes of the folded and packed weights that are kept for inference, of `model` or of all models.

    `fastres.config.max_packed_bytes` limits them, `fastres.refresh_(model)` drops those of a model.
    """
    entries = _entries.values() if model is None else [_entries[m] for m in model.modules() if m in _entries]
    return sum(entry.run.nbytes for entry in list(entries) if entry.run is not None)


def kept(model: nn.Module) -> list[table.PackedConvolution]:
    """The folded weights of `model` that are kept now: who holds them may go on to use their memory."""
    return [entry.run for m in model.modules() if (entry := _entries.get(m)) is not None and entry.run is not None]


def geometry(conv: nn.Conv2d) -> Geometry:
    """stride, padding, dilation, groups as the ops take them; padding must be numbers."""
    assert not isinstance(conv.padding, str)
    return [*conv.stride], [*conv.padding], [*conv.dilation], conv.groups


def conv_tensors(conv: nn.Conv2d) -> tuple[Tensor, Tensor | None]:
    """Weight and bias. From the dictionary, because Module.__getattr__ would take a share of a small network's time."""
    try:
        parameters = conv._parameters
        return parameters["weight"], parameters["bias"]  # type: ignore[return-value]
    except KeyError:  # replaced by plain attributes
        return conv.weight, conv.bias


def folded(conv: nn.Conv2d, bn: BatchNorm | None, x: Tensor) -> tuple[table.PackedConvolution, tuple[int, ...]] | None:
    """run(x, residual, relu): the convolution with `bn` folded in (if given) and packed weights; and the shape of its
    output. None where they cannot be kept or must not be folded.

    Kept under three witnesses: identity and version counter of every tensor, and a fingerprint of the values, because
    writes through `.data` and to inference tensors move no counter. The fingerprint reads batch norm's tensors whole,
    and of a large weight samples of every output and every input channel (csrc/cpu/fingerprint.cpp);
    `fastres.refresh_` is for any other write. On GPUs there is no fingerprint, which the CPU would have to wait for; so
    nothing is kept there of a forward in which DistributedDataParallel wrote buffers.

    Raises:
        RuntimeError: if x does not fit the convolution.
    """
    if not config.keep_folded_weights or torch.compiler.is_compiling() or registration.autocast_enabled(x.device.type):
        return None
    if not serves(x) or x.dtype is torch.float64 or not x.numel():
        return None
    if not packs(x) and managed.buffers_are_broadcast():
        _entries.pop(conv, None)
        return None
    sources: tuple[Tensor | None, ...] = conv_tensors(conv)
    if bn is not None:
        sources += batch_norm.tensors(bn)
        if sources[4] is None:
            return None  # no running statistics
    tensors = [t for t in sources if t is not None]
    made_from = (
        [id(t) if t.is_inference() else (id(t), t._version) for t in tensors],
        torch.ops.fastres_cpu.fingerprint.default(tensors) if packs(x) else [t.data_ptr() for t in tensors],
        None if bn is None else bn.eps,
        (conv.stride, conv.padding, conv.dilation, conv.groups),
    )
    inputs = (
        x.shape,
        x.dtype,
        x.is_contiguous(memory_format=torch.channels_last),
        config.winograd,
        table.setting(),
    )
    entry = _entries.get(conv)
    if entry is None or entry.inputs != inputs or entry.made_from != made_from:
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return None  # folding would wait for the device
        shape = arguments.check_convolution(x, conv.weight, conv.bias, geometry(conv))
        plan = _plan(conv, x)
        if entry is not None and entry.made_from == made_from and entry.plan == plan:
            entry.inputs, entry.shape = inputs, shape
        else:
            _entries.pop(conv, None)
            run = _pack(conv, bn, x, plan)
            entry = _Entry(run, made_from, tuple(tensors), plan, inputs, shape)
            limit = config.max_packed_bytes
            if run is None or limit is None or packed_bytes() + run.nbytes <= limit:
                _entries[conv] = entry
            else:
                replay.spoil()  # which would keep them
    return None if entry.run is None else (entry.run, entry.shape)


def packs(x: Tensor) -> bool:
    """Whether kernels for inputs like x take packed weights; else they are kept plain."""
    return x.is_cpu


def serves(x: Tensor) -> bool:
    """Whether folded weights are for x's device at all."""
    return extension.available() if packs(x) else x.is_cuda


def _plan(conv: nn.Conv2d, x: Tensor) -> tuple[Any, ...] | None:
    """What the weights are packed for: kernel, method, layout, dtype. None if no kernel keeps packed weights."""
    where = geometry(conv)
    if not packs(x):
        order = reference.conv_format(x, conv.weight)
        calls = [(x, conv.weight, None, None, *where, relu) for relu in (False, True)]
        served = all(table.fused_kernel_serves("conv_bias_act", call) for call in calls)
        return (_plain, "", order, x.dtype) if served else None
    for kernel in table.kernels("conv_bias_act", "cpu"):
        if kernel.unavailable() is None and kernel.why_not(x, conv.weight, None, None, *where) is None:
            method = convolution.method(x, conv.weight, *where)
            order = reference.conv_format(x, conv.weight)
            return None if kernel.prepare is None else (kernel.prepare, method, order, x.dtype)
    return None


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None, *where: Any) -> Plain:
    return Plain(weight.to(x.dtype), None if bias is None else bias.to(x.dtype), where)


@torch.no_grad()
def _pack(
    conv: nn.Conv2d, bn: BatchNorm | None, x: Tensor, plan: tuple[Any, ...] | None
) -> table.PackedConvolution | None:
    if plan is None:
        return None
    prepare, _, order, _ = plan
    weight, bias = conv.weight, conv.bias
    if bn is not None:
        assert bn.running_mean is not None and bn.running_var is not None
        weight, bias = functional.fold(weight, bias, bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps)
    if not bool(weight.isfinite().all()) or (bias is not None and not bool(bias.isfinite().all())):
        return None  # batch norm by itself: folded, an overflow would become NaN elsewhere than in eager
    return prepare(x, weight.contiguous(memory_format=order), bias, *geometry(conv))
