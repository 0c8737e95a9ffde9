"""Write KTAP that the kernel's own parser reads correctly.

Source: Documentation/dev-tools/ktap.rst; tools/testing/kunit/kunit_parser.py
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from pyluo.vm.results.verdict import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pyluo.vm.results.verdict import Verdict

__all__ = ["write"]

_LINES = {
    Outcome.PASSED: ("ok", ""),
    Outcome.SKIPPED: ("ok", "SKIP"),
    # A reader that does not know XFAIL takes this for a pass.
    Outcome.EXPECTED_FAILURE: ("ok", "XFAIL"),
}
_FAILED_LINE = ("not ok", "")
_NUMBER_SIGN = (
    "\uff03"  # looks like a number sign, which the kernel's parser does not allow in a name
)
_DIRECTIVE = re.compile(r"(SKIP|TODO|XFAIL|XPASS)", re.IGNORECASE)
# The kernel's parser takes these words, anywhere in a line, for the end of the log.
_END = re.compile("List of all partitions:|Kernel panic - not syncing: VFS:|reboot: System halted")


def write(verdicts: Sequence[Verdict]) -> str:
    """Return the document: a test for each verdict, with its subtests nested in it.

    KTAP can only tell that a guest died by a result that was planned and did not come, so it is
    written that way, beside the reason.
    """
    lines = ["KTAP version 1", f"1..{len(verdicts)}"]
    for number, verdict in enumerate(verdicts, 1):
        lines += _test(number, verdict)
    return "\n".join(lines) + "\n"


def _test(number: int, verdict: Verdict) -> Iterator[str]:
    name = _name(verdict.name)
    # The parser finds the end of a test, and what is missing, by the test's name; but it would
    # take a subtest of the same name for that end.
    named = bool(name) and name not in {_name(subtest.name) for subtest in verdict.subtests}
    crashed = verdict.outcome is Outcome.CRASHED
    crash_within = any(subtest.outcome is Outcome.CRASHED for subtest in verdict.subtests)
    missing = int(named and crashed and not crash_within)
    if verdict.subtests or missing:
        yield "  KTAP version 1"
        if named:
            yield f"  # Subtest: {name}"
        yield f"  1..{len(verdict.subtests) + missing}"
        for place, subtest in enumerate(verdict.subtests, 1):
            yield from (f"  {line}" for line in _test(place, subtest))
    if verdict.text not in {subtest.text for subtest in verdict.subtests}:
        yield from map(_diagnostic, verdict.lines)
    yield _result(number, name, verdict)


def _result(number: int, name: str, verdict: Verdict) -> str:
    word, directive = _LINES.get(verdict.outcome, _FAILED_LINE)
    reason = _printable(verdict.explanation).replace("#", _NUMBER_SIGN).strip()
    if not directive and _DIRECTIVE.match(reason):
        reason = f"({reason})"  # or it would be taken for a directive
    result = " ".join(filter(None, (word, str(number), name)))
    description = " ".join(filter(None, (directive, reason)))
    return f"{result} # {description}" if description else result


def _name(text: str) -> str:
    """Return a test's name without number signs, which the kernel's parser does not allow."""
    return _printable(text).replace("#", _NUMBER_SIGN).strip(" -:")


def _diagnostic(text: str) -> str:
    text = _printable(text)
    return "# " + (" " if text.startswith("Subtest:") else "") + text


def _printable(text: str) -> str:
    """Return a text as one line, whatever else may count as the end of a line."""
    text = "".join(each if each.isprintable() else " " for each in text)
    return _END.sub(lambda end: end[0].replace(" ", "  ", 1), text)
