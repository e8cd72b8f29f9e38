"""The forward of one module as a graph: what it calls, in which order, on which values.

The forward runs once on a stand-in for the module: a shallow copy of it and of everything below, which shares all
parameters and has proxies for activations. Nothing is patched, so other threads may run the model meanwhile, and
nothing of the model is written to. A child becomes one node of the graph; children that are opened run their own
forward instead. What would make the graph another one next time (data, randomness, state that the forward writes) is a
reason to refuse.
"""

from __future__ import annotations

import inspect
import operator
import sys
import types
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import Proxy, Scope, TracerBase
from torch.nn.modules import module as nn_module

from fastres.hooks import KINDS as HOOKS
from fastres.recipes import random_state, sizes, source
from fastres.recipes.residual import FusedModule

_NAME, _TRACER = "_fastres_name", "_fastres_tracer"


class Refused(Exception):
    """The forward cannot be written down as a graph; str() is the reason.

    Attributes:
        sized: whether it asked for sizes before; with others there might be a graph.
    """

    sized = False


@dataclass
class Trace:
    """The graph of a forward, and what it holds for.

    Attributes:
        graph: its call_module and get_attr targets are paths below the module.
        modules: those that are called, by target.
        opened: the module itself and the children whose forwards are part of the graph, by path.
        touched: other modules whose attributes were read.
        parameters: names of the forward's arguments that are values of the graph, in order.
        defaults: the arguments that had their defaults.
        positional: names of all arguments that may be given by position, in order.
        outer: global variables that the code reads and that a user may set: (globals, name, value).
        sizes: those of arguments that the code compares with a number, which is what they were taken for.
    """

    graph: fx.Graph
    modules: dict[str, nn.Module]
    opened: dict[str, nn.Module]
    touched: list[nn.Module]
    parameters: tuple[str, ...]
    defaults: dict[str, Any]
    positional: tuple[str, ...]
    outer: list[tuple[dict[str, Any], str, Any]] = field(default_factory=list)
    sizes: list[sizes.Size] = field(default_factory=list)


def unfused(module: nn.Module) -> type[nn.Module]:
    """The class whose forward is the module's own."""
    return module.unfused_class() if isinstance(module, FusedModule) else type(module)


def hooked(module: nn.Module) -> bool:
    return any(getattr(module, hooks, None) for hooks in HOOKS)


def opaque(module: nn.Module) -> str | None:
    """Why the forward of this module is not to be run on a stand-in, or None."""
    kind = unfused(module)
    if kind.__module__ == "fastres.nn":
        return f"a {kind.__name__} of fastres, which is fused by itself"
    if isinstance(module, (torch.jit.ScriptModule, fx.GraphModule)):
        return f"a {kind.__name__}, which has a graph of its own"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "lazy: its parameters do not exist yet"
    if kind.__call__ is not nn.Module.__call__:
        return f"{kind.__name__} has its own __call__"
    if "forward" in module.__dict__:
        return "the module has its own forward"
    if kind.__module__.startswith("torch.nn.utils."):
        return "parametrized"
    if not isinstance(kind.forward, types.FunctionType):
        return f"{kind.__name__}.forward is not a function"
    for child in (module, *module._modules.values()):
        if type(child).__module__.startswith("torch.ao."):
            return f"{type(child).__name__} is a module of torch's quantization"
    return None


def trace(
    module: nn.Module,
    opens: Callable[[nn.Module], bool],
    given: tuple[str, ...] = (),
    call: dict[str, Any] | None = None,
) -> Trace:
    """Runs the forward of `module` on a stand-in.

    Args:
        opens: whether the forward of a child is part of the graph.
        given: names of arguments with a default that are values too.
        call: arguments by name, of which only sizes that the forward compares with numbers are used.

    Raises:
        Refused: with the reason.
    """
    if reason := opaque(module):
        raise Refused(reason)
    kind = unfused(module)
    parameters, defaults, positional = _arguments(kind.forward, given)
    tracer = _Tracer(module, opens, call or {})
    outer: list[tuple[dict[str, Any], str, Any]] = []
    for opened in tracer.opened.values():
        reason, read = source.inspect(unfused(opened))
        if reason:
            raise Refused(reason)
        outer += read
    if any((nn_module._global_forward_hooks, nn_module._global_forward_pre_hooks)):
        raise Refused("global module hooks")
    before = random_state.read()
    try:
        with torch.enable_grad():
            tracer.modes = _modes()
            values = {name: tracer.create_proxy("placeholder", name, (), {}) for name in parameters}
            optional = {name: values.pop(name) for name in given}
            result = kind.forward(tracer.root, *values.values(), **optional, **defaults)
            tracer.create_node("output", "output", (tracer.create_arg(result),), {})
    except Exception as error:  # whatever a forward may raise on a value that is none
        text = str(error).splitlines()
        refused = Refused(f"forward does not trace: {type(error).__name__}: {text[0] if text else ''}")
        refused = error if isinstance(error, Refused) else refused
        refused.sized = bool(tracer.sizes)
        raise refused from None
    finally:
        drawn = random_state.changed(before)
    if drawn:
        raise Refused("forward draws random numbers")
    if tracer.mode_changed:  # the forward may have caught what create_node raised
        raise Refused(_MODE)
    tracer.check_untouched()
    sizes.drop(tracer.graph)
    modules = {str(n.target): tracer.names[str(n.target)] for n in tracer.graph.nodes if n.op == "call_module"}
    touched = list(tracer.touched.values())
    return Trace(tracer.graph, modules, tracer.opened, touched, parameters, defaults, positional, outer, tracer.sizes)


_MODE = "forward sets the mode of autograd or of autocast, or calls an autograd.Function"


def _modes() -> tuple[Any, ...]:
    """What a call depends on besides its arguments. An autograd.Function runs its forward without gradients."""
    autocast = [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")]
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


def _arguments(
    forward: Callable[..., Any], given: tuple[str, ...]
) -> tuple[tuple[str, ...], dict[str, Any], tuple[str, ...]]:
    """The arguments without a default or among `given`; the others with their defaults; those that have a position."""
    names, defaults, positional = [], {}, []
    try:
        signature = inspect.signature(forward)
    except (TypeError, ValueError):
        raise Refused("forward has no signature") from None
    if getattr(forward, "__wrapped__", None) is not None:
        raise Refused("forward is decorated")
    for i, parameter in enumerate(signature.parameters.values()):
        if i == 0:
            continue
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise Refused("forward takes any number of arguments")
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty:
            raise Refused(f"forward wants the keyword {parameter.name}")
        if parameter.kind is not parameter.KEYWORD_ONLY:
            positional.append(parameter.name)
        if parameter.default is parameter.empty or parameter.name in given:
            names.append(parameter.name)
        else:
            defaults[parameter.name] = parameter.default
    if not names:
        raise Refused("forward has no argument without a default")
    return tuple(names), defaults, tuple(positional)


class _Value(Proxy):
    """An activation that is none, in whose place a tensor comes."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """Python asks for it in isinstance(), where the answer should be Tensor; but C++ would then take it for one."""
        frame = sys._getframe(1)
        if frame.f_globals.get("__name__", "").split(".")[0] == "torch" and frame.f_code.co_name != "is_tensor":
            return _Value
        raise Refused("forward asks for the type of its input")

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


def _in_place(function: Any) -> Callable[[Any, Any], Any]:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "imatmul"):
    setattr(_Value, f"__{_name}__", _in_place(getattr(operator, _name)))


class _Tracer(TracerBase):
    """Builds the stand-ins and collects the graph."""

    def __init__(self, module: nn.Module, opens: Callable[[nn.Module], bool], call: dict[str, Any]) -> None:
        self.graph = fx.Graph()
        self.call = call
        self.modes: tuple[Any, ...] = ()
        self.mode_changed = False
        self.scope = Scope("", None)
        self.module_stack = OrderedDict()
        self.node_name_to_scope = {}
        self.names: dict[str, nn.Module] = {}
        self.opened: dict[str, nn.Module] = {}
        self.touched: dict[int, nn.Module] = {}
        self.originals: dict[int, tuple[nn.Module, nn.Module]] = {}
        self.clones: list[tuple[Tensor, int]] = []
        self.sizes: list[sizes.Size] = []
        self._stand_ins: dict[int, nn.Module] = {}
        self.root = self._stand_in(module, "", lambda m: m is module or opens(m))
        self.tensors = {id(t): name for name, t in (*self.root.named_parameters(), *self.root.named_buffers())}
        self.touched.clear()  # by the line above

    def _stand_in(self, module: nn.Module, path: str, opens: Callable[[nn.Module], bool]) -> nn.Module:
        if id(module) in self._stand_ins:
            return self._stand_ins[id(module)]
        self.names[path] = module
        opened = opens(module)
        kind: Any = unfused(module)
        copy = _blank(kind if opened else _leaf_class(kind))
        attributes = copy.__dict__
        attributes.update({name: _copied(value) for name, value in module.__dict__.items()})
        self._stand_ins[id(module)] = copy
        for hooks in HOOKS:
            attributes[hooks] = OrderedDict()
        attributes["_modules"] = {
            name: None if child is None else self._stand_in(child, f"{path}.{name}" if path else name, opens)
            for name, child in module._modules.items()
        }
        if opened:
            self.opened[path] = module
            self.originals[id(copy)] = (copy, module)
            attributes["_buffers"] = {
                name: None if buffer is None else buffer.detach().clone() for name, buffer in module._buffers.items()
            }
            self.clones += [
                (buffer, buffer._version) for buffer in attributes["_buffers"].values() if buffer is not None
            ]
        else:
            attributes[_NAME], attributes[_TRACER] = path, self
        return copy

    def proxy(self, node: fx.Node) -> Proxy:
        return _Value(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self.modes:  # a graph would not set it
            self.mode_changed = True
            raise Refused(_MODE)
        return super().create_node(*args, **kwargs)

    def to_bool(self, obj: Proxy) -> bool:
        found = sizes.compared(obj.node, self.call)
        if found is None:
            return super().to_bool(obj)  # raises
        self.sizes.append(found)
        return (obj.node.target is operator.eq) is found.equal

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Proxy):
            return a.node
        if isinstance(a, Tensor):
            if id(a) not in self.tensors:
                raise Refused("forward makes a tensor of its own, which the graph would keep")
            return self.create_node("get_attr", self.tensors[id(a)], (), {})
        if isinstance(a, nn.Module):
            raise Refused("forward passes a module on")
        if type(a) in (tuple, list):
            return type(a)(self.create_arg(item) for item in a)
        if type(a) is torch.Size or (isinstance(a, tuple) and hasattr(a, "_fields")):
            return super().create_arg(a)
        if isinstance(a, dict):
            return {key: self.create_arg(value) for key, value in a.items()}
        if isinstance(a, slice):
            return slice(*(self.create_arg(item) for item in (a.start, a.stop, a.step)))
        return a

    def check_untouched(self) -> None:
        """That the forward has left no traces.

        Raises:
            Refused: if it has.
        """
        for copy, module in self.originals.values():
            now, before = copy.__dict__, module.__dict__
            for name in now.keys() | before.keys():
                if name in HOOKS or name in ("_modules", "_buffers"):
                    continue
                if name not in now or name not in before or not _unchanged(now[name], before[name]):
                    raise Refused(f"forward writes self.{name}")
            if now["_modules"].keys() != before["_modules"].keys():
                raise Refused("forward changes its children")
            if now["_buffers"].keys() != before["_buffers"].keys():
                raise Refused("forward changes its buffers")
            held = {id(buffer) for buffer, _ in self.clones}
            if any(buffer is not None and id(buffer) not in held for buffer in now["_buffers"].values()):
                raise Refused("forward replaces a buffer")
        if any(buffer._version != version for buffer, version in self.clones):
            raise Refused("forward writes to a buffer")


def _copied(value: Any) -> Any:
    return value.copy() if type(value) in (dict, OrderedDict, list, set) else value


def _unchanged(now: Any, before: Any) -> bool:
    if type(before) in (dict, OrderedDict):
        return type(now) is type(before) and [*map(_ids, now.items())] == [*map(_ids, before.items())]
    if type(before) is list:
        return type(now) is list and [*map(id, now)] == [*map(id, before)]
    return now == before if type(before) is set else now is before


def _ids(item: tuple[Any, Any]) -> tuple[Any, int]:
    return item[0], id(item[1])


class _Leaf:
    """Mixed into the class of a stand-in whose call is one node."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        own = object.__getattribute__(self, "__dict__")
        return own[_TRACER].create_proxy("call_module", own[_NAME], args, kwargs)

    def __getattribute__(self, name: str) -> Any:
        own = object.__getattribute__(self, "__dict__")
        if name not in ("__class__", "__dict__") and _TRACER in own:
            tracer = own[_TRACER]
            module = tracer.names[own[_NAME]]
            tracer.touched[id(module)] = module
        return super().__getattribute__(name)


_leaf_classes: WeakKeyDictionary[type, type] = WeakKeyDictionary()


def _leaf_class(kind: type) -> type:
    if kind not in _leaf_classes:
        try:
            found: Any = types.new_class(kind.__name__, (_Leaf, kind))
            _blank(found)
        except TypeError:  # a metaclass or slots that do not allow it
            found = type(kind.__name__, (_Leaf, nn.Module), {})
        _leaf_classes[kind] = found
    return _leaf_classes[kind]


def _blank(kind: Any) -> Any:
    return object.__new__(kind)
