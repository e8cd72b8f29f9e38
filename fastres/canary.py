"""A canary: now and then one random fused block also runs its original forward, and the two are compared."""

from __future__ import annotations

import math
import random
import threading
import warnings
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fastres import config, observe, switches
from fastres.aside import aside, site_alone, tensors_in
from fastres.kernels import extension
from fastres.reasons import because
from fastres.recipes.residual import FusedModule, StemForward
from fastres.testing import budget, relative_error


class CanaryWarning(UserWarning):
    """A fused block differs from its original forward by more than its budget."""


class CanaryError(RuntimeError):
    """The same, with action="raise". `check` says which block and how much."""

    def __init__(self, text: str, check: Check) -> None:
        super().__init__(text)
        self.check = check


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        name: path of the block, "" for the model itself, whose site is its stem.
        forward: number of the model's forward, from 1.
        training: whether the block was in training mode.
        tensor: the worst of what was compared: "output" or the name of a buffer.
        error: of that, relative L2 (of a counter, absolute).
        budget: what it may be.
    """

    name: str
    forward: int
    training: bool
    tensor: str
    error: float
    budget: float

    @property
    def ok(self) -> bool:
        return self.error <= self.budget

    def __str__(self) -> str:
        where = f"{self.name or 'the stem'}, forward {self.forward}, {'train' if self.training else 'eval'}"
        return f"{where}: {self.tensor} is {self.error:.2e} off, budget {self.budget:.2e}"


def canary(
    model: nn.Module, every: int = 100, *, action: str = "warn", tolerance: float | None = None, seed: int | None = None
) -> Canary:
    """Watches the fused blocks of `model`: in every `every`-th forward, one of those that run fused, chosen at random,
    also runs its original forward, on the same input, with the same random numbers, on a copy (weights shared, buffers
    of its own). Outputs, and in training the running statistics and counters after the forward, are compared.

    The budget is that of `fastres.verify`. Where the two differ by more than a few roundings, the block runs a third
    time, in float64: the fused one may be twice as far from that as the original (or a few roundings, or 5e-6 where
    Winograd convolutions may serve). So the original's own errors raise no alarm.

    Not compared: gradients; what `fastres.replay` does with recorded calls (blocks run one by one in the forward that
    is checked); blocks in a module that has a forward of its own. Nothing is counted or checked inside torch.compile,
    the capture of a CUDA graph, torch.func transforms and torch.jit.trace.

    Statistics, counters and random state are what they are without a canary, bit for bit. A check costs one more
    forward of one block, so all together some 1 / (every * blocks) of a forward; in inference two more forwards run
    without recorded calls. Copies and pickles of the model are not watched.

    Args:
        model: swapped by `fuse_`, now or later. Its own `__call__` counts.
        every: from one check to the next, in forwards of the model.
        action: "warn" (CanaryWarning); "raise" (CanaryError, from within the forward); "disable": warn, and the block
            runs its original forward from then on, in copies too, until `unfuse_`; `fastres.explain` says so.
        tolerance: largest relative L2 difference from the original, in place of the budget.
        seed: of the choice of blocks.

    Returns:
        A handle: `remove()` ends it, as the end of a `with` block does; `checks` counts, `last` is the last Check,
        `drifts` are all that were not ok.

    Raises:
        TypeError, ValueError: for bad arguments.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"canary takes an nn.Module, got {type(model).__name__}")
    if type(every) is not int or every < 1:
        raise ValueError(f"every must be a whole number from 1, not {every!r}")
    if action not in ("warn", "raise", "disable"):
        raise ValueError(f"action must be 'warn', 'raise' or 'disable', not {action!r}")
    if tolerance is not None and not tolerance >= 0:
        raise ValueError(f"tolerance must be 0 or more, not {tolerance!r}")
    return Canary(model, every, action, tolerance, seed)


class Canary:
    """What `canary` returns: see there."""

    def __init__(self, model: nn.Module, every: int, action: str, tolerance: float | None, seed: int | None) -> None:
        self.checks = 0
        self.last: Check | None = None
        self.drifts: list[Check] = []
        self._model = weakref.ref(model)
        self._every, self._action, self._tolerance = every, action, tolerance
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._forwards = 0
        self._due = False
        self._passed_over: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # did not run fused when it was their turn
        self._watch: _Watch | None = None
        self._handles = [
            model.register_forward_pre_hook(_Hook(self, "_begin"), with_kwargs=True),
            model.register_forward_hook(_Hook(self, "_end"), with_kwargs=True, always_call=True),
        ]

    def remove(self) -> None:
        """Ends the checks."""
        for handle in self._handles:
            handle.remove()
        self._close()

    def __enter__(self) -> Canary:
        return self

    def __exit__(self, *args: object) -> None:
        self.remove()

    def _begin(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """Before a forward of the model: chooses a block, where a check is due."""
        if model is not self._model() or _cannot_look():
            return
        with self._lock:
            self._forwards += 1
            self._due = self._due or self._forwards % self._every == 0
            if not self._due or self._watch is not None:
                return
            blocks = [(name, m) for name, m in model.named_modules() if _is_fused(m)]
            left = [(name, m) for name, m in blocks if m not in self._passed_over and _copyable(m)]
            if not left:  # none of them runs fused now
                self._passed_over.clear()
                self._due = False
                return
            watch = self._watch = _Watch(*self._random.choice(left), self._tolerance)
        if watch.block is model:  # whose hooks are being called
            watch.before(model, args, kwargs)

    def _end(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """After a forward of the model, whatever became of it: acts on what was found."""
        watch = self._watch
        if watch is None or watch.thread != threading.get_ident() or model is not self._model():
            return
        self._close()
        if watch.found is None:
            self._passed_over.add(watch.block)
            return
        self._passed_over.clear()
        self._due = False
        check = Check(watch.name, self._forwards, watch.block.training, *watch.found)
        self.checks += 1
        self.last = check
        if not check.ok:
            self.drifts.append(check)
            self._act(check, watch.block)

    def _act(self, check: Check, block: nn.Module) -> None:
        text = f"fastres canary: {check}"
        if self._action == "raise":
            raise CanaryError(text, check)
        if self._action == "disable":
            why = f"switched off by a canary: {check.tensor} was {check.error:.1e} off"
            switches.turn_off(block, because("canary", why))
            text += "; the block runs its original forward from now on"
        warnings.warn(text, CanaryWarning, stacklevel=4)

    def _close(self) -> None:
        with self._lock:
            watch, self._watch = self._watch, None
        if watch is not None:
            watch.close()


class _Hook:
    """A hook on the whole model; copies and pickles of the model get one that does nothing."""

    looks_at_nothing = True

    def __init__(self, owner: Canary | None = None, method: str = "") -> None:
        self._owner, self._method = owner, method

    def __call__(self, model: nn.Module, args: Any, kwargs: Any, *output: Any) -> None:
        if not torch.compiler.is_compiling() and self._owner is not None:
            getattr(self._owner, self._method)(model, args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, ()


class _Watch:
    """One block during one forward of the model."""

    def __init__(self, name: str, block: nn.Module, tolerance: float | None) -> None:
        self.name, self.block, self.tolerance = name, block, tolerance
        self.thread = threading.get_ident()
        self.ran_fused = False
        self.found: tuple[str, float, float] | None = None  # tensor, error, budget
        self._copy: nn.Module | None = None
        self._ends = ExitStack()
        for handle in (
            block.register_forward_pre_hook(self.before, with_kwargs=True),
            block.register_forward_hook(self.after, with_kwargs=True, prepend=True),
        ):
            self._ends.callback(handle.remove)

    def close(self) -> None:
        self._ends.close()

    def before(self, block: nn.Module, args: Any, kwargs: Any) -> None:
        """Keeps all that the block starts from."""
        if self._copy is not None or threading.get_ident() != self.thread:
            return
        self._copy = aside(block)
        self._call = tree_map_only(Tensor, lambda t: t.detach().clone(), (args, kwargs))
        self._devices = [t.device for t in tensors_in(self._call) if t.is_cuda][:1]
        self._random = _random_state(self._devices)
        others = observe.listener

        def note(other: nn.Module, reason: str | None) -> None:
            if other is block and threading.get_ident() == self.thread:
                self.ran_fused = reason is None
            if others is not None:
                others(other, reason)

        self._ends.enter_context(observe.listening(note))

    def after(self, block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Compares, where the block ran fused."""
        if self._copy is None or self.found is not None or threading.get_ident() != self.thread:
            return
        self.close()
        if not self.ran_fused:
            return
        drew = any(not torch.equal(a, b) for a, b in zip(self._random, _random_state(self._devices), strict=True))
        # What a network's stem gave is lost: once more.
        fused = self._run(aside(self._copy)) if isinstance(block, StemForward) else _results(output, block)
        eager = self._run(aside(self._copy, plain=True))
        found = [(n, _error(n, fused, eager), self._limit(t.dtype, drew)) for n, t in eager.items()]
        if self.tolerance is None and not drew and any(error > allowed for _, error, allowed in found):
            with torch.autocast(next(iter(eager.values())).device.type, enabled=False):
                truth = self._run(aside(self._copy, plain=True, change=_double), _double)
            found = [
                (n, _error(n, fused, truth), _roundings(t.dtype, _error(n, eager, truth))) for n, t in eager.items()
            ]
        self.found = max(found, key=lambda row: row[1] / row[2] if row[2] else math.inf if row[1] else 0.0)

    def _limit(self, dtype: torch.dtype, drew: bool) -> float:
        """What fused and original may differ by without a look at float64; with random numbers, which in float64 are
        others, there is no such look."""
        return self.tolerance if self.tolerance is not None else _roundings(dtype) * (4 if drew else 1)

    def _run(self, copy: nn.Module, change: Callable[[Tensor], Tensor] = torch.clone) -> dict[str, Tensor]:
        assert self._copy is not None
        copy = site_alone(copy, self.block)
        args, kwargs = tree_map_only(Tensor, change, self._call)
        with torch.random.fork_rng(self._devices), torch.no_grad():
            torch.set_rng_state(self._random[0])
            for device, state in zip(self._devices, self._random[1:], strict=True):
                torch.cuda.set_rng_state(state, device)
            return _results(copy.forward(*args, **kwargs), copy)


def _results(output: Any, block: nn.Module) -> dict[str, Tensor]:
    """What a call of the block left, by name: outputs, and in training mode buffers."""
    found = {f"output{i or ''}": y.detach() for i, y in enumerate(tensors_in(output))}
    return found | (dict(block.named_buffers()) if block.training else {})


def _error(name: str, found: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """Relative L2 distance of one result; of integers the largest difference; of a running mean relative to the
    deviation, where that is larger."""
    x, truth = found.get(name), want[name]
    if x is None or x.shape != truth.shape:
        return math.inf
    if not truth.is_floating_point():
        return float((x.double() - truth.double()).abs().max()) if truth.numel() else 0.0
    error = relative_error(x, truth)
    var = want.get(name.removesuffix("mean") + "var") if name.endswith("running_mean") else None
    if var is None or not math.isfinite(error):
        return error
    size = float(truth.double().norm())
    return error * (size or 1.0) / max(size, float(var.double().sqrt().norm()), 1e-300)


def _roundings(dtype: torch.dtype, eager_error: float = 0.0) -> float:
    """What a fused result may be off by: as `fastres.verify`."""
    if not dtype.is_floating_point:
        return 0.0
    winograd = config.winograd and extension.available()
    return budget(eager_error, dtype, summed=dtype is torch.float32, winograd=winograd)


def _double(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t.clone()


def _random_state(devices: list[torch.device]) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]


def _cannot_look() -> bool:
    """Whether this call is traced, captured or transformed."""
    if torch._C._functorch.peek_interpreter_stack() is not None or torch._C._is_tracing():
        return True
    return torch.cuda.is_available() and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _is_fused(module: nn.Module) -> bool:
    return isinstance(module, FusedModule)


def _copyable(block: nn.Module) -> bool:
    return not any("forward" in m.__dict__ or isinstance(m, torch.jit.ScriptModule) for m in block.modules())
