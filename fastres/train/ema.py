"""A moving average of the weights: often a little better than the last weights, and less noisy."""

from __future__ import annotations

import copy

import torch
from torch import nn

__all__ = ["Ema"]


class Ema:
    """average <- d average + (1 - d) weights after every step t = 0, 1, ..., with d = min(decay, (1 + t) / (10 + t)).

    The smaller d of the first steps lets the average forget the initial weights. Running statistics are averaged too;
    integers (batch counters) are copied.

    Attributes:
        model: a copy of the given model with the averages, in eval mode.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Takes in the weights after the step with this index, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages, weights = self.model.state_dict(), model.state_dict()
        floats = [name for name, value in weights.items() if value.is_floating_point()]
        torch._foreach_lerp_([averages[n] for n in floats], [weights[n] for n in floats], 1 - decay)
        for name in weights.keys() - set(floats):
            averages[name].copy_(weights[name])
