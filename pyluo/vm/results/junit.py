"""Write verdicts as JUnit XML, which most systems of continuous integration read."""

from __future__ import annotations

from typing import TYPE_CHECKING
from xml.etree import ElementTree

from pyluo.vm.results.verdict import Outcome

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyluo.vm.results.verdict import Verdict

__all__ = ["write"]

_COUNTED = {"failure": "failures", "error": "errors", "skipped": "skipped"}
_SKIPS = {Outcome.SKIPPED: "skip", Outcome.EXPECTED_FAILURE: "xfail"}


def write(suite: str, verdicts: Sequence[Verdict]) -> str:
    """Return the XML document: a suite for each verdict, and a case for each of its leaves.

    The outcomes CRASHED and NO_VERDICT become errors, FAILED becomes a failure, and an expected
    failure counts as skipped.

    Args:
        suite: the name of the run.
        verdicts: the verdicts.
    """
    root = ElementTree.Element("testsuites", name=_printable(suite))
    for verdict in verdicts:
        element = ElementTree.SubElement(root, "testsuite", name=_printable(verdict.name))
        for leaf in verdict.leaves():
            _add_case(element, f"{suite}.{verdict.name}", leaf.name or verdict.name, leaf)
        _count(element, [element])
    _count(root, list(root))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _add_case(suite: ElementTree.Element, classname: str, name: str, verdict: Verdict) -> None:
    case = ElementTree.SubElement(
        suite, "testcase", classname=_printable(classname), name=_printable(name)
    )
    text = "\n".join(map(_printable, verdict.lines))
    reason = _printable(verdict.explanation)
    if verdict.error:
        ElementTree.SubElement(case, "error", type=verdict.error, message=reason).text = text
    elif verdict.bad:
        ElementTree.SubElement(case, "failure", message=reason or "not ok").text = text
    elif verdict.outcome in _SKIPS:
        kind = _SKIPS[verdict.outcome]
        ElementTree.SubElement(case, "skipped", type=kind, message=reason).text = text
    elif text:
        ElementTree.SubElement(case, "system-out").text = text


def _count(element: ElementTree.Element, suites: list[ElementTree.Element]) -> None:
    cases = [case for suite in suites for case in suite.findall("testcase")]
    element.set("tests", str(len(cases)))
    for tag, attribute in _COUNTED.items():
        element.set(attribute, str(sum(case.find(tag) is not None for case in cases)))


def _printable(text: str) -> str:
    """Return a text in which the characters that XML cannot represent are replaced."""
    return "".join(each if each.isprintable() or each == "\t" else "\ufffd" for each in text)
