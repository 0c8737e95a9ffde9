"""What the benchmarks have in common that measure the same for several sizes."""

from __future__ import annotations

import argparse
import math
import statistics
from typing import TYPE_CHECKING

from pyluo.vm import progress

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    # Seconds, by what was measured and by the size.
    Measured = dict[str, dict[str, list[float]]]

__all__ = ["fit_exponent", "measure", "parse"]


def parse(description: str, sizes: Sequence[int]) -> argparse.Namespace:
    """Return what the command line chooses: `rounds`, `sizes`, `kernel` and `json`.

    Args:
        description: the docstring of the benchmark.
        sizes: the sizes, unless the command line has others.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured")
    parser.add_argument("--sizes", type=int, nargs="+", default=sizes, metavar="N")
    parser.add_argument("--kernel", default="stable")
    parser.add_argument("--json", action="store_true", help="as data, in seconds")
    return parser.parse_args()


def measure(
    what: str, arguments: argparse.Namespace, run: Callable[[int], dict[str, float]]
) -> Measured:
    """Measure all sizes in turns, as often as `arguments` says.

    Args:
        what: the name of the benchmark, for the progress bar.
        arguments: what `parse` returned.
        run: measures a size once; returns seconds, by what was measured.
    """
    measured: Measured = {}
    sizes = arguments.sizes
    with progress.bar(what, arguments.rounds * len(sizes)) as advance:
        for number in range(arguments.rounds):
            for position, size in enumerate(sizes):
                for name, seconds in run(size).items():
                    measured.setdefault(name, {}).setdefault(str(size), []).append(seconds)
                advance(number * len(sizes) + position + 1)
    return measured


def fit_exponent(times: dict[str, list[float]]) -> float:
    """Return the exponent of a power law through the medians, by least squares: 1 is linear."""
    points = [
        (math.log(int(size)), math.log(statistics.median(seconds)))
        for size, seconds in times.items()
    ]
    middle_x = statistics.fmean(x for x, _ in points)
    middle_y = statistics.fmean(y for _, y in points)
    above = sum((x - middle_x) * (y - middle_y) for x, y in points)
    return above / sum((x - middle_x) ** 2 for x, _ in points)
