"""Part of the pytest plugin: the cases of a program that reports in KTAP, as subtests."""

from __future__ import annotations

from collections import Counter
from copy import copy
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from pyluo.vm.machine.vm import VM
    from pyluo.vm.run.programs import Verdict

__all__ = ["Ktap", "tell_apart"]


class Ktap:
    """What the fixture `ktap` gives: call it to run a program in a guest.

    Args:
        subtests: pytest's own fixture.
    """

    def __init__(self, subtests: pytest.Subtests) -> None:
        self._subtests = subtests

    def __call__(
        self, vm: VM, argv: Sequence[str | os.PathLike[str]], *, timeout: float = 60
    ) -> list[Verdict]:
        """Runs a program that reports in KTAP, and makes each of its cases a subtest.

        A case that is made of others is told by these, unless it failed of something else. The test
        itself fails if the program did not do what it announced, and is skipped if no case ran.

        Args:
            vm: the guest.
            argv: the program and its arguments.
            timeout: in seconds.

        Returns:
            The verdicts, once more.

        Raises:
            GuestCrash: the guest died; the cases that came before have been told then.
            HarnessError: the guest cannot run the program.
        """
        from pyluo.vm.results.ktap_reader import Outcome
        from pyluo.vm.run import programs

        told = programs.of(vm, argv, timeout)
        cases = [case for verdict in told if verdict.case for case in verdict.innermost()]
        for case in cases:
            with self._subtests.test(case.case):
                _end(case)
        for whole in told:
            if whole.crash is not None:
                raise whole.crash
            if not whole.case:
                _end(whole)
        if all(case.outcome is Outcome.SKIPPED for case in cases):
            pytest.skip("the program skipped all its cases")
        return told


def _end(verdict: Verdict) -> None:
    """Ends a test, or a subtest, as the verdict says."""
    from pyluo.vm.results.ktap_reader import Outcome

    text = "\n".join([verdict.reason or verdict.outcome.value, *verdict.diagnostics])
    match verdict.outcome:
        case Outcome.FAILED:
            pytest.fail(text, pytrace=False)
        case Outcome.SKIPPED:
            pytest.skip(verdict.reason)
        case Outcome.EXPECTED_FAILURE:
            pytest.xfail(verdict.reason)


def tell_apart(config: pytest.Config) -> None:
    """Has --junitxml show each subtest.

    pytest writes all of a test into the test's own case, and of those that passed nothing. Subtests
    of one name are numbered.
    """
    from _pytest.junitxml import mangle_test_address, xml_key

    xml: Any = config.stash.get(xml_key, None)
    if xml is None:
        return
    open_case = xml._opentestcase
    told = Counter[object]()

    def open_own_case(report: pytest.TestReport) -> object:
        if not isinstance(report, pytest.SubtestReport):
            return open_case(report)
        description = report._sub_test_description()
        test = report.nodeid, getattr(report, "node", None)  # which is pytest-xdist's worker
        told[test, description] += 1
        number = told[test, description]
        named = copy(report)
        named.nodeid = f"{report.nodeid}{description}{number}"
        case = open_case(named)
        # Not left to pytest, which takes each name with a bracket in it for one that ends with one.
        name = f"{mangle_test_address(report.nodeid)[-1]}{description}"
        case.add_attribute("name", name if number == 1 else f"{name} {number}")
        case.duration = report.duration
        return case

    xml._opentestcase = open_own_case
