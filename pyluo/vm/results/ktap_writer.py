"""KTAP, written so that the kernel's own parser takes it for what it is.

Source: Documentation/dev-tools/ktap.rst; tools/testing/kunit/kunit_parser.py
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from pyluo.vm.results.ktap_reader import Outcome
from pyluo.vm.run.programs import by_program

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pyluo.vm.run.programs import Verdict

__all__ = ["write"]

_LINE = {
    Outcome.PASSED: ("ok", ""),
    Outcome.FAILED: ("not ok", ""),
    Outcome.SKIPPED: ("ok", "SKIP"),
    # What knows no XFAIL goes by the "ok".
    Outcome.EXPECTED_FAILURE: ("ok", "XFAIL"),
}
_NUMBER_SIGN = "\uff03"  # what looks like one: the kernel's parser takes no other one in a name
_DIRECTIVE = re.compile(r"(SKIP|TODO|XFAIL|XPASS)", re.IGNORECASE)
# Wherever in a line it stands, the kernel's parser takes the log for ended there.
_END = re.compile("List of all partitions:|Kernel panic - not syncing: VFS:|reboot: System halted")


def write(verdicts: Sequence[Verdict]) -> str:
    """The document: a test for each program, with its cases as subtests.

    That a guest died, KTAP can only tell by a result that was planned and did not come: so it is
    written, beside the reason.
    """
    programs = by_program(verdicts)
    lines = ["KTAP version 1", f"1..{len(programs)}"]
    for number, program in enumerate(programs, 1):
        lines += _test(number, program)
    return "\n".join(lines) + "\n"


def _test(number: int, verdict: Verdict) -> Iterator[str]:
    name = _name(verdict.case)
    # By its name the parser tells the end of a test from a subtest, and sees what is missing; but a
    # subtest of that name would be the end to it.
    named = bool(name) and name not in {_name(each.case) for each in verdict.subtests}
    told = any(each.crash for each in verdict.subtests)
    missing = int(named and verdict.crash is not None and not told)
    if verdict.subtests or missing:
        yield "  KTAP version 1"
        if named:
            yield f"  # Subtest: {name}"
        yield f"  1..{len(verdict.subtests) + missing}"
        for place, subtest in enumerate(verdict.subtests, 1):
            yield from (f"  {line}" for line in _test(place, subtest))
    yield from map(_diagnostic, verdict.diagnostics)
    yield _result(number, name, verdict)


def _result(number: int, name: str, verdict: Verdict) -> str:
    word, directive = _LINE[verdict.outcome]
    reason = _printable(verdict.reason).replace("#", _NUMBER_SIGN).strip()
    if not directive and _DIRECTIVE.match(reason):
        reason = f"({reason})"  # it is a reason, and no directive
    result = " ".join(filter(None, (word, str(number), name)))
    described = " ".join(filter(None, (directive, reason)))
    return f"{result} # {described}" if described else result


def _name(text: str) -> str:
    """A description: anything but a number sign, which the kernel's parser cannot be given."""
    return _printable(text).replace("#", _NUMBER_SIGN).strip(" -:")


def _diagnostic(text: str) -> str:
    text = _printable(text)
    return "# " + (" " if text.startswith("Subtest:") else "") + text


def _printable(text: str) -> str:
    """A line of it: whatever else may count as a line's end is none."""
    text = "".join(each if each.isprintable() else " " for each in text)
    return _END.sub(lambda end: end[0].replace(" ", "  ", 1), text)
