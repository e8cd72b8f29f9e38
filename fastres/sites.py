"""A site is a place where fused code may run in a module's stead: a convolution with its batch norm, a batch norm, an addition.

This file answers two questions at call time, in one cheap pass over a block's children: may the fast path run now (`blocked`), and
if so how (`conv_bn_act`, `bn_act`, `bn_act_maxpool`). Nothing is decided once and for all: hooks, parametrizations, SyncBatchNorm
conversion, frozen batch norms and mode changes that come after the swap are seen.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from fastres import config, functional
from fastres import ops as _ops
from fastres.kernels import extension, onednn, table

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_GLOBAL_HOOKS = (
    nn_module._global_forward_hooks,
    nn_module._global_forward_pre_hooks,
    nn_module._global_backward_hooks,
    nn_module._global_backward_pre_hooks,
)

#: While fastres.explain runs: what a block tells about itself, (block, reason or None).
_listener: Callable[[nn.Module, str | None], None] | None = None


@contextmanager
def listening(listener: Callable[[nn.Module, str | None], None]) -> Any:
    """Calls `listener(block, reason)` for every fused block that runs; reason is None on the fast path."""
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before


def blocked(block: nn.Module, x: Any, *children: nn.Module | None) -> str | None:
    """Why `block` has to run its original forward on `x` now, or None. `children`: the modules the fast path would not call."""
    reason = _input_blocked(x) or _children_blocked(x, children)
    if _listener is not None:
        _listener(block, reason)
    return reason


def _input_blocked(x: Any) -> str | None:
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        return f"input is a {type(x).__name__}, not a plain tensor"
    if x.layout is not torch.strided or x.dtype not in _DTYPES:
        return f"input is {x.layout}, {x.dtype}"
    if x.dim() != 4:
        return f"input has {x.dim()} dimensions"
    if reason := table.no_fused_kernel("bn_act", x.device.type):
        return reason
    if any(_GLOBAL_HOOKS):
        return "global module hooks"
    if not torch.compiler.is_compiling():
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return "inside a torch.func transform"
        if torch.autograd.forward_ad._current_level >= 0:
            return "forward-mode differentiation"
        if torch.jit.is_tracing():
            return "torch.jit.trace"
    return None


def _children_blocked(x: Tensor, children: tuple[nn.Module | None, ...]) -> str | None:
    cast = torch.is_autocast_enabled(x.device.type)
    for child in children:
        if child is None:
            continue
        reason = child_blocked(child)
        if reason is None and type(child) is nn.Conv2d:
            reason = _conv_blocked(child, x, cast)
        elif reason is None and type(child) is nn.BatchNorm2d:
            reason = _batch_norm_blocked(child, x)
        if reason:
            return reason
    return None


def child_blocked(child: nn.Module) -> str | None:
    """Why a child may not be replaced by fused code whatever its input is, or None."""
    kind = type(child)
    if kind not in (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Identity, nn.MaxPool2d):
        return f"{kind.__name__} in place of a plain module"
    if child._forward_hooks or child._forward_pre_hooks or child._backward_hooks or child._backward_pre_hooks:
        return f"hooks on {kind.__name__}"
    if "forward" in child.__dict__:
        return f"{kind.__name__} has its own forward"
    if kind is nn.Conv2d and (child.padding_mode != "zeros" or isinstance(child.padding, str)):
        return f"padding {child.padding!r}, mode {child.padding_mode!r}"
    return _max_pool_blocked(child) if kind is nn.MaxPool2d else None


def _conv_blocked(conv: nn.Conv2d, x: Tensor, cast: bool) -> str | None:
    weight = conv.weight
    if type(weight) is not nn.Parameter and type(weight) is not Tensor:
        return f"convolution weight is a {type(weight).__name__}"
    if weight.device != x.device:
        return f"input on {x.device}, weight on {weight.device}"
    if weight.dtype is not x.dtype and not cast:
        return f"input is {x.dtype}, convolution weight {weight.dtype}"
    return None


def _batch_norm_blocked(bn: nn.BatchNorm2d, x: Tensor) -> str | None:
    mean, var = bn.running_mean, bn.running_var
    if (mean is None) != (var is None):
        return "one of the running statistics is None"
    if mean is None and bn.eps <= 0:
        return f"eps {bn.eps}"
    if bn.training and bn.eps <= 0:
        return f"eps {bn.eps}"
    for t in (bn.weight, bn.bias, mean, var):
        if t is None:
            continue
        if type(t) is not nn.Parameter and type(t) is not Tensor:
            return f"a batch-norm tensor is a {type(t).__name__}"
        if t.device != x.device:
            return f"input on {x.device}, batch norm on {t.device}"
        if t.dtype is not x.dtype and t.dtype is not torch.float32:
            return f"input is {x.dtype}, batch norm {t.dtype}"
    return None


def _max_pool_blocked(pool: nn.MaxPool2d) -> str | None:
    sizes = (pool.kernel_size, pool.stride, pool.padding)
    if pool.dilation != 1 or pool.ceil_mode or pool.return_indices or not all(isinstance(s, int) for s in sizes):
        return "max-pooling with dilation, ceil_mode, indices or uneven windows"
    if pool.kernel_size > 15 or -(-pool.kernel_size // pool.stride) > 4 or pool.padding > pool.kernel_size // 2:
        return f"pooling window {pool.kernel_size} with stride {pool.stride}"
    return None


def _tracked(bn: nn.BatchNorm2d) -> tuple[bool, float, Tensor | None]:
    """As nn.BatchNorm2d.forward: counts the batch; returns whether batch statistics are used, the momentum, and the counter if
    it is to be used in the momentum's place."""
    counter = bn.num_batches_tracked
    if bn.training and bn.track_running_stats and counter is not None:
        counter.add_(1)
    batch_statistics = bn.training or (bn.running_mean is None and bn.running_var is None)
    cumulative = bn.momentum is None and bn.training and bn.track_running_stats and counter is not None
    return batch_statistics, 0.0 if bn.momentum is None else bn.momentum, counter if cumulative else None


def _running(bn: nn.BatchNorm2d) -> tuple[Tensor | None, Tensor | None]:
    if bn.training and not bn.track_running_stats:
        return None, None
    return bn.running_mean, bn.running_var


def bn_act(bn: nn.BatchNorm2d, x: Tensor, *, act: str, residual: Tensor | None = None) -> Tensor:
    """act(bn(x) + residual) with the module's attributes as they are now."""
    training, momentum, counter = _tracked(bn)
    return functional.bn_act(
        x,
        *_running(bn),
        bn.weight,
        bn.bias,
        residual,
        training=training,
        momentum=momentum,
        eps=bn.eps,
        act=act,
        num_batches_tracked=counter,
    )


def bn_act_maxpool(bn: nn.BatchNorm2d, pool: nn.MaxPool2d, x: Tensor, *, act: str) -> Tensor:
    """pool(act(bn(x))) with the modules' attributes as they are now."""
    training, momentum, counter = _tracked(bn)
    return functional.bn_act_maxpool(
        x,
        *_running(bn),
        bn.weight,
        bn.bias,
        training=training,
        momentum=momentum,
        eps=bn.eps,
        act=act,
        num_batches_tracked=counter,
        kernel_size=pool.kernel_size,
        stride=pool.stride,
        padding=pool.padding,
    )


def conv_bn_act(conv: nn.Conv2d, bn: nn.BatchNorm2d, x: Tensor, *, act: str, residual: Tensor | None = None) -> Tensor:
    """act(bn(conv(x)) + residual): in inference one convolution with folded, packed weights, else conv_bn_act."""
    if not bn.training and bn.running_mean is not None and not _wants_gradient(conv, bn, x, residual):
        folded = _folded(conv, bn, x)
        if folded is not None:
            weight, bias, order = folded
            x = x.contiguous(memory_format=order) if order is torch.channels_last else x
            geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
            residual = residual if residual is None or residual.dtype is x.dtype else residual.to(x.dtype)
            return _ops.conv_bias_act.op(x, weight, bias, residual, *geometry, act == "relu")
    geometry = ([*conv.stride], [*conv.padding], [*conv.dilation], conv.groups)
    functional.check_convolution(x, conv.weight, conv.bias, geometry)  # an error must come before the batch is counted
    training, momentum, counter = _tracked(bn)
    return functional.conv_bn_act(
        x,
        conv.weight,
        *_running(bn),
        bn.weight,
        bn.bias,
        residual,
        conv_bias=conv.bias,
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        groups=conv.groups,
        training=training,
        momentum=momentum,
        eps=bn.eps,
        act=act,
        num_batches_tracked=counter,
    )


def _wants_gradient(conv: nn.Conv2d, bn: nn.BatchNorm2d, *tensors: Tensor | None) -> bool:
    if not torch.is_grad_enabled():
        return False
    used = (conv.weight, conv.bias, bn.weight, bn.bias, *tensors)
    return any(t is not None and t.requires_grad for t in used)


class _Folded:
    """Folded and packed weights of one convolution, with what they were made from."""

    __slots__ = ("bias", "dtype", "eps", "fingerprint", "order", "versions", "weight")


# A module's entry goes with the module. Copies and pickles of a model carry no folded weights.
_cache: WeakKeyDictionary[nn.Module, _Folded] = WeakKeyDictionary()


def forget(model: nn.Module) -> None:
    """Drops the folded weights of every convolution of `model`."""
    for module in model.modules():
        _cache.pop(module, None)


def _versions(tensors: list[Tensor]) -> tuple[Any, ...]:
    return tuple((id(t), -1 if t.is_inference() else t._version) for t in tensors)


def _folded(conv: nn.Conv2d, bn: nn.BatchNorm2d, x: Tensor) -> tuple[Tensor, Tensor, torch.memory_format] | None:
    """Weight and bias for conv_bias_act, and the layout its input is to have; None where they must not or cannot be kept.

    Kept between calls under three witnesses: identity and version counter of every tensor, and a fingerprint of the values, because
    writes through `.data` and to inference tensors move no counter. The fingerprint reads batch norm's tensors whole, and of a large
    weight samples of every output and every input channel (csrc/cpu/fingerprint.cpp); `fastres.refresh_` is for any other write.
    """
    if not config.keep_folded_weights or torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
        return None
    if x.device.type != "cpu" or extension.load_error() is not None or x.dtype is torch.float64 or not x.numel():
        return None
    if not any(kernel.name == "cpu" for kernel in table.kernels("conv_bias_act", "cpu")):
        return None
    tensors = [t for t in (conv.weight, conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var) if t is not None]
    versions, fingerprint = _versions(tensors), torch.ops.fastres_cpu.fingerprint.default(tensors)
    entry = _cache.get(conv)
    if (
        entry is None
        or entry.fingerprint != fingerprint
        or entry.versions != versions
        or entry.eps != bn.eps
        or entry.dtype is not x.dtype
    ):
        entry = _fold(conv, bn, x)
        entry.versions, entry.fingerprint = versions, fingerprint
        _cache[conv] = entry
    return None if entry.weight is None else (entry.weight, entry.bias, entry.order)


@torch.no_grad()
def _fold(conv: nn.Conv2d, bn: nn.BatchNorm2d, x: Tensor) -> _Folded:
    entry = _Folded()
    entry.eps, entry.dtype = bn.eps, x.dtype
    channels_last = conv.weight.is_contiguous(memory_format=torch.channels_last) and not conv.weight.is_contiguous()
    entry.order = torch.channels_last if channels_last else torch.contiguous_format
    weight, bias = functional.fold(conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps)
    weight, bias = (t.to(onednn.compute_dtype(x.dtype)) for t in (weight, bias))
    entry.weight, entry.bias = None, bias
    if bool(weight.isfinite().all()) and bool(bias.isfinite().all()):  # else batch norm runs by itself, where nothing overflows
        entry.weight = onednn.pack(weight, x.shape, conv.stride, conv.padding, conv.dilation, conv.groups)
    return entry
