"""A site is a place where fused code may run in a module's stead: a convolution with its batch norm, a batch norm, an
addition.

This file answers two questions at call time, in one cheap pass over a block's children: may the fast path run now
(`blocked`), and if so how (`conv_bn_act`, `bn_act`, `bn_act_maxpool`). Nothing is decided once and for all: hooks,
parametrizations, SyncBatchNorm conversion, frozen batch norms and mode changes that come after the swap are seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from fastres import arguments, batch_norm, config, folding, functional, ops, replay
from fastres.batch_norm import BatchNorm
from fastres.kernels import convolution as convolution_kernel
from fastres.kernels import extension, program, table
from fastres.ops import registration
from fastres.ops.bn_act_maxpool import pooled

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


def blocked(block: nn.Module, x: Any, reason: str | None = None, **children: nn.Module) -> str | None:
    """Why `block` has to run its original forward on `x` now, or None.

    Args:
        reason: one that the caller has found already.
        children: the modules the fast path would not call, under the names of their roles: conv, bn, relu or maxpool,
            with or without a number.
    """
    reason = reason or _input_blocked(x) or _children_blocked(x, children)
    if _listener is not None:
        _listener(block, reason)
    return reason


def unit_blocked(unit: nn.Module, x: Any, reason: str | None) -> str | None:
    """As `blocked`, for a unit whose steps look at their tensors themselves: only at what does not depend on them. x: a
    plain tensor, unless there is a reason already."""
    reason = reason or _context_blocked(x)
    tell(unit, reason)
    return reason


def chain_of_blocks(
    owner: nn.Module,
    parts: tuple[str, ...] | None,
    forwards: tuple[Any, ...],
    x: Tensor,
    forward: Callable[[Tensor], Tensor],
) -> Tensor:
    """forward(x), which runs the modules `parts` of `owner` one after the other; in inference by fastres.replay, whose
    arguments these are."""
    if (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or _listener is not None
        or not config.keep_folded_weights
        or _input_blocked(x) is not None
        or not x.is_cpu
        or not extension.available()
        or registration.autocast_enabled("cpu")
    ):
        return forward(x)
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    inputs = (x.shape, x.dtype, channels_last, config.winograd, table.setting())
    return replay.chain_of_blocks(owner, parts, forwards, x, inputs, forward)


def together(network: nn.Module, x: Any) -> AbstractContextManager[None]:
    """For the forward of a whole network: what each of its layers would launch for itself, casts of weights and updates
    of running statistics, is launched once, where a kernel has that."""
    if torch.compiler.is_compiling() or not network.training or type(x) is not Tensor:
        return nullcontext()
    if not table.fused_kernel_serves("update_all_running_stats_", ([x],)):
        return nullcontext()
    modules = list(network.modules())
    if any(_GLOBAL_HOOKS) or any(m._forward_hooks or m._forward_pre_hooks for m in modules):
        return nullcontext()  # a hook may look at running statistics
    return _together([m for m in modules if type(m) is nn.Conv2d], x)


@contextmanager
def _together(convolutions: list[nn.Conv2d], x: Tensor) -> Iterator[None]:
    with ops.cast_weights.together([conv.weight for conv in convolutions], x), ops.update_running_stats.together():
        yield


def _input_blocked(x: Any) -> str | None:
    return _tensor_blocked(x) or _context_blocked(x)


def _tensor_blocked(x: Any) -> str | None:
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        return f"input is a {type(x).__name__}, not a plain tensor"
    if x.layout is not torch.strided or x.is_nested or x.dtype not in _DTYPES:
        return f"input is {x.layout}, {x.dtype}"
    if x.dim() != 4:
        return f"input has {x.dim()} dimensions"
    return None


def _context_blocked(x: Tensor) -> str | None:
    if reason := table.no_fused_kernel("bn_act", x.device.type):
        return reason
    if any(_GLOBAL_HOOKS):
        return "global module hooks"
    if not torch.compiler.is_compiling():
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return "inside a torch.func transform"
        if torch.autograd.forward_ad._current_level >= 0:
            return "forward-mode differentiation"
        if torch._C._is_tracing():
            return "torch.jit.trace"
    return None


def step_blocked(x: Any, conv: Any, bn: Any) -> str | None:
    """Why act(bn(conv(x)) + ...) may not run fused on this x, for modules that may be replaced (`child_blocked`) or
    stand for one that is (fastres.batch_norm.Frozen). None for a convolution or batch norm that is not part of it. The
    caller has asked `blocked` for what does not depend on x."""
    reason = _tensor_blocked(x)
    if reason is None and x.device.type not in ("cpu", "cuda"):
        reason = _context_blocked(x)
    if reason is None and conv is not None:
        reason = _conv_blocked(conv, x, registration.autocast_enabled(x.device.type))
    if reason is None and bn is not None:
        reason = batch_norm.blocked(bn, x)
    return reason


def add_blocked(x: Any, residual: Any) -> str | None:
    """Why relu(x + residual) may not run fused, or None."""
    if reason := _tensor_blocked(x) or _tensor_blocked(residual):
        return reason
    if x.shape != residual.shape or x.dtype is not residual.dtype or x.stride() != residual.stride():
        return "the two sides of the addition differ in shape, dtype or layout"
    return None if x.device == residual.device else f"an addition of {x.device} and {residual.device}"


def add_act(x: Tensor, residual: Tensor, *, act: str) -> Tensor:
    """act(x + residual), where `add_blocked` has nothing against it."""
    y = functional.add_act(x, residual, act=act)
    run: Any = lambda x, residual, relu: functional.add_act(x, residual, act=act)  # noqa: E731
    replay.note(run, x, residual, act == "relu", y)
    return y


def tell(module: nn.Module, reason: str | None) -> None:
    """Tells the listener about `module`."""
    if _listener is not None:
        _listener(module, reason)


def _children_blocked(x: Tensor, children: dict[str, nn.Module]) -> str | None:
    cast = registration.autocast_enabled(x.device.type)
    for role, child in children.items():
        reason = child_blocked(role, child)
        if reason is None and type(child) is nn.Conv2d:
            reason = _conv_blocked(child, x, cast)
        elif reason is None and type(child) in batch_norm.FORWARDS:
            reason = batch_norm.blocked(child, x)  # type: ignore[arg-type]
        if reason:
            return reason
    return None


#: What a role may be, with the forward that fused code stands in for.
_ROLES: dict[str, dict[Any, Any]] = {
    "conv": {nn.Conv2d: nn.Conv2d.forward},
    "bn": batch_norm.FORWARDS,
    "relu": {nn.ReLU: nn.ReLU.forward},
    "maxpool": {nn.MaxPool2d: nn.MaxPool2d.forward},
    "avgpool": {nn.AdaptiveAvgPool2d: nn.AdaptiveAvgPool2d.forward},
    "fc": {nn.Linear: nn.Linear.forward},
}


def child_blocked(role: str, child: nn.Module) -> str | None:
    """Why a child may not be replaced by fused code whatever its input is, or None."""
    forwards = _ROLES.get(role) or _ROLES[role.rstrip("0123456789")]
    kind = type(child)
    if kind not in forwards:
        return f"{role} is a {kind.__name__}, not a plain {next(iter(forwards)).__name__}"
    if kind.forward is not forwards[kind]:
        return f"{kind.__name__}.forward was replaced"
    if reason := child_changed(role, child):
        return reason
    if kind is nn.Conv2d:
        return padding_blocked(child)
    return _max_pool_blocked(child) if kind is nn.MaxPool2d else None


def padding_blocked(conv: Any) -> str | None:
    """Why ops do not serve the padding of a convolution, or None."""
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return f"padding {conv.padding!r}, mode {conv.padding_mode!r}"
    return None


def child_changed(role: str, child: nn.Module) -> str | None:
    """Why calling a child does more than to run the forward of its class, or None."""
    if child._forward_hooks or child._forward_pre_hooks or child._backward_hooks or child._backward_pre_hooks:
        return f"hooks on {role}"
    return f"{role} has its own forward" if "forward" in child.__dict__ else None


def _conv_blocked(conv: nn.Conv2d, x: Tensor, cast: bool) -> str | None:
    weight, _ = folding.conv_tensors(conv)
    if type(weight) is not nn.Parameter and type(weight) is not Tensor:
        return f"convolution weight is a {type(weight).__name__}"
    if weight.device != x.device:
        return f"input on {x.device}, weight on {weight.device}"
    if weight.dtype is not x.dtype and not cast:
        return f"input is {x.dtype}, convolution weight {weight.dtype}"
    return None


def _max_pool_blocked(pool: Any) -> str | None:
    sizes = (pool.kernel_size, pool.stride, pool.padding)
    if pool.dilation != 1 or pool.ceil_mode or pool.return_indices or not all(isinstance(s, int) for s in sizes):
        return "max-pooling with dilation, ceil_mode, indices or uneven windows"
    if pool.kernel_size > 15 or -(-pool.kernel_size // pool.stride) > 4 or pool.padding > pool.kernel_size // 2:
        return f"pooling window {pool.kernel_size} with stride {pool.stride}"
    return None


def bn_act(
    bn: BatchNorm,
    x: Tensor,
    *,
    act: str,
    residual: Tensor | None = None,
    recompute: bool = False,
    promote: bool = False,
) -> Tensor:
    """act(bn(x) + residual) with the module's attributes as they are now. recompute: as in fastres.functional; promote:
    a residual of another shape or dtype is added as by `+`, else as by `+=`."""
    if residual is not None and not _fits(residual, x.shape, x):
        return _add_separately(bn_act(bn, x, act="identity"), residual, act, promote)
    y = functional.bn_act(
        x,
        *batch_norm.running(bn),
        bn.weight,
        bn.bias,
        residual,
        act=act,
        **batch_norm.options(bn),
        recompute=recompute,
    )
    replay.note(lambda x, residual, relu: bn_act(bn, x, act=act, residual=residual), x, residual, act == "relu", y)
    return y


def bn_act_maxpool(bn: BatchNorm, pool: Any, x: Tensor, *, act: str) -> Tensor:
    """pool(act(bn(x))) with the modules' attributes as they are now."""
    y = functional.bn_act_maxpool(
        x,
        *batch_norm.running(bn),
        bn.weight,
        bn.bias,
        act=act,
        **batch_norm.options(bn),
        kernel_size=pool.kernel_size,
        stride=pool.stride,
        padding=pool.padding,
    )
    replay.note(lambda x, residual, relu: bn_act_maxpool(bn, pool, x, act=act), x, None, act == "relu", y)
    return y


def stem(block: nn.Module, x: Tensor, conv: Any, bn: Any, relu: Any, maxpool: Any) -> Tensor | None:
    """maxpool(relu(bn(conv(x)))) of `block` in one pass, in inference and where that is legal and a kernel has it; else
    None."""
    children = {"conv": conv, "bn": bn, "relu": relu, "maxpool": maxpool}
    if _input_blocked(x) or _children_blocked(x, children):
        return None
    y = conv_bn_relu_maxpool(conv, bn, maxpool, x)
    if y is not None and _listener is not None:
        _listener(block, None)
    return y


def conv_bn_relu_maxpool(conv: nn.Conv2d, bn: BatchNorm, maxpool: Any, x: Tensor) -> Tensor | None:
    """maxpool(relu(bn(conv(x)))) in one pass, in inference and where a kernel has it; else None. The caller has asked
    whether it is legal."""
    if bn.training or not folding.packs(x) or (torch.is_grad_enabled() and wants_gradient(conv, bn, x, None)):
        return None
    kept = folding.folded(conv, bn, x)
    if kept is None or not isinstance(kept[0], convolution_kernel.Packed):
        return None
    window = (maxpool.kernel_size, maxpool.stride, maxpool.padding)
    run = kept[0].then_maxpool(*window)
    if run is None or min(pooled(size, *window) for size in kept[1][2:]) < 1:  # eager has its own error for that
        return None
    y = run(x, None, True)
    replay.note(run, x, None, True, y)
    return y


def convolution(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """conv(x): in inference with packed weights, else conv_bias_act; the module itself where that is not legal."""
    if _input_blocked(x) or _children_blocked(x, {"conv": conv}) or x.dtype is torch.float64:
        return conv(x)
    return conv_act(conv, x, act="identity")


def conv_add(conv: nn.Conv2d, x: Tensor, residual: Tensor) -> Tensor:
    """conv(x) + residual, as conv_act."""
    y = conv_act(conv, x, act="identity", residual=residual)
    if residual is None:  # a user's shortcut may return it: eager's TypeError
        y += residual
    return y


def conv_act(conv: nn.Conv2d, x: Tensor, *, act: str, residual: Tensor | None = None, promote: bool = False) -> Tensor:
    """act(conv(x) + residual): in inference with packed weights, else conv_bias_act. The caller has asked `blocked`.
    promote: as in `bn_act`."""
    relu = act == "relu"
    if not (torch.is_grad_enabled() and wants_gradient(conv, None, x, residual)):
        kept = folding.folded(conv, None, x)
        if kept is not None and (residual is None or _fits(residual, kept[1], x)):
            y = kept[0](x, residual, relu)
            replay.note(kept[0], x, residual, relu, y)
            return y
    stride, padding, dilation, groups = folding.geometry(conv)
    fits = residual is None
    if residual is not None:
        shape = arguments.check_convolution(x, conv.weight, conv.bias, (stride, padding, dilation, groups))
        fits = _fits(residual, shape, x)
    y = functional.conv_bias_act(
        x,
        conv.weight,
        conv.bias,
        residual if fits else None,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        act=act if fits else "identity",
    )
    return y if fits else _add_separately(y, residual, act, promote)


def zero_pad(shortcut: Any, x: Tensor) -> Tensor:
    """shortcut(x) of a ZeroPadShortcut."""
    y = shortcut(x)
    replay.note(program.ZeroPad(shortcut.channels, shortcut.stride), x, None, False, y)
    return y


def plain_classifier(avgpool: Any, fc: Any) -> bool:
    """Whether fc(flatten(avgpool(x))) is global average pooling and a linear layer, for which fused code may stand."""
    return (
        child_blocked("avgpool", avgpool) is None
        and child_blocked("fc", fc) is None
        and avgpool.output_size in (1, (1, 1))
    )


def classify(avgpool: nn.Module, fc: Any, x: Tensor) -> Tensor:
    """fc(flatten(avgpool(x))) of a plain classifier: in inference in one pass, where that is legal."""
    if not _may_classify(fc, x):
        return fc(torch.flatten(avgpool(x), 1))
    run = program.Classify(*folding.conv_tensors(fc))
    y = run(x)
    replay.note(run, x, None, False, y)
    return y


def _may_classify(fc: Any, x: Tensor) -> bool:
    if torch.compiler.is_compiling() or not extension.available() or table.setting() is not None:
        return False
    if _input_blocked(x) or not x.is_contiguous(memory_format=torch.channels_last) or not x.numel():
        return False
    tensors = [t for t in (x, *folding.conv_tensors(fc)) if t is not None]
    return (
        all(type(t) in (Tensor, nn.Parameter) and t.is_cpu and t.dtype is torch.float32 for t in tensors)
        and all(t.is_contiguous() for t in tensors[1:])
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
        and not registration.autocast_enabled("cpu")
        and x.shape[1] == fc.weight.shape[1]
    )


def conv_bn_act(
    conv: nn.Conv2d,
    bn: BatchNorm,
    x: Tensor,
    *,
    act: str,
    residual: Tensor | None = None,
    recompute: bool = False,
    fork: list[Tensor] | None = None,
    promote: bool = False,
) -> Tensor:
    """act(bn(conv(x)) + residual): in inference one convolution with folded, packed weights, else conv_bn_act.
    recompute, for results that do not leave the block, and fork: as in fastres.functional.conv_bn_act; promote: as in
    `bn_act`."""
    if not bn.training and not (torch.is_grad_enabled() and wants_gradient(conv, bn, x, residual)):
        kept = folding.folded(conv, bn, x)
        if kept is not None and (residual is None or _fits(residual, kept[1], x)):
            if fork is not None:
                fork.append(x)
            y = kept[0](x, residual, act == "relu")
            replay.note(kept[0], x, residual, act == "relu", y)
            return y
    geometry = folding.geometry(conv)
    # Its errors come before the batch is counted.
    shape = arguments.check_convolution(x, conv.weight, conv.bias, geometry)
    if residual is not None and not _fits(residual, shape, x):
        return _add_separately(conv_bn_act(conv, bn, x, act="identity", fork=fork), residual, act, promote)
    return functional.conv_bn_act(
        x,
        conv.weight,
        *batch_norm.running(bn),
        bn.weight,
        bn.bias,
        residual,
        conv_bias=conv.bias,
        stride=geometry[0],
        padding=geometry[1],
        dilation=geometry[2],
        groups=geometry[3],
        act=act,
        **batch_norm.options(bn),
        recompute=recompute,
        fork=fork,
    )


def _fits(residual: Any, shape: Any, x: Tensor) -> bool:
    """Whether a residual can be added inside an op: all else has the rules and errors of eager's `+=`."""
    if not isinstance(residual, Tensor):
        return False
    cast = registration.autocast_enabled(x.device.type)
    return residual.shape == torch.Size(shape) and residual.device == x.device and (cast or residual.dtype is x.dtype)


def _add_separately(y: Tensor, residual: Any, act: str, promote: bool) -> Tensor:
    replay.spoil()
    if promote:
        y = y + residual
    else:
        y += residual
    return y.relu() if act == "relu" else y


def wants_gradient(conv: nn.Conv2d, bn: BatchNorm | None, x: Tensor, residual: Tensor | None) -> bool:
    """Whether act(bn(conv(x)) + residual) has a gradient, if gradients are recorded."""
    tensors = (x, residual, conv.weight, conv.bias, *((bn.weight, bn.bias) if bn is not None else ()))
    return any(t is not None and t.requires_grad for t in tensors)
