"""Ratios of pairs of times, and how noisy they are."""

from __future__ import annotations

import math
import os
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    # What measures pairs; it is closed if the bench gives up.
    Pairs = Generator["Pair", None, None]

__all__ = ["LEAST_PAIRS", "Pair", "Ratio", "fit_exponent", "read_other_cpu_seconds"]

LEAST_PAIRS = 5
"""A ratio of fewer pairs says nothing."""


class Pair(NamedTuple):
    """Two times that were taken one right after the other, in seconds."""

    above: float
    below: float

    @property
    def ratio(self) -> float:
        """What was measured, as a multiple of what it is measured by."""
        return self.above / self.below


@dataclass(frozen=True, slots=True)
class Ratio:
    """The ratio of two times, over all pairs.

    Attributes:
        median: the median of the pairs' ratios.
        least: the least of them.
        most: the greatest of them.
        runs: the number of pairs.
    """

    median: float
    least: float
    most: float
    runs: int

    @classmethod
    def of(cls, pairs: Sequence[Pair]) -> Self:
        """Return the ratio of some pairs.

        Raises:
            ValueError: there are fewer than five pairs, or a time is not above 0.
        """
        if len(pairs) < LEAST_PAIRS:
            raise ValueError(
                f"a ratio of {len(pairs)} pairs says nothing: it takes at least {LEAST_PAIRS}"
            )
        if not all(math.isfinite(time) and time > 0 for pair in pairs for time in pair):
            raise ValueError(f"a time is no time: {pairs}")
        ratios = [pair.ratio for pair in pairs]
        return cls(statistics.median(ratios), min(ratios), max(ratios), len(ratios))

    @property
    def spread(self) -> float:
        """How far the pairs are apart: from the least to the greatest, as a part of the median."""
        return (self.most - self.least) / self.median


def fit_exponent(sizes: Sequence[float], times: Sequence[float]) -> float:
    """Return the exponent of a power law through the points, by least squares: 1 is linear.

    Raises:
        ValueError: there are fewer than two different sizes.
    """
    if len(set(sizes)) < 2:
        raise ValueError("an exponent takes two different sizes")
    slope, _ = statistics.linear_regression(
        [math.log(size) for size in sizes], [math.log(time) for time in times]
    )
    return slope


def read_other_cpu_seconds() -> float:
    """Return the CPU seconds used since boot, except by this process and its finished children."""
    _, user, nice, system, _, _, irq, softirq, steal, *_ = (
        Path("/proc/stat").read_text().partition("\n")[0].split()
    )
    busy = sum(map(int, (user, nice, system, irq, softirq, steal))) / os.sysconf("SC_CLK_TCK")
    own = os.times()
    return busy - own.user - own.system - own.children_user - own.children_system
