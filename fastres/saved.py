"""How much a forward pass keeps for its backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class SavedTensors:
    """Counts what autograd saves for the backward pass while it is entered.

    Every storage counts once and as a whole, however many tensors lie in it. Parameters and buffers of `model` do not
    count: they are there anyway. The input does, if a gradient needs it.

    Attributes:
        bytes: sum over the storages.
        storages: how many there are.
        label: of what runs now; storages that it is the first to keep count for it in `bytes_of`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.label = ""
        self._own = {_identity(t) for t in (*model.parameters(), *model.buffers())}
        self._found: dict[int, tuple[str, torch.UntypedStorage]] = {}  # kept, so that no identity is used twice
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._note, lambda t: t)

    def __enter__(self) -> SavedTensors:
        self._hooks.__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        self._hooks.__exit__(*args)

    def _note(self, t: Tensor) -> Tensor:
        if _identity(t) not in self._own and _identity(t) not in self._found:
            self._found[_identity(t)] = self.label, t.untyped_storage()
        return t

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for _, storage in self._found.values())

    @property
    def storages(self) -> int:
        return len(self._found)

    def bytes_of(self, label: str) -> int:
        return sum(storage.nbytes() for owner, storage in self._found.values() if owner == label)


def _identity(t: Tensor) -> int:
    """Of a tensor's storage; tensors of PyTorch's meta device have storages too, but no addresses."""
    return t.untyped_storage()._cdata
