"""A module once more, to run it aside: the values of its weights, buffers of its own. Nothing that the copy does shows
in the original: statistics, gradients, hooks, training flags."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastres.recipes.residual import FusedModule, StemForward


def aside(module: nn.Module, *, plain: bool = False, change: Callable[[Tensor], Tensor] | None = None) -> nn.Module:
    """A copy of `module` and all in it.

    Its parameters are new ones on the same memory, its buffers copies. Hooks are those of the original, but the copy's
    can be added and removed; whoever does not want those of `module` itself calls the copy's `forward`. What tune_
    decided does not hold for the copy.

    Args:
        plain: whether swapped blocks have their original class in the copy.
        change: what every parameter and buffer becomes, in place of that.

    Raises:
        ValueError: for a module with a forward of its own, which is bound to the original, and a scripted one.
    """
    copies: dict[int, nn.Module] = {}
    tensors: dict[int, Any] = {}

    def parameter(p: Any) -> Any:
        if p is not None and id(p) not in tensors:
            values = p.detach() if change is None else change(p.detach())
            tensors[id(p)] = nn.Parameter(values, requires_grad=p.requires_grad)
        return None if p is None else tensors[id(p)]

    def buffer(b: Any) -> Any:
        if b is not None and id(b) not in tensors:
            tensors[id(b)] = b.detach().clone() if change is None else change(b.detach())
        return None if b is None else tensors[id(b)]

    def copied(one: nn.Module) -> nn.Module:
        if id(one) in copies:
            return copies[id(one)]
        if "forward" in one.__dict__ or isinstance(one, torch.jit.ScriptModule):
            raise ValueError(f"a {type(one).__name__} has a forward of its own, bound to it, and cannot run aside")
        kind: Any = one.unfused_class() if plain and isinstance(one, FusedModule) else type(one)
        other = copies[id(one)] = kind.__new__(kind)
        other.__dict__.update({k: v.copy() if isinstance(v, dict) else v for k, v in one.__dict__.items()})
        other._parameters = {name: parameter(p) for name, p in one._parameters.items()}
        other._buffers = {name: buffer(b) for name, b in one._buffers.items()}
        other._modules = {name: None if m is None else copied(m) for name, m in one._modules.items()}
        return other

    with torch.no_grad():
        return copied(module)


def site_alone(copy: nn.Module, fused: nn.Module) -> nn.Module:
    """What of a copy of the fused module `fused` its fast path stands for: all of a block, the stem of a network. The
    children of `copy` after the stem then do nothing."""
    if isinstance(fused, StemForward):
        names = list(copy._modules)
        last = max(names.index(child) for child in fused.fused_children)
        copy._modules.update({name: nn.Identity() for name in names[last + 1 :]})
    return copy


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists, dicts and data classes that PyTorch knows."""
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
