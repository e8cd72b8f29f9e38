"""A matched forward as a list of calls on a list of values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastres import guard, replay, sites
from fastres.recipes import projection
from fastres.recipes.operations import Node, Operation
from fastres.recipes.patterns import Group, Matched
from fastres.recipes.residual import FusedModule
from fastres.recipes.trace import Trace

Values = list[Any]
Step = Callable[[Values], Any]


class Program:
    """The steps of a forward.

    Attributes:
        inputs: how many arguments it takes.
    """

    def __init__(self, traced: Trace, matched: Matched) -> None:
        graph = matched.graph
        self.slots = {node: i for i, node in enumerate(graph.nodes)}
        for node, value in matched.values.items():
            self.slots[node] = self.slots[value]
        self.size = len(graph.nodes)
        self.inputs = len(traced.parameters)
        modules = traced.modules | traced.opened
        steps: list[tuple[Step, int, list[int]]] = []
        for step in matched.steps:
            if isinstance(step, Group):
                made: Step = _fused(step, self.slots, [self._call(n, modules, matched) for n in step.nodes])
                if step.shortcut is not None:
                    calls = [self._call(n, modules, matched) for n in step.shortcut.nodes]
                    made = _Joined(made, _fused(step.shortcut, self.slots, calls))  # type: ignore[arg-type]
                steps.append((made, self.slots[step.last], sorted(self._reads(step))))
            elif step.op == "output":
                self.result = _argument(step.args[0], self.slots)
                self.returns = {self.slots[node] for node in step.all_input_nodes}
            elif step.op != "placeholder":
                reads = self._inputs(step)
                call = self._call(step, modules, matched)
                module = modules[str(step.target)] if step.op == "call_module" else None
                steps.append((_Plain(call, module, reads, self.size), self.slots[step], reads))
        last = {slot: i for i, (_, _, reads) in enumerate(steps) for slot in reads}
        self.steps = [
            (step, out, [slot for slot, when in last.items() if when == i and slot not in self.returns])
            for i, (step, out, _) in enumerate(steps)
        ]

    def __call__(self, args: tuple[Any, ...]) -> Any:
        values: Values = [None] * self.size
        values[: self.inputs] = args
        del args
        for step, out, dead in self.steps:
            values[out] = step(values)
            for slot in dead:
                values[slot] = None
        return self.result(values)

    def _inputs(self, node: Node) -> list[int]:
        return [self.slots[i] for i in node.all_input_nodes]

    def _reads(self, group: Group) -> set[int]:
        nodes = [*group.nodes, *(group.shortcut.nodes if group.shortcut is not None else ())]
        return {slot for node in nodes for slot in self._inputs(node)} - {self.slots[group.last]}

    def _call(self, node: Node, modules: dict[str, nn.Module], matched: Matched) -> Step:
        if node.op == "get_attr":
            path, _, name = str(node.target).rpartition(".")
            owner = modules[path]
            return lambda values: getattr(owner, name)
        op: Operation = matched.operations[node]
        if node.op == "call_module" and op.norm is not None:
            call: Any = op.norm.plain
        else:
            call = modules[str(node.target)] if node.op == "call_module" else node.target
        if node.op == "call_method":
            return _method(str(call), _argument(tuple(node.args), self.slots), _argument(dict(node.kwargs), self.slots))
        if len(node.args) == 1 and isinstance(node.args[0], Node) and not node.kwargs:
            slot = self.slots[node.args[0]]
            return lambda values: call(values[slot])
        args, kwargs = _argument(tuple(node.args), self.slots), _argument(dict(node.kwargs), self.slots)
        return lambda values: call(*args(values), **kwargs(values))


class _Plain:
    """Something that is not fused, and that a recording takes as it is."""

    def __init__(self, call: Step, module: nn.Module | None, reads: list[int], size: int) -> None:
        self.call, self.module, self.reads, self.size = call, module, list(dict.fromkeys(reads)), size

    def __call__(self, values: Values) -> Any:
        if not replay.recorded() or isinstance(self.module, FusedModule):
            return self.call(values)  # a fused module records its own calls
        with replay.paused():
            y = self.call(values)
        inputs = [values[slot] for slot in self.reads]
        if type(y) is Tensor and 1 <= len(inputs) <= 2 and all(type(x) is Tensor for x in inputs):
            replay.note(self.again, inputs[0], inputs[1] if len(inputs) > 1 else None, False, y)
        else:
            replay.spoil()
        return y

    def again(self, x: Tensor, residual: Tensor | None, relu: bool) -> Any:
        values: Values = [None] * self.size
        for slot, value in zip(self.reads, (x, residual), strict=False):
            values[slot] = value
        return self.call(values)


def _method(name: str, args: Step, kwargs: Step) -> Step:
    def call(values: Values) -> Any:
        value, *others = args(values)
        return getattr(value, name)(*others, **kwargs(values))

    return call


def _argument(a: Any, slots: dict[Node, int]) -> Step:
    """How to get an argument of the graph from the values."""
    if isinstance(a, Node):
        slot = slots[a]
        return lambda values: values[slot]
    if isinstance(a, tuple | list):
        items = [_argument(item, slots) for item in a]
        kind = type(a) if type(a) in (tuple, list) else (list if isinstance(a, list) else tuple)
        return lambda values: kind(item(values) for item in items)
    if isinstance(a, dict):
        entries = {key: _argument(value, slots) for key, value in a.items()}
        return lambda values: {key: value(values) for key, value in entries.items()}
    if isinstance(a, slice):
        parts = [_argument(part, slots) for part in (a.start, a.stop, a.step)]
        return lambda values: slice(*(part(values) for part in parts))
    return lambda values: a


def _fused(group: Group, slots: dict[Node, int], calls: list[Step]) -> Step:
    if group.conv is None and group.norm is None:
        return _AddAct(group, slots, calls)
    return _Fused(group, slots, calls)


class _Group:
    """A group as one call; where that is not legal on these values, its nodes one by one."""

    def __init__(self, group: Group, slots: dict[Node, int], calls: list[Step]) -> None:
        self.conv, self.pool = group.conv, group.pool
        self.act = "relu" if group.relu else "identity"
        self.x = slots[group.x]
        self.residual = None if group.residual is None else slots[group.residual]
        self.recompute = group.recompute
        self.fork, self.promote, self.alone = group.fork, group.promote, group.alone
        self.calls = [(call, slots[node]) for call, node in zip(calls, group.nodes, strict=True)]
        self.modules = [m for m in (group.conv, None if group.norm is None else group.norm.module) if m is not None]
        self.stands: Any = None if group.norm is None else group.norm.stands

    def one_by_one(self, values: Values, reason: str) -> Any:
        for module in self.modules:
            guard.tell(module, reason)
        replay.spoil()
        for call, slot in self.calls:
            values[slot] = call(values)
        result = values[self.calls[-1][1]]
        for _, slot in self.calls:
            values[slot] = None
        return result


class _Fused(_Group):
    """Around a convolution or a batch norm."""

    def __call__(self, values: Values) -> Any:
        x = values[self.x]
        conv, norm = self.conv, self.stands
        if reason := guard.step_blocked(x, conv, norm):
            return self.one_by_one(values, reason)
        if self.residual is not None:
            residual = values[self.residual]
            if type(residual) is not Tensor and type(residual) is not nn.Parameter:
                return self.one_by_one(values, f"the residual is a {type(residual).__name__}")
            return self.add(x, residual)
        if self.pool is not None:
            return self.then_pool(values, x)
        if norm is None:
            if self.alone and x.dtype is torch.float64:
                return self.calls[0][0](values)
            return sites.conv_act(conv, x, act=self.act)
        if conv is None:
            return sites.bn_act(norm, x, act=self.act, recompute=self.recompute)
        if not self.fork:
            return sites.conv_bn_act(conv, norm, x, act=self.act, recompute=self.recompute)
        fork: list[Tensor] = []
        y = sites.conv_bn_act(conv, norm, x, act=self.act, fork=fork, recompute=self.recompute)
        values[self.x] = fork[0]
        return y

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """The whole group."""
        if self.conv is None:
            return sites.bn_act(self.stands, x, act=self.act, residual=residual, promote=self.promote)
        if self.stands is None:
            return sites.conv_act(self.conv, x, act=self.act, residual=residual, promote=self.promote)
        return sites.conv_bn_act(self.conv, self.stands, x, act=self.act, residual=residual, promote=self.promote)

    def then_pool(self, values: Values, x: Tensor) -> Any:
        if self.conv is None:
            return sites.bn_act_maxpool(self.stands, self.pool, x, act=self.act)
        y = sites.conv_bn_relu_maxpool(self.conv, self.stands, self.pool, x)
        if y is not None:
            return y
        y = sites.conv_act(self.conv, x, act="identity")
        # The convolution may change the dtype (autocast): what counts is what batch norm gets.
        if reason := guard.step_blocked(y, None, self.stands):
            guard.tell(self.modules[-1], reason)
            replay.spoil()
            (_, slot), *rest = self.calls
            values[slot] = y
            del y
            for call, out in rest:
                values[out] = call(values)
            return values[out]
        return sites.bn_act_maxpool(self.stands, self.pool, y, act=self.act)


class _Joined:
    """A group and its shortcut, whose batch norms are one op where a kernel has that."""

    def __init__(self, main: _Fused, shortcut: _Fused) -> None:
        self.main, self.shortcut = main, shortcut

    def __call__(self, values: Values) -> Any:
        main, other = self.main, self.shortcut
        y, x = values[main.x], values[other.x]
        if not guard.step_blocked(y, main.conv, main.stands) and not guard.step_blocked(x, other.conv, other.stands):
            joined = projection.join(main.conv, main.stands, y, other.conv, other.stands, x)
            if joined is not None:
                return joined
        del y, x
        values[main.residual] = other(values)  # type: ignore[index]
        result = main(values)
        values[main.residual] = None  # type: ignore[index]
        return result


class _AddAct(_Group):
    """relu(x + residual) without a batch norm."""

    def __call__(self, values: Values) -> Any:
        x, residual = values[self.x], values[self.residual]  # type: ignore[index]
        if reason := guard.add_blocked(x, residual):
            return self.one_by_one(values, reason)
        return sites.add_act(x, residual, act=self.act)
