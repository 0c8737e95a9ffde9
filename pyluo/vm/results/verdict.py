"""The verdict on a test, and on the tests that it is made of."""

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
    """What came of a test."""

    PASSED = "passed"
    FAILED = "failed"
    CRASHED = "crashed"  # the guest died, or its kernel complained
    NO_VERDICT = "no verdict"  # the harness, a fixture or pytest could not do its work
    SKIPPED = "skipped"
    EXPECTED_FAILURE = "xfailed"

    @property
    def bad(self) -> bool:
        """Whether it makes a run fail."""
        return self in _WORST_FIRST


FAILURES = frozenset({Outcome.FAILED, Outcome.CRASHED})
"""The outcomes that are held against the kernel."""

_WORST_FIRST = (Outcome.CRASHED, Outcome.FAILED, Outcome.NO_VERDICT)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a test: of a case, a program, a file, or a route of the matrix.

    Attributes:
        name: the name of the test among its siblings: pytest's node id, or what a program printed.
        outcome: what came of it.
        reason: why, in a line; empty if it passed.
        text: all that the test printed about a failure, in lines.
        cause: what a guest died of or its kernel complained of, if that ended the test.
        booted: whether that guest had ever spoken.
        seconds: how long it took, setup and teardown included; 0 if that is not known.
        guests: what the guests that it used left behind.
        subtests: the tests that it is made of. None of them is bad if it was skipped or was
            expected to fail; if one of them is bad, so is the test.
        incomplete: whether something is wrong with the test as a whole, beside its subtests: a
            result that did not come, an exit status that they do not explain.
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
        """Whether it makes a run fail."""
        return self.outcome.bad

    @property
    def error(self) -> str:
        """What ended the test if it did not fail by itself: "no verdict", or the cause's value."""
        if self.outcome is Outcome.NO_VERDICT:
            return Outcome.NO_VERDICT.value
        return self.cause.value if self.outcome is Outcome.CRASHED and self.cause else ""

    @property
    def explanation(self) -> str:
        """The reason, for those who do not see the outcome."""
        if self.outcome is Outcome.NO_VERDICT:
            return f"no verdict: {self.reason}"
        return self.reason

    @property
    def lines(self) -> list[str]:
        """The text, split into its lines."""
        return self.text.split("\n") if self.text else []

    def leaves(self) -> Iterator[Verdict]:
        """Yield the verdicts on all tests that are made of no others.

        Their names lead to them from here: "outer / inner"; this verdict's own name is left out.
        It comes itself, with an empty name, if it is made of no others, and after them if they do
        not account for its outcome.
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
    """Return the verdict on a test that is made of others and has no result of its own.

    The worst of them decides; if none is bad, the one outcome that all have, or else a pass.
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
    """Return the first verdict of the worst outcome; None if none is bad."""
    bad = [verdict for verdict in verdicts if verdict.bad]
    return min(bad, key=lambda verdict: _WORST_FIRST.index(verdict.outcome), default=None)


def passed(verdicts: Sequence[Verdict]) -> bool:
    """Return whether no test is bad and at least one passed.

    A run that tested nothing proves nothing.
    """
    leaves = [leaf for verdict in verdicts for leaf in verdict.leaves()]
    return not any(leaf.bad for leaf in leaves) and any(
        leaf.outcome is Outcome.PASSED for leaf in leaves
    )
