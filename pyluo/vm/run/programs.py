"""Runs the kernel's selftests in guests, and says what came of each test."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING

from pyluo.errors import LuoError
from pyluo.vm import progress
from pyluo.vm.errors import GuestCrash, HarnessError
from pyluo.vm.results import ktap_reader
from pyluo.vm.results.ktap_reader import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from pyluo.vm.machine.vm import VM
    from pyluo.vm.run.selftests import Program

__all__ = ["Verdict", "by_program", "of", "passed", "run"]

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
        subtests: of which it is made. None of them has failed if it was skipped, or was expected
            to fail.
        no_verdict: whether it failed of what says nothing of the kernel.
    """

    program: str
    case: str
    outcome: Outcome
    reason: str = ""
    diagnostics: tuple[str, ...] = ()
    crash: GuestCrash | None = None
    subtests: tuple[Verdict, ...] = ()
    no_verdict: bool = False

    @property
    def failed(self) -> bool:
        """Whether the run as a whole fails by it."""
        return self.outcome is Outcome.FAILED

    @property
    def error(self) -> str:
        """What it failed of, if not of itself: "no verdict", or a guest's death."""
        if self.no_verdict:
            return "no verdict"
        return self.crash.death.value if self.crash else ""

    def innermost(self) -> Iterator[Verdict]:
        """The tests that are made of no others, by their whole names, "outer / inner".

        And itself after them, if it failed of something else than they.
        """
        told = [
            replace(verdict, case=f"{self.case} / {verdict.case}")
            for subtest in self.subtests
            for verdict in subtest.innermost()
        ]
        yield from told
        if not told or (self.failed and self.error not in [v.error for v in told if v.failed]):
            yield replace(self, subtests=())


def passed(verdicts: Sequence[Verdict]) -> bool:
    """Whether no test failed, and at least one passed: a run that tested nothing proves nothing."""
    tests = [test for verdict in verdicts for test in verdict.innermost()]
    failed = any(test.failed for test in tests)
    return not failed and any(test.outcome is Outcome.PASSED for test in tests)


def by_program(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """One verdict a program, named after it and made of those on its cases."""
    return [_summed_up(name, list(told)) for name, told in groupby(verdicts, lambda v: v.program)]


def _summed_up(program: str, verdicts: list[Verdict]) -> Verdict:
    cases = tuple(verdict for verdict in verdicts if verdict.case)
    whole = next((verdict for verdict in verdicts if not verdict.case), None)
    outcomes = {verdict.outcome for verdict in verdicts}
    outcome = outcomes.pop() if len(outcomes) == 1 else Outcome.PASSED
    if any(verdict.failed for verdict in verdicts):
        outcome = Outcome.FAILED
    if whole is None:
        return Verdict(program, program, outcome, subtests=cases)
    return replace(whole, case=program, outcome=outcome, subtests=cases)


def of(vm: VM, command: Sequence[str | os.PathLike[str]], timeout: float) -> list[Verdict]:
    """Runs a program that reports in KTAP in a guest, and gives its verdicts.

    Args:
        vm: which runs on, unless the program is its death: that is the last verdict's `crash`.
        command: the program and its arguments.
        timeout: in seconds.

    Raises:
        HarnessError: the guest cannot run the program.
    """
    words = [os.fspath(word) for word in command]
    return _judge(os.path.basename(words[0]), _run(vm, words, timeout))


def run(
    programs: Sequence[Program], boot: Callable[[], VM], *, timeout: float
) -> Iterator[Verdict]:
    """Runs each program in a guest of its own, and gives its verdicts when it has ended.

    Args:
        programs: to run.
        boot: makes a guest, which knows where staged programs jump.
        timeout: in seconds, of each program, and of each stage.

    Raises:
        HarnessError: a guest could not be started, or cannot run the program.
    """
    for number, program in enumerate(programs, 1):
        with progress.bar(f"{program.name}, {number} of {len(programs)}", None) as reached:
            verdicts = _attend(program, boot, timeout, reached)
        yield from verdicts


def _attend(
    program: Program,
    boot: Callable[[], VM],
    timeout: float,
    reached: progress.Reached,
) -> list[Verdict]:
    verdicts: list[Verdict] = []
    try:
        with boot() as vm:
            if program.staged:
                verdicts = [_run_stages(vm, program, timeout)]
            else:
                with _followed(vm, reached):
                    ended = _run(vm, [str(program.path)], timeout)
                verdicts = _judge(program.name, ended)
    except GuestCrash as crash:
        # It may come of the last look at the kernel, when all has been judged.
        return [*verdicts, _crashed(program.name, crash, crash.console)]
    return verdicts


@contextmanager
def _followed(vm: VM, reached: progress.Reached) -> Iterator[None]:
    """Shows how many results have come, by the console: the program's own words come at its end."""
    heard = len(vm.console)
    ended = threading.Event()

    def follow() -> None:
        while not ended.wait(_GLANCE):
            report = ktap_reader.parse(vm.console[heard:])
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
    startable = shutil.which(command[0])  # the guest's files are the host's
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
    report = ktap_reader.parse(ended.text)
    verdicts = [_verdict(name, result) for result in report.results]
    faults = [*report.faults, *_unexplained(ended, report)]
    if ended.crash:
        verdicts.append(_crashed(name, ended.crash, report.diagnostics))
    elif faults:
        verdicts.append(Verdict(name, "", Outcome.FAILED, "; ".join(faults), report.diagnostics))
    elif report.skipped:
        verdicts.append(Verdict(name, "", Outcome.SKIPPED, report.skip_reason))
    return verdicts


def _verdict(program: str, result: ktap_reader.Result, excuse: str = "") -> Verdict:
    """The verdict on a result, and on those that it is made of.

    Args:
        program: the name of the program.
        result: of it.
        excuse: why it does not matter if it failed, as of the test that it belongs to.
    """
    # kselftest.h writes the name of a skipped test where its reason belongs.
    case = result.name or result.reason or str(result.number)
    outcome, reason = result.outcome, result.reason
    if outcome in (Outcome.SKIPPED, Outcome.EXPECTED_FAILURE):
        excuse = excuse or f"{outcome.value} of {case}"
    elif result.failed and excuse:
        outcome, reason = Outcome.EXPECTED_FAILURE, f"{excuse}; {reason}" if reason else excuse
    elif result.failed and outcome is not Outcome.FAILED:
        told = _fault(result)
        outcome, reason = Outcome.FAILED, f"{told}; {reason}" if reason else told
    subtests = result.subtests.results if result.subtests else ()
    within = tuple(_verdict(program, each, excuse) for each in subtests)
    said = (*(result.subtests.diagnostics if result.subtests else ()), *result.diagnostics)
    return Verdict(program, case, outcome, reason, said, subtests=within)


def _fault(result: ktap_reader.Result) -> str:
    """Why a test failed that did not say so itself."""
    if result.outcome is Outcome.MISSING:
        return "it said nothing itself"
    faults = result.subtests.faults if result.subtests else ()
    return "; ".join(faults) or "a subtest failed"


def _unexplained(ended: _Ended, report: ktap_reader.Report) -> list[str]:
    """How the program ended, where its report does not account for it."""
    untested = all(result.outcome is Outcome.SKIPPED for result in report.results)
    accounted = (ended.status == 1 and report.failed) or (ended.status == _SKIPPED and untested)
    return [] if accounted or not ended.how else [ended.how]


def _run_stages(vm: VM, program: Program, timeout: float) -> Verdict:
    """A verdict on both stages. All that they report is their exit status."""
    for stage in (1, 2):
        if stage == 2:
            try:
                vm.live_update()
            except LuoError as error:
                return Verdict(program.name, "", Outcome.FAILED, f"no live update: {error}")
        ended = _run(vm, [str(program.path), "-s", str(stage)], timeout)
        report = ktap_reader.parse(ended.text)
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
