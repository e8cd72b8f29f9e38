"""The parts of a model that time and memory are counted by: its blocks, and where no block is known single layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from fastres import nn as fastres_nn
from fastres.explain.record import floating
from fastres.recipes import fused_class
from fastres.recipes.residual import FusedModule, StemForward
from fastres.recipes.units import Unit

#: Told where the model is from now on: the name of a unit, or None for what lies between them.
Enter = Callable[[str | None], None]


def recipe_of(module: nn.Module) -> type[nn.Module] | None:
    """The fused class of a module, swapped or not, or None."""
    return type(module) if isinstance(module, FusedModule) else fused_class(type(module))


def is_block(module: nn.Module) -> bool:
    """Whether fused code may run in the module's stead."""
    return isinstance(module, (fastres_nn.ConvBnAct2d, fastres_nn.BnAct2d, fastres_nn.AddAct)) or (
        recipe_of(module) is not None
    )


def is_shortcut(module: nn.Module, parent: nn.Module) -> bool:
    """Whether a module is the projection of a block that a recipe knows, which takes it over."""
    known = recipe_of(parent)
    return getattr(parent, "downsample", None) is module and known is not None and not issubclass(known, Unit)


def is_network(module: nn.Module) -> bool:
    """Whether it is a whole network, of which a row's block is the stem only."""
    recipe = recipe_of(module)
    return recipe is not None and issubclass(recipe, StemForward)


@contextmanager
def entered(units: dict[str, nn.Module], enter: Enter) -> Iterator[None]:
    """Inside, `enter` is told when a forward, and the backward behind it, comes to a unit or leaves it.

    Of a network the unit is its stem: what comes before the first other unit in forward, and in backward after the
    last. Backward follows the gradients of a unit's output and input: where that input has other users, their backward
    may be counted too.
    """
    stack: list[str] = []
    networks = {name for name, module in units.items() if is_network(module)}
    current: str | None = None

    def now_in(name: str | None) -> None:
        nonlocal current
        current = name
        enter(name)

    def on_gradient(t: Any, then: Callable[[str], None], name: str) -> None:
        t.register_hook(lambda grad: then(name))

    def left(name: str) -> None:
        if current == name:  # else the unit before it, whose output is this one's input, has been entered already
            now_in(None)

    def before(name: str, args: Any) -> None:
        stack.append(name)
        now_in(name)
        for t in [t for t in floating(args) if t.requires_grad][:1]:
            on_gradient(t, left, name)

    def after(name: str, output: Any) -> None:
        stack.pop()
        outer = stack[-1] if stack else None
        now_in(None if outer in networks else outer)
        for t in [t for t in floating(output) if t.requires_grad][:1]:
            if name not in networks:
                on_gradient(t, now_in, name)

    with ExitStack() as hooks:
        for name, module in units.items():
            pre = module.register_forward_pre_hook(lambda _, args, name=name: before(name, args))
            post = module.register_forward_hook(lambda _, args, output, name=name: after(name, output))
            hooks.callback(pre.remove)
            hooks.callback(post.remove)
        yield
