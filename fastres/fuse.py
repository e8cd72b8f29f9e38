"""fuse_: swaps the classes of the blocks it knows, in place; unfuse_ swaps them back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastres import batch_norm, folding, forms, replay, sites, switches
from fastres.recipes import fused_class
from fastres.recipes.residual import FusedModule
from fastres.report import FuseReport, Row

_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Hardswish)
_KINDS: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (nn.modules.conv._ConvNd, "conv"),
    (nn.modules.batchnorm._NormBase, "bn"),
    (_ACTIVATIONS, "act"),
    (nn.modules.pooling._MaxPoolNd, "pool"),
)


def fuse_(model: nn.Module, *, memory: str | None = None, example: Any = None) -> FuseReport:
    """Lets the residual blocks of `model` run fused, in training and inference. In place, idempotent, undone by
    `unfuse_`.

    Only classes are swapped: every child, parameter, buffer, hook and state_dict key stays. At each call the block
    decides whether the fast path is legal now; where it is not, its original forward runs.

    Args:
        model: any module. fastres.models and torchvision's ResNet, ResNeXt and Wide ResNet are known; the rest is left
        alone.
        memory: "low": a training step keeps less for its backward pass. For each block is chosen whether the outputs of
            its convolutions are computed again there, bit for bit, with the statistics of forward; where blocks without
            a projection follow each other, the output of every second one too. "fast": as without it. None: what the
            model has now ("fast", unless it or what it was copied from was made "low").
        example: for "low", an input of the model [N, C, H, W], or a tuple of its arguments, for whose shape, dtype and
            layout is chosen. Its values do not count; it may be on PyTorch's meta device. Without autocast.

    Returns:
        A report with a row for every convolution, batch norm, activation, addition and pooling: fused, or why not.

    Raises:
        TypeError: if model is not an nn.Module, or there is no example for memory="low".
        ValueError: for another value of memory. A call that raises leaves the model as it was.
    """
    forms.check(memory, example)
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse_ takes an nn.Module, got {type(model).__name__}")
    planned = plan(model)
    done: list[tuple[nn.Module, type[nn.Module]]] = []
    try:
        for module, new in planned.swaps:
            done.append((module, type(module)))
            module.__class__ = new
        chosen = forms.choose_(model, memory, example)
    except BaseException:
        for module, old in done:
            module.__class__ = old
        raise
    return FuseReport([row for row, _ in planned.rows], chosen)


def unfuse_(model: nn.Module) -> nn.Module:
    """Gives every swapped block of `model` its own class back and drops folded weights and what tune_ or a canary
    decided. Returns `model`."""
    _swap_back(model)
    switches.forget(model)
    return model


def _swap_back(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, FusedModule):
            original: Any = module.unfused_class()
            module.__class__ = original
    folding.forget(model)
    replay.forget(model)


def refresh_(model: nn.Module) -> nn.Module:
    """Drops the folded weights of `model`: the next inference call folds anew. Needed only after writing to a few
    single values of a weight behind autograd's back (through `.data`, NumPy or a raw pointer), on a GPU to any;
    every other change is noticed. Returns `model`."""
    folding.forget(model)
    replay.forget(model)
    return model


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the `with` block every module of `model` runs its original forward (for torch.jit, ONNX export,
    comparisons)."""
    swapped = [(module, type(module)) for module in model.modules() if isinstance(module, FusedModule)]
    _swap_back(model)
    try:
        yield model
    finally:
        for module, cls in swapped:
            module.__class__ = cls


@dataclass
class Plan:
    """What fuse_ would do to a model: the swaps, and for each row the module whose fast path covers it."""

    swaps: list[tuple[nn.Module, type[nn.Module]]]
    rows: list[tuple[Row, nn.Module | None]]


def plan(model: nn.Module) -> Plan:
    """Looks at every module of `model` and changes nothing."""
    swaps: list[tuple[nn.Module, type[nn.Module]]] = []
    additions: list[tuple[Row, nn.Module | None]] = []
    claimed: dict[nn.Module, tuple[Row, nn.Module | None]] = {}
    for name, module in model.named_modules():
        cls: Any = type(module)
        fused = issubclass(cls, FusedModule)
        new: Any = cls if fused else fused_class(cls)
        if new is None:
            continue
        reason = None if fused else _unlike_recipe(module, new)
        _claim(name, module, new, reason, claimed, additions)
        if reason is None and not fused:
            swaps.append((module, new))
    rows = [
        claimed.get(module) or (Row(name, kind, False, _unclaimed(model, name)), None)
        for name, module in model.named_modules()
        if (kind := kind_of(module))
    ]
    return Plan(swaps, rows + additions)


def kind_of(module: nn.Module) -> str | None:
    """ "conv", "bn", "act" or "pool", or None for any other module."""
    return next((kind for types, kind in _KINDS if isinstance(module, types)), None)


def _unlike_recipe(module: nn.Module, new: Any) -> str | None:
    """Why a block of a known class cannot be swapped: it does not run the forward the recipe was written for."""
    if "forward" in module.__dict__:
        return "the block has its own forward"
    method = getattr(type(module), new.forward_method, None)
    code = getattr(method, "__code__", None)
    if code is None or set(code.co_names) != new.forward_names:
        return f"{type(module).__name__}.{new.forward_method} is not the one the recipe was written for"
    children = _taken_over(module, new)
    missing = [name for name, child in children.items() if not isinstance(child, nn.Module)]
    return f"no child module {missing[0]}" if missing else None


def _taken_over(block: nn.Module, new: Any) -> dict[str, Any]:
    """The children that the fused forward stands in for, by name; None for one that is missing and must not be."""
    children = {name: getattr(block, name, None) for name in new.fused_children}
    return {name: c for name, c in children.items() if c is not None or name not in new.optional_children}


def _claim(
    name: str,
    block: nn.Module,
    new: Any,
    reason: str | None,
    claimed: dict[nn.Module, tuple[Row, nn.Module | None]],
    additions: list[tuple[Row, nn.Module | None]],
) -> None:
    """Notes the rows of the children that a block's fused forward takes over."""
    prefix = f"{name}." if name else ""
    children = {child: module for child, module in _taken_over(block, new).items() if module is not None}
    main = reason or next(filter(None, (sites.child_blocked(role, child) for role, child in children.items())), None)
    for role, child in children.items():
        row = Row(f"{prefix}{role}", kind_of(child) or "act", main is None, main or "", note=batch_norm.note(child))
        claimed[child] = (row, block)
    downsample = getattr(block, "downsample", None)
    if type(downsample) is nn.Sequential and len(downsample) == 2 and kind_of(downsample[0]) == "conv":
        why = reason or next(filter(None, map(sites.child_blocked, ("conv", "bn"), downsample)), None)
        for i, child in enumerate(downsample):
            path, note = f"{prefix}downsample.{i}", batch_norm.note(child)
            row = Row(path, kind_of(child) or "act", why is None, why or "", note=note)
            claimed[child] = (row, downsample)
    if new.adds:
        additions.append((Row(name, "add", main is None, main or ""), block))


def _unclaimed(model: nn.Module, name: str) -> str:
    if not name:
        return "a single module"
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, FusedModule) or fused_class(type(parent)):
        return "runs as it is: its output is what the fused part takes"
    return f"inside {type(parent).__name__}, which no recipe covers"
