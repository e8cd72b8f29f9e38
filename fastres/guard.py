"""May fused code run in the stead of a block's own forward now? The question of every call, in one cheap pass.

Nothing is decided once and for all: hooks, parametrizations, SyncBatchNorm conversion, frozen batch norms and mode
changes that come after the swap are seen.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from fastres import batch_norm, folding, hooks, managed, observe, reasons, switches
from fastres.kernels import table
from fastres.ops import registration
from fastres.snapshot import unchanged

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
GLOBAL_HOOKS = (
    nn_module._global_forward_hooks,
    nn_module._global_forward_pre_hooks,
    nn_module._global_backward_hooks,
    nn_module._global_backward_pre_hooks,
)

#: Of blocks that had to run their original forward because of a child: what shows that they have to again. Between the
#: kernels of a network, which leave nothing in the caches, each question of `blocked` costs microseconds.
_refused: WeakKeyDictionary[nn.Module, Callable[[], bool]] = WeakKeyDictionary()


def blocked(
    block: nn.Module,
    x: Any,
    reason: str | None = None,
    *,
    shortcut: nn.Module | None = None,
    once: Collection[nn.Module] = (),
    **children: nn.Module,
) -> str | None:
    """Why `block` has to run its original forward on `x` now, or None.

    Args:
        reason: one that the caller has found already.
        shortcut: what the block computes its residual with, which eager does last and fused code before its own last
            convolution. That shows if there is one of `once` in it.
        children: the modules the fast path would not call, under the names of their roles: conv, bn, relu or maxpool,
            with or without a number.
    """
    reason = reason or managed.reason(block, "the block") or input_blocked(x) or switches.reason(block, x)
    if reason is None and _contains(shortcut, once):
        reason = reasons.because("shared-module", "module shared with the shortcut")
    reason = reason or children_blocked(x, children, block)
    if observe.listener is not None:
        observe.listener(block, reason)
    return reason


def still_blocked(block: nn.Module) -> bool:
    """Whether what blocked `block` at its last call does so still, whatever its input is: a child with hooks, or one of
    another type. Where somebody listens, `blocked` has to find the first reason. Not under torch.compile."""
    holds = _refused.get(block)
    return holds is not None and observe.listener is None and holds()


def _remember(block: nn.Module, child: nn.Module, reason: str) -> None:
    if reasons.code_of(reason) == "hook":
        kinds = (child.__dict__[kind] for kind in hooks.KINDS)
        _refused[block] = unchanged((child,), (block._modules, child.__dict__, *filter(None, kinds)))
    elif reasons.code_of(reason) == "unknown-module":
        _refused[block] = unchanged((child,), (block._modules,))


def _contains(module: nn.Module | None, wanted: Collection[nn.Module]) -> bool:
    """Whether one of `wanted` is `module` or inside it. Module.modules() would take most of a guard's time."""
    if module is None:
        return False
    return any(module is one for one in wanted) or any(_contains(child, wanted) for child in module._modules.values())


def unit_blocked(unit: nn.Module, x: Any, reason: str | None) -> str | None:
    """As `blocked`, for a unit whose steps look at their tensors themselves: only at what does not depend on them. x: a
    plain tensor, unless there is a reason already."""
    reason = reason or _context_blocked(x)
    tell(unit, reason)
    return reason


def input_blocked(x: Any) -> str | None:
    return _tensor_blocked(x) or _context_blocked(x)


def _tensor_blocked(x: Any) -> str | None:
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        return reasons.because("tensor", f"input is a {type(x).__name__}, not a plain tensor")
    if x.layout is not torch.strided or x.is_nested or x.dtype not in _DTYPES:
        plain = x.layout is torch.strided and not x.is_nested
        return reasons.because("dtype" if plain else "tensor", f"input is {x.layout}, {x.dtype}")
    if x.dim() != 4:
        return reasons.because("shape", f"input has {x.dim()} dimensions")
    return None


def _context_blocked(x: Tensor) -> str | None:
    if reason := table.no_fused_kernel("bn_act", x.device.type):
        return reasons.because("no-kernel", reason)
    if observe.off:
        return "original forwards were asked for"
    if any(GLOBAL_HOOKS):
        return reasons.because("hook", "global module hooks")
    if not torch.compiler.is_compiling():
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return reasons.because("functorch", "inside a torch.func transform")
        if torch.autograd.forward_ad._current_level >= 0:
            return reasons.because("forward-ad", "forward-mode differentiation")
        if torch._C._is_tracing():
            return reasons.because("tracing", "torch.jit.trace")
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


def tell(module: nn.Module, reason: str | None) -> None:
    """Tells the listener about `module`."""
    if observe.listener is not None:
        observe.listener(module, reason)


def children_blocked(x: Tensor, children: dict[str, nn.Module], block: nn.Module | None = None) -> str | None:
    """Why one of the children may not be replaced by fused code on this x, or None. block: whose children they are, for
    `still_blocked`."""
    cast = registration.autocast_enabled(x.device.type)
    for role, child in children.items():
        reason = child_blocked(role, child)
        if reason is not None and block is not None and not torch.compiler.is_compiling():
            _remember(block, child, reason)
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
#: The same, and under the names that the roles have in blocks.
_NAMES = _ROLES | {f"{role}{number}": _ROLES[role] for role in ("conv", "bn") for number in (1, 2, 3)}


def child_blocked(role: str, child: nn.Module) -> str | None:
    """Why a child may not be replaced by fused code whatever its input is, or None."""
    if reason := managed.reason(child, role):
        return reason
    forwards = _NAMES.get(role) or _ROLES[role.rstrip("0123456789")]
    kind = type(child)
    if kind not in forwards:
        plain = next(iter(forwards)).__name__
        return reasons.because("unknown-module", f"{role} is a {kind.__name__}, not a plain {plain}")
    if kind.forward is not forwards[kind]:
        return reasons.because("own-forward", f"{kind.__name__}.forward was replaced")
    if reason := child_changed(role, child):
        return reason
    if kind is nn.Conv2d:
        return padding_blocked(child)
    return _max_pool_blocked(child) if kind is nn.MaxPool2d else None


def padding_blocked(conv: Any) -> str | None:
    """Why ops do not serve the padding of a convolution, or None."""
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return reasons.because("geometry", f"padding {conv.padding!r}, mode {conv.padding_mode!r}")
    return None


def child_changed(role: str, child: nn.Module) -> str | None:
    """Why calling a child does more than to run the forward of its class, or None."""
    if hooks.hooked(child):
        return reasons.because("hook", f"hooks on {role}")
    if "forward" in child.__dict__:
        return reasons.because("own-forward", f"{role} has its own forward")
    return None


def _conv_blocked(conv: nn.Conv2d, x: Tensor, cast: bool) -> str | None:
    weight, _ = folding.conv_tensors(conv)
    if type(weight) is not nn.Parameter and type(weight) is not Tensor:
        return reasons.because("tensor", f"convolution weight is a {type(weight).__name__}")
    if weight.device != x.device:
        return reasons.because("device", f"input on {x.device}, weight on {weight.device}")
    if weight.dtype is not x.dtype and not cast:
        return reasons.because("dtype", f"input is {x.dtype}, convolution weight {weight.dtype}")
    return None


def _max_pool_blocked(pool: Any) -> str | None:
    sizes = (pool.kernel_size, pool.stride, pool.padding)
    if pool.dilation != 1 or pool.ceil_mode or pool.return_indices or not all(isinstance(s, int) for s in sizes):
        return reasons.because("geometry", "max-pooling with dilation, ceil_mode, indices or uneven windows")
    if pool.kernel_size > 15 or -(-pool.kernel_size // pool.stride) > 4 or pool.padding > pool.kernel_size // 2:
        return reasons.because("geometry", f"pooling window {pool.kernel_size} with stride {pool.stride}")
    return None
