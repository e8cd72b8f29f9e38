"""Finds in the graph of a forward what one op of fastres does: groups of nodes.

A group runs where its last node stood, so its first nodes move behind whatever stood between: only where nothing there
could notice. A result that more than one node reads ends its group. What writes to its input in place counts as a
function where the input is fresh and nobody else reads it; else it stays, in its place, and so does what it writes to.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from fastres.recipes import norms
from fastres.recipes.operations import Node, Operation, operation
from fastres.recipes.trace import Trace


@dataclass(eq=False)
class Group:
    """act(bn(conv(x)) + residual), then the pooling; all but x may be missing.

    Attributes:
        nodes: in order.
        promote: the residual is added out of place.
        shortcut: the group that computes the residual, if it runs as part of this one.
        fork: the first of two that read x, the other being part of a group too.
        recompute: the result is read by one convolution only.
    """

    nodes: list[Node]
    x: Node
    conv: Any = None
    norm: Any = None
    pool: Any = None
    residual: Node | None = None
    relu: bool = False
    promote: bool = False
    shortcut: Group | None = None
    fork: bool = False
    recompute: bool = False

    @property
    def last(self) -> Node:
        return self.nodes[-1]

    @property
    def alone(self) -> bool:
        """Whether it is but a convolution."""
        return len(self.nodes) == 1 and self.conv is not None


@dataclass
class Matched:
    """The nodes of a graph in the order in which they run, groups in place of their last nodes."""

    graph: fx.Graph
    operations: dict[Node, Operation]
    steps: list[Group | Node] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    values: dict[Node, Node] = field(default_factory=dict)  # of nodes that give their input back: that
    reasons: dict[Node, str] = field(default_factory=dict)

    @property
    def worthwhile(self) -> bool:
        return any(not group.alone for group in self.groups)


def match(traced: Trace) -> Matched:
    """The groups of a traced forward."""
    modules = traced.modules | traced.opened
    _expand(traced, modules)
    return _Matcher(traced.graph, modules).run()


def _expand(traced: Trace, modules: dict[str, nn.Module]) -> None:
    """Writes out what a batch norm calls after itself."""
    for node in list(traced.graph.nodes):
        if node.op != "call_module" or not norms.is_norm(module := modules[str(node.target)]):
            continue
        norm = norms.known(module)
        last = node
        for name in () if isinstance(norm, str) else norm.after:
            path = f"{node.target}.{name}"
            modules[path] = traced.modules[path] = module._modules[name]  # type: ignore[assignment]
            with traced.graph.inserting_after(last):
                new = traced.graph.create_node("call_module", path, (last,))
            last.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)
            last = new


class _Matcher:
    def __init__(self, graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
        self.nodes = list(graph.nodes)
        self.place = {node: i for i, node in enumerate(self.nodes)}
        self.ops = {node: operation(node, modules) for node in self.nodes}
        self.values: dict[Node, Node] = {}
        self.uses: dict[Node, list[Node]] = defaultdict(list)
        self.depth: dict[Node, int] = {}
        self.roots: dict[Node, frozenset[Node]] = {}
        self.owner: dict[Node, Group] = {}
        self.groups: list[Group] = []
        self.graph = graph
        for node in self.nodes:
            inputs = list(dict.fromkeys(map(self.value, node.all_input_nodes)))
            self.depth[node] = 1 + max((self.depth[i] for i in inputs), default=0)
            if self.ops[node].kind == "skip":
                self.values[node] = inputs[0]
                continue
            for i in inputs:
                self.uses[i].append(node)
        for node in self.nodes:
            if node in self.values:
                continue
            self.roots[node] = frozenset({node})
            if not self.fresh(node):
                self.roots[node] |= frozenset().union(*(self.roots[self.value(i)] for i in node.all_input_nodes))

    def value(self, node: Node) -> Node:
        return self.values.get(node, node)

    def fresh(self, node: Node) -> bool:
        """Whether the result is a tensor of its own."""
        op = self.ops[node]
        return op.fresh and (not op.writes or self.functional(node))

    def functional(self, node: Node) -> bool:
        """Whether an operation that writes to its input may as well not do so."""
        if not node.args or not isinstance(node.args[0], fx.Node):
            return False
        target = self.value(node.args[0])
        return self.uses[target] == [node] and self.fresh(target)

    def why_not(self, node: Node) -> str:
        op = self.ops[node]
        if op.reason:
            return op.reason
        if node in self.owner:
            return "part of another op"
        if op.writes and not self.functional(node):
            return "writes in place to what others read"
        return ""

    def only_use(self, node: Node, kind: str) -> Node | None:
        uses = self.uses[node]
        if len(uses) != 1 or self.ops[uses[0]].kind != kind or self.why_not(uses[0]):
            return None
        return uses[0]

    def may_move(self, group: Group, last: Node) -> bool:
        """Whether the nodes of the group may move behind everything before `last`."""
        start = self.place[group.nodes[0]]
        early = self.roots[group.x]
        norm = self.ops[group.nodes[0]].module, self.ops[group.nodes[min(1, len(group.nodes) - 1)]].module
        for node in self.nodes[start : self.place[last]]:
            if node in group.nodes or node in self.values:
                continue
            op = self.ops[node]
            written = op.writes and not (op.fresh and self.functional(node))
            if written and any(early & self.roots[self.value(i)] for i in node.all_input_nodes):
                return False
            if op.module is not None and any(m in norm for m in op.module.modules()):
                return False
        return True

    def run(self) -> Matched:
        for kind in ("bn", "conv", "add"):
            for node in self.nodes:
                if self.ops[node].kind == kind and not self.why_not(node):
                    self.start(node, kind)
        self.join_shortcuts()
        for group in self.groups:
            self.decide(group)
        done = Matched(self.graph, self.ops, values=self.values, groups=self.groups)
        for node in self.nodes:
            owner = self.owner.get(node)
            if node in self.values or (owner is not None and node is not owner.last):
                continue
            done.steps.append(node if owner is None else owner)
        for group in self.groups:
            if group.shortcut is not None:
                done.steps.remove(group.shortcut)
        done.reasons = {node: self.reason(node) for node in self.nodes if node not in self.owner}
        done.reasons |= {group.last: self.after(group.last) for group in self.groups if group.alone}
        return done

    def start(self, node: Node, kind: str) -> None:
        x = self.value(node.args[0])  # type: ignore[arg-type]
        op = self.ops[node]
        group = Group([node], x)
        if kind == "bn":
            group.norm = op.norm
            if self.ops[x].kind == "conv" and not self.why_not(x) and self.uses[x] == [node]:
                before = Group([x, node], self.value(x.args[0]), conv=self.ops[x].module, norm=op.norm)  # type: ignore[arg-type]
                group = before if self.may_move(before, node) else group
        elif kind == "conv":
            group.conv = op.module
        else:
            group.residual, group.promote = self.value(node.args[1]), not op.writes  # type: ignore[arg-type]
        self.extend(group)
        if kind == "add" and not group.relu:
            return
        self.groups.append(group)
        self.owner |= dict.fromkeys(group.nodes, group)

    def extend(self, group: Group) -> None:
        """Takes what follows into the group."""
        add = None if group.residual is not None else self.only_use(group.last, "add")
        if add is not None and (other := self.other_operand(add, group)) is not None and self.may_move(group, add):
            group.nodes.append(add)
            group.residual, group.promote = other, not self.ops[add].writes
        act = self.only_use(group.last, "act")
        if act is not None and self.may_move(group, act):
            group.nodes.append(act)
            group.relu = True
        if group.relu and group.norm is not None and group.residual is None:
            pool = self.only_use(group.last, "pool")
            if pool is not None and self.may_move(group, pool):
                group.nodes.append(pool)
                group.pool = self.ops[pool].module

    def other_operand(self, add: Node, group: Group) -> Node | None:
        """The residual, if the group is the branch that adds it."""
        operands = [self.value(operand) for operand in add.args]  # type: ignore[arg-type]
        if operands[0] is operands[1]:
            return None
        other = operands[operands.index(group.last) - 1]
        op = self.ops[other]
        rival = op.kind in ("bn", "conv") and not self.why_not(other) and self.uses[other] == [add]
        if rival and (op.kind == "bn") >= (group.norm is not None) and self.depth[other] > self.depth[group.last]:
            return None
        return other

    def join_shortcuts(self) -> None:
        """Lets a residual that is a convolution with batch norm run with the group that adds it."""
        for group in self.groups:
            found = None if group.residual is None else self.owner.get(group.residual)
            if found is None or group.conv is None or group.norm is None or found.norm is group.norm:
                continue
            plain = found.conv is not None and found.norm is not None and len(found.nodes) == 2
            if plain and group.relu and self.uses[found.last] == [group.nodes[2]] and self.may_move(found, group.last):
                group.shortcut = found

    def decide(self, group: Group) -> None:
        if group.conv is None and group.norm is None:
            return
        reader = self.owner.get(self.uses[group.last][0]) if len(self.uses[group.last]) == 1 else None
        if reader is not None and reader.conv is not None and reader.x is group.last:
            group.recompute = group.relu and group.norm is not None and group.residual is None and group.pool is None
        uses = self.uses[group.x]
        if group.conv is not None and group.norm is not None and len(uses) == 2 and uses[0] is group.nodes[0]:
            other = self.owner.get(uses[1])
            if other is not None and other is not group:
                group.fork = self.place[group.last] < self.place[other.last]

    def reason(self, node: Node) -> str:
        op = self.ops[node]
        if (why := self.why_not(node)) or op.kind in ("skip", "other"):
            return why
        if op.kind == "add":
            between = [self.between(self.value(i)) for i in node.args]  # type: ignore[arg-type]
            named = [text for text in between if text]
            return named[0] if named else "an addition without a ReLU, and no batch norm before it"
        x = self.value(node.args[0])  # type: ignore[arg-type]
        if op.kind == "act" and len(self.uses[x]) > 1:
            return "its input is read elsewhere too"
        return f"its input comes from {self.named(x)}"

    def after(self, conv: Node) -> str:
        """Why a convolution is by itself."""
        uses = self.uses[conv]
        if len(uses) > 1:
            what = "its result is read more than once"
        else:
            what = f"before {self.named(uses[0])}" if uses else "its result is not read"
        return f"{what}: runs by itself, as a convolution of fastres's"

    def between(self, node: Node) -> str:
        """What stands between a batch norm and the addition of `node`."""
        path: list[Node] = []
        while self.ops[node].kind == "other" and node.op != "placeholder" and len(path) < 8:
            path.append(node)
            inputs = [self.value(i) for i in node.all_input_nodes]
            if not inputs:
                return ""
            node = max(inputs, key=lambda i: self.depth[i])
        if not path or self.ops[node].kind != "bn":
            return ""
        return f"{self.named(path[-1])} between {node.target} and the addition"

    def named(self, node: Node) -> str:
        module = self.ops[node].module
        if node.op == "call_module" and module is not None:
            return f"{node.target} ({type(module).__name__})"
        return "the input" if node.op == "placeholder" else str(getattr(node.target, "__name__", node.target))
