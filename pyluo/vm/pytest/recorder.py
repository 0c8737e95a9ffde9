"""Part of the pytest plugin: what came of each test, with what became of its guests.

A test that failed is shown with the consoles of its guests. ``--pyluo-record FILE`` writes a line
of JSON for each test, which `read` reads; ``--pyluo-ktap FILE`` the verdicts.
"""

from __future__ import annotations

import enum
import json
from dataclasses import asdict, dataclass, replace
from typing import IO, TYPE_CHECKING, Any, TypeVar

import pytest

from pyluo.vm.errors import Death, GuestCrash, HarnessError
from pyluo.vm.machine.timeline import Event, GuestLog, Jump, Timeline
from pyluo.vm.machine.usage import usage
from pyluo.vm.pytest.fixtures import FAILED, replace_shared

if TYPE_CHECKING:
    import os
    from collections.abc import Generator, Mapping

__all__ = ["FAILURES", "Outcome", "Record", "Subtest", "read"]

E = TypeVar("E", bound=BaseException)

_CONSOLE_LINES = 60
_REASON = 200  # characters of a line that says why
_UNENDED = "it was not run to its end"
_NOTE = "pyluo_record"  # of a report: what this module adds to it, as data
_before_key = pytest.StashKey[dict[int, int]]()


class Outcome(enum.Enum):
    """What came of a test. Only the first three are its own verdict, or the guest's."""

    PASSED = "passed"
    FAILED = "failed"
    CRASHED = "crashed"
    EXPECTED_FAILURE = "xfailed"
    SKIPPED = "skipped"
    ERROR = "error"


FAILURES = frozenset({Outcome.FAILED, Outcome.CRASHED})
_WORST = (Outcome.CRASHED, Outcome.FAILED, Outcome.ERROR)  # the rest is not bad


@dataclass(frozen=True, slots=True)
class Subtest:
    """What came of a part of a test that told it by itself.

    Attributes:
        name: its message and its keyword arguments, as in "mmap" and "number=1".
        outcome: as that of a test.
        reason: why, in a line; empty if it passed.
        text: all that there is to say of a failure.
        death: what a guest died of in it, or its kernel complained of.
        booted: whether that guest had ever spoken.
    """

    name: str
    outcome: Outcome
    reason: str = ""
    text: str = ""
    death: Death | None = None
    booted: bool = True


@dataclass(frozen=True, slots=True)
class Record:
    """What came of a test.

    Attributes:
        test: pytest's node id.
        outcome: CRASHED if a guest died or its kernel complained; ERROR if the harness, a fixture
            or pytest could not do its work, which is no verdict on anything.
        seconds: that it took, setup and teardown included.
        reason: why, in a line; empty if it passed.
        text: all that there is to say of a failure.
        guests: those that it used.
        death: what a guest died of, or its kernel complained of, if that ended the test.
        booted: whether that guest had ever spoken.
        subtests: what it told of its parts. If one of them is bad, so is the test.
    """

    test: str
    outcome: Outcome
    seconds: float = 0.0
    reason: str = ""
    text: str = ""
    guests: tuple[GuestLog, ...] = ()
    death: Death | None = None
    booted: bool = True
    subtests: tuple[Subtest, ...] = ()

    @property
    def bad(self) -> bool:
        """Whether the run fails by it."""
        return self.outcome in _WORST

    def data(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self, dict_factory=_plain)


def read(path: str | os.PathLike[str]) -> list[Record]:
    """The records of a run; one that was cut short has those that were written by then."""
    with open(path, encoding="utf-8") as file:
        return [_record(json.loads(line)) for line in file if line.endswith("\n")]


def _plain(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: each.value if isinstance(each, enum.Enum) else each for name, each in fields}


def _record(data: dict[str, Any]) -> Record:
    guests = tuple(_guest(each) for each in data["guests"])
    subtests = tuple(Subtest(**each | _enums(each)) for each in data["subtests"])
    return Record(**data | _enums(data) | {"guests": guests, "subtests": subtests})


def _enums(data: dict[str, Any]) -> dict[str, Any]:
    death = Death(data["death"]) if data["death"] else None
    return {"outcome": Outcome(data["outcome"]), "death": death}


def _guest(data: dict[str, Any]) -> GuestLog:
    return GuestLog(data["kernel"], tuple(_jump(each) for each in data["jumps"]), data["console"])


def _jump(data: dict[str, Any]) -> Jump:
    events = tuple(Event(each["name"], each["at"]) for each in data["timeline"]["events"])
    return Jump(**data | {"timeline": Timeline(data["timeline"]["started"], events)})


def pytest_configure(config: pytest.Config) -> None:
    """Begins to record, unless this is a worker, whose reports go home."""
    if hasattr(config, "workerinput"):
        return
    record, ktap = (_opened(config, option) for option in ("--pyluo-record", "--pyluo-ktap"))
    if record or ktap:
        config.pluginmanager.register(_Recorder(record, ktap), "pyluo-recorder")


def _opened(config: pytest.Config, option: str) -> IO[str] | None:
    try:
        # Half of a surrogate pair, as of a file's name, could be printed nowhere.
        path = config.getoption(option)
        return open(path, "w", encoding="utf-8", errors="replace") if path else None
    except OSError as error:
        raise pytest.UsageError(f"{option}: {error}") from None


class _Recorder:
    """A plugin that writes a record when all phases of a test have been reported.

    Args:
        lines: where to.
        ktap: where the verdicts on all tests go in the end.
    """

    def __init__(self, lines: IO[str] | None, ktap: IO[str] | None) -> None:
        self._lines = lines
        self._ktap = ktap
        self._records: dict[str, Record] = {}
        self._ended: list[Record] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Adds a phase or a subtest; what went wrong first counts."""
        record = self._records.get(report.nodeid, Record(report.nodeid, Outcome.PASSED))
        told = _told(report)
        if isinstance(report, pytest.SubtestReport):
            record = replace(record, subtests=(*record.subtests, told))
        else:
            record = replace(record, seconds=record.seconds + report.duration)
            if told.outcome is not Outcome.PASSED and not record.bad:
                record = _taking(record, told)
            if not record.bad:
                record = _with_subtests(record)
            if guests := getattr(report, _NOTE, {}).get("guests"):
                record = replace(record, guests=tuple(map(_guest, guests)))
        self._records[report.nodeid] = record

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Writes the record."""
        if record := self._records.pop(nodeid, None):
            self._write(record)

    def pytest_unconfigure(self) -> None:
        """Writes what was begun and not ended."""
        for record in self._records.values():
            if not record.bad:
                record = replace(record, outcome=Outcome.ERROR, reason=_UNENDED)
            self._write(record)
        if self._lines:
            self._lines.close()
        if self._ktap:
            from pyluo.vm.results import ktap_writer, recorded

            with self._ktap as file:
                file.write(ktap_writer.write(recorded.by_file(self._ended)))

    def _write(self, record: Record) -> None:
        if self._ktap:
            self._ended.append(record)
        if self._lines:
            self._lines.write(json.dumps(record.data(), ensure_ascii=False) + "\n")
            self._lines.flush()


def _told(report: pytest.TestReport) -> Subtest:
    """What came of a subtest, or of a phase of a test, which has no name."""
    note = getattr(report, _NOTE, None)
    if note is None:  # it is pytest-xdist that reports: a worker is gone
        return Subtest("", Outcome.ERROR, report.longreprtext, report.longreprtext)
    death = Death(note["death"]) if note["death"] else None
    outcome = Outcome(note["outcome"])
    # Of a test with subtests that failed, pytest makes one that failed, later than the note.
    text = report.longreprtext if outcome is not Outcome.PASSED else ""
    return Subtest(note.get("name", ""), outcome, note["reason"], text, death, note["booted"])


def _with_subtests(record: Record) -> Record:
    """With what the worst subtest came to, if that is bad."""
    bad = [each for each in record.subtests if each.outcome in _WORST]
    if not bad:
        return record
    worst = min(bad, key=lambda each: _WORST.index(each.outcome))
    return _taking(record, replace(worst, reason=f"{worst.name}: {worst.reason}"))


def _taking(record: Record, told: Subtest) -> Record:
    return replace(
        record,
        outcome=told.outcome,
        reason=told.reason,
        text=told.text,
        death=told.death,
        booted=told.booted,
    )


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """From now on guests are this test's."""
    usage.ended = []
    item.stash[_before_key] = {id(guest): guest.requests for guest in usage.running}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Notes what came of a phase of a test, and shows the consoles of its guests if it failed."""
    report = yield
    error = call.excinfo.value if call.excinfo else None
    outcome = _outcome(report, error)
    crash = _find(error, GuestCrash)
    note: dict[str, Any] = {
        "outcome": outcome.value,
        "reason": _reason(report, error),
        "death": crash.death.value if crash else None,
        "booted": crash is None or crash.booted,
    }
    if report.when == "call" or report.failed:
        guests = _guests(item)
        if item.config.getoption("--pyluo-record"):
            note["guests"] = [asdict(guest) for guest in guests]
        if outcome is Outcome.FAILED:
            _show(report, guests)
    setattr(report, _NOTE, note)
    item.stash[FAILED] = item.stash.get(FAILED, False) or outcome in _WORST
    # Not before: after a subtest that failed, the test goes on.
    if report.when == "teardown" and item.stash[FAILED]:
        replace_shared(item)
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Notes the name of a subtest, which a worker's reports get quoted once more on their way.

    Its guests are those of the test that it belongs to, whose report comes later.
    """
    if isinstance(report, pytest.SubtestReport):
        note = getattr(report, _NOTE)
        note.setdefault("name", _name(report.context.msg, report.context.kwargs))
        note.pop("guests", None)


def _name(message: str | None, values: Mapping[str, str]) -> str:
    words = [*filter(None, [message]), *(f"{name}={value}" for name, value in values.items())]
    return ", ".join(words) or "subtest"


def _guests(item: pytest.Item) -> list[GuestLog]:
    """Those that a test made, or asked for something."""
    before = item.stash.get(_before_key, {})
    used = [guest for guest in usage.running if guest.requests != before.get(id(guest))]
    return [*(usage.ended or ()), *(guest.log for guest in used)]


def _outcome(report: pytest.TestReport, error: BaseException | None) -> Outcome:
    if report.passed:
        return Outcome.PASSED
    crash = _find(error, GuestCrash)
    # First, since to pytest a test that is expected to fail may fail of anything, setup included.
    # And a QEMU that ended, or was killed where memory was short, says nothing of the kernel.
    if _find(error, HarnessError) or (crash and crash.death is Death.QEMU):
        return Outcome.ERROR
    if report.skipped:
        return Outcome.EXPECTED_FAILURE if hasattr(report, "wasxfail") else Outcome.SKIPPED
    if crash:
        return Outcome.CRASHED
    return Outcome.FAILED if report.when == "call" else Outcome.ERROR


def _reason(report: pytest.TestReport, error: BaseException | None) -> str:
    """Why a test did not pass, in a line."""
    if report.passed:
        return ""
    text = getattr(report, "wasxfail", "")
    if not text and report.skipped and isinstance(report.longrepr, tuple):
        text = report.longrepr[2]
    text = text or (f"{type(error).__name__}: {error}" if error else report.longreprtext)
    return text.partition("\n")[0][:_REASON]


def _show(report: pytest.TestReport, guests: list[GuestLog]) -> None:
    for guest in guests:
        lines = guest.console.splitlines()[-_CONSOLE_LINES:]
        report.sections.append((f"The console of a guest ({guest.kernel})", "\n".join(lines)))


def _find(error: BaseException | None, kind: type[E]) -> E | None:
    """An exception of a kind: this one, or one of the group that this is."""
    if isinstance(error, BaseExceptionGroup):
        return next(filter(None, (_find(each, kind) for each in error.exceptions)), None)
    return error if isinstance(error, kind) else None
