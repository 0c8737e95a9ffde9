"""The cells of a matrix: each is a route between two kernels, with the results of its tests."""

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
    """Two kernels, and how many live updates guests make between them.

    Attributes:
        origin: the kernel that guests boot.
        target: the kernel that guests live-update to; with more hops, they go back and forth.
        hops: the number of live updates in a row.
    """

    origin: Kernel
    target: Kernel
    hops: int

    @property
    def direction(self) -> Direction:
        """Whether the first hop goes to a newer or an older kernel, by their releases."""
        before, after = _sort_key(self.origin.release), _sort_key(self.target.release)
        if self.origin.image == self.target.image or before == after:
            return Direction.SAME
        return Direction.UPGRADE if before < after else Direction.ROLLBACK

    def __str__(self) -> str:
        hops = "one hop" if self.hops == 1 else f"{self.hops} hops"
        return f"{self.origin.name} to {self.target.name}, {hops}"


@dataclass(frozen=True, slots=True)
class Cell:
    """A route, and the results of the tests on it.

    Attributes:
        route: the route.
        run: the run of the tests on the route.
    """

    route: Route
    run: PytestRun

    @property
    def outcome(self) -> Outcome:
        """The outcome of the run: PASSED, FAILED or NO_VERDICT."""
        return self.run.outcome

    def verdict(self) -> Verdict:
        """Return the verdict on the route, with the verdicts on its tests as subtests."""
        verdict = summarize(str(self.route), self.run.verdicts)
        if self.outcome is Outcome.NO_VERDICT and not verdict.bad:
            return replace(verdict, outcome=self.outcome, reason=self.run.reason)
        return verdict

    def to_data(self) -> dict[str, Any]:
        """Return the cell as values that JSON can represent."""
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
        """The median blackout of all jumps that landed, in seconds; None if none is known."""
        blackouts = [
            jump.blackout
            for verdict in self.run.verdicts
            for guest in verdict.guests
            for jump in guest.jumps
            if jump.blackout is not None
        ]
        return median(blackouts) if blackouts else None


def _sort_key(release: str) -> tuple[float, ...]:
    """Return a sort key for releases; a release candidate comes before the final release."""
    match = _RELEASE.match(release)
    if match is None:
        return ()
    major, minor, patch, candidate = match.groups()
    return int(major), int(minor), int(patch or 0), int(candidate or 0) or float("inf")
