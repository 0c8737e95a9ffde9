"""The verdicts of `pyluo vm selftests`: a line each, or one document."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pyluo.vm import Kernel
    from pyluo.vm.verdicts import Verdict

__all__ = ["show", "show_json"]


def show(suite: str, kernel: Kernel, verdicts: Iterable[Verdict]) -> bool:
    """Prints each verdict as it comes, then their number; whether the run passed."""
    from pyluo.vm.verdicts import passed

    seen = []
    for verdict in verdicts:
        seen.append(verdict)
        name = f"{verdict.program}: {verdict.case}" if verdict.case else verdict.program
        reason = f"  # {verdict.reason}" if verdict.reason else ""
        print(f"{_outcome(verdict):6}  {name}{reason}", flush=True)
        for line in verdict.diagnostics if verdict.failed else ():
            print(f"        {line}")
    counted = Counter(map(_outcome, seen))
    told = ", ".join(f"{number} {outcome}" for outcome, number in counted.items())
    end = "PASSED" if passed(seen) else "FAILED"
    print(f"\n{end}: {suite} on Linux {kernel.release}: {told or 'no test ran'}")
    return passed(seen)


def show_json(suite: str, kernel: Kernel, verdicts: Iterable[Verdict]) -> bool:
    """Prints all verdicts when the last has come; whether the run passed."""
    from pyluo.vm.verdicts import passed

    seen = list(verdicts)
    rows = [
        {
            "program": each.program,
            "case": each.case,
            "outcome": _outcome(each),
            "reason": each.reason,
            "diagnostics": each.diagnostics,
        }
        for each in seen
    ]
    data = {"suite": suite, "kernel": kernel.name, "release": kernel.release, "verdicts": rows}
    print(json.dumps(data | {"passed": passed(seen)}, indent=2))
    return passed(seen)


def _outcome(verdict: Verdict) -> str:
    return "crash" if verdict.crash else verdict.outcome.value
