"""One call of a model, watched: which blocks took the fast path, which kernels ran for which modules, and what came in
and out of every module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastres import observe
from fastres.kernels import table


@dataclass(frozen=True)
class Served:
    """A kernel that ran.

    Attributes:
        op: such as "conv_bn_act". kernel, method: as in Row.
        modules: what it stood for.
        backward: whether it ran in the backward pass. addend: whether it also added another gradient to that of its
            input.
    """

    op: str
    kernel: str
    method: str
    modules: tuple[nn.Module, ...]
    backward: bool = False
    addend: bool = False


class Recorder:
    """Watches fused code while `watching` is entered.

    Attributes:
        outcome: of every block that ran: None on the fast path, else the (first) reason against it.
        calls: every kernel that ran.
        backward: set by the caller when the backward pass begins.
    """

    def __init__(self, model: nn.Module) -> None:
        self.outcome: dict[nn.Module, str | None] = {}
        self.calls: list[Served] = []
        self.backward = False
        self._pending: tuple[nn.Module, ...] = ()
        self._owners = {
            key: module
            for module in model.modules()
            for t in (*module._parameters.values(), *module._buffers.values())
            if (key := _memory(t)) is not None
        }

    @contextmanager
    def watching(self) -> Iterator[None]:
        with observe.listening(self._block), observe.recording(self._stands_for), table.watching(self._call):
            yield

    def _block(self, block: nn.Module, reason: str | None) -> None:
        self.outcome[block] = self.outcome.get(block) or reason

    def _stands_for(self, modules: tuple[nn.Module, ...], op: str = "", kernel: str = "", method: str = "") -> None:
        if op:
            self.calls.append(Served(op, kernel, method, modules))
        else:
            self._pending = modules

    def _call(self, op: str, kernel: table.Kernel, args: tuple[Any, ...]) -> None:
        if op.startswith("update_"):  # running statistics, which are no operation of the model
            return
        found = [self._owners[key] for a in args if (key := _memory(a)) in self._owners]
        modules = tuple(dict.fromkeys((*self._pending, *found)))
        self._pending = ()
        addend = op == "conv_bn_act_backward" and args[-1] is not None
        self.calls.append(Served(op, kernel.name, kernel.method(*args), modules, self.backward, addend))


def _memory(value: Any) -> tuple[int, int] | None:
    """Where a plain tensor lies: what autograd gives back for backward may be another tensor on the same memory."""
    if type(value) not in (Tensor, nn.Parameter) or value.layout is not torch.strided or not value.numel():
        return None
    return value.data_ptr(), value.nbytes


@dataclass
class Flow:
    """What comes in and out of a module in one forward, all its calls together, in bytes of floating-point tensors.

    Attributes:
        values: of its outputs, a number. gradient: whether its input has one.
    """

    x: int = 0
    y: int = 0
    values: int = 0
    gradient: bool = False


@contextmanager
def flows(modules: dict[str, nn.Module]) -> Iterator[dict[str, Flow]]:
    """Collects the Flow of the named modules, by hooks: original forwards only."""
    found: dict[str, Flow] = {}

    def note(name: str, args: Any, output: Any) -> None:
        flow = found.setdefault(name, Flow())
        inputs, outputs = floating(args), floating(output)
        flow.x += sum(t.nbytes for t in inputs[:1])
        flow.y += sum(t.nbytes for t in outputs)
        flow.values += sum(t.numel() for t in outputs)
        flow.gradient |= any(t.requires_grad for t in inputs)

    with ExitStack() as stack:
        for name, module in modules.items():
            hook = module.register_forward_hook(lambda _, args, output, name=name: note(name, args, output))
            stack.callback(hook.remove)
        yield found


def floating(value: Any) -> list[Tensor]:
    """The floating-point tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [t for part in parts for t in floating(part)]


class Step:
    """What is explained: one inference call in eval mode; in training mode forward and backward.

    Attributes:
        gradients: whether it goes backward.
    """

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.model, self.inputs = model, inputs
        leaves = [*model.parameters(), *floating(inputs)]
        self.gradients = model.training and any(t.requires_grad for t in leaves)

    def copies(self) -> tuple[Any, ...]:
        """The inputs once more: a model may write to them."""
        return tuple(_copy(value) for value in self.inputs)

    def forward(self, inputs: tuple[Any, ...]) -> Any:
        """The model's output."""
        with torch.set_grad_enabled(self.gradients):
            return self.model(*inputs)

    def backward(self, output: Any, inputs: tuple[Any, ...]) -> None:
        """Computes all gradients, from ones, and drops them: none is added to what is in `.grad`."""
        outputs = [t for t in floating(output) if t.requires_grad]
        leaves = [t for t in (*self.model.parameters(), *floating(inputs)) if t.requires_grad]
        if self.gradients and outputs:
            torch.autograd.grad(outputs, leaves, [torch.ones_like(t) for t in outputs], allow_unused=True)


def _copy(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone().requires_grad_(value.requires_grad)


@contextmanager
def state_kept(model: nn.Module) -> Iterator[None]:
    """Puts every buffer of `model` and the random state back at the end of the `with` block."""
    before = {buffer: buffer.clone() for buffer in model.buffers()}
    with torch.random.fork_rng():
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, values in before.items():
                    if not torch.equal(buffer, values):  # a write would count as a change, and weights be folded anew
                        buffer.copy_(values)
