"""Judge a program that reports in KTAP, by its output and by how it ended."""

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
"""The exit status of a test that was skipped: tools/testing/selftests/kselftest.h, KSFT_SKIP."""


@dataclass(frozen=True, slots=True)
class EndedProgram:
    """A program that has ended, one way or another.

    Attributes:
        output: what it printed; mixed with what the kernel printed, if it did not end by itself.
        ending: how it ended; empty if it exited with status 0.
        status: its exit status; None if it did not end by itself.
        crash: the guest's death, if that ended the program.
    """

    output: str
    ending: str
    status: int | None = None
    crash: GuestCrash | None = None


def judge(name: str, program: EndedProgram) -> Verdict:
    """Return the verdict on a program, made of those on its cases.

    Args:
        name: the name of the program.
        program: how it ended, and what it printed.
    """
    report = ktap_reader.parse(program.output)
    verdict = summarize(name, [_judge_result(result) for result in report.results])
    text = "\n".join(report.diagnostics)
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
    return verdict


def with_failure(
    verdict: Verdict, failure: GuestFailure, diagnostics: Sequence[str] = ()
) -> Verdict:
    """Return a program's verdict, changed because the guest died or its kernel complained.

    Args:
        verdict: the verdict without the failure.
        failure: what the guest died of, or its kernel complained of.
        diagnostics: what the program printed last; without it, the console's last lines are shown.
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
    """Return the verdict on a result, made of those on its subtests.

    Args:
        result: the result.
        excuse: why it does not matter if the test failed: it is part of one that was skipped, or
            was expected to fail.
    """
    # kselftest.h writes the name of a skipped test where its reason belongs.
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
    """Return why a test failed whose own line does not say that it did."""
    if result.outcome is None:
        return "it reported no result itself"
    faults = result.subtests.faults if result.subtests else ()
    return "; ".join(faults) or "a subtest failed"


def _unexplained_ending(program: EndedProgram, report: KtapReport) -> list[str]:
    """Return how the program ended, if its report does not account for that."""
    untested = all(result.outcome is Outcome.SKIPPED for result in report.results)
    explained = (program.status == 1 and report.failed) or (
        program.status == SKIP_STATUS and untested
    )
    return [] if explained or not program.ending else [program.ending]
