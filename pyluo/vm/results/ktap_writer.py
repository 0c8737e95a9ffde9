"""Write verdicts as KTAP that the kernel's own parser reads correctly.

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
    # To a reader that does not know XFAIL, this means that the test passed.
    Outcome.EXPECTED_FAILURE: ("ok", "XFAIL"),
}
_FAILED_LINE = ("not ok", "")
# A full-width number sign. The kernel's parser does not allow "#" in the name of a test.
_NUMBER_SIGN = "\uff03"
_DIRECTIVE = re.compile(r"(SKIP|TODO|XFAIL|XPASS)", re.IGNORECASE)
# The kernel's parser stops reading at a line that contains these words.
_END = re.compile("List of all partitions:|Kernel panic - not syncing: VFS:|reboot: System halted")


def write(verdicts: Sequence[Verdict]) -> str:
    """Return the KTAP document: a test for each verdict, with its subtests nested in it.

    In KTAP, the only sign of a crash is a planned result that did not come. Therefore the plan of a
    test in which a guest died announces one subtest more than there are.
    """
    lines = ["KTAP version 1", f"1..{len(verdicts)}"]
    for number, verdict in enumerate(verdicts, 1):
        lines += _format_test(number, verdict)
    return "\n".join(lines) + "\n"


def _format_test(number: int, verdict: Verdict) -> Iterator[str]:
    name = _clean_name(verdict.name)
    # The kernel's parser finds the end of a test by the test's name in "# Subtest:". If a subtest
    # has the same name, the name is not written, because the parser would take the subtest's result
    # for the end of the test.
    named = bool(name) and name not in {_clean_name(subtest.name) for subtest in verdict.subtests}
    crashed = verdict.outcome is Outcome.CRASHED
    crash_within = any(subtest.outcome is Outcome.CRASHED for subtest in verdict.subtests)
    if crashed and not crash_within and not named:
        name, named = f"{name} as a whole".lstrip(), True
    missing = int(crashed and not crash_within)
    if verdict.subtests or missing:
        yield "  KTAP version 1"
        if named:
            yield f"  # Subtest: {name}"
        yield f"  1..{len(verdict.subtests) + missing}"
        for position, subtest in enumerate(verdict.subtests, 1):
            yield from (f"  {line}" for line in _format_test(position, subtest))
    if verdict.text not in {subtest.text for subtest in verdict.subtests}:
        yield from map(_format_diagnostic, verdict.lines)
    yield _format_result(number, name, verdict)


def _format_result(number: int, name: str, verdict: Verdict) -> str:
    word, directive = _LINES.get(verdict.outcome, _FAILED_LINE)
    reason = _to_one_line(verdict.explanation).replace("#", _NUMBER_SIGN).strip()
    if not directive and _DIRECTIVE.match(reason):
        reason = f"({reason})"  # without the parentheses, it would be taken for a directive
    result = " ".join(filter(None, (word, str(number), name)))
    description = " ".join(filter(None, (directive, reason)))
    return f"{result} # {description}" if description else result


def _clean_name(text: str) -> str:
    """Return a test's name as the kernel's parser allows it: without number signs, on one line."""
    return _to_one_line(text).replace("#", _NUMBER_SIGN).strip(" -:")


def _format_diagnostic(text: str) -> str:
    text = _to_one_line(text)
    return "# " + (" " if text.startswith("Subtest:") else "") + text


def _to_one_line(text: str) -> str:
    """Return a text as one line that the kernel's parser does not take for the end of the log."""
    text = "".join(each if each.isprintable() else " " for each in text)
    return _END.sub(lambda end: end[0].replace(" ", "  ", 1), text)
