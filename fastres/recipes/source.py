"""What the code of a forward says about whether one run of it stands for all."""

from __future__ import annotations

import dis
import types
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

#: Names whose use makes what a forward does depend on more than its input and its module.
_IMPURE = {
    **dict.fromkeys(("print", "open", "input", "exec", "eval", "globals", "locals"), "input or output"),
    **dict.fromkeys(("is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled"), "the mode of autograd"),
    **dict.fromkeys(("get_autocast_dtype", "get_autocast_gpu_dtype", "is_inference", "requires_grad"), "autograd"),
    **dict.fromkeys(("environ", "getenv"), "the environment"),
    **dict.fromkeys(("perf_counter", "monotonic", "time_ns", "record_function", "synchronize"), "the time"),
}
_CLOCKS = ("time", "datetime")
_STORES = ("STORE_GLOBAL", "DELETE_GLOBAL")
_SIMPLE = (bool, int, float, str, type(None))
_DEPTH = 6

Outer = list[tuple[dict[str, Any], str, Any]]

_found: WeakKeyDictionary[type, tuple[Any, str | None, list[tuple[dict[str, Any], str]]]] = WeakKeyDictionary()


def inspect(kind: type[nn.Module]) -> tuple[str | None, Outer]:
    """Looks at the code of kind.forward, and at the functions and methods that it names.

    Returns:
        Why a graph of it may not hold next time, or None; and the simple global variables that it reads, with their
        values now.
    """
    forward: Any = kind.forward
    known = _found.get(kind)
    if known is None or known[0] is not forward:
        reader = _Reader(kind)
        reader.read(forward, 0)
        known = _found[kind] = (forward, reader.reason, reader.outer)
    return known[1], [(where, name, where[name]) for where, name in known[2] if name in where]


class _Reader:
    def __init__(self, kind: type) -> None:
        self.kind = kind
        self.reason: str | None = None
        self.outer: list[tuple[dict[str, Any], str]] = []
        self._seen: set[types.CodeType] = set()

    def read(self, function: Any, depth: int) -> None:
        function = getattr(function, "__func__", function)
        if not isinstance(function, types.FunctionType) or depth > _DEPTH:
            return
        if function.__module__ and function.__module__.split(".")[0] == "torch":
            return
        self._read(function.__code__, function.__globals__, depth)

    def _read(self, code: types.CodeType, where: dict[str, Any], depth: int) -> None:
        if code in self._seen:
            return
        self._seen.add(code)
        name = code.co_name
        for instruction in dis.get_instructions(code):
            if instruction.opname in _STORES:
                self.reason = self.reason or f"{name} writes the global variable {instruction.argval}"
            if instruction.opname == "STORE_DEREF" and instruction.argval in code.co_freevars:
                self.reason = self.reason or f"{name} writes a variable outside of it"
        for used in code.co_names:
            if used in _IMPURE and not (used in where and isinstance(where[used], types.FunctionType)):
                self.reason = self.reason or f"{name} uses {used}: {_IMPURE[used]}"
            value = where.get(used)
            if isinstance(value, types.ModuleType) and value.__name__ in _CLOCKS:
                self.reason = self.reason or f"{name} uses {used}: the time"
            if used in where and type(value) in _SIMPLE:
                self.outer.append((where, used))
            self.read(value if value is not None else getattr(self.kind, used, None), depth + 1)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._read(constant, where, depth)
