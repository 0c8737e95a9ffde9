"""Verdicts on tests that pytest ran, by their records."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyluo.vm.errors import GuestCrash
from pyluo.vm.pytest.recorder import Outcome, Record
from pyluo.vm.results import ktap_reader
from pyluo.vm.run.programs import Verdict

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pyluo.vm.pytest.recorder import Subtest

__all__ = ["by_file", "of_record"]

_OUTCOMES = {
    Outcome.PASSED: ktap_reader.Outcome.PASSED,
    Outcome.SKIPPED: ktap_reader.Outcome.SKIPPED,
    Outcome.EXPECTED_FAILURE: ktap_reader.Outcome.EXPECTED_FAILURE,
}


def by_file(records: Iterable[Record]) -> list[Verdict]:
    """The verdicts on tests, each file a program; those of a file stand together.

    Args:
        records: in any order, as several workers have it.
    """
    verdicts = []
    for record in records:
        file, _, test = record.test.partition("::")
        verdicts.append(of_record(file, test, record))
    return sorted(verdicts, key=lambda verdict: verdict.program)


def of_record(program: str, case: str, record: Record | Subtest) -> Verdict:
    """The verdict on a test, and on its subtests; or on one of these.

    Args:
        program: what it is to be called that the test belongs to.
        case: what the test is to be called.
        record: of it.
    """
    no_verdict = record.outcome is Outcome.ERROR
    crash = None
    if record.death and not no_verdict:
        crash = GuestCrash(record.death, record.reason, kernel="", life=0, console=())
    subtests = record.subtests if isinstance(record, Record) else ()
    said = record.text.splitlines()
    if any(each.text == record.text for each in subtests):  # it is told there
        said = []
    return Verdict(
        program,
        case,
        _OUTCOMES.get(record.outcome, ktap_reader.Outcome.FAILED),
        f"no verdict: {record.reason}" if no_verdict else record.reason,
        tuple(said),
        crash,
        tuple(of_record(program, each.name, each) for each in subtests),
        no_verdict,
    )
