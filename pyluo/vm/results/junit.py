"""Verdicts as JUnit's XML, which most of what runs tests for a living reads."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from pyluo.vm.results.ktap_reader import Outcome

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyluo.vm.run.programs import Verdict

__all__ = ["write"]

_COUNTED = ("failure", "error", "skipped")
_NAMES = {"failure": "failures", "error": "errors", "skipped": "skipped"}


def write(suite: str, verdicts: Sequence[Verdict]) -> str:
    """The document: a suite for each program, and a case for each test that is made of no others.

    A guest's death is an error, and no failure, as is what gives no verdict; what was expected to
    fail counts as skipped.
    """
    root = ElementTree.Element("testsuites", name=_printable(suite))
    for program, told in groupby(verdicts, lambda verdict: verdict.program):
        element = ElementTree.SubElement(root, "testsuite", name=_printable(program))
        for verdict in told:
            for each in verdict.innermost():
                _case(element, f"{suite}.{program}", each)
        _count(element, [element])
    _count(root, list(root))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _case(suite: ElementTree.Element, classname: str, verdict: Verdict) -> None:
    case = ElementTree.SubElement(
        suite,
        "testcase",
        classname=_printable(classname),
        name=_printable(verdict.case or verdict.program),
    )
    said = "\n".join(map(_printable, verdict.diagnostics))
    reason = _printable(verdict.reason)
    if verdict.error:
        ElementTree.SubElement(case, "error", type=verdict.error, message=reason).text = said
    elif verdict.failed:
        ElementTree.SubElement(case, "failure", message=reason or "not ok").text = said
    elif verdict.outcome is not Outcome.PASSED:
        kind = verdict.outcome.value
        ElementTree.SubElement(case, "skipped", type=kind, message=reason).text = said
    elif said:
        ElementTree.SubElement(case, "system-out").text = said


def _count(element: ElementTree.Element, suites: list[ElementTree.Element]) -> None:
    cases = [case for suite in suites for case in suite.findall("testcase")]
    element.set("tests", str(len(cases)))
    for tag in _COUNTED:
        number = sum(case.find(tag) is not None for case in cases)
        element.set(_NAMES[tag], str(number))


def _printable(text: str) -> str:
    """What XML can carry of it."""
    return "".join(each if each.isprintable() or each == "\t" else "\ufffd" for each in text)
