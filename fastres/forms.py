"""Which form of its ops each fused block takes where memory is scarce, and what it then keeps for backward.

There are three: "keep" saves the outputs of convolutions (activations behind them are computed again from these in any
case); "recompute" saves neither (fastres/ops/recompute.py); and the algebraic conv1x1_bn_act, which takes the place of
both where it serves, has no such output. What each saves is counted without computing: the model runs on PyTorch's meta
device, on tensors without values, by the ways that the kernels of the real device would be asked for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from fastres import layout, observe, reference, switches
from fastres.aside import aside, tensors_in
from fastres.kernels import table
from fastres.recipes.residual import FusedModule
from fastres.report import BlockMemory, MemoryReport
from fastres.saved import SavedTensors


def check(memory: str | None, example: Any) -> None:
    """Raises ValueError or TypeError for arguments of fuse_ that make no sense."""
    if memory not in (None, "fast", "low"):
        raise ValueError(f"memory must be 'low', 'fast' or None, not {memory!r}")
    if memory == "low" and next(tensors_in(example), None) is None:
        raise TypeError('memory="low" needs an example: an input of the model, whose shape counts')


def choose_(model: nn.Module, memory: str | None, example: Any) -> MemoryReport | None:
    """Chooses the form of every fused block of `model`; a report where memory is "low"."""
    if memory == "fast":
        for module in model.modules():
            switches.recompute(module, False)
    if memory != "low":
        return None
    args = example if isinstance(example, tuple) else (example,)
    device_type = next(tensors_in(args)).device.type
    with table.meta_is("cpu" if device_type == "meta" else device_type), _Layouts():
        shapes = tree_map_only(Tensor, lambda t: t.detach().to("meta"), args)
        copy = _training(aside(model, change=lambda t: t.to("meta")))
        blocks = _running_fused(copy, shapes)
        convolutions = {name: _convolutions(copy, name, blocks) for name in blocks}
        fast, algebraic = _count(copy, shapes, blocks, convolutions, dict.fromkeys(blocks, False))
        low, _ = _count(copy, shapes, blocks, convolutions, dict.fromkeys(blocks, True))
        chosen = {name: low.bytes_of(name) < fast.bytes_of(name) for name in blocks}
        found, _ = _count(copy, shapes, blocks, convolutions, chosen)
    forms = {path: recompute for name, recompute in chosen.items() for path in convolutions[name]}
    measured = None if device_type == "meta" else _measured(model, args, forms, device_type)
    _set(model, forms)
    rows = [
        BlockMemory(
            name, "recompute" if again else "keep", name in algebraic, fast.bytes_of(name), found.bytes_of(name)
        )
        for name, again in chosen.items()
    ]
    return MemoryReport(rows, fast.bytes, found.bytes, measured)


def _training(copy: nn.Module) -> nn.Module:
    return copy if copy.training else copy.train()


def _set(model: nn.Module, forms: dict[str, bool]) -> None:
    """Sets whether the outputs of convolutions, given by their paths, are computed again."""
    for path, recompute in forms.items():
        switches.recompute(model.get_submodule(path), recompute)


def _measured(model: nn.Module, args: tuple[Any, ...], forms: dict[str, bool], device_type: str) -> int:
    copy = _training(aside(model))
    _set(copy, forms)
    off = torch.autocast(device_type, enabled=False)
    with SavedTensors(copy) as saved, torch.enable_grad(), off, torch.random.fork_rng():
        copy(*args)
    return saved.bytes


def _running_fused(copy: nn.Module, shapes: tuple[Any, ...]) -> list[str]:
    """Paths of the fused modules that run fused."""
    reasons: dict[nn.Module, str | None] = {}
    with observe.listening(reasons.__setitem__), torch.enable_grad():
        copy(*shapes)
    fused = [(name, module) for name, module in copy.named_modules() if issubclass(type(module), FusedModule)]
    return [name for name, module in fused if reasons.get(module, "did not run") is None]


def _convolutions(copy: nn.Module, name: str, blocks: list[str]) -> list[str]:
    """Paths of the convolutions in a block but not in another block within it."""
    start = f"{name}." if name else ""
    inner = [f"{other}." for other in blocks if other != name and other.startswith(start)]
    return [
        path
        for path, module in copy.named_modules()
        if type(module) is nn.Conv2d and path.startswith(start) and not path.startswith(tuple(inner))
    ]


class _Layouts(TorchDispatchMode):
    """Gives convolutions on the meta device the layout that they have on others."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default and y.dim() == 4:
            return layout.in_format(y, reference.conv_format(args[0], args[1]))
        return y


def _count(
    copy: nn.Module,
    shapes: tuple[Any, ...],
    blocks: list[str],
    convolutions: dict[str, list[str]],
    chosen: dict[str, bool],
) -> tuple[SavedTensors, set[str]]:
    """What a forward saves, by block, and which blocks end algebraically."""
    _set(copy, {path: chosen[name] for name, paths in convolutions.items() for path in paths})
    saved, algebraic, handles = SavedTensors(copy), set(), []
    for name in filter(None, blocks):
        before: list[str] = []

        def enter(_: nn.Module, args: Any, name: str = name, before: list[str] = before) -> None:
            before.append(saved.label)
            saved.label = name

        def leave(_: nn.Module, args: Any, y: Any, name: str = name, before: list[str] = before) -> None:
            saved.label = before.pop()
            if type(getattr(y, "grad_fn", None)).__name__.startswith("conv1x1_bn_act"):
                algebraic.add(name)

        block = copy.get_submodule(name)
        handles += [block.register_forward_pre_hook(enter), block.register_forward_hook(leave)]
    with saved, torch.enable_grad():
        copy(*shapes)
    for handle in handles:
        handle.remove()
    return saved, algebraic
