"""The result of a run of pytest: the verdicts on its tests, and the outcome of the run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyluo.vm.results.verdict import FAILURES, Outcome

if TYPE_CHECKING:
    from pyluo.vm.results.verdict import Verdict

__all__ = ["NOT_RUN", "UNFINISHED", "PytestRun"]

# pytest's exit statuses: all tests passed, some failed, there were no tests.
_PASSED, _FAILED, _NO_TESTS = 0, 1, 5
UNFINISHED = 130
"""The status of a run that did not come to its end; pytest itself never exits with it."""


@dataclass(frozen=True, slots=True)
class PytestRun:
    """A run of pytest that has ended.

    Attributes:
        verdicts: the verdict on each test.
        status: pytest's exit status.
        output: the output of pytest; empty if it went to another file.
        limit: the time limit in seconds, if the run was ended because it exceeded the limit; else
            None.
    """

    verdicts: tuple[Verdict, ...]
    status: int
    output: str
    limit: float | None = None

    @property
    def outcome(self) -> Outcome:
        """FAILED if a test failed or a guest died; PASSED only if all tests ran to their end and at
        least one passed; NO_VERDICT otherwise."""
        outcomes = {verdict.outcome for verdict in self.verdicts}
        if outcomes & FAILURES:
            return Outcome.FAILED
        proven = self.status == _PASSED and Outcome.PASSED in outcomes and not self.limit
        return Outcome.PASSED if proven else Outcome.NO_VERDICT

    @property
    def reason(self) -> str:
        """The reason for the outcome, in one line; empty if the outcome is PASSED."""
        failed = [verdict for verdict in self.verdicts if verdict.outcome in FAILURES]
        if self.limit and not failed:
            return f"the tests still ran after {self.limit:g} s"
        for verdict in failed or self.verdicts:
            if verdict.bad:
                return f"{verdict.name}: {verdict.reason}"
        if self.status == _NO_TESTS or (self.status == _PASSED and not self.verdicts):
            return "no test ran"
        if self.status == UNFINISHED:
            return "it was not run to its end"
        if self.status == _FAILED:
            return "pytest failed, and no test tells why"
        if self.status != _PASSED:
            return f"pytest ended with status {self.status}"
        return "" if self.outcome is Outcome.PASSED else "no test passed"


NOT_RUN = PytestRun((), UNFINISHED, "")
