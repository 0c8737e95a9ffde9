"""Tests between every two of several kernels, in both directions, over one hop and over several."""

from __future__ import annotations

import asyncio
import enum
import re
from dataclasses import dataclass, replace
from itertools import product
from statistics import median
from typing import TYPE_CHECKING, Any

from pyluo.vm.results.ktap_reader import Outcome
from pyluo.vm.results.recorded import of_record
from pyluo.vm.run import pytest_process
from pyluo.vm.run.programs import Verdict
from pyluo.vm.run.pytest_process import Result, Run

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pyluo.vm.kernels.kernel import Kernel
    from pyluo.vm.machine.options import GuestOptions

__all__ = ["Cell", "Direction", "Route", "routes", "run"]

_NUMBERS = re.compile(r"(\d+)\.(\d+)(?:\.(\d+))?(?:-rc(\d+))?")


class Direction(enum.Enum):
    """Which way a live update goes."""

    UPGRADE = "upgrade"
    SAME = "same"
    ROLLBACK = "rollback"


@dataclass(frozen=True, slots=True)
class Route:
    """What a cell is about.

    Attributes:
        origin: the kernel that guests boot.
        target: the one that they live-update to, and back again if there are more hops.
        hops: how many live updates in a row.
    """

    origin: Kernel
    target: Kernel
    hops: int

    @property
    def direction(self) -> Direction:
        """Of the first hop, by the kernels' releases."""
        before, after = _version(self.origin.release), _version(self.target.release)
        if self.origin.image == self.target.image or before == after:
            return Direction.SAME
        return Direction.UPGRADE if before < after else Direction.ROLLBACK

    def __str__(self) -> str:
        hops = "one hop" if self.hops == 1 else f"{self.hops} hops"
        return f"{self.origin.name} to {self.target.name}, {hops}"


@dataclass(frozen=True, slots=True)
class Cell:
    """What came of a route.

    Attributes:
        route: which.
        run: of the tests.
    """

    route: Route
    run: Run

    @property
    def result(self) -> Result:
        """Of the run."""
        return self.run.result

    def verdicts(self) -> list[Verdict]:
        """On each test; and on the whole, if no single test tells why it has not passed."""
        route = str(self.route)
        told = [of_record(route, record.test, record) for record in self.run.records]
        if self.result is not Result.PASSED and not any(each.failed for each in told):
            reason = f"no verdict: {self.run.reason}"
            told.append(Verdict(route, "", Outcome.FAILED, reason, no_verdict=True))
        return told

    def data(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "from": self.route.origin.name,
            "to": self.route.target.name,
            "releases": [self.route.origin.release, self.route.target.release],
            "hops": self.route.hops,
            "direction": self.route.direction.value,
            "result": self.result.value,
            "reason": self.run.reason,
            "median_blackout": self.blackout,
            "tests": [record.data() for record in self.run.records],
        }

    @property
    def blackout(self) -> float | None:
        """The median of all its jumps that landed, in seconds; None if none did."""
        blackouts = [
            jump.blackout
            for record in self.run.records
            for guest in record.guests
            for jump in guest.jumps
            if jump.blackout is not None
        ]
        return median(blackouts) if blackouts else None


def routes(
    origins: Sequence[Kernel], targets: Sequence[Kernel], hops: Sequence[int]
) -> list[Route]:
    """Every pair, with each number of hops."""
    return [Route(*each) for each in product(origins, targets, hops)]


async def run(
    routes: Sequence[Route],
    tests: Sequence[str],
    options: GuestOptions,
    *,
    jobs: int,
    limit: float,
    ended: Callable[[Cell], None],
) -> None:
    """Runs the tests on each route.

    Args:
        routes: to try.
        tests: as for `pytest_process.run`.
        options: of the guests; the kernels are those of the route.
        jobs: how many routes at once; each has one guest at a time, unless a test has more.
        limit: seconds for the tests of a route, as for `pytest_process.run`.
        ended: called with each cell, in whatever order they come; and where this is interrupted,
            with what the routes came to by then that were begun.

    Raises:
        HarnessError: pytest could not be started on a route; the others have ended then.
    """
    gate = asyncio.Semaphore(jobs)

    async def fill(route: Route) -> None:
        async with gate:
            named = replace(options, kernel=route.origin.name, to=route.target.name)
            tried = await pytest_process.run(
                tests,
                named,
                [route.origin, route.target],
                hops=route.hops,
                limit=limit,
                cut_off=lambda run: ended(Cell(route, run)),
            )
        ended(Cell(route, tried))

    # Where one is cancelled that waits for its turn, the others are to end in peace.
    for failure in await asyncio.gather(*map(fill, routes), return_exceptions=True):
        if failure:
            raise failure


def _version(release: str) -> tuple[float, ...]:
    """A release in an order: a candidate comes before what it is a candidate for."""
    match = _NUMBERS.match(release)
    if match is None:
        return ()
    major, minor, patch, candidate = match.groups()
    return int(major), int(minor), int(patch or 0), int(candidate or 0) or float("inf")
