"""The gradient through one residual block, taken apart and checked.

    v2     y = x + F(x)          g = dL/dy               dL/dx = g + J^T g
    v1     y = relu(x + F(x))    g = dL/dy * [y > 0]     dL/dx = g + J^T g
    plain  y = relu(F(x))        g = dL/dy * [y > 0]     dL/dx = J^T g

J is the Jacobian dF/dx of the branch F, so the first two lines are dL/dx = g (dF/dx + 1). dL/dx and dL/dy are those of
the whole network. The right side is found without it, twice: J^T g by the backward pass of F alone; and along random
directions v, <g, J v> by central differences of F, which know nothing of backward passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastres.models import PreActBasicBlock

__all__ = ["Block", "blocks"]

#: In float64 the difference quotient's rounding error is about 1e-16 / STEP; a larger step crosses more kinks of ReLUs.
STEP = 1e-8
DIRECTIONS = 3


@dataclass(frozen=True)
class Block:
    """A block whose shortcut, if any, is the identity.

    Attributes:
        name: layer2.1 and so on. of_output, of_input: norms of dL/dy and dL/dx.
        through_branch: norm of J^T g. through_shortcut: norm of g, which the identity adds; 0 in a plain block.
        error: |dL/dx - (g + J^T g)| / |dL/dx|, without g in a plain block.
        difference_error: by how much central differences of F are off, relative to |dL/dx|: median over directions.
    """

    name: str
    of_output: float
    of_input: float
    through_branch: float
    through_shortcut: float
    error: float
    difference_error: float

    @property
    def growth(self) -> float:
        """By how much the gradient grows on its way back through the block."""
        return self.of_input / self.of_output


def blocks(model: nn.Module, x: Tensor, labels: Tensor, *, seed: int = 0) -> list[Block]:
    """The blocks of a network whose input and output have the same shape, in order, in training mode and float64.

    Args:
        model: of basic blocks, not fused; it is left in float64, with running statistics that have moved.
        x: images, (N, 3, H, W), normalised. labels: (N). The loss is their mean cross entropy. seed: of the directions.
    """
    model.double().train()
    seen: list[tuple[str, Any, Tensor, Tensor]] = []

    def note(name: str, block: nn.Module, x: Tensor, y: Tensor) -> None:
        x.retain_grad()
        y.retain_grad()
        seen.append((name, block, x, y))

    hooks = [
        block.register_forward_hook(lambda block, given, y, name=name: note(name, block, given[0], y))
        for name, block in model.named_modules()
        if hasattr(block, "downsample")
    ]
    try:
        F.cross_entropy(model(x.double()), labels).backward()
    finally:
        for hook in hooks:
            hook.remove()
    random = torch.Generator().manual_seed(seed)
    same = (row for row in seen if row[2].shape == row[3].shape and row[1].downsample is None)
    return [_examine(name, block, x, y, random) for name, block, x, y in same]


def branch(block: Any, x: Tensor) -> Tensor:
    """F(x): what the block adds to its input."""
    if isinstance(block, PreActBasicBlock):
        activated = x if block.bn1 is None else F.relu(block.bn1(x))
        return block.conv2(F.relu(block.bn2(block.conv1(activated))))
    return block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))


def _examine(name: str, block: Any, x: Tensor, y: Tensor, random: torch.Generator) -> Block:
    assert x.grad is not None and y.grad is not None
    g = y.grad if block.preactivation else y.grad * (y > 0)
    x_alone = x.detach().requires_grad_()
    (back,) = torch.autograd.grad(branch(block, x_alone), x_alone, g)
    shortcut = g if block.residual else torch.zeros_like(g)
    error = (x.grad - (shortcut + back)).norm() / x.grad.norm()
    return Block(
        name=name,
        of_output=y.grad.norm().item(),
        of_input=x.grad.norm().item(),
        through_branch=back.norm().item(),
        through_shortcut=shortcut.norm().item(),
        error=error.item(),
        difference_error=_difference(block, x.detach(), g, x.grad - shortcut, random) / x.grad.norm().item(),
    )


@torch.no_grad()
def _difference(block: Any, x: Tensor, g: Tensor, back: Tensor, random: torch.Generator) -> float:
    """|<back, v> - <g, F(x + h v) - F(x - h v)> / 2h| for v of independent standard normals, with which <back, v> has
    the standard deviation |back|. The median leaves out a direction in which some ReLU passes its kink."""
    errors = []
    for _ in range(DIRECTIONS):
        v = torch.randn(x.shape, generator=random, dtype=x.dtype)
        quotient = (branch(block, x + STEP * v) - branch(block, x - STEP * v)) / (2 * STEP)
        errors.append(((g * quotient).sum() - (back * v).sum()).abs().item())
    return median(errors)
