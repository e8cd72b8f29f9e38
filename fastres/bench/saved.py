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
    """

    def __init__(self, model: nn.Module) -> None:
        self._own = {_address(t) for t in (*model.parameters(), *model.buffers())}
        self._found: dict[int, torch.UntypedStorage] = {}  # kept, so that no address is used twice
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._note, lambda t: t)

    def __enter__(self) -> SavedTensors:
        self._hooks.__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        self._hooks.__exit__(*args)

    def _note(self, t: Tensor) -> Tensor:
        if _address(t) not in self._own:
            self._found[_address(t)] = t.untyped_storage()
        return t

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._found.values())

    @property
    def storages(self) -> int:
        return len(self._found)


def _address(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()
