"""Modules of any class whose own forward contains something to fuse: traced, matched, and run as a list of steps.

What the trace depended on is compared at every call, identities and attributes of everything that was read, in one
pass; if anything differs, another trace of the same module may fit, or a new one is made. Traces are kept outside of
the model. The class of a unit is made here, a subclass of its own class, so isinstance, pickle and copies work.
"""

from __future__ import annotations

import copyreg
import threading
import types
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastres import batch_norm, guard, replay, sites
from fastres.hooks import KINDS as HOOKS
from fastres.reasons import because
from fastres.recipes import fused_class, norms, source, trace
from fastres.recipes.patterns import Matched, match
from fastres.recipes.residual import FusedModule
from fastres.recipes.steps import Program
from fastres.recipes.trace import Refused, Trace
from fastres.snapshot import unchanged

#: Traces of one module that are kept at a time, and that are made at all.
KEPT, MADE = 8, 64
NOTHING = because("no-pattern", "nothing in it to fuse")
#: What may stand for a value of a graph, and lists of it. Numbers are passed on, as to an interpolation.
_VALUES = (Tensor, nn.Parameter, int, float)
_CALL = nn.Module.__call__


class Unit(FusedModule):
    """What a fused class of this kind adds to its own class."""

    adds = False
    fused_children = ()

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        found, values = plan_for(self, args, kwargs)
        reason = values if isinstance(values, str) else None
        x: Any = None if reason else next(_tensors(values))
        if guard.unit_blocked(self, x, reason) is not None:
            replay.spoil()
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        del args
        program = found.program
        if replay.recorded():
            if found.traced.outer:
                replay.spoil()  # which does not look at global variables
        elif len(values) == 1 and values[0] is x and not found.traced.outer and not torch.is_grad_enabled():
            return sites.chain_of_blocks(self, None, (), x, lambda x: program((x,)))
        del x
        return program(values)

    def __reduce_ex__(self, protocol: Any) -> Any:
        made: Any = super().__reduce_ex__(max(2, int(protocol)))
        function, args, *rest = made
        if function is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return (function, args, *rest)  # a class that copies itself in a way of its own
        return (_new, (self.unfused_class(), *args[1:]), *rest)


def _new(cls: type, *args: Any) -> Any:
    """Makes an empty unit: what pickles and copies call."""
    kind = unit_class(cls)
    return kind.__new__(kind, *args)


_classes: WeakKeyDictionary[type, type[nn.Module]] = WeakKeyDictionary()


def unit_class(cls: type) -> type[nn.Module]:
    """The fused subclass of a class."""
    if cls not in _classes:
        name = f"Fused{cls.__name__}"
        own = {"__module__": cls.__module__, "__doc__": cls.__doc__, "__qualname__": name}
        _classes[cls] = types.new_class(name, (Unit, cls), {}, lambda body: body.update(own))
    return _classes[cls]


class Guard:
    """Tells whether modules are as they were.

    Args:
        whole: those of which everything counts: attributes, children, hooks.
        called: those of which only the call counts: hooks and forward.
        outer: global variables, as in Trace.
    """

    def __init__(self, whole: list[nn.Module], called: list[nn.Module], outer: source.Outer) -> None:
        whole = [m for m in dict.fromkeys(whole) if not isinstance(m, torch.jit.ScriptModule)]
        called = [m for m in dict.fromkeys(called) if m not in whole]
        modules = (*whole, *called)
        views = [view for m in whole for view in (m.__dict__, m._modules)]
        views += [m.__dict__[hooks] for m in modules for hooks in HOOKS]
        self._attributes_hold = unchanged(modules, views)
        self._forwards = [(kind, kind.forward) for kind in dict.fromkeys(map(trace.unfused, modules))]
        self._called = [m.__dict__ for m in called]
        self._outer = outer

    def valid(self) -> bool:
        return (
            self._attributes_hold()
            and nn.Module.__call__ is _CALL
            and all(kind.forward is forward for kind, forward in self._forwards)
            and not any("forward" in attributes for attributes in self._called)
            and all(where.get(name) is value for where, name, value in self._outer)
        )


class Refusal:
    """Why a module's own forward has to run, as long as the module is as it is.

    Attributes:
        given: as of a plan.
        sized: only for the sizes of one call.
    """

    def __init__(self, module: nn.Module, reason: str, given: tuple[str, ...] = (), sized: bool = False) -> None:
        self.reason, self.given, self.sized = reason, given, sized
        self.guard = Guard(list(module.modules()), [], [])

    def fits(self, call: Call) -> bool:
        return self.given == call.given


class Plan:
    """A module's program, and what it holds for.

    Attributes:
        given: names of the arguments with a default that are values.
    """

    def __init__(self, module: nn.Module, traced: Trace, matched: Matched, given: tuple[str, ...] = ()) -> None:
        self.traced, self.matched, self.given = traced, matched, given
        self.program = Program(traced, matched)
        self.helpers = [m for m in traced.opened.values() if m is not module]
        whole = [*traced.opened.values(), *traced.touched]
        called: list[nn.Module] = []
        for node in matched.graph.nodes:
            op = matched.operations[node]
            if op.kind != "other" and op.module is not None:
                by_call = op.norm is not None and type(op.module) in batch_norm.FORWARDS
                (called if by_call else whole).append(op.module)
        self.guard = Guard(whole, called, traced.outer)

    def rows(self) -> Iterator[tuple[str, str, str, nn.Module | None]]:
        """Path, kind, reason ("" if it is fused) and module of every operation of the graph; no path and module for
        functions."""
        paths = {module: path for path, module in self.traced.opened.items()}
        for node in self.matched.graph.nodes:
            op = self.matched.operations[node]
            if op.kind not in ("conv", "bn", "act", "add", "pool"):
                continue
            reason = self.matched.reasons.get(node, "")
            path = str(node.target) if node.op == "call_module" else paths.get(op.module, "")
            yield path, op.kind, reason, op.module

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | str:
        """The values of the call, or why the graph is not that of this call."""
        names = self.traced.parameters
        if kwargs or len(args) != len(names) or names != self.traced.positional[: len(args)]:
            given = self.named(args, kwargs)
            if given is None:
                return "called with other arguments than it takes"
            if any(name not in given for name in names):
                return "called without an argument"
            for name, value in given.items():
                if name not in names and value is not self.traced.defaults.get(name, _new):
                    shown = type(value).__name__ if isinstance(value, Tensor) else repr(value)
                    return f"called with {name}={shown}"[:80]
            args = tuple(given[name] for name in names)
        for name, value in zip(names, args, strict=True):
            for item in value if type(value) in (list, tuple) else (value,):
                if type(item) not in _VALUES:
                    return f"{name} is a {type(item).__name__}, not a plain tensor"
        if next(_tensors(args), None) is None:
            return "called without a tensor"
        for size in self.traced.sizes:
            if differs := size.differs(args[names.index(size.argument)]):
                return differs
        return args

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """The arguments of a call by their names; None if they are not those of the forward."""
        given = dict(zip(self.traced.positional, args, strict=False))
        if len(args) > len(self.traced.positional) or given.keys() & kwargs.keys():
            return None
        return given | kwargs

    def fits(self, call: Call) -> bool:
        """Whether it has the arguments that a call gives, of sizes that count as theirs."""
        named = call.named
        sizes = self.traced.sizes
        return self.given == call.given and not any(size.differs(named.get(size.argument)) for size in sizes)

    def other(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """The call, if another graph might be that of it."""
        named = self.named(args, kwargs)
        if named is None or any(name not in named for name in self.traced.parameters if name not in self.given):
            return None
        if any(size.answer(named.get(size.argument)) is None for size in self.traced.sizes):
            return None
        optional = (*self.given, *self.traced.defaults)
        call = Call(named, tuple(name for name in optional if isinstance(named.get(name), Tensor)))
        return None if self.fits(call) else call


class Call(NamedTuple):
    """Arguments by name; and the names of those that have a default and are tensors, in order."""

    named: dict[str, Any]
    given: tuple[str, ...]


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Those among values, and in lists of values."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif type(value) in (list, tuple):
            yield from _tensors(value)


class _Known:
    """What is known of one module."""

    def __init__(self) -> None:
        self.found: list[Plan | Refusal] = []
        self.made = 0


_known: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()
#: Reentrant: a forward that is traced may call a unit that is no child of its module, such as one in a plain list.
_lock = threading.RLock()


def forget(model: nn.Module) -> None:
    """Drops the traces of `model` and of every module in it."""
    for module in model.modules():
        _known.pop(module, None)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """At the end of the `with` block the traces of `model` are what they were: hooks that are put on it inside are no
    change that counts."""
    before = {m: (list(known.found), known.made) for m in model.modules() if (known := _known.get(m)) is not None}
    try:
        yield
    finally:
        forget(model)
        for module, (found, made) in before.items():
            _known[module] = known = _Known()
            known.found, known.made = found, made


def plan_for(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """The plan for a call of `module` and its values; or why there is none, twice."""
    found = plan_of(module)
    values = found.arguments(args, kwargs) if isinstance(found, Plan) else found.reason
    if isinstance(found, Plan) and isinstance(values, str) and (call := found.other(args, kwargs)) is not None:
        found = plan_of(module, call=call)
        values = found.arguments(args, kwargs) if isinstance(found, Plan) else found.reason
    return found, values


def plan_of(module: nn.Module, opener: Opener | None = None, call: Call | None = None) -> Plan | Refusal:
    """The plan that holds for `module` now, or why there is none. Without a call: one that no tensor is given to for an
    argument with a default; with an opener, which reports ask with, the oldest, the one of the first report."""
    known = _known.get(module)
    if known is not None:
        for found in known.found if opener is None else reversed(known.found):
            if (not found.given if call is None else found.fits(call)) and found.guard.valid():
                return found
    if module.__dict__.get("_is_replica"):
        return Refusal(module, "a replica of DataParallel")
    with _lock:
        known = _known.setdefault(module, _Known())
        if known.made >= MADE:
            return Refusal(module, f"its attributes are others at every call ({MADE} times traced)")
        known.made += 1
        made = make(module, opener or Opener(), call)
        if isinstance(made, Plan) or not made.sized:
            known.found = [made, *known.found[: KEPT - 1]]
        return made


class Opener:
    """Says which children are part of their parent's graph: containers, those whose forward is a chain of calls, and
    gates."""

    def __init__(self) -> None:
        self._answers: dict[int, bool] = {}

    def __call__(self, module: nn.Module) -> bool:
        if id(module) not in self._answers:
            self._answers[id(module)] = self._answer(module)
        return self._answers[id(module)]

    def _answer(self, module: nn.Module) -> bool:
        kind = type(module)
        if isinstance(module, FusedModule) or norms.is_norm(module) or trace.hooked(module) or trace.opaque(module):
            return False
        if kind.forward is nn.Sequential.forward:
            return len(module._modules) > 0
        if kind.__module__.startswith("torch.nn.") or fused_class(kind) is not None:
            return False
        try:
            traced = trace.trace(module, self)
            # A size that it compares is known of an argument only, and inside of its parent it has none.
            return not traced.sizes and (_chain(traced) or _gate(traced, module))
        except Refused:
            return False


def _chain(traced: Trace) -> bool:
    before = None
    for node in traced.graph.nodes:
        if node.op == "get_attr":
            continue
        inputs = [i for i in node.all_input_nodes if i.op != "get_attr"]
        if node.op == "placeholder":
            if before is not None:
                return False
        elif inputs != [before] or (node.op == "output" and node.args[0] is not before):
            return False
        before = node
    return True


def _gate(traced: Trace, module: nn.Module) -> bool:
    """Whether it is what stands between a batch norm and the addition, such as squeeze-and-excitation: without a batch
    norm of its own, without a block, and small."""
    if len(traced.parameters) != 1 or any(norms.is_norm(m) for m in module.modules()):
        return False
    return len(traced.graph.nodes) <= 16 and all(m.__module__.startswith("torch.nn.") for m in traced.modules.values())


def make(module: nn.Module, opener: Opener, call: Call | None = None) -> Plan | Refusal:
    """A new plan for `module`, or why there can be none."""
    given, named = ((), {}) if call is None else (call.given, call.named)
    try:
        traced = trace.trace(module, opener, given, named)
        matched = match(traced)
        if matched.worthwhile:
            return Plan(module, traced, matched, given)
        alone = {group.last for group in matched.groups}
        left = (node for node, op in matched.operations.items() if op.kind != "other" and node not in alone)
        reasons = (matched.reasons.get(node) for node in left)
        return Refusal(module, next(filter(None, reasons), NOTHING), given, bool(named and traced.sizes))
    except Refused as refused:
        text = str(refused)
        reason = because("hook" if "hook" in text else "not-traceable", text)
        return Refusal(module, reason, given, bool(named) and refused.sized)
