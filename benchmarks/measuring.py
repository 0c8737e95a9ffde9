"""Measure ratios, and say how noisy the machine was meanwhile."""

from __future__ import annotations

import statistics
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.ratios import Ratio, read_other_cpu_seconds
from pyluo.vm import progress

if TYPE_CHECKING:
    from collections.abc import Mapping

    from benchmarks.keys import Key

__all__ = ["Measured", "as_json", "measure"]


@dataclass(frozen=True, slots=True)
class Measured:
    """A ratio, and what went on while it was measured.

    Attributes:
        above: the median of the times that are divided, in seconds.
        below: the median of those by which they are divided.
        others: how many cores other programs used meanwhile.
    """

    ratio: Ratio
    above: float
    below: float
    others: float


def measure(name: str, key: Key, kernel: str, rounds: int) -> Measured:
    """Measure a ratio.

    Args:
        name: its name, for the progress bar.
        key: what to measure.
        kernel: the kernel of the guests.
        rounds: the number of pairs.
    """
    pairs = []
    began, others = time.monotonic(), read_other_cpu_seconds()
    with progress.bar(name, rounds) as advance, closing(key.pairs(kernel, rounds)) as measuring:
        for pair in measuring:
            pairs.append(pair)
            advance(len(pairs))
    seconds, others = time.monotonic() - began, read_other_cpu_seconds() - others
    ratio = Ratio.of(pairs)
    above, below = (statistics.median(times) for times in zip(*pairs, strict=True))
    return Measured(ratio, above, below, max(0.0, others / seconds))


def as_json(
    measured: Mapping[str, Measured], curves: Mapping[str, Any], machine: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what bench.json contains: the ratios by their names, the curves, and what ran.

    Args:
        measured: the ratios.
        curves: the curves.
        machine: what ran.
    """
    noise = {
        name: {
            "spread": each.ratio.spread,
            "cores_of_others": each.others,
            "above_seconds": each.above,
            "below_seconds": each.below,
        }
        for name, each in measured.items()
    }
    ratios = {name: asdict(each.ratio) for name, each in measured.items()}
    return {**ratios, "curves": dict(curves), "machine": {**machine, "noise": noise}}
