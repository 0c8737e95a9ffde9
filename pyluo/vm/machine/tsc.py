"""The frequency of this machine's time-stamp counter."""

from __future__ import annotations

import functools
import time

from pyluo._sys import read_tsc

__all__ = ["frequency"]

_SPAN = 0.02  # seconds
_TRIES = 5


@functools.cache
def frequency() -> int:
    """Return the frequency in kHz, to a few parts in a million; 0 if there is no such counter."""
    began, first = _read()
    time.sleep(_SPAN)
    ended, last = _read()
    return round((last - first) * 1_000_000 / (ended - began))


def _read() -> tuple[int, int]:
    """Return a time in nanoseconds and the counter at that time.

    Of some readings, this takes the one in which the least time passed, as another process may run
    in the midst of one.
    """
    readings = []
    for _ in range(_TRIES):
        before = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
        counter = read_tsc()
        after = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
        readings.append((after - before, (before + after) // 2, counter))
    _, when, counter = min(readings)
    return when, counter
