"""Runs the kernel's selftests in guests, and says what came of each test."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyluo.errors import LuoError
from pyluo.vm import ktap, progress
from pyluo.vm.errors import GuestCrash, HarnessError
from pyluo.vm.ktap import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from pyluo.vm.selftests import Program
    from pyluo.vm.vm import VM

__all__ = ["Verdict", "passed", "run"]

_SKIPPED = 4  # tools/testing/selftests/kselftest.h, KSFT_SKIP
_NOT_RUNNABLE, _NOT_FOUND, _SIGNALLED = 126, 127, 128  # as shells have it
_GLANCE = 0.5  # seconds between looks at how far a program is
# What a program says also goes to the console, which outlives the guest; at once, since what it
# says last before it brings the kernel down tells the most. Its very last words may still be lost.
_RELAY = ["bash", "-o", "pipefail", "-c", '"$@" 2>&1 | chrt --fifo 1 tee /dev/console', "bash"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of one test.

    Attributes:
        program: the name of the test program.
        case: the name of the test in it; empty for the program as a whole.
        outcome: never MISSING: that is a failure.
        reason: why, unless it passed.
        diagnostics: what the program said about it.
        crash: the guest's death, if that ended it.
    """

    program: str
    case: str
    outcome: Outcome
    reason: str = ""
    diagnostics: tuple[str, ...] = ()
    crash: GuestCrash | None = None

    @property
    def failed(self) -> bool:
        """Whether the run as a whole fails by it."""
        return self.outcome is Outcome.FAILED


def passed(verdicts: Sequence[Verdict]) -> bool:
    """Whether no test failed, and at least one passed: a run that tested nothing proves nothing."""
    failed = any(verdict.failed for verdict in verdicts)
    return not failed and any(verdict.outcome is Outcome.PASSED for verdict in verdicts)


def run(
    programs: Sequence[Program], boot: Callable[[], VM], *, to: str | None = None, timeout: float
) -> Iterator[Verdict]:
    """Runs each program in a guest of its own, and gives its verdicts when it has ended.

    Args:
        programs: to run.
        boot: makes a guest.
        to: the kernel that staged programs jump into; without it, the one that runs.
        timeout: in seconds, of each program, and of each stage.

    Raises:
        HarnessError: a guest could not be started, or cannot run the program.
    """
    for number, program in enumerate(programs, 1):
        with progress.bar(f"{program.name}, {number} of {len(programs)}", None) as reached:
            verdicts = _attend(program, boot, to, timeout, reached)
        yield from verdicts


def _attend(
    program: Program,
    boot: Callable[[], VM],
    to: str | None,
    timeout: float,
    reached: progress.Reached,
) -> list[Verdict]:
    try:
        with boot() as vm:
            if program.staged:
                return [_run_stages(vm, program, to, timeout)]
            with _followed(vm, reached):
                ended = _run(vm, [str(program.path)], timeout)
            return _judge(program.name, ended)
    except GuestCrash as crash:
        return [_crashed(program.name, crash, crash.console)]


@contextmanager
def _followed(vm: VM, reached: progress.Reached) -> Iterator[None]:
    """Shows how many results have come, by the console: the program's own words come at its end."""
    heard = len(vm.console)
    ended = threading.Event()

    def follow() -> None:
        while not ended.wait(_GLANCE):
            report = ktap.parse(vm.console[heard:])
            reached(len(report.results), report.planned)

    follower = threading.Thread(target=follow, name="pyluo-progress", daemon=True)
    follower.start()
    try:
        yield
    finally:
        ended.set()
        follower.join()


@dataclass(frozen=True, slots=True)
class _Ended:
    """A program that has ended, one way or another.

    Attributes:
        text: what it said; mixed with what the kernel said, if it did not end by itself.
        how: it ended, if not by itself and with exit status 0.
        status: of its exit; None if it did not end by itself.
        crash: the guest's death.
    """

    text: str
    how: str
    status: int | None = None
    crash: GuestCrash | None = None


def _run(vm: VM, command: list[str], timeout: float) -> _Ended:
    heard = len(vm.console)
    try:
        done = vm.run([*_RELAY, *command], timeout)
    except GuestCrash as crash:
        return _Ended(vm.console[heard:], "the guest crashed", crash=crash)
    except subprocess.TimeoutExpired:
        return _Ended(vm.console[heard:], f"it still ran after {timeout:g} s")
    startable = os.access(command[0], os.X_OK)  # the guest's files are the host's
    if done.returncode in (_NOT_RUNNABLE, _NOT_FOUND) and not startable:
        raise HarnessError(f"the guest cannot run {command[0]}", done.stderr.decode().strip())
    how = _ending(done.returncode)
    return _Ended(done.stdout.decode(errors="replace"), how, done.returncode)


def _ending(status: int) -> str:
    try:
        return f"killed by {signal.Signals(status - _SIGNALLED).name}"
    except ValueError:
        return f"exit status {status}" if status else ""


def _judge(name: str, ended: _Ended) -> list[Verdict]:
    """The verdicts of a program that reports in KTAP: one a test, and one on what else is wrong."""
    report = ktap.parse(ended.text)
    verdicts = [_verdict(name, result) for result in report.results]
    faults = [*report.faults, *_unexplained(ended, report)]
    if ended.crash:
        verdicts.append(_crashed(name, ended.crash, report.diagnostics))
    elif faults:
        verdicts.append(Verdict(name, "", Outcome.FAILED, "; ".join(faults), report.diagnostics))
    elif report.skipped:
        verdicts.append(Verdict(name, "", Outcome.SKIPPED, report.skip_reason))
    return verdicts


def _verdict(program: str, result: ktap.Result) -> Verdict:
    outcome, reason = result.outcome, result.reason
    if result.failed and outcome is not Outcome.FAILED:
        told = "it said nothing itself" if outcome is Outcome.MISSING else "a subtest failed"
        outcome, reason = Outcome.FAILED, f"{told}; {reason}" if reason else told
    # kselftest.h writes the name of a skipped test where its reason belongs.
    case = result.name or result.reason or str(result.number)
    return Verdict(program, case, outcome, reason, result.diagnostics)


def _unexplained(ended: _Ended, report: ktap.Report) -> list[str]:
    """How the program ended, where its report does not account for it."""
    untested = all(result.outcome is Outcome.SKIPPED for result in report.results)
    accounted = (ended.status == 1 and report.failed) or (ended.status == _SKIPPED and untested)
    return [] if accounted or not ended.how else [ended.how]


def _run_stages(vm: VM, program: Program, to: str | None, timeout: float) -> Verdict:
    """A verdict on both stages. All that they report is their exit status."""
    for stage in (1, 2):
        if stage == 2:
            try:
                vm.live_update(to)
            except LuoError as error:
                return Verdict(program.name, "", Outcome.FAILED, f"no live update: {error}")
        ended = _run(vm, [str(program.path), "-s", str(stage)], timeout)
        report = ktap.parse(ended.text)
        if ended.crash:
            return _crashed(program.name, ended.crash, report.diagnostics)
        # After the jump there is no excuse: the session was handed over.
        if ended.status == _SKIPPED and stage == 1:
            return Verdict(program.name, "", Outcome.SKIPPED, report.skip_reason)
        if ended.how:
            reason = "; ".join([f"stage {stage}", *filter(None, [report.bailed_out]), ended.how])
            return Verdict(program.name, "", Outcome.FAILED, reason, report.diagnostics)
    return Verdict(program.name, "", Outcome.PASSED)


def _crashed(program: str, crash: GuestCrash, said: tuple[str, ...]) -> Verdict:
    reason = f"{crash.death.value}: {crash.reason} (kernel {crash.kernel}, life {crash.life})"
    return Verdict(program, "", Outcome.FAILED, reason, said or crash.console, crash)
