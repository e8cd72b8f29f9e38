"""Inference of a chain of fused blocks as a plain list of calls.

A fused block asks before every call whether its fast path may run, and whether its folded weights are still those of
the model. At batch 1 the answers take a good part of the time. So the second of two like calls is recorded,
and from then on only what the answers were made from is compared, all blocks at once: every attribute of every module,
every version counter, one fingerprint of the weights. Anything else than last time, and the blocks run as ever.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter, is_
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

#: run(x, residual, relu)
Run = Callable[[Tensor, Tensor | None, bool], Tensor]

_PLAIN: dict[type[nn.Module], Any] = {
    kind: kind.forward for kind in (nn.Sequential, nn.Identity, nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d)
}
_CALL = nn.Module.__call__
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_END = object()


@dataclass(slots=True)
class _Recording:
    """The calls of one forward, as they happen."""

    values: list[ref[Tensor]]  # the input, then the result of each step
    steps: list[tuple[Run, int, int | None, bool]] = field(default_factory=list)
    complete: bool = True

    def index(self, value: Tensor) -> int:
        for i in range(len(self.values) - 1, -1, -1):
            if self.values[i]() is value:
                return i
        self.complete = False  # something that was not recorded made it
        return 0

    def add(self, run: Run, x: Tensor, residual: Tensor | None, relu: bool, y: Tensor) -> None:
        self.steps.append((run, self.index(x), None if residual is None else self.index(residual), relu))
        self.values.append(ref(y))


class _Thread(threading.local):
    recording: _Recording | None = None


_thread = _Thread()


def note(run: Run, x: Tensor, residual: Tensor | None, relu: bool, y: Tensor) -> None:
    """Tells a recording that y = run(x, residual, relu)."""
    if _thread.recording is not None:
        _thread.recording.add(run, x, residual, relu, y)


def spoil() -> None:
    """Tells a recording that a value was changed in place."""
    if _thread.recording is not None:
        _thread.recording.complete = False


@contextmanager
def _recording(x: Tensor) -> Iterator[_Recording]:
    before, _thread.recording = _thread.recording, _Recording([ref(x)])
    try:
        yield _thread.recording
    finally:
        _thread.recording = before


class _Replay:
    """The steps of a recording, and all that they depend on."""

    def __init__(self, owner: nn.Module, modules: list[nn.Module], inputs: Any, recording: _Recording) -> None:
        self.inputs = inputs
        last_use = {i: step for step, (_, *used, _) in enumerate(recording.steps) for i in used if i is not None}
        self.steps = [
            (*step, [i for i, last in last_use.items() if last == number])
            for number, step in enumerate(recording.steps)
        ]
        # No reference to the owner, whose entry this is. The views show the dictionaries as they are at any time.
        self.modules, self.types = modules, [type(m) for m in modules]
        self.forwards = {kind: kind.forward for kind in self.types}
        self.dicts = [m.__dict__ for m in modules]
        names = ("_parameters", "_buffers", "_modules", *_HOOKS)
        self.views: list[Any] = [owner.__dict__.values(), owner._modules.values()]
        for attributes in self.dicts:
            self.views += [attributes.values(), *(attributes[name].values() for name in names)]
        self.attributes = [*chain.from_iterable(self.views), _END]
        self.tensors = [
            t
            for m in modules
            for name, t in (*m._parameters.items(), *m._buffers.items())
            if t is not None and name != "num_batches_tracked"
        ]
        self.versioned = [t for t in self.tensors if not t.is_inference()]
        self.versions, self.fingerprint = self._versions(), self._fingerprint()

    def _versions(self) -> list[int]:
        return [t._version for t in self.versioned]

    def _fingerprint(self) -> int:
        return torch.ops.fastres_cpu.fingerprint.default(self.tensors)

    def valid(self) -> bool:
        return (
            nn.Module.__call__ is _CALL
            and all(map(is_, map(type, self.modules), self.types))
            and all(kind.forward is forward for kind, forward in self.forwards.items())
            and all(map(is_, map(attrgetter("__dict__"), self.modules), self.dicts))
            and all(map(is_, chain(chain.from_iterable(self.views), (_END,)), self.attributes))
            and self._versions() == self.versions
            and self._fingerprint() == self.fingerprint
        )

    def __call__(self, x: Tensor) -> Tensor:
        values: list[Any] = [x]
        for run, i, residual, relu, dead in self.steps:
            y = run(values[i], None if residual is None else values[residual], relu)
            values.append(y)
            for j in dead:
                values[j] = None
        return y


#: Of each owner: its replay, or what its last input was like.
_replays: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


def forget(model: nn.Module) -> None:
    """Drops the replay of `model` and of every module in it."""
    for module in model.modules():
        _replays.pop(module, None)


def chain_of_blocks(
    owner: nn.Module,
    parts: tuple[str, ...],
    forwards: tuple[Any, ...],
    x: Tensor,
    inputs: Any,
    forward: Callable[[Tensor], Tensor],
) -> Tensor:
    """forward(x), which runs the modules `parts` of `owner` one after the other, by replay where nothing has changed.

    Args:
        forwards: of the fused blocks among them.
        inputs: all that the choice of kernels depends on besides the modules: two calls are alike if it is equal.
    """
    known = _replays.get(owner)
    if isinstance(known, _Replay):
        if known.inputs == inputs and known.valid():
            return known(x)
        known = None
    with _recording(x) as recording:
        y = forward(x)
    again = known is not None and known == inputs
    _replays[owner] = inputs
    if again and recording.complete and recording.steps and recording.values[-1]() is y:
        modules = [module for part in parts for module in owner._modules[part].modules()]  # type: ignore[union-attr]
        if nn.Module.__call__ is _CALL and all(_replayable(module, forwards) for module in modules):
            _replays[owner] = _Replay(owner, modules, inputs, recording)
    return y


def _replayable(module: nn.Module, forwards: tuple[Any, ...]) -> bool:
    """Whether all that the module's call does is to run code that was recorded."""
    kind = type(module)
    known = kind.forward is _PLAIN[kind] if kind in _PLAIN else kind.forward in forwards
    return known and "forward" not in module.__dict__ and not any(getattr(module, hooks) for hooks in _HOOKS)
