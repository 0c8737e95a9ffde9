"""Subtests: make each case of a KTAP report a subtest, and write subtests to JUnit XML."""

from __future__ import annotations

from collections import Counter
from copy import copy
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from pyluo.vm.machine.vm import VM
    from pyluo.vm.results.verdict import Verdict

__all__ = ["Ktap", "separate_subtests"]


class Ktap:
    """The value of the fixture `ktap`: call it to run a program in a guest.

    Args:
        subtests: pytest's own fixture.
    """

    def __init__(self, subtests: pytest.Subtests) -> None:
        self._subtests = subtests

    def __call__(
        self, vm: VM, argv: Sequence[str | os.PathLike[str]], *, timeout: float = 60
    ) -> Verdict:
        """Run a program that reports in KTAP, and make each of its cases a subtest.

        A case that consists of other cases does not become a subtest of its own, unless it failed
        although all of them passed. The test itself fails if the program's report is incomplete,
        and is skipped if the program skipped all its cases.

        Args:
            vm: the guest.
            argv: the program and its arguments.
            timeout: seconds after which the program is killed, and the test fails.

        Returns:
            The verdict on the program, with the verdicts on its cases.

        Raises:
            GuestCrash: the guest died; the cases that ended before that have become subtests.
            HarnessError: the guest cannot run the program.
        """
        from pyluo.vm.results.verdict import Outcome
        from pyluo.vm.run.programs import run_program

        verdict, crash = run_program(vm, argv, timeout)
        leaves = [leaf for leaf in verdict.leaves() if leaf.name]
        for leaf in leaves:
            with self._subtests.test(leaf.name):
                _report(leaf)
        if crash is not None:
            raise crash
        if verdict.incomplete or not leaves:
            _report(verdict)
        if all(leaf.outcome is Outcome.SKIPPED for leaf in leaves):
            pytest.skip("the program skipped all its cases")
        return verdict


def _report(verdict: Verdict) -> None:
    """End the current test or subtest with the outcome of a verdict."""
    from pyluo.vm.results.verdict import Outcome

    text = "\n".join([verdict.reason or "not ok", *verdict.lines])
    match verdict.outcome:
        case Outcome.FAILED:
            pytest.fail(text, pytrace=False)
        case Outcome.SKIPPED:
            pytest.skip(verdict.reason)
        case Outcome.EXPECTED_FAILURE:
            pytest.xfail(verdict.reason)


def separate_subtests(config: pytest.Config) -> None:
    """Make --junitxml write a test case for each subtest, for --pyluo-junit-subtests.

    Without this, pytest writes the subtests that failed into the case of their test, and no
    subtests that passed. Subtests of the same name get numbers.
    """
    # pytest has no public interface for this.
    try:
        from _pytest.junitxml import LogXML, mangle_test_address, xml_key

        open_case = LogXML._opentestcase
        describe = pytest.SubtestReport._sub_test_description
    except (ImportError, AttributeError) as error:
        raise pytest.UsageError(
            f"--pyluo-junit-subtests does not work with pytest {pytest.__version__} ({error})"
        ) from None
    xml: Any = config.stash.get(xml_key, None)
    if xml is None:
        return
    numbers = Counter[object]()

    def open_own_case(report: pytest.TestReport) -> object:
        if not isinstance(report, pytest.SubtestReport):
            return open_case(xml, report)
        description = describe(report)
        test = report.nodeid, getattr(report, "node", None)  # pytest-xdist's worker
        numbers[test, description] += 1
        number = numbers[test, description]
        renamed = copy(report)
        renamed.nodeid = f"{report.nodeid}{description}{number}"
        case = open_case(xml, renamed)
        # Set the name here, because pytest would cut off the name in the report at its first
        # bracket.
        name = f"{mangle_test_address(report.nodeid)[-1]}{description}"
        case.add_attribute("name", name if number == 1 else f"{name} {number}")
        case.duration = report.duration
        return case

    xml._opentestcase = open_own_case
