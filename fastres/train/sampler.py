"""Which images go into which batch: the same for every number of processes and of loading workers.

An epoch is a permutation of the n images that depends on (seed, epoch) only. It is cut into ceil(n / batch) global
batches of equal size, give or take one image: no image is lost or seen twice, and there is no tiny last batch, whose
statistics would spoil batch norm. A process takes its consecutive part of each global batch, in as many micro-batches
as gradients are accumulated over.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from fastres.errors import UserError

__all__ = ["MicroBatches", "global_batches", "share"]


def share(indices: np.ndarray, part: int, parts: int) -> np.ndarray:
    """Part number `part` of `parts` consecutive parts, of equal size give or take one."""
    return np.array_split(indices, parts)[part]


def global_batches(n: int, batch: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The indices of the images of each step of an epoch, over all processes."""
    order = np.random.default_rng((seed, epoch)).permutation(n)
    return np.array_split(order, math.ceil(n / batch))


class MicroBatches(Sampler[list[int]]):
    """The micro-batches of one process in one epoch, `accumulate` for each step.

    Args:
        n: images. batch: of a step, over all processes. seed, epoch: what the order depends on.
        rank, size: which process of how many. accumulate: micro-batches a step. first: the step to start at.

    Raises:
        UserError: if some micro-batch would have no image.
    """

    def __init__(
        self, n: int, batch: int, *, seed: int, epoch: int, rank: int, size: int, accumulate: int, first: int = 0
    ) -> None:
        self.batches = global_batches(n, batch, seed, epoch)[first:]
        self.rank, self.size, self.accumulate = rank, size, accumulate
        smallest = n // math.ceil(n / batch)
        if smallest < size * accumulate:
            raise UserError(
                f"batches of {smallest} images do not fill {size} process(es) with {accumulate} micro-batch(es) each: "
                "--batch must be larger"
            )

    def __iter__(self) -> Iterator[list[int]]:
        for indices in self.batches:
            own = share(indices, self.rank, self.size)
            for part in range(self.accumulate):
                yield share(own, part, self.accumulate).tolist()

    def __len__(self) -> int:
        return len(self.batches) * self.accumulate
