"""Read KTAP, the kernel's format of test results: the plan of a program, and its results.

The parser accepts more than KTAP, because selftests also write TAP 13, and on a console other lines
come in between. The judgement is strict: a report with fewer results than were planned has failed,
because a program that dies half way does not say so.

Source: Documentation/dev-tools/ktap.rst
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from pyluo.vm.results.verdict import Outcome

__all__ = ["KtapReport", "KtapResult", "parse"]

_VERSION = re.compile(r"K?TAP version [0-9]+")
# At most nine digits: no real test has a longer number, and int() refuses very long ones.
_PLAN = re.compile(r"1\.\.([0-9]{1,9})\s*(?:#\s*(?:SKIP\w*)?:?\s*(.*))?", re.IGNORECASE)
_RESULT = re.compile(r"(not )?ok +([0-9]{1,9})(?: +-(?= |$) *| +|$)(.*)")
_BAIL_OUT = re.compile(r"Bail out!\s*(.*)")
# A directive is a word of its own: neither "#skip_list" nor "# todos" is one.
_DIRECTIVE = re.compile(
    r"(?:^|\s)#\s*(SKIP|TODO|XFAIL|XPASS|TIMEOUT|ERROR)(?::?\s+|:?$)(.*)", re.IGNORECASE
)
_COMMENT = re.compile(r"(?:^|\s)#\s+(.*)")
# kselftest's runner puts "# " before each line of a program that it runs, and then writes a result
# line with such a name for the program.
_RUNNER = "selftests: "
_PREFIXES = re.compile(r"((?:# ?)+)(.*)")
_DEEPEST = 16  # levels of subtests that are read, at most; the kernel nests three


@dataclass(frozen=True, slots=True)
class KtapResult:
    """The result of one test.

    The test's result line is the line that begins with "ok" or "not ok".

    Attributes:
        number: the test's number in its result line; if that line is missing, the next number.
        name: the test's name; may be empty.
        outcome: PASSED, FAILED, SKIPPED or EXPECTED_FAILURE, from the result line; None if there
            are results of subtests but no result line.
        reason: the text after the directive (such as SKIP) in the result line.
        diagnostics: the lines before the result line that belong to no subtest, without "# ".
        subtests: the report on the subtests; None if the test has none.
    """

    number: int
    name: str
    outcome: Outcome | None
    reason: str = ""
    diagnostics: tuple[str, ...] = ()
    subtests: KtapReport | None = None

    @property
    def failed(self) -> bool:
        """Whether the test or a subtest failed, even if the result line says that it passed."""
        if self.outcome in (Outcome.SKIPPED, Outcome.EXPECTED_FAILURE):
            return False
        subtest_failed = self.subtests is not None and self.subtests.failed
        return self.outcome is not Outcome.PASSED or subtest_failed


@dataclass(frozen=True, slots=True)
class KtapReport:
    """The results of the tests of one level: of a program, or of the subtests of a test.

    Attributes:
        planned: how many tests the plan announced; None if there was no plan.
        results: the results.
        diagnostics: the lines after the last result, without "# ".
        bailed_out: the text after "Bail out!"; None if the program did not bail out.
        skip_reason: the text after a plan of zero tests.
    """

    planned: int | None = None
    results: tuple[KtapResult, ...] = ()
    diagnostics: tuple[str, ...] = ()
    bailed_out: str | None = None
    skip_reason: str = ""

    @property
    def skipped(self) -> bool:
        """Whether the plan announced zero tests, and there was no result."""
        return self.planned == 0 and not self.results and self.bailed_out is None

    @property
    def faults(self) -> tuple[str, ...]:
        """What is wrong with the report as a whole, apart from failed tests in it."""
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
        numbers = [each.number for each in self.results if each.outcome is not None]
        planned = {number for number in numbers if 1 <= number <= self.planned}
        if len(planned) < self.planned:
            faults.append(f"{len(planned)} of {self.planned} planned results came")
        if len(numbers) > len(planned):
            faults.append(f"{len(numbers) - len(planned)} results came that were not planned")
        return tuple(faults)

    @property
    def failed(self) -> bool:
        """Whether a test failed, or something is wrong with the report as a whole."""
        return bool(self.faults) or any(result.failed for result in self.results)


def parse(text: str) -> KtapReport:
    """Return the report in the output of a test program.

    The indentation of a line is its level. The result line of a test follows the lines of its
    subtests. Lines that are not KTAP become diagnostics, because they may explain a failure. The
    lines of a program that kselftest's runner ran become subtests of the runner's result.
    """
    reader = _Reader()
    for line in text.split("\n"):
        reader.add_line(line)
    return reader.finish()


def _parse_commented(lines: list[str]) -> KtapReport | None:
    """Return the report in the lines that a runner wrote as comments; None if they have no result.

    A further "# " before a line is a further level. The program may have written any of this as a
    comment of its own, so a result is enough: only a plan that was announced must be complete.

    Args:
        lines: the lines without their first "# ".
    """
    reader = _Reader(commented=True)
    for line in lines:
        reader.add_line(line)
    report = reader.finish()
    return report if report.results else None


class _Level:
    """The tests of one indentation that have been read so far.

    Args:
        indent: the number of spaces before the lines.
        commented: whether a runner wrote the lines as comments.
    """

    def __init__(self, indent: int, *, commented: bool) -> None:
        self.indent = indent
        self._commented = commented
        self.diagnostics: list[str] = []  # the lines since the last result
        self._planned: int | None = None
        self._skip_reason = ""
        self._results: list[KtapResult] = []

    def add_plan(self, match: re.Match[str]) -> None:
        # If there are two plans, only the larger one shows that results are missing.
        self._planned = max(int(match[1]), self._planned or 0)
        self._skip_reason = match[2] or ""

    def add_result(self, match: re.Match[str], subtests: KtapReport | None) -> None:
        name, word, reason = _split_description(match[3])
        outcome = _outcome(match[1] is None, word)
        if word in ("TIMEOUT", "ERROR"):
            reason = f"{word} {reason}".rstrip()
        if subtests is None and name.startswith(_RUNNER):
            subtests = _parse_commented(self.diagnostics)
            if subtests is not None:
                self.diagnostics = []  # the subtests have them
        self._add(
            KtapResult(int(match[2]), name, outcome, reason, tuple(self.diagnostics), subtests)
        )

    def add_orphans(self, subtests: KtapReport) -> None:
        """Add the report on subtests whose own test has no result line."""
        if self._commented and self._results and self._results[-1].subtests is None:
            self._results[-1] = replace(self._results[-1], subtests=subtests)
            return
        number = self._results[-1].number + 1 if self._results else 1
        missing = KtapResult(number, "", None, "", tuple(self.diagnostics), subtests)
        self._add(missing)

    def _add(self, result: KtapResult) -> None:
        self._results.append(result)
        self.diagnostics = []

    def report(self, bailed_out: str | None = None) -> KtapReport:
        planned = self._planned
        if planned is None and self._commented:
            planned = len(self._results)
        return KtapReport(
            planned,
            tuple(self._results),
            tuple(self.diagnostics),
            bailed_out,
            self._skip_reason,
        )


class _Reader:
    """Reads lines, and keeps track of the levels that are not closed yet.

    Args:
        commented: whether a runner wrote the lines as comments, so that a comment that is a line of
            KTAP counts as one.
    """

    def __init__(self, *, commented: bool = False) -> None:
        self._commented = commented
        self._levels: list[_Level] = []
        self._early: list[str] = []  # the lines before the first level
        self._bailed_out: str | None = None

    def add_line(self, line: str) -> None:
        words = line.strip()
        indent = len(line) - len(line.lstrip(" "))
        if self._commented and (match := _PREFIXES.fullmatch(words)) and _is_test(match[2]):
            indent, words = indent + 4 * match[1].count("#"), match[2]
        if match := _BAIL_OUT.fullmatch(words):
            self._bailed_out = match[1]
        elif not self._take_test(indent, words) and words:
            self._diagnostics(indent).append(
                words[1:].removeprefix(" ") if words[0] == "#" else words
            )

    def finish(self) -> KtapReport:
        if not self._levels:
            return KtapReport(diagnostics=tuple(self._early), bailed_out=self._bailed_out)
        while len(self._levels) > 1:
            report = self._levels.pop().report()
            self._levels[-1].add_orphans(report)
        return self._levels[0].report(self._bailed_out)

    def _take_test(self, indent: int, words: str) -> bool:
        if not _is_test(words):
            return False
        result, plan = _RESULT.fullmatch(words), _PLAN.fullmatch(words)
        subtests = self._close(indent)
        if not self._open(indent):
            return False
        level = self._levels[-1]
        if result:
            level.add_result(result, subtests)
        elif subtests:
            level.add_orphans(subtests)
        if plan:
            level.add_plan(plan)
        return True

    def _close(self, indent: int) -> KtapReport | None:
        """Close the levels that are indented deeper than this; return the outermost one's report.

        The result is None if no level is.
        """
        closed: KtapReport | None = None
        while self._levels and self._levels[-1].indent > indent:
            level = self._levels.pop()
            if closed is not None:
                level.add_orphans(closed)
            closed = level.report()
        return closed

    def _open(self, indent: int) -> bool:
        """Open a level of this indentation unless it is open.

        Returns:
            Whether the level is open now: too many levels cannot be open.
        """
        if not self._levels or self._levels[-1].indent < indent:
            if len(self._levels) == _DEEPEST:
                return False
            self._levels.append(_Level(indent, commented=self._commented))
            self._levels[-1].diagnostics, self._early = self._early, []
        return True

    def _diagnostics(self, indent: int) -> list[str]:
        """Return the list that a diagnostic line of this indentation belongs to."""
        for level in reversed(self._levels):
            if level.indent <= indent:
                return level.diagnostics
        return self._levels[0].diagnostics if self._levels else self._early


def _is_test(words: str) -> bool:
    """Return whether a line is a result, a plan, or the version of the format."""
    return any(each.fullmatch(words) for each in (_RESULT, _PLAN, _VERSION))


def _split_description(rest: str) -> tuple[str, str, str]:
    """Split the text after the number in a result line: name, directive, text of the directive."""
    if match := _DIRECTIVE.search(rest):
        return rest[: match.start()].rstrip(), match[1].upper(), match[2]
    if match := _COMMENT.search(rest):
        return rest[: match.start()].rstrip(), "", match[1]
    return rest, "", ""


def _outcome(ok: bool, directive: str) -> Outcome:
    match directive:
        case "SKIP":
            return Outcome.SKIPPED
        case "TIMEOUT" | "ERROR":
            return Outcome.FAILED
        case "XFAIL":  # the kernel's selftests write "ok" with this directive
            return Outcome.EXPECTED_FAILURE
        case "TODO" if not ok:
            return Outcome.EXPECTED_FAILURE
        case _:
            return Outcome.PASSED if ok else Outcome.FAILED
