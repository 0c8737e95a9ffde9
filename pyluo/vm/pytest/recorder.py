"""Write the verdict on each test to files, and show the consoles of guests if a test failed.

The plugin registers this module when the first guest boots, or if one of the files is wanted.

``--pyluo-record FILE`` writes a line of JSON for each test, with the timelines and the consoles of
its guests; `pyluo.vm.results.json_lines` reads the file. ``--pyluo-ktap FILE`` writes KTAP.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import IO, TYPE_CHECKING, Any, TypeVar

import pytest

from pyluo.vm.errors import Death, GuestFailure, HarnessError, cause_of
from pyluo.vm.machine.usage import usage
from pyluo.vm.pytest.fixtures import FAILED, replace_shared
from pyluo.vm.results import json_lines, ktap_writer
from pyluo.vm.results.verdict import Outcome, Verdict, summarize, worst_of

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Mapping

    from pyluo.vm.machine.timeline import GuestLog

__all__ = ["open_files"]

E = TypeVar("E", bound=BaseException)

_CONSOLE_LINES = 60  # the last lines of a console that are shown if a test failed
_REASON_LIMIT = 200  # characters of a verdict's reason, at most
_NOT_FINISHED = "it was not run to its end"
# The attribute of pytest's reports in which this module puts what it knows, as values that JSON can
# represent, because pytest-xdist sends reports to the main process.
_NOTE = "pyluo_record"


def open_files(config: pytest.Config) -> None:
    """Open the files that the options name, and register the plugin that writes them."""
    record, ktap = (_open(config, option) for option in ("--pyluo-record", "--pyluo-ktap"))
    config.pluginmanager.register(_Recorder(record, ktap), "pyluo-recorder")


def _open(config: pytest.Config, option: str) -> IO[str] | None:
    try:
        # errors="replace", because a file's name may contain a lone surrogate, which UTF-8 cannot
        # encode.
        path = config.getoption(option)
        return open(path, "w", encoding="utf-8", errors="replace") if path else None
    except OSError as error:
        raise pytest.UsageError(f"{option}: {error}") from None


class _Recorder:
    """A plugin that writes the verdict on a test when all phases of the test have been reported.

    Args:
        lines: the file for a line of JSON per test; None for no such file.
        ktap: the file for KTAP, which is written at the end; None for no such file.
    """

    def __init__(self, lines: IO[str] | None, ktap: IO[str] | None) -> None:
        self._lines = lines
        self._ktap = ktap
        self._begun: dict[str, Verdict] = {}
        self._ended: list[Verdict] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add the result of a phase or of a subtest to the verdict on a test.

        If several phases went wrong, the first of them counts. If a plugin runs a test again after
        it failed, the last run counts.
        """
        verdict = Verdict(report.nodeid, Outcome.PASSED)
        if report.when != "setup":
            verdict = self._begun.get(report.nodeid, verdict)
        part = _make_verdict(report)
        if isinstance(report, pytest.SubtestReport):
            verdict = replace(verdict, subtests=(*verdict.subtests, part))
        else:
            verdict = replace(verdict, seconds=verdict.seconds + report.duration)
            if part.outcome is not Outcome.PASSED and not verdict.bad:
                verdict = _adopt_outcome(verdict, part)
            if not verdict.bad and worst_of(verdict.subtests):
                verdict = _adopt_outcome(verdict, summarize(verdict.name, verdict.subtests))
            if guests := getattr(report, _NOTE, {}).get("guests"):
                verdict = replace(verdict, guests=tuple(map(json_lines.guest_from_data, guests)))
        self._begun[report.nodeid] = verdict

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Write the verdict on a test that has ended."""
        if verdict := self._begun.pop(nodeid, None):
            self._write(verdict)

    def pytest_unconfigure(self) -> None:
        """Write the verdicts on tests that did not run to their end, and close the files."""
        for verdict in self._begun.values():
            if not verdict.bad:
                verdict = replace(verdict, outcome=Outcome.NO_VERDICT, reason=_NOT_FINISHED)
            self._write(verdict)
        if self._lines:
            self._lines.close()
        if self._ktap:
            with self._ktap as file:
                file.write(ktap_writer.write(_group_by_file(self._ended)))

    def _write(self, verdict: Verdict) -> None:
        if self._ktap:
            self._ended.append(verdict)
        if self._lines:
            self._lines.write(json_lines.write(verdict))
            self._lines.flush()


def _group_by_file(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """Return a verdict for each file, with the verdicts on its tests as subtests."""
    files: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        file, _, test = verdict.name.partition("::")
        files.setdefault(file, []).append(replace(verdict, name=test))
    return [summarize(file, tests) for file, tests in sorted(files.items())]


def _make_verdict(report: pytest.TestReport) -> Verdict:
    """Return the verdict on a subtest, or on a phase of a test; the latter has no name."""
    note = getattr(report, _NOTE, None)
    if note is None:  # the report comes from pytest-xdist itself: a worker crashed
        return Verdict("", Outcome.NO_VERDICT, report.longreprtext, report.longreprtext)
    outcome = Outcome(note["outcome"])
    return Verdict(
        note.get("name", ""),
        outcome,
        note["reason"],
        # Use the outcome in the note, not the one in the report: after the note was made, pytest
        # turns a test with failed subtests into a failed one.
        report.longreprtext if outcome is not Outcome.PASSED else "",
        cause_of(note["cause"]) if note["cause"] else None,
        note["booted"],
    )


def _adopt_outcome(verdict: Verdict, part: Verdict) -> Verdict:
    """Return the verdict on a test, with the outcome of one of its parts."""
    return replace(
        verdict,
        outcome=part.outcome,
        reason=part.reason,
        text=part.text,
        cause=part.cause,
        booted=part.booted,
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add a note with the outcome to the report on a phase; add the consoles if it failed."""
    report = yield
    error = call.excinfo.value if call.excinfo else None
    outcome = _determine_outcome(report, error)
    failure = _find_exception(error, GuestFailure)
    note: dict[str, Any] = {
        "outcome": outcome.value,
        "reason": _find_reason(report, error),
        "cause": failure.cause.value if failure else None,
        "booted": failure is None or failure.booted,
    }
    if report.when == "call" or report.failed:
        guests = usage.find_logs()
        if item.config.getoption("--pyluo-record"):
            note["guests"] = [asdict(guest) for guest in guests]
        if outcome is Outcome.FAILED:
            _add_consoles(report, guests)
    setattr(report, _NOTE, note)
    item.stash[FAILED] = item.stash.get(FAILED, False) or outcome.bad
    # Replace the guest only after the teardown: a test goes on after a subtest that failed.
    if report.when == "teardown" and item.stash[FAILED]:
        replace_shared(item)
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add the name to the note on a subtest, and remove the guests.

    This is done before pytest-xdist sends the report to the main process, where the values in the
    name would arrive quoted. The report on the test itself, which comes later, has the guests.
    """
    note = getattr(report, _NOTE, None)
    if note is not None and isinstance(report, pytest.SubtestReport):
        note.setdefault("name", _subtest_name(report.context.msg, report.context.kwargs))
        note.pop("guests", None)


def _subtest_name(message: str | None, values: Mapping[str, str]) -> str:
    words = [*filter(None, [message]), *(f"{name}={value}" for name, value in values.items())]
    return ", ".join(words) or "subtest"


def _determine_outcome(report: pytest.TestReport, error: BaseException | None) -> Outcome:
    if report.passed:
        return Outcome.PASSED
    failure = _find_exception(error, GuestFailure)
    # Check this first: if the harness failed in a test that is marked xfail, pytest would report an
    # expected failure. The end of QEMU, which may have been killed because the host ran out of
    # memory, says nothing about the kernel.
    if _find_exception(error, HarnessError) or (failure and failure.cause is Death.QEMU):
        return Outcome.NO_VERDICT
    if report.skipped:
        return Outcome.EXPECTED_FAILURE if hasattr(report, "wasxfail") else Outcome.SKIPPED
    if failure:
        return Outcome.CRASHED
    return Outcome.FAILED if report.when == "call" else Outcome.NO_VERDICT


def _find_reason(report: pytest.TestReport, error: BaseException | None) -> str:
    """Return in one line why a test did not pass; empty if it passed."""
    if report.passed:
        return ""
    text = getattr(report, "wasxfail", "")
    if not text and report.skipped and isinstance(report.longrepr, tuple):
        text = report.longrepr[2]
    text = text or (f"{type(error).__name__}: {error}" if error else report.longreprtext)
    return text.partition("\n")[0][:_REASON_LIMIT]


def _add_consoles(report: pytest.TestReport, guests: list[GuestLog]) -> None:
    for guest in guests:
        lines = guest.console.splitlines()[-_CONSOLE_LINES:]
        report.sections.append((f"The console of a guest ({guest.kernel})", "\n".join(lines)))


def _find_exception(error: BaseException | None, kind: type[E]) -> E | None:
    """Return an exception of this class: the error itself, or the first one in a group."""
    if isinstance(error, BaseExceptionGroup):
        return next(filter(None, (_find_exception(each, kind) for each in error.exceptions)), None)
    return error if isinstance(error, kind) else None
