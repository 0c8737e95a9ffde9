"""Record the verdict on each test, with what its guests left behind.

``--pyluo-record FILE`` writes them as lines of JSON, which `pyluo.vm.results.json_lines` reads;
``--pyluo-ktap FILE`` writes them in KTAP. A test that failed is shown with the consoles of its
guests.
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

__all__: list[str] = []

E = TypeVar("E", bound=BaseException)

_CONSOLE_LINES = 60
_REASON_LIMIT = 200  # characters of the line that says why
_UNENDED = "it was not run to its end"
_NOTE = "pyluo_record"  # the attribute of a report that holds what this module adds to it, as data
_requests_key = pytest.StashKey[dict[int, int]]()


def pytest_configure(config: pytest.Config) -> None:
    """Begin to record, but not in a worker of pytest-xdist: the main process gets its reports."""
    if hasattr(config, "workerinput"):
        return
    record, ktap = (_open(config, option) for option in ("--pyluo-record", "--pyluo-ktap"))
    if record or ktap:
        config.pluginmanager.register(_Recorder(record, ktap), "pyluo-recorder")


def _open(config: pytest.Config, option: str) -> IO[str] | None:
    try:
        # Half of a surrogate pair, as a file's name may contain, can be printed nowhere.
        path = config.getoption(option)
        return open(path, "w", encoding="utf-8", errors="replace") if path else None
    except OSError as error:
        raise pytest.UsageError(f"{option}: {error}") from None


class _Recorder:
    """A plugin that writes the verdict on a test once all its phases have been reported.

    Args:
        lines: the file for lines of JSON.
        ktap: the file for the verdicts on all tests in KTAP, written at the end.
    """

    def __init__(self, lines: IO[str] | None, ktap: IO[str] | None) -> None:
        self._lines = lines
        self._ktap = ktap
        self._begun: dict[str, Verdict] = {}
        self._ended: list[Verdict] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add a phase or a subtest to the verdict; what went wrong first counts."""
        verdict = self._begun.get(report.nodeid, Verdict(report.nodeid, Outcome.PASSED))
        part = _verdict_on_part(report)
        if isinstance(report, pytest.SubtestReport):
            verdict = replace(verdict, subtests=(*verdict.subtests, part))
        else:
            verdict = replace(verdict, seconds=verdict.seconds + report.duration)
            if part.outcome is not Outcome.PASSED and not verdict.bad:
                verdict = _take_over(verdict, part)
            if not verdict.bad and worst_of(verdict.subtests):
                verdict = _take_over(verdict, summarize(verdict.name, verdict.subtests))
            if guests := getattr(report, _NOTE, {}).get("guests"):
                verdict = replace(verdict, guests=tuple(map(json_lines.guest_from_data, guests)))
        self._begun[report.nodeid] = verdict

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Write the verdict."""
        if verdict := self._begun.pop(nodeid, None):
            self._write(verdict)

    def pytest_unconfigure(self) -> None:
        """Write the verdicts on tests that were begun and not ended."""
        for verdict in self._begun.values():
            if not verdict.bad:
                verdict = replace(verdict, outcome=Outcome.NO_VERDICT, reason=_UNENDED)
            self._write(verdict)
        if self._lines:
            self._lines.close()
        if self._ktap:
            with self._ktap as file:
                file.write(ktap_writer.write(_by_file(self._ended)))

    def _write(self, verdict: Verdict) -> None:
        if self._ktap:
            self._ended.append(verdict)
        if self._lines:
            self._lines.write(json_lines.write(verdict))
            self._lines.flush()


def _by_file(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """Return a verdict for each file, made of those on its tests, whatever their order."""
    files: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        file, _, test = verdict.name.partition("::")
        files.setdefault(file, []).append(replace(verdict, name=test))
    return [summarize(file, tests) for file, tests in sorted(files.items())]


def _verdict_on_part(report: pytest.TestReport) -> Verdict:
    """Return the verdict on a subtest, or on a phase of a test, which has no name."""
    note = getattr(report, _NOTE, None)
    if note is None:  # pytest-xdist itself reports: a worker is gone
        return Verdict("", Outcome.NO_VERDICT, report.longreprtext, report.longreprtext)
    outcome = Outcome(note["outcome"])
    return Verdict(
        note.get("name", ""),
        outcome,
        note["reason"],
        # pytest makes a test with failed subtests fail later than the note was taken.
        report.longreprtext if outcome is not Outcome.PASSED else "",
        cause_of(note["cause"]) if note["cause"] else None,
        note["booted"],
    )


def _take_over(verdict: Verdict, part: Verdict) -> Verdict:
    """Return a test's verdict with what a part of the test came to."""
    return replace(
        verdict,
        outcome=part.outcome,
        reason=part.reason,
        text=part.text,
        cause=part.cause,
        booted=part.booted,
    )


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Count the guests that are used from now on as this test's."""
    usage.ended = []
    item.stash[_requests_key] = {id(guest): guest.requests for guest in usage.running}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note the outcome of a phase of a test, and show its guests' consoles if it failed."""
    report = yield
    error = call.excinfo.value if call.excinfo else None
    outcome = _outcome(report, error)
    failure = _find(error, GuestFailure)
    note: dict[str, Any] = {
        "outcome": outcome.value,
        "reason": _reason(report, error),
        "cause": failure.cause.value if failure else None,
        "booted": failure is None or failure.booted,
    }
    if report.when == "call" or report.failed:
        guests = _guests(item)
        if item.config.getoption("--pyluo-record"):
            note["guests"] = [asdict(guest) for guest in guests]
        if outcome is Outcome.FAILED:
            _add_consoles(report, guests)
    setattr(report, _NOTE, note)
    item.stash[FAILED] = item.stash.get(FAILED, False) or outcome.bad
    # Not before the teardown: the test goes on after a subtest that failed.
    if report.when == "teardown" and item.stash[FAILED]:
        replace_shared(item)
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note the name of a subtest here, since values in reports of workers arrive quoted.

    The guests of a subtest are those of its test, whose own report comes later.
    """
    if isinstance(report, pytest.SubtestReport):
        note = getattr(report, _NOTE)
        note.setdefault("name", _subtest_name(report.context.msg, report.context.kwargs))
        note.pop("guests", None)


def _subtest_name(message: str | None, values: Mapping[str, str]) -> str:
    words = [*filter(None, [message]), *(f"{name}={value}" for name, value in values.items())]
    return ", ".join(words) or "subtest"


def _guests(item: pytest.Item) -> list[GuestLog]:
    """Return the logs of the guests that a test booted or sent requests to."""
    before = item.stash.get(_requests_key, {})
    used = [guest for guest in usage.running if guest.requests != before.get(id(guest))]
    return [*(usage.ended or ()), *(guest.log for guest in used)]


def _outcome(report: pytest.TestReport, error: BaseException | None) -> Outcome:
    if report.passed:
        return Outcome.PASSED
    failure = _find(error, GuestFailure)
    # This comes first, because an expected failure may be of any kind to pytest, setup included.
    # A QEMU that ended, or was killed when memory was short, says nothing about the kernel.
    if _find(error, HarnessError) or (failure and failure.cause is Death.QEMU):
        return Outcome.NO_VERDICT
    if report.skipped:
        return Outcome.EXPECTED_FAILURE if hasattr(report, "wasxfail") else Outcome.SKIPPED
    if failure:
        return Outcome.CRASHED
    return Outcome.FAILED if report.when == "call" else Outcome.NO_VERDICT


def _reason(report: pytest.TestReport, error: BaseException | None) -> str:
    """Return why a test did not pass, in a line."""
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


def _find(error: BaseException | None, kind: type[E]) -> E | None:
    """Return the exception if it is of a kind, or the first one of that kind in a group."""
    if isinstance(error, BaseExceptionGroup):
        return next(filter(None, (_find(each, kind) for each in error.exceptions)), None)
    return error if isinstance(error, kind) else None
