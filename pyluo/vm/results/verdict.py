"""The verdict on a test and on its subtests."""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from pyluo.vm.errors import Cause
    from pyluo.vm.machine.timeline import GuestLog

__all__ = ["FAILURES", "Outcome", "Verdict", "passed", "summarize"]


class Outcome(enum.Enum):
    """The outcome of a test."""

    PASSED = "passed"
    FAILED = "failed"
    CRASHED = "crashed"  # the guest died, or its kernel complained
    NO_VERDICT = "no verdict"  # the harness, a fixture or pytest could not do its work
    SKIPPED = "skipped"
    EXPECTED_FAILURE = "xfailed"

    @property
    def bad(self) -> bool:
        """Whether a test with this outcome makes the run fail."""
        return self in _WORST_FIRST


FAILURES = frozenset({Outcome.FAILED, Outcome.CRASHED})
"""The outcomes that count against the kernel."""

_WORST_FIRST = (Outcome.CRASHED, Outcome.FAILED, Outcome.NO_VERDICT)


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of a test. The test may be a case, a program, a file, or a route of a matrix.

    Attributes:
        name: the name of the test, without the names of the tests that contain it: pytest's node
            id, or the name that a program printed.
        outcome: the outcome of the test.
        reason: the reason for the outcome, in one line; empty if the test passed.
        text: the test's output about a failure; may have several lines.
        cause: what a guest died of or its kernel complained of, if that ended the test; else None.
        booted: whether that guest had ever spoken.
        seconds: the duration of the test with setup and teardown; 0 if it is not known.
        guests: the records of the guests that the test used.
        subtests: the verdicts on the tests that this test consists of. If a subtest is bad, the
            test is bad. If the test was skipped or expected to fail, no subtest is bad.
        incomplete: whether something is wrong with the test apart from its subtests: a planned
            result is missing, or the results do not explain the exit status.
    """

    name: str
    outcome: Outcome
    reason: str = ""
    text: str = ""
    cause: Cause | None = None
    booted: bool = True
    seconds: float = 0.0
    guests: tuple[GuestLog, ...] = ()
    subtests: tuple[Verdict, ...] = ()
    incomplete: bool = False

    @property
    def bad(self) -> bool:
        """Whether this verdict makes the run fail."""
        return self.outcome.bad

    @property
    def error(self) -> str:
        """What ended the test, if it neither passed nor failed by itself; else empty.

        It is "no verdict", or the value of `cause`.
        """
        if self.outcome is Outcome.NO_VERDICT:
            return Outcome.NO_VERDICT.value
        return self.cause.value if self.outcome is Outcome.CRASHED and self.cause else ""

    @property
    def explanation(self) -> str:
        """The reason, preceded by "no verdict" if that is the outcome.

        It is for formats that have no such outcome.
        """
        if self.outcome is Outcome.NO_VERDICT:
            return f"no verdict: {self.reason}"
        return self.reason

    @property
    def lines(self) -> list[str]:
        """The text, split into its lines."""
        return self.text.split("\n") if self.text else []

    def leaves(self) -> Iterator[Verdict]:
        """Yield the verdicts on the tests in this one that have no subtests.

        The name of each consists of the names on the way to it, "outer / inner", without the name
        of this verdict. If this verdict has no subtests, or they do not explain its outcome, the
        verdict itself comes last, with an empty name.
        """
        leaves = [
            replace(leaf, name=" / ".join(filter(None, [subtest.name, leaf.name])))
            for subtest in self.subtests
            for leaf in subtest.leaves()
        ]
        yield from leaves
        explained = any(leaf.bad and leaf.error == self.error for leaf in leaves)
        if not leaves or self.incomplete or (self.bad and not explained):
            yield replace(self, name="", subtests=())


def summarize(name: str, subtests: Sequence[Verdict]) -> Verdict:
    """Return the verdict on a test that consists of subtests and has no result of its own.

    If a subtest is bad, the outcome is that of the worst one. Otherwise, if all subtests have the
    same outcome, it is that outcome; else it is PASSED.

    Args:
        name: the name of the test.
        subtests: the verdicts on its subtests.
    """
    if worst := worst_of(subtests):
        return replace(
            worst,
            name=name,
            reason=": ".join(filter(None, [worst.name, worst.reason])),
            seconds=0.0,
            guests=(),
            subtests=tuple(subtests),
            incomplete=False,
        )
    outcomes = {subtest.outcome for subtest in subtests}
    outcome = outcomes.pop() if len(outcomes) == 1 else Outcome.PASSED
    return Verdict(name, outcome, subtests=tuple(subtests))


def worst_of(verdicts: Iterable[Verdict]) -> Verdict | None:
    """Return the first verdict that has the worst outcome; None if no verdict is bad."""
    bad = [verdict for verdict in verdicts if verdict.bad]
    return min(bad, key=lambda verdict: _WORST_FIRST.index(verdict.outcome), default=None)


def passed(verdicts: Sequence[Verdict]) -> bool:
    """Return whether a run passed: no test is bad, and at least one test passed."""
    leaves = [leaf for verdict in verdicts for leaf in verdict.leaves()]
    return not any(leaf.bad for leaf in leaves) and any(
        leaf.outcome is Outcome.PASSED for leaf in leaves
    )
