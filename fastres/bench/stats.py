"""From raw samples to medians, spreads and verdicts. Plain Python, no dependency."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from statistics import median


@dataclass(frozen=True)
class Timing:
    """Seconds of one iteration: the median over rounds, and the spread as an interval."""

    median: float
    low: float
    high: float

    def overlaps(self, other: Timing) -> bool:
        """Whether the two spreads have a value in common."""
        return self.low <= other.high and other.low <= self.high


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile (0 to 1) by linear interpolation between the sorted values."""
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def timing(rounds: Sequence[Sequence[float]]) -> Timing:
    """Summarise the samples of one contender.

    Every round counts once, by its median, so that a contender with short iterations and hence more samples in a round
    is judged like the others. The spread is the middle half of the rounds (25th to 75th percentile), or all of them
    when there are fewer than five.

    Args:
        rounds: for each round the seconds of its iterations.
    """
    medians = [median(samples) for samples in rounds]
    if len(medians) < 5:
        return Timing(median(medians), min(medians), max(medians))
    return Timing(median(medians), quantile(medians, 0.25), quantile(medians, 0.75))


def speedup(of: Timing, against: Timing) -> float:
    """How many times faster `of` is than `against` (below 1: slower)."""
    return against.median / of.median


def verdict(of: Timing, against: Timing) -> str:
    """ "faster", "slower", or "no difference" where the spreads overlap."""
    if of.overlaps(against):
        return "no difference"
    return "faster" if of.median < against.median else "slower"


def break_even_images(setup: float, time: Timing, base_setup: float, base_time: Timing, batch: int) -> int | None:
    """After how many images the longer set-up has paid for itself.

    Args:
        setup, time: seconds of set-up and of one iteration of the contender.
        base_setup, base_time: the same of the baseline.
        batch: images in one iteration.

    Returns:
        0 if the contender is ahead from the first image on, None if it never gets ahead.
    """
    extra = setup - base_setup
    gain = (base_time.median - time.median) / batch
    if verdict(time, base_time) != "faster":
        return None
    return max(0, ceil(round(extra / gain, 6)))
