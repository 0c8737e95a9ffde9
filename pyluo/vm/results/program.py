"""Judge a program that reports in KTAP by its output and by the way in which it ended."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pyluo.vm.results import ktap_reader
from pyluo.vm.results.verdict import Outcome, Verdict, summarize

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyluo.vm.errors import GuestCrash, GuestFailure
    from pyluo.vm.results.ktap_reader import KtapReport, KtapResult

__all__ = ["SKIP_STATUS", "EndedProgram", "judge", "with_failure"]

SKIP_STATUS = 4
"""The exit status of a skipped selftest: tools/testing/selftests/kselftest.h, KSFT_SKIP."""


@dataclass(frozen=True, slots=True)
class EndedProgram:
    """A program that has exited, was killed, or died with its guest.

    Attributes:
        output: what the program wrote to stdout; if it died with its guest, the text of the
            console, which contains messages of the kernel as well.
        ending: how the program ended, in words; empty if it exited with status 0.
        status: the program's exit status; None if the program did not end by itself.
        crash: the guest's death if that ended the program, else None.
        stderr: what the program wrote to stderr, unless it is in `output`.
    """

    output: str
    ending: str
    status: int | None = None
    crash: GuestCrash | None = None
    stderr: str = ""


def judge(name: str, program: EndedProgram) -> Verdict:
    """Return the verdict on a program, with the verdicts on its cases as subtests.

    Args:
        name: the name of the program.
        program: the output of the program, and how it ended.
    """
    report = ktap_reader.parse(program.output)
    verdict = summarize(name, [_judge_result(result) for result in report.results])
    text = "\n".join([*report.diagnostics, *program.stderr.splitlines()])
    faults = [*report.faults, *_unexplained_ending(program, report)]
    if program.crash:
        return with_failure(verdict, program.crash, report.diagnostics)
    if faults:
        return Verdict(
            name,
            Outcome.FAILED,
            "; ".join(faults),
            text,
            subtests=verdict.subtests,
            incomplete=True,
        )
    if report.skipped:
        return Verdict(name, Outcome.SKIPPED, report.skip_reason)
    return replace(verdict, text=text) if verdict.bad and not verdict.text else verdict


def with_failure(
    verdict: Verdict, failure: GuestFailure, diagnostics: Sequence[str] = ()
) -> Verdict:
    """Return the verdict on a program during which the guest died or its kernel complained.

    Args:
        verdict: the verdict on the program without regard to the failure.
        failure: the failure of the guest.
        diagnostics: the last lines of the program, to put into the verdict; if there are none, the
            last lines of the console are used.
    """
    reason = (
        f"{failure.cause.value}: {failure.reason} (kernel {failure.kernel}, life {failure.life})"
    )
    lines = list(diagnostics or failure.console)
    if verdict.incomplete or (verdict.bad and not verdict.subtests):
        # The program had failed by itself before the complaint came to light.
        reason += f"; before that: {verdict.reason}"
        lines = [*verdict.lines, *lines]
    return replace(
        verdict,
        outcome=Outcome.CRASHED,
        reason=reason,
        text="\n".join(lines),
        cause=failure.cause,
        booted=failure.booted,
        incomplete=True,
    )


def _judge_result(result: KtapResult, excuse: str = "") -> Verdict:
    """Return the verdict on a test, with the verdicts on its subtests.

    Args:
        result: the result of the test.
        excuse: why a failure does not count: the test belongs to a test that was skipped or was
            expected to fail. Empty if a failure counts.
    """
    # kselftest.h writes the name of a skipped test in the place of the reason.
    name = result.name or result.reason or str(result.number)
    outcome, reason = result.outcome, result.reason
    if outcome in (Outcome.SKIPPED, Outcome.EXPECTED_FAILURE):
        excuse = excuse or f"{'skip' if outcome is Outcome.SKIPPED else 'xfail'} of {name}"
    elif result.failed and excuse:
        outcome, reason = Outcome.EXPECTED_FAILURE, f"{excuse}; {reason}" if reason else excuse
    elif result.failed and outcome is not Outcome.FAILED:
        fault = _explain_failure(result)
        outcome, reason = Outcome.FAILED, f"{fault}; {reason}" if reason else fault
    assert outcome is not None  # a missing result counts as failed
    subtests = result.subtests.results if result.subtests else ()
    later = result.subtests.diagnostics if result.subtests else ()
    return Verdict(
        name,
        outcome,
        reason,
        "\n".join([*later, *result.diagnostics]),
        subtests=tuple(_judge_result(each, excuse) for each in subtests),
    )


def _explain_failure(result: KtapResult) -> str:
    """Return why a test counts as failed although its result line does not say so."""
    if result.outcome is None:
        return "it reported no result itself"
    faults = result.subtests.faults if result.subtests else ()
    return "; ".join(faults) or "a subtest failed"


def _unexplained_ending(program: EndedProgram, report: KtapReport) -> list[str]:
    """Return how the program ended, unless its report explains that; a list of one or none."""
    untested = all(result.outcome is Outcome.SKIPPED for result in report.results)
    explained = (program.status == 1 and report.failed) or (
        program.status == SKIP_STATUS and untested
    )
    return [] if explained or not program.ending else [program.ending]
