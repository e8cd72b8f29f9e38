"""Sizes of its arguments that a forward compares with a number: `if x.shape[1] != self.channels: raise ...`.

A trace takes such a size for that number, or, where it is made for a certain call, for what it is there, and notes it:
its graph holds for arguments with the same answer only.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx


@dataclass(frozen=True)
class Size:
    """Whether x.shape[dimension], or x.dim() where `dimension` is None, is a number; x is an argument.

    Attributes:
        value: the number.
        equal: the answer.
    """

    argument: str
    dimension: int | None
    value: int
    equal: bool = True

    def answer(self, x: Any) -> bool | None:
        """Whether it is the number for x; None if x has no such size."""
        if not isinstance(x, Tensor):
            return None
        if self.dimension is None:
            return x.dim() == self.value
        return x.shape[self.dimension] == self.value if -x.dim() <= self.dimension < x.dim() else None

    def differs(self, x: Any) -> str | None:
        """Why a graph does not hold for x, or None."""
        if self.answer(x) is self.equal:
            return None
        what = "number of dimensions" if self.dimension is None else f"dimension {self.dimension}"
        of = tuple(x.shape) if isinstance(x, Tensor) else f"a {type(x).__name__}"
        return f"{self.argument}: {what} of {of} is {'not ' if self.equal else ''}{self.value}"


def compared(node: fx.Node, call: dict[str, Any]) -> Size | None:
    """The size that `node` compares with a number by == or !=, or None. call: arguments by name, where known."""
    if node.target not in (operator.eq, operator.ne):
        return None
    sizes = [a for a in node.args if isinstance(a, fx.Node)]
    numbers = [a for a in node.args if type(a) is int]
    read = _read(sizes[0]) if len(sizes) == len(numbers) == 1 else None
    if read is None:
        return None
    found = Size(*read, numbers[0])
    return replace(found, equal=found.answer(call.get(found.argument)) is not False)


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
