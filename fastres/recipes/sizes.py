"""Sizes of its arguments that a forward compares with a number: `if x.shape[1] != self.channels: raise ...`.

A trace takes such a size for that number and notes it: its graph holds for arguments of that size only. For others the
module's own forward runs, with its own error.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch import Tensor, fx


@dataclass(frozen=True)
class Size:
    """x.shape[dimension], or x.dim() where `dimension` is None, of the argument x.

    Attributes:
        value: what it has to be.
    """

    argument: str
    dimension: int | None
    value: int

    def differs(self, x: Tensor) -> str | None:
        """Why x does not fit, or None."""
        if self.dimension is None:
            return None if x.dim() == self.value else f"{self.argument} has {x.dim()} dimensions, not {self.value}"
        if -x.dim() <= self.dimension < x.dim() and x.shape[self.dimension] == self.value:
            return None
        return f"{self.argument} has shape {tuple(x.shape)}, not {self.value} in dimension {self.dimension}"


def compared(node: fx.Node) -> Size | None:
    """The size that `node` compares with a number by == or !=, or None."""
    if node.target not in (operator.eq, operator.ne):
        return None
    sizes = [a for a in node.args if isinstance(a, fx.Node)]
    numbers = [a for a in node.args if type(a) is int]
    found = _read(sizes[0]) if len(sizes) == len(numbers) == 1 else None
    return None if found is None else Size(*found, numbers[0])


def drop(graph: fx.Graph) -> None:
    """Takes what nothing reads of comparisons and sizes out of the graph."""
    for node in reversed(graph.nodes):
        pure = node.target in (operator.eq, operator.ne, operator.getitem, getattr) or _read(node) is not None
        if pure and not node.users:
            graph.erase_node(node)


def _read(node: fx.Node) -> tuple[str, int | None] | None:
    """(argument, dimension) where `node` is x.shape[i], x.size(i), x.ndim or x.dim()."""
    x, *rest = node.args or (None,)
    if node.target is operator.getitem and isinstance(x, fx.Node) and x.target is getattr and x.args[1] == "shape":
        x = x.args[0]
    elif node.target is getattr and rest == ["ndim"]:
        rest = []
    elif node.op != "call_method" or (node.target, len(rest)) not in (("size", 1), ("dim", 0)) or node.kwargs:
        return None
    if not isinstance(x, fx.Node) or x.op != "placeholder" or (rest and type(rest[0]) is not int):
        return None
    return str(x.target), rest[0] if rest else None  # type: ignore[return-value]
