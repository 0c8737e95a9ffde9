"""Verdicts, shown and written: a line each, or one document, or several."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Iterator

    from pyluo.vm import Kernel
    from pyluo.vm.run.programs import Verdict

__all__ = ["add_files", "show", "show_json", "written"]


def add_files(parser: argparse.ArgumentParser) -> None:
    """Adds the options that name the files of `written`."""
    parser.add_argument("--junit", metavar="FILE", help="write the verdicts there as JUnit's XML")
    parser.add_argument("--ktap", metavar="FILE", help="write them there in KTAP")


def show(suite: str, kernel: Kernel, verdicts: Iterable[Verdict]) -> bool:
    """Prints each verdict as it comes, then their number; whether the run passed."""
    from pyluo.vm.run.programs import passed

    seen, told_each = [], Counter[str]()
    for verdict in verdicts:
        seen.append(verdict)
        for each in verdict.innermost():
            told_each[_outcome(each)] += 1
            _print(each)
    told = ", ".join(f"{number} {outcome}" for outcome, number in told_each.items())
    end = "PASSED" if passed(seen) else "FAILED"
    print(f"\n{end}: {suite} on Linux {kernel.release}: {told or 'no test ran'}")
    return passed(seen)


def show_json(suite: str, kernel: Kernel, verdicts: Iterable[Verdict]) -> bool:
    """Prints all verdicts when the last has come; whether the run passed."""
    from pyluo.vm.run.programs import passed

    seen = list(verdicts)
    rows = [_row(verdict) for verdict in seen]
    data = {"suite": suite, "kernel": kernel.name, "release": kernel.release, "verdicts": rows}
    print(json.dumps(data | {"passed": passed(seen)}, indent=2))
    return passed(seen)


@contextmanager
def written(
    suite: str, verdicts: Iterable[Verdict], junit_file: str | None, ktap_file: str | None
) -> Iterator[Iterator[Verdict]]:
    """Passes verdicts on, and writes them into files once the last has come.

    A run that is not whole leaves the files empty, whatever was in them before.

    Raises:
        OSError: a file cannot be written; told before the first test runs.
    """
    from pyluo.vm.results import junit, ktap_writer

    seen: list[Verdict] = []

    def passed_on() -> Iterator[Verdict]:
        for verdict in verdicts:
            seen.append(verdict)
            yield verdict

    with ExitStack() as files:
        junit_out, ktap_out = (
            files.enter_context(open(path, "w", encoding="utf-8")) if path else None
            for path in (junit_file, ktap_file)
        )
        yield passed_on()
        if junit_out:
            junit_out.write(junit.write(suite, seen))
        if ktap_out:
            ktap_out.write(ktap_writer.write(seen))


def _print(verdict: Verdict) -> None:
    name = f"{verdict.program}: {verdict.case}" if verdict.case else verdict.program
    reason = f"  # {verdict.reason}" if verdict.reason else ""
    print(f"{_outcome(verdict):6}  {name}{reason}", flush=True)
    for line in verdict.diagnostics if verdict.failed else ():
        print(f"        {line}")


def _row(verdict: Verdict) -> dict[str, object]:
    return {
        "program": verdict.program,
        "case": verdict.case,
        "outcome": _outcome(verdict),
        "reason": verdict.reason,
        "diagnostics": verdict.diagnostics,
        "subtests": [_row(subtest) for subtest in verdict.subtests],
    }


def _outcome(verdict: Verdict) -> str:
    return "crash" if verdict.crash else verdict.outcome.value
