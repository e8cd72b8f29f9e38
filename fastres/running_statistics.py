"""Running statistics where a forward runs more often than its batch should count.

Batch norms in training count a batch whenever they run, as PyTorch's do: also when activation checkpointing runs them a
second time in backward, or when a CUDA graph is warmed up. `statistics_once` leaves the second time out,
`snapshot_statistics` takes back whatever happens inside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastres import hooks

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")

#: The buffers of layers that run once more just now, with copies in their places.
_kept: WeakKeyDictionary[nn.Module, dict[str, Tensor]] = WeakKeyDictionary()


@contextmanager
def statistics_once(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the `with` block, batch norms of `model` that run within a backward pass leave their running statistics
    and counters alone.

    A forward within a backward pass is one that was made before: torch.utils.checkpoint, with `use_reentrant` True and
    False, computes again what it has not kept. So a step counts its batch once, with checkpointing or without it.
    Results and gradients stay what they are. It holds for every normalisation layer of torch.nn that has running
    statistics, fused or not, and for subclasses. Compiled code (torch.compile) does not ask.

    Args:
        model: in any mode. Layers that it gets inside the block are not part of it.
    """
    handles = []
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            handles.append(module.register_forward_pre_hook(_keep))
            handles.append(module.register_forward_hook(_put_back, always_call=True))
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def snapshot_statistics(model: nn.Module) -> Iterator[nn.Module]:
    """At the end of the `with` block the running statistics and counters of every normalisation layer of `model` are
    what they were at its start, also after an exception.

    For steps that must not count: the warm-up of a CUDA graph, a search for a learning rate, a batch that is run again.
    Values are written back in place, so what holds the buffers (a captured graph, an averaged model) goes on to hold
    them.
    """
    before = [
        (module, name, buffer.detach().clone())
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._NormBase)
        for name in _BUFFERS
        if (buffer := getattr(module, name)) is not None
    ]
    try:
        yield model
    finally:
        with torch.no_grad():
            for module, name, values in before:
                getattr(module, name).copy_(values)


def tracks(bn: Any) -> bool:
    """Whether a call of `bn` is to update its running statistics and counter, if it has them."""
    return bn.training and bn.track_running_stats and not (bn._forward_pre_hooks and _once(bn) and _again())


def _once(bn: nn.Module) -> bool:
    return any(hook is _keep for hook in bn._forward_pre_hooks.values())


def _again() -> bool:
    """Whether this thread is within a backward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


@hooks.harmless
def _keep(module: nn.Module, args: Any) -> None:
    """Lets a forward of its own write to copies. They are there to be saved for backward, as the buffers were in the
    first forward: non-reentrant checkpointing counts what is saved."""
    if not _again() or module in _kept:
        return
    buffers = {name: b for name in _BUFFERS if (b := module._buffers.get(name)) is not None}
    _kept[module] = buffers
    module._buffers.update({name: buffer.clone() for name, buffer in buffers.items()})


@hooks.harmless
def _put_back(module: nn.Module, args: Any, output: Any) -> None:
    if module in _kept:
        module._buffers.update(_kept.pop(module))
