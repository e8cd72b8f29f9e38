"""The learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["SCHEDULES", "WARM_RATE", "Schedule", "warmed_up"]

SCHEDULES = ("step", "cosine")
#: By how much the paper's warm-up lowers the rate: 0.01 in place of 0.1.
WARM_RATE = 0.1


@dataclass(frozen=True)
class Schedule:
    """Learning rates of a run.

    Attributes:
        kind: "step": base * gamma^(milestones passed), as in He et al. 2015;
            "cosine": base * (1 + cos(pi t)) / 2, t from 0 to 1 over the steps after the warm-up (Loshchilov and Hutter
            2017, without restarts).
        base: the rate at its highest.
        steps: of the whole run.
        milestones: steps at which the rate of "step" falls.
        gamma: the factor by which it falls.
        warmup: steps in which the rate rises linearly from base / warmup to base (Goyal et al. 2017).
    """

    kind: str
    base: float
    steps: int
    milestones: Sequence[int] = ()
    gamma: float = 0.1
    warmup: int = 0

    def rate(self, step: int) -> float:
        """The rate of the step with this index, counted from 0."""
        if step < self.warmup:
            return self.base * (step + 1) / self.warmup
        if self.kind == "step":
            return self.base * self.gamma ** sum(step >= milestone for milestone in self.milestones)
        t = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.base * (1 + math.cos(math.pi * min(t, 1.0))) / 2


def warmed_up(wrong: int, seen: int, samples: int) -> bool:
    """Whether the paper's warm-up of ResNet-110 ends: the training error has fallen below 80 %.

    Args:
        wrong: misclassified images of this epoch so far. seen: images so far. samples: images of an epoch. The error
            counts once it is that of 1,000 images, or of an epoch if it has fewer: a single batch may be lucky.
    """
    return seen >= min(1000, samples) and wrong < 0.8 * seen
