"""An activation that is computed again in backward from what its own op saved, instead of being saved as well.

y = act(batch_norm(raw)) is the input of the next convolution, which needs it for its weight gradient. Its raw input is
saved anyway, by the op that made y, and one pass over raw gives y again, bit for bit. So the next op saves raw, and y's
memory is free between forward and backward.

Where memory is scarce (`recompute_conv` of fastres.functional.conv_bn_act), raw is not saved either: the next op saves
nothing of y, and in backward the node that made y makes it again, convolution and all, from its own input. What it
unpacked for that, and raw, wait at the node for its own backward, which is next. Statistics are those of forward, and
running ones are not updated again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastres.ops import bn_act

#: make(node, tensors): y without history; again(node, tensors): y as a differentiable function of what the node saved.
Make = Callable[[Any, tuple[Any, ...]], Tensor]


@dataclass(frozen=True, slots=True)
class _Recipe:
    """How the node of y makes it once more: tensors that whoever takes the offer saves for that; which of the node's
    results y is; and its version counter when it was made."""

    tensors: tuple[Tensor | None, ...]
    make: Make
    again: Make
    output: int
    version: int


def offer(
    y: Tensor, tensors: tuple[Tensor | None, ...], eps: float, relu: bool, again: Callable[[Any], Tensor]
) -> None:
    """Lets the next op that saves y = bn_act(*tensors) save `tensors` (raw, weight, bias, mean, var) in its place.

    For a caller who knows that nothing writes to y in a way that moves no version counter. again(y.grad_fn): y as a
    differentiable function of what that node saved.
    """

    def make(node: Any, tensors: tuple[Any, ...]) -> Tensor:
        return bn_act.op(*tensors, None, False, eps, relu, False)[0]

    offer_made(y, tensors, make, lambda node, tensors: again(node))


def offer_made(y: Tensor, tensors: tuple[Tensor | None, ...], make: Make, again: Make) -> None:
    """Lets the next op that saves y save `tensors` in its place; make(y.grad_fn, tensors) is y."""
    if torch.compiler.is_compiling():  # which knows no grad_fn
        return
    node: Any = y.grad_fn
    if node is not None:
        node.fastres_recipe = _Recipe(tensors, make, again, y.output_nr, y._version)


def save(ctx: Any, x: Tensor, tensors: tuple[Tensor | None, ...]) -> None:
    """ctx.save_for_backward(x, *tensors), or what x is made from. An offer is taken once."""
    node: Any = None if torch.compiler.is_compiling() else x.grad_fn
    recipe = getattr(node, "fastres_recipe", None)
    if recipe is not None and recipe.output != x.output_nr:  # x is another result of the node: a forked input
        recipe = None
    if recipe is not None:
        del node.fastres_recipe
    if recipe is None or recipe.version != x._version:
        ctx.recipe = None
        ctx.save_for_backward(x, *tensors)
        return
    ctx.recipe, ctx.made_by = (recipe.make, recipe.again, len(recipe.tensors)), node
    ctx.save_for_backward(*recipe.tensors, *tensors)


def saved(ctx: Any) -> tuple[Tensor, tuple[Any, ...]]:
    """What `save` was given."""
    if getattr(ctx, "fastres_recipe", None) is not None:  # nobody took the offer: its tensors can go
        del ctx.fastres_recipe
    waiting = getattr(ctx, "fastres_waiting", None)
    if waiting is not None and not torch.is_grad_enabled():
        del ctx.fastres_waiting
        return waiting
    if ctx.recipe is None:
        x, *tensors = ctx.saved_tensors
        return x, tuple(tensors)
    make, again, count = ctx.recipe
    found = ctx.saved_tensors
    # again: for gradients of gradients
    x = (again if torch.is_grad_enabled() else make)(ctx.made_by, found[:count])
    return x, tuple(found[count:])


def wait(ctx: Any, x: Tensor, tensors: tuple[Any, ...]) -> None:
    """Lets the node's own backward, which comes soon, find what was unpacked and computed for another one's."""
    ctx.fastres_waiting = (x, tensors)


def is_saved(x: Tensor, output: int) -> bool:
    """Whether x is a forked input, result number `output` of its node, and that node has saved it as it is."""
    node: Any = None if torch.compiler.is_compiling() else x.grad_fn
    return node is not None and x.output_nr == output and getattr(node, "recipe", node) is None
