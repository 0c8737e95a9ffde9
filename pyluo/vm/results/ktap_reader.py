"""The kernel's test format, KTAP: what a run of tests announced, and what came of each.

Read liberally, since selftests also write TAP 13 and a console mixes other lines in; judged
strictly, since a program that dies half way through writes no word of it.

Source: Documentation/dev-tools/ktap.rst
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass

__all__ = ["Outcome", "Report", "Result", "parse"]

_VERSION = re.compile(r"K?TAP version [0-9]+")
# No number of a real test is longer, and int() refuses the longest.
_PLAN = re.compile(r"1\.\.([0-9]{1,9})\s*(?:#\s*(?:SKIP\w*)?:?\s*(.*))?", re.IGNORECASE)
_RESULT = re.compile(r"(not )?ok +([0-9]{1,9})(?: +-(?= |$) *| +|$)(.*)")
_BAIL_OUT = re.compile(r"Bail out!\s*(.*)")
_DIRECTIVE = re.compile(
    r"(?:^|\s)#(?:\s*(SKIP|TODO|XFAIL|XPASS|TIMEOUT|ERROR)(?:\w*):?(?=\s|$)|\s)\s*(.*)",
    re.IGNORECASE,
)
_DEEPEST = 16  # levels; the kernel nests three


class Outcome(enum.Enum):
    """What came of a test."""

    PASSED = "ok"
    FAILED = "not ok"
    SKIPPED = "skip"
    EXPECTED_FAILURE = "xfail"
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Result:
    """One test.

    Attributes:
        number: as it was told; of a missing one, the number that was next.
        name: may be empty.
        outcome: by its own line; MISSING if its subtests came and that line did not.
        reason: what stands behind the line's directive, such as SKIP.
        diagnostics: the lines before its own that belong to no subtest, without their "# ".
        subtests: of which it is made.
    """

    number: int
    name: str
    outcome: Outcome
    reason: str = ""
    diagnostics: tuple[str, ...] = ()
    subtests: Report | None = None

    @property
    def failed(self) -> bool:
        """Whether it failed, or a subtest did, even if its own line denies that."""
        if self.outcome in (Outcome.SKIPPED, Outcome.EXPECTED_FAILURE):
            return False
        subtest_failed = self.subtests is not None and self.subtests.failed
        return self.outcome is not Outcome.PASSED or subtest_failed


@dataclass(frozen=True, slots=True)
class Report:
    """The tests of one level.

    Attributes:
        planned: how many were announced; None if the plan never came.
        results: those that came.
        diagnostics: the lines after the last result, without their "# ".
        bailed_out: why the run was given up, if it was.
        skip_reason: what stands behind a plan of no tests.
    """

    planned: int | None = None
    results: tuple[Result, ...] = ()
    diagnostics: tuple[str, ...] = ()
    bailed_out: str | None = None
    skip_reason: str = ""

    @property
    def skipped(self) -> bool:
        """Whether it announced that there would be no tests, and kept to it."""
        return self.planned == 0 and not self.results and self.bailed_out is None

    @property
    def faults(self) -> tuple[str, ...]:
        """What is wrong with the run as a whole, whatever its results are."""
        if self.skipped:
            return ()
        faults = []
        if self.bailed_out is not None:
            faults.append(f"it bailed out: {self.bailed_out or 'no reason given'}")
        if not self.results:
            faults.append("no result came")
        if self.planned is None:
            faults.append("no plan came")
            return tuple(faults)
        told = [each.number for each in self.results if each.outcome is not Outcome.MISSING]
        kept = {number for number in told if 1 <= number <= self.planned}
        if len(kept) < self.planned:
            faults.append(f"{len(kept)} of {self.planned} planned results came")
        if len(told) > len(kept):
            faults.append(f"{len(told) - len(kept)} results came that were not planned")
        return tuple(faults)

    @property
    def failed(self) -> bool:
        """Whether a test failed, or the run as a whole is at fault."""
        return bool(self.faults) or any(result.failed for result in self.results)


def parse(text: str) -> Report:
    """The report in the output of a test program.

    A level is told by its indentation, and closed by the result that it belongs to. Lines that are
    no KTAP are kept among the diagnostics: next to a failure they may be its cause.
    """
    reader = _Reader()
    for line in text.split("\n"):
        reader.take(line)
    return reader.end()


class _Level:
    """The tests of one indentation, as far as they have come."""

    def __init__(self, indent: int) -> None:
        self.indent = indent
        self.said: list[str] = []  # since the last result
        self._planned: int | None = None
        self._skip_reason = ""
        self._results: list[Result] = []

    def plan(self, match: re.Match[str]) -> None:
        # Of two plans, the larger one can be kept by nobody who kept only the smaller.
        self._planned = max(int(match[1]), self._planned or 0)
        self._skip_reason = match[2] or ""

    def result(self, match: re.Match[str], subtests: Report | None) -> None:
        name, word, reason = _described(match[3])
        outcome = _outcome(match[1] is None, word)
        if word in ("TIMEOUT", "ERROR"):
            reason = f"{word} {reason}".rstrip()
        self._add(Result(int(match[2]), name, outcome, reason, tuple(self.said), subtests))

    def orphans(self, subtests: Report) -> None:
        """Takes in subtests whose own test did not report."""
        number = self._results[-1].number + 1 if self._results else 1
        missing = Result(number, "", Outcome.MISSING, "", tuple(self.said), subtests)
        self._add(missing)

    def _add(self, result: Result) -> None:
        self._results.append(result)
        self.said = []

    def report(self, bailed_out: str | None = None) -> Report:
        return Report(
            self._planned, tuple(self._results), tuple(self.said), bailed_out, self._skip_reason
        )


class _Reader:
    """Takes lines, and knows which levels are open."""

    def __init__(self) -> None:
        self._levels: list[_Level] = []
        self._early: list[str] = []  # what was said before the first level
        self._bailed_out: str | None = None

    def take(self, line: str) -> None:
        words = line.strip()
        indent = len(line) - len(line.lstrip(" "))
        if match := _BAIL_OUT.fullmatch(words):
            self._bailed_out = match[1]
        elif not self._take_test(indent, words) and words:
            self._said(indent).append(words[1:].removeprefix(" ") if words[0] == "#" else words)

    def end(self) -> Report:
        if not self._levels:
            return Report(diagnostics=tuple(self._early), bailed_out=self._bailed_out)
        while len(self._levels) > 1:
            report = self._levels.pop().report()
            self._levels[-1].orphans(report)
        return self._levels[0].report(self._bailed_out)

    def _take_test(self, indent: int, words: str) -> bool:
        result, plan = _RESULT.fullmatch(words), _PLAN.fullmatch(words)
        if not (result or plan or _VERSION.fullmatch(words)):
            return False
        subtests = self._close(indent)
        if not self._open(indent):
            return False
        level = self._levels[-1]
        if result:
            level.result(result, subtests)
        elif subtests:
            level.orphans(subtests)
        if plan:
            level.plan(plan)
        return True

    def _close(self, indent: int) -> Report | None:
        """Closes the levels below an indentation; the report of the uppermost of them."""
        closed: Report | None = None
        while self._levels and self._levels[-1].indent > indent:
            level = self._levels.pop()
            if closed is not None:
                level.orphans(closed)
            closed = level.report()
        return closed

    def _open(self, indent: int) -> bool:
        """Makes the last level one of this indentation, unless that is too deep."""
        if not self._levels or self._levels[-1].indent < indent:
            if len(self._levels) == _DEEPEST:
                return False
            self._levels.append(_Level(indent))
            self._levels[-1].said, self._early = self._early, []
        return True

    def _said(self, indent: int) -> list[str]:
        """Where a diagnostic line of this indentation goes: to the innermost level around it."""
        for level in reversed(self._levels):
            if level.indent <= indent:
                return level.said
        return self._levels[0].said if self._levels else self._early


def _described(rest: str) -> tuple[str, str, str]:
    """The name, the directive and what stands behind it, of what follows a result's number."""
    match = _DIRECTIVE.search(rest)
    if match is None:
        return rest, "", ""
    return rest[: match.start()].rstrip(), (match[1] or "").upper(), match[2]


def _outcome(ok: bool, directive: str) -> Outcome:
    match directive:
        case "SKIP":
            return Outcome.SKIPPED
        case "TIMEOUT" | "ERROR":
            return Outcome.FAILED
        case "XFAIL":  # which the kernel's selftests write behind "ok"
            return Outcome.EXPECTED_FAILURE
        case "TODO" if not ok:
            return Outcome.EXPECTED_FAILURE
        case _:
            return Outcome.PASSED if ok else Outcome.FAILED
