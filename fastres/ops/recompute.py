"""An activation that is computed again in backward from what its own op saved, instead of being saved as well.

y = act(batch_norm(raw)) is the input of the next convolution, which needs it for its weight gradient. Its raw input is
saved anyway, by the op that made y, and one pass over raw gives y again, bit for bit. So the next op saves raw, and y's
memory is free between forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastres.ops import bn_act


@dataclass(frozen=True, slots=True)
class _Recipe:
    """y = bn_act(*tensors): which of its node's results y is, its version counter when it was made, and how its node
    makes it with its history."""

    tensors: tuple[Tensor | None, ...]  # raw, weight, bias, mean, var
    eps: float
    relu: bool
    output: int
    version: int
    again: Callable[[Any], Tensor]


def offer(
    y: Tensor, tensors: tuple[Tensor | None, ...], eps: float, relu: bool, again: Callable[[Any], Tensor]
) -> None:
    """Lets the next op that saves y save `tensors` (raw, weight, bias, mean, var) in its place.

    For a caller who knows that nothing writes to y in a way that moves no version counter. again(y.grad_fn): y as a
    differentiable function of what that node saved.
    """
    if torch.compiler.is_compiling():  # which knows no grad_fn
        return
    node: Any = y.grad_fn
    if node is not None:
        node.fastres_recipe = _Recipe(tensors, eps, relu, y.output_nr, y._version, again)


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
    ctx.recipe, ctx.made_by = (recipe.eps, recipe.relu, recipe.again), node
    ctx.save_for_backward(*recipe.tensors, *tensors)


def saved(ctx: Any) -> tuple[Tensor, tuple[Any, ...]]:
    """What `save` was given."""
    if ctx.recipe is None:
        x, *tensors = ctx.saved_tensors
        return x, tuple(tensors)
    raw, weight, bias, mean, var, *tensors = ctx.saved_tensors
    eps, relu, again = ctx.recipe
    if torch.is_grad_enabled():  # for gradients of gradients
        return again(ctx.made_by), tuple(tensors)
    return bn_act.op(raw, weight, bias, mean, var, None, False, eps, relu, False)[0], tuple(tensors)
