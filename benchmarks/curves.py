"""What the bench measures by size: times that are drawn as curves, with the exponents fitted."""

from __future__ import annotations

import statistics
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from benchmarks import carried, layouts, moves, stores
from benchmarks.ratios import fit_exponent
from pyluo.vm import progress

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from benchmarks.carried import Points

__all__ = ["COLUMNS", "CURVES", "Curve", "describe", "measure", "summarize"]

_FITTED = 3
"""To how many of the largest sizes an exponent is fitted: small ones show what each call costs."""


@dataclass(frozen=True, slots=True)
class Curve:
    """Times by size.

    Attributes:
        title: what is measured.
        unit: what the size counts.
        sizes: the sizes, from the least to the greatest.
        points: measures all sizes in turns, a number of times, with the guests' kernel of a name.
        floors: of what is measured, the names of those that have a floor, with the floor of each.
    """

    title: str
    unit: str
    sizes: tuple[int, ...]
    points: Callable[[str, Sequence[int], int], Points]
    floors: Mapping[str, str] = field(default_factory=dict)


_CARRIED = {"preserve": "preserve, C", "retrieve": "retrieve, C"}
CURVES = {
    "descriptors": Curve(
        "memfds of 4 KiB in one session", "descriptors", (1, 10, 100, 1000, 10_000),
        carried.descriptors, _CARRIED,
    ),
    "memory": Curve("one memfd", "MiB", carried.choose_sizes(), carried.memory, _CARRIED),
    "sessions": Curve(
        "sessions with a memfd of 4 KiB each", "sessions", (1, 10, 100, 1000, 10_000),
        carried.sessions, _CARRIED,
    ),
    "stores": Curve(
        "a store with memfds of 4 KiB, and 100 bytes of metadata for each", "entries",
        (1250, 2500, 5000, 10_000), stores.entries,
        {"add": "preserve, C", "add_many": "preserve, C", "renew": "renew, C",
         "retrieve": "retrieve, C"},
    ),
    "mappings": Curve(
        "the layout of an I/O address space", "mappings", (500, 1000, 2000, 4000),
        layouts.mappings, {"adopt": "floor"},
    ),
    "moves": Curve(
        "the pause of a VM that moves to another build of its VMM", "MiB", (32, 128, 512),
        moves.moves,
    ),
}  # fmt: skip


def measure(
    name: str, curve: Curve, kernel: str, sizes: Sequence[int], rounds: int
) -> dict[str, Any]:
    """Measure a curve, and return what bench.json has of it.

    Args:
        name: its name, for the progress bar.
        curve: what to measure.
        kernel: the kernel of the guests.
        sizes: the sizes.
        rounds: how often each size is measured.
    """
    times: dict[str, dict[int, list[float]]] = {}
    done = 0
    with (
        progress.bar(name, rounds * len(sizes)) as advance,
        closing(curve.points(kernel, sizes, rounds)) as measuring,
    ):
        for size, seen in measuring:
            for what, seconds in seen.items():
                times.setdefault(what, {}).setdefault(size, []).append(seconds)
            done += 1
            advance(done)
    return summarize(curve, times)


def summarize(curve: Curve, times: dict[str, dict[int, list[float]]]) -> dict[str, Any]:
    """Return what bench.json has of a curve.

    That is, by what was measured and for each size: the median in seconds, and for what has a floor
    the multiple of the floor's. The exponents are fitted to the medians, and to what is left of
    them without the floor's time: the kernel's own exponent may be above 1.

    Args:
        curve: what was measured.
        times: the seconds, by what was measured and by the size.
    """
    sizes = sorted(next(iter(times.values())))
    medians = {
        what: [statistics.median(by_size[size]) for size in sizes]
        for what, by_size in times.items()
    }
    multiples, exponents = {}, {}
    for what, seconds in medians.items():
        exponents[what] = _fit(sizes, seconds)
        if what in curve.floors:
            pairs = list(zip(seconds, medians[curve.floors[what]], strict=True))
            multiples[what] = [ours / floor for ours, floor in pairs]
            exponents[f"{what} without the floor"] = _fit(
                sizes, [ours - floor for ours, floor in pairs]
            )
    return {
        "title": curve.title,
        "unit": curve.unit,
        "sizes": sizes,
        "seconds": medians,
        "multiples": multiples,
        "exponents": {what: found for what, found in exponents.items() if found is not None},
    }


COLUMNS = ("of the floor", "exponent", "without the floor")
"""What `describe` returns, as headings of a table."""


def describe(curve: Mapping[str, Any], what: str) -> list[str]:
    """Return three numbers about what was measured, as text; empty if there is no such number.

    They are how many times the floor the largest size takes, the exponent, and that of what is left
    without the floor.

    Args:
        curve: a curve as bench.json has it.
        what: what was measured.
    """
    numbers = (
        curve["multiples"].get(what, [None])[-1],
        curve["exponents"].get(what),
        curve["exponents"].get(f"{what} without the floor"),
    )
    return ["" if number is None else f"{number:.2f}" for number in numbers]


def _fit(sizes: Sequence[int], seconds: Sequence[float]) -> float | None:
    """Return the exponent of the largest sizes; None if there is none to fit."""
    if len(sizes) < 2 or min(seconds[-_FITTED:]) <= 0:
        return None
    return fit_exponent(sizes[-_FITTED:], seconds[-_FITTED:])
