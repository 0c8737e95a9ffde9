"""The cells of a matrix: which kernels a route connects, and what came of the tests on it."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any

from pyluo.vm.results import json_lines
from pyluo.vm.results.verdict import Outcome, Verdict, summarize

if TYPE_CHECKING:
    from pyluo.vm.kernels.kernel import Kernel
    from pyluo.vm.results.pytest_run import PytestRun

__all__ = ["Cell", "Direction", "Route"]

_RELEASE = re.compile(r"(\d+)\.(\d+)(?:\.(\d+))?(?:-rc(\d+))?")


class Direction(enum.Enum):
    """Whether a live update goes to a newer kernel or to an older one."""

    UPGRADE = "upgrade"
    SAME = "same"
    ROLLBACK = "rollback"


@dataclass(frozen=True, slots=True)
class Route:
    """The kernels of a cell, and how often guests go between them.

    Attributes:
        origin: the kernel that guests boot.
        target: the kernel that they live-update to, and back again if there are more hops.
        hops: how many live updates in a row.
    """

    origin: Kernel
    target: Kernel
    hops: int

    @property
    def direction(self) -> Direction:
        """The direction of the first hop, by the kernels' releases."""
        before, after = _sort_key(self.origin.release), _sort_key(self.target.release)
        if self.origin.image == self.target.image or before == after:
            return Direction.SAME
        return Direction.UPGRADE if before < after else Direction.ROLLBACK

    def __str__(self) -> str:
        hops = "one hop" if self.hops == 1 else f"{self.hops} hops"
        return f"{self.origin.name} to {self.target.name}, {hops}"


@dataclass(frozen=True, slots=True)
class Cell:
    """What came of the tests on a route.

    Attributes:
        route: the route.
        run: the run of the tests on it.
    """

    route: Route
    run: PytestRun

    @property
    def outcome(self) -> Outcome:
        """The outcome of the run: PASSED, FAILED or NO_VERDICT."""
        return self.run.outcome

    def verdict(self) -> Verdict:
        """Return the verdict on the route, made of those on its tests."""
        verdict = summarize(str(self.route), self.run.verdicts)
        if self.outcome is Outcome.NO_VERDICT and not verdict.bad:
            return replace(verdict, outcome=self.outcome, reason=self.run.reason)
        return verdict

    def to_data(self) -> dict[str, Any]:
        """Return the cell as JSON has it."""
        return {
            "from": self.route.origin.name,
            "to": self.route.target.name,
            "releases": [self.route.origin.release, self.route.target.release],
            "hops": self.route.hops,
            "direction": self.route.direction.value,
            "outcome": self.outcome.value,
            "reason": self.run.reason,
            "median_blackout": self.blackout,
            "tests": [json_lines.to_data(verdict) for verdict in self.run.verdicts],
        }

    @property
    def blackout(self) -> float | None:
        """The median blackout of all jumps that landed, in seconds; None if none did."""
        blackouts = [
            jump.blackout
            for verdict in self.run.verdicts
            for guest in verdict.guests
            for jump in guest.jumps
            if jump.blackout is not None
        ]
        return median(blackouts) if blackouts else None


def _sort_key(release: str) -> tuple[float, ...]:
    """Return a key that puts releases in order; a candidate comes before its final release."""
    match = _RELEASE.match(release)
    if match is None:
        return ()
    major, minor, patch, candidate = match.groups()
    return int(major), int(minor), int(patch or 0), int(candidate or 0) or float("inf")
