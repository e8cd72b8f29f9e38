"""The gradient of a residual network along its single paths.

Block i maps x to after(F_i(x) + s_i(x)). Its gradient is a sum of two terms, through the branch F_i and through the
shortcut s_i; so that of n blocks is a sum over 2^n paths, one for each choice of one term in every block. The length of
a path is the number of branches on it. After one forward through the whole network, every block keeps its own
piece of the graph, and gradients go backward through the pieces that a path takes.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastres.analysis import blocks
from fastres.analysis.blocks import Block

__all__ = ["Paths"]


class Paths:
    """The paths of a network for one batch of images; the loss is the mean cross-entropy.

    Batch norm works as the mode of the model says; in training mode its running statistics move.

    Args:
        model: a residual network with blocks that `blocks.find` knows, one after the other. images, labels: the batch.
    """

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        self.images = images.detach().clone().requires_grad_()
        self._pieces: list[_Piece] = []
        new: dict[str, nn.Module] = {b.name: _Split(b, self._pieces) for b in blocks.find(model)}
        with torch.enable_grad(), blocks.replaced(model, new):
            loss = F.cross_entropy(model(self.images), labels)
        (self._last,) = torch.autograd.grad(loss, self._pieces[-1].output)

    def __len__(self) -> int:
        """Number of blocks."""
        return len(self._pieces)

    def gradient(self, branches: Collection[int]) -> Tensor:
        """d loss / d images along the path that takes the branches of these blocks and the shortcuts of the others."""
        g = self._last
        for i in reversed(range(len(self))):
            piece = self._pieces[i]
            g = piece.joined(g)
            g = self._before(i, piece.through_branch(g) if i in branches else piece.through_shortcut(g))
        return g

    def sums(self) -> list[Tensor]:
        """The sum of d loss / d images over all paths of each length, 0 to n.

        Not path by path: the sums up to block i follow from those up to block i + 1, as Pascal's triangle does.
        """
        sums = [self._last]
        for i in reversed(range(len(self))):
            piece = self._pieces[i]
            joined = [piece.joined(g) for g in sums]
            sums = [piece.through_shortcut(g) for g in joined]
            sums.append(torch.zeros_like(sums[0]))
            for length, g in enumerate(joined):
                sums[length + 1] = sums[length + 1] + piece.through_branch(g)
            sums = [self._before(i, g) for g in sums]
        return sums

    def _before(self, i: int, g: Tensor) -> Tensor:
        """From the input of block i to the output of the block before, or to the images."""
        start = self._pieces[i - 1].output if i else self.images
        arrived = self._pieces[i].arrived
        return g if arrived is start else _vjp(arrived, start, g)


class _Piece:
    """One block's part of the graph, cut off from those before and behind it."""

    def __init__(self, block: Block, x: Tensor) -> None:
        self.arrived = x  # still part of the graph before
        self.input = x.detach().requires_grad_()
        self.branch, self.shortcut = block.branch(self.input), block.shortcut(self.input)
        self._sum = self.branch.detach().requires_grad_()
        self._after = block.after(self._sum + self.shortcut.detach())
        self.output = self._after.detach().requires_grad_()

    def joined(self, g: Tensor) -> Tensor:
        """From the output to the addition."""
        return _vjp(self._after, self._sum, g)

    def through_branch(self, g: Tensor) -> Tensor:
        return _vjp(self.branch, self.input, g)

    def through_shortcut(self, g: Tensor) -> Tensor:
        return g if self.shortcut is self.input else _vjp(self.shortcut, self.input, g)


class _Split(nn.Module):
    """A block that notes its piece."""

    def __init__(self, block: Block, pieces: list[_Piece]) -> None:
        super().__init__()
        self.block, self.pieces = block, pieces

    def forward(self, x: Tensor) -> Tensor:
        piece = _Piece(self.block, x)
        self.pieces.append(piece)
        return piece.output


def _vjp(y: Tensor, x: Tensor, g: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(y, x, g, retain_graph=True)
    return found
