"""fuse_: swaps the classes of the blocks it knows, in place; unfuse_ swaps them back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import nn

from fastres import batch_norm, folding, forms, guard, managed, replay, switches
from fastres.reasons import because, code_of
from fastres.recipes import fused_class, norms, trace, units
from fastres.recipes.operations import ACTIVATIONS
from fastres.recipes.residual import FusedModule
from fastres.report import FuseReport, Row

_KINDS: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (nn.modules.conv._ConvNd, "conv"),
    (nn.modules.batchnorm._NormBase, "bn"),
    (ACTIVATIONS, "act"),
    (nn.modules.pooling._MaxPoolNd, "pool"),
)


def fuse_(model: nn.Module, *, memory: str | None = None, example: Any = None) -> FuseReport:
    """Lets the residual blocks of `model` run fused, in training and inference. In place, idempotent, undone by
    `unfuse_`.

    Only classes are swapped: every child, parameter, buffer, hook and state_dict key stays. At each call the block
    decides whether the fast path is legal now; where it is not, its original forward runs.

    Args:
        model: any module. The blocks of fastres.models and of torchvision's ResNet, ResNeXt and Wide ResNet are known;
            modules of other classes are traced (docs/recipes.md); what cannot be traced is left alone.
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
            _become(module, module.unfused_class())
    folding.forget(model)
    replay.forget(model)
    units.forget(model)


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
            _become(module, cls)


def _become(module: nn.Module, cls: Any) -> None:
    """Changes a module's class, also for methods that are kept in its attributes, as accelerate's hooks do."""
    before, module.__class__ = type(module), cls
    for name, value in module.__dict__.items():
        if isinstance(value, MethodType) and value.__self__ is module:
            method = value.__func__.__name__
            if getattr(before, method, None) is value.__func__:
                module.__dict__[name] = MethodType(getattr(cls, method), module)


@dataclass
class Plan:
    """What fuse_ would do to a model: the swaps, and for each row the module whose fast path covers it."""

    swaps: list[tuple[nn.Module, type[nn.Module]]]
    rows: list[tuple[Row, nn.Module | None]]


def plan(model: nn.Module) -> Plan:
    """Looks at every module of `model` and changes nothing."""
    walk = _Walk(model)
    walk.visit("", model)
    return Plan(walk.swaps, walk.rows())


class _Walk:
    """Goes through a model from the top: a module is a block that a recipe knows, or a unit of its own, or neither."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.swaps: list[tuple[nn.Module, type[nn.Module]]] = []
        self.claimed: dict[nn.Module, tuple[Row, nn.Module | None]] = {}
        self.additions: list[tuple[Row, nn.Module | None]] = []
        self._opener = units.Opener()
        self._seen: set[nn.Module] = set()
        self._inlined: set[nn.Module] = set()  # their forwards are part of a unit's
        self._reasons: dict[nn.Module, str] = {}  # why a module's own calls are not fused

    def visit(self, name: str, module: nn.Module) -> None:
        if module in self._seen:
            return
        self._seen.add(module)
        cls: Any = type(module)
        recipe: Any = cls if issubclass(cls, FusedModule) else fused_class(managed.without_fsdp(cls))
        known = recipe is not None and not issubclass(recipe, units.Unit)
        reason = None
        if known and recipe is not cls:
            reason = managed.reason(module, "the block") or _unlike_recipe(module, recipe)
        if known and (reason is None or not self._unit(name, module)):
            _claim(name, module, recipe, reason, self.claimed, self.additions)
            self._inlined.update(child for child in module.children() if self._is_claimed(child))
            if reason is None and recipe is not cls:
                self.swaps.append((module, recipe))
        elif not known and module._modules and kind_of(module) in (None, "conv") and module not in self._inlined:
            self._unit(name, module)
        for child_name, child in module._modules.items():
            if child is not None:
                self.visit(f"{name}.{child_name}" if name else child_name, child)

    def _is_claimed(self, child: nn.Module) -> bool:
        """Whether a recipe has taken a shortcut over."""
        return type(child) is nn.Sequential and all(m in self.claimed for m in child._modules.values())

    def _unit(self, name: str, module: nn.Module) -> bool:
        """Traces a module of any class, and notes what its graph holds. Returns whether something of it is fused."""
        if not isinstance(module, units.Unit) and (reason := managed.reason(module, "the block")):
            self._reasons[module] = reason
            return False
        found = units.plan_of(module, self._opener)
        if isinstance(found, units.Refusal):
            self._reasons[module] = found.reason
            return False
        try:
            new = units.unit_class(trace.unfused(module))
        except TypeError as error:
            self._reasons[module] = f"its class cannot be derived from: {error}"
            return False
        if not isinstance(module, units.Unit):
            self.swaps.append((module, new))
        self._inlined.update(found.helpers)
        for target, kind, reason, part in found.rows():
            path = ".".join(filter(None, (name, target)))
            if part is None:
                self.additions.append((Row(name, kind, not reason, reason), module))
            else:
                self.claimed[part] = (Row(path, kind, not reason, reason, note=batch_norm.note(part)), module)
        return True

    def rows(self) -> list[tuple[Row, nn.Module | None]]:
        """One for every operation."""
        modules = [
            self.claimed.get(module) or (Row(name, kind, False, self._unclaimed(name, module)), None)
            for name, module in self.model.named_modules()
            if (kind := kind_of(module))
        ]
        return modules + self.additions

    def _unclaimed(self, name: str, module: nn.Module) -> str:
        if not name:
            return because("unknown-block", "a single module")
        if reason := managed.reason(module, "it"):
            return reason
        parent = self.model.get_submodule(name.rpartition(".")[0])
        if not isinstance(parent, units.Unit) and (isinstance(parent, FusedModule) or fused_class(type(parent))):
            return because("outside-block", "runs as it is: its output is what the fused part takes")
        reason = self._reasons.get(parent) or because("unknown-block", "called by a module that is not fused")
        return because(code_of(reason), f"inside {type(parent).__name__}: {reason}")


def kind_of(module: nn.Module) -> str | None:
    """ "conv", "bn", "act" or "pool", or None for any other module."""
    found = next((kind for types, kind in _KINDS if isinstance(module, types)), None)
    return found or ("bn" if norms.is_norm(module) else None)


def _unlike_recipe(module: nn.Module, new: Any) -> str | None:
    """Why a block of a known class cannot be swapped: it does not run the forward the recipe was written for."""
    if "forward" in module.__dict__:
        return because("own-forward", "the block has its own forward")
    method = getattr(type(module), new.forward_method, None)
    code = getattr(method, "__code__", None)
    if code is None or set(code.co_names) != new.forward_names:
        name = f"{type(module).__name__}.{new.forward_method}"
        return because("unknown-forward", f"{name} is not the one the recipe was written for")
    children = _taken_over(module, new)
    missing = [name for name, child in children.items() if not isinstance(child, nn.Module)]
    if missing:
        return because("missing-child", f"no child module {missing[0]}")
    # What may go again, such as a hook, is for the guard at call time.
    lasting = {role: child for role, child in children.items() if guard.child_changed(role, child) is None}
    return next(filter(None, (guard.child_blocked(role, child) for role, child in lasting.items())), None)


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
    main = reason or next(filter(None, (guard.child_blocked(role, child) for role, child in children.items())), None)
    for role, child in children.items():
        row = Row(f"{prefix}{role}", kind_of(child) or "act", main is None, main or "", note=batch_norm.note(child))
        claimed[child] = (row, block)
    downsample = getattr(block, "downsample", None)
    if type(downsample) is nn.Sequential and len(downsample) == 2 and kind_of(downsample[0]) == "conv":
        why = reason or next(filter(None, map(guard.child_blocked, ("conv", "bn"), downsample)), None)
        for i, child in enumerate(downsample):
            path, note = f"{prefix}downsample.{i}", batch_norm.note(child)
            row = Row(path, kind_of(child) or "act", why is None, why or "", note=note)
            claimed[child] = (row, downsample)
    if new.adds:
        additions.append((Row(name, "add", main is None, main or ""), block))
