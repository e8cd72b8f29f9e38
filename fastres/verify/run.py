"""One forward, and one backward, of a module with everything it leaves behind; and what enters its parts meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

#: (kind, name) -> tensor; kinds as in `certificate.Row`.
Outcome = dict[tuple[str, str], Tensor]


@dataclass(frozen=True)
class Call:
    """Arguments of a module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def map(self, change: Callable[[Tensor], Any]) -> Call:
        """The same call with every tensor changed."""
        one = lambda value: change(value) if isinstance(value, Tensor) else value  # noqa: E731
        return Call(tuple(map(one, self.args)), {key: one(value) for key, value in self.kwargs.items()})

    def double(self) -> Call:
        return self.map(lambda t: t.double() if t.is_floating_point() else t)

    def tensors(self) -> list[tuple[str, Tensor]]:
        """Names and tensors: "input" for the first argument, then "input1", ... and the keywords."""
        named = [(f"input{i or ''}", value) for i, value in enumerate(self.args)] + list(self.kwargs.items())
        return [(name, value) for name, value in named if isinstance(value, Tensor)]


def run(
    module: nn.Module, call: Call, *, gradients: bool, seed: int, round_to: torch.dtype, autocast: torch.dtype | None
) -> Outcome:
    """Calls `module` once and puts its buffers, gradients and the random state back.

    Args:
        gradients: also go backward, from a random gradient of the output that depends on `seed` only.
        round_to: the dtype to which the values of that gradient are rounded, so that all versions get the same.
        autocast: its dtype, or None for none.
    """
    leaves = call.map(lambda t: t.detach().clone().requires_grad_(gradients and t.is_floating_point()))
    device = next((t.device for _, t in leaves.tensors()), torch.device("cpu"))
    cast = torch.autocast(device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None)
    buffers = {name: (buffer, buffer.clone()) for name, buffer in module.named_buffers()}
    module.zero_grad(set_to_none=True)
    with _random_state(device, seed):
        with torch.enable_grad() if gradients else torch.no_grad(), cast:
            outputs = dict(_flat("output", module(*leaves.args, **leaves.kwargs)))
        outcome: Outcome = {("output", name): y.detach() for name, y in outputs.items()}
        if gradients:
            _backward([y for y in outputs.values() if y.requires_grad], seed, round_to)
            outcome |= {("input gradient", name): t.grad for name, t in leaves.tensors() if t.grad is not None}
            outcome |= {("gradient", name): p.grad for name, p in module.named_parameters() if p.grad is not None}
    for name, (buffer, before) in buffers.items():
        outcome["buffer" if buffer.is_floating_point() else "counter", name] = buffer.clone()
        if not torch.equal(buffer, before):
            buffer.copy_(before)
    module.zero_grad(set_to_none=True)
    return outcome


def _backward(outputs: list[Tensor], seed: int, round_to: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    upstream = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(round_to) for y in outputs]
    torch.autograd.backward(outputs, [g.to(y.device, y.dtype) for g, y in zip(upstream, outputs, strict=True)])


def _flat(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested tuples, lists and dicts, with a name each."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _flat(f"{name}.{key}", part)
    elif isinstance(value, (tuple, list)):
        for i, part in enumerate(value):
            yield from _flat(f"{name}.{i}", part)


@contextmanager
def _random_state(device: torch.device, seed: int) -> Iterator[None]:
    """Inside, layers that draw random numbers draw the same ones for the same seed; afterwards nobody notices."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.default_generators[device.index or 0].manual_seed(seed)
        yield


@contextmanager
def captured(model: nn.Module, names: list[str]) -> Iterator[dict[str, Call]]:
    """Collects the arguments of the first call of every named module."""
    calls: dict[str, Call] = {}

    def note(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name not in calls:
            calls[name] = Call(args, kwargs).map(lambda t: t.detach().clone())

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, kwargs, name=name: note(name, args, kwargs), with_kwargs=True
        )
        for name in names
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()
