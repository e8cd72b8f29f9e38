"""A site is a place where fused code runs in a module's stead: a convolution with its batch norm, a batch norm, an
addition. `fastres.guard` says whether it may; this file, how, from the modules' attributes as they are at each call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastres import (
    arguments,
    batch_norm,
    config,
    folding,
    functional,
    guard,
    hooks,
    observe,
    ops,
    replay,
    switches,
)
from fastres.batch_norm import BatchNorm
from fastres.kernels import convolution as convolution_kernel
from fastres.kernels import extension, program, table
from fastres.ops import registration
from fastres.ops.bn_act_maxpool import pooled


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
        or observe.listener is not None
        or not config.keep_folded_weights
        or guard.still_blocked(owner)
        or guard.input_blocked(x) is not None
        or not x.is_cpu
        or not extension.available()
        or registration.autocast_enabled("cpu")
    ):
        return forward(x)
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    inputs = (x.shape, x.dtype, channels_last, config.winograd, table.setting(), switches.epoch())
    return replay.chain_of_blocks(owner, parts, forwards, x, inputs, forward)


def together(network: nn.Module, x: Any) -> AbstractContextManager[None]:
    """For the forward of a whole network: what each of its layers would launch for itself, casts of weights and updates
    of running statistics, is launched once, where a kernel has that."""
    if torch.compiler.is_compiling() or not network.training or type(x) is not Tensor or observe.off:
        return nullcontext()
    if not table.fused_kernel_serves("update_all_running_stats_", ([x],)):
        return nullcontext()
    modules = list(network.modules())
    if any(guard.GLOBAL_HOOKS) or any(map(hooks.hooked, modules)):
        return nullcontext()  # a hook may look at running statistics
    return _together([m for m in modules if type(m) is nn.Conv2d], x)


@contextmanager
def _together(convolutions: list[nn.Conv2d], x: Tensor) -> Iterator[None]:
    with ops.cast_weights.together([conv.weight for conv in convolutions], x), ops.update_running_stats.together():
        yield


def add_act(x: Tensor, residual: Tensor, *, act: str) -> Tensor:
    """act(x + residual), where `add_blocked` has nothing against it."""
    y = functional.add_act(x, residual, act=act)
    run: Any = lambda x, residual, relu: functional.add_act(x, residual, act=act)  # noqa: E731
    replay.note(run, x, residual, act == "relu", y)
    return y


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
    observe.stand_for(bn)
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
    observe.stand_for(bn, pool)
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
    if guard.input_blocked(x) or guard.children_blocked(x, children):
        return None
    y = conv_bn_relu_maxpool(conv, bn, maxpool, x)
    if y is not None and observe.listener is not None:
        observe.listener(block, None)
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
    observe.ran((conv, bn, maxpool), "conv_maxpool", kept[0].kernel)
    y = run(x, None, True)
    replay.note(run, x, None, True, y)
    return y


def convolution(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """conv(x): in inference with packed weights, else conv_bias_act; the module itself where that is not legal."""
    if guard.input_blocked(x) or guard.children_blocked(x, {"conv": conv}) or x.dtype is torch.float64:
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
            return _run_folded(kept[0], (conv,), x, residual, relu)
    stride, padding, dilation, groups = folding.geometry(conv)
    fits = residual is None
    if residual is not None:
        shape = arguments.check_convolution(x, conv.weight, conv.bias, (stride, padding, dilation, groups))
        fits = _fits(residual, shape, x)
    observe.stand_for(conv)
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
        recompute_conv=switches.recomputes(conv),
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
        guard.child_blocked("avgpool", avgpool) is None
        and guard.child_blocked("fc", fc) is None
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
    if guard.input_blocked(x) or not x.is_contiguous(memory_format=torch.channels_last) or not x.numel():
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
            return _run_folded(kept[0], (conv, bn), x, residual, act == "relu")
    geometry = folding.geometry(conv)
    # Its errors come before the batch is counted.
    shape = arguments.check_convolution(x, conv.weight, conv.bias, geometry)
    if residual is not None and not _fits(residual, shape, x):
        return _add_separately(conv_bn_act(conv, bn, x, act="identity", fork=fork), residual, act, promote)
    observe.stand_for(conv, bn)
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
        recompute_conv=switches.recomputes(conv),
        fork=fork,
    )


def _run_folded(
    run: table.PackedConvolution, modules: tuple[nn.Module, ...], x: Tensor, residual: Tensor | None, relu: bool
) -> Tensor:
    observe.ran(modules, "conv_bias_act", run.kernel)
    y = run(x, residual, relu)
    replay.note(run, x, residual, relu, y)
    return y


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
