"""Tests of the verdict on a program, by its output, its end and the fate of its guest."""

from __future__ import annotations

from pyluo.vm import Complaint, GuestCrash, KernelComplaint
from pyluo.vm.results.program import EndedProgram, judge, with_failure
from pyluo.vm.results.verdict import Outcome

COMPLAINT = KernelComplaint(
    Complaint.WARNING, "at mm/slub.c:1", kernel="stable", life=2, console=("[1.0] WARNING",)
)
TOLD = "kernel warning: at mm/slub.c:1 (kernel stable, life 2)"


def test_a_fault_of_the_program_is_told_beside_a_complaint_that_comes_to_light_later() -> None:
    verdict = judge("p", EndedProgram("1..3\nok 1 a\n# the last word\n", "exit status 3", 3))
    assert (verdict.outcome, verdict.incomplete) == (Outcome.FAILED, True)
    both = with_failure(verdict, COMPLAINT)
    assert (both.outcome, both.cause) == (Outcome.CRASHED, Complaint.WARNING)
    assert both.reason == (f"{TOLD}; before that: 1 of 3 planned results came; exit status 3")
    assert both.lines == ["the last word", "[1.0] WARNING"]
    assert [leaf.name for leaf in both.leaves()] == ["a", ""]


def test_a_complaint_after_a_program_that_passed_is_told_alone() -> None:
    verdict = judge("p", EndedProgram("1..1\nok 1 a\n", "", 0))
    assert verdict.outcome is Outcome.PASSED
    assert with_failure(verdict, COMPLAINT).reason == TOLD


def test_a_crash_ends_a_program_by_itself() -> None:
    crash = GuestCrash(Complaint.PANIC, "Oops", kernel="stable", life=1, console=())
    verdict = judge("p", EndedProgram("1..3\nok 1 a\n", "the guest crashed", crash=crash))
    assert (verdict.outcome, verdict.cause) == (Outcome.CRASHED, Complaint.PANIC)
    assert verdict.reason == "kernel panic: Oops (kernel stable, life 1)"


def test_a_failing_case_without_a_reason_is_named_alone() -> None:
    verdict = judge("p", EndedProgram("1..1\nnot ok 1 b\n", "exit status 1", 1))
    assert (verdict.outcome, verdict.reason) == (Outcome.FAILED, "b")
