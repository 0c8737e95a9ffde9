"""Print the verdicts on tests, and write them to the files that a command line names."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Iterator

    from pyluo.vm import Kernel
    from pyluo.vm.results.verdict import Verdict

__all__ = ["add_file_options", "show", "show_json", "write_files"]

# What to print for each outcome: KTAP's words, which users of the kernel's selftests know.
_WORDS = {
    "passed": "ok",
    "failed": "not ok",
    "crashed": "crash",
    "no verdict": "no verdict",
    "skipped": "skip",
    "xfailed": "xfail",
}


def add_file_options(parser: argparse.ArgumentParser) -> None:
    """Add the options --junit and --ktap, which name the files that `write_files` writes."""
    parser.add_argument("--junit", metavar="FILE", help="write the verdicts to FILE as JUnit XML")
    parser.add_argument("--ktap", metavar="FILE", help="write the verdicts to FILE in KTAP")


def show(suite: str, kernel: Kernel, verdicts: Iterable[Verdict]) -> bool:
    """Print each verdict as it arrives, then how many there were of each outcome.

    Returns:
        Whether the run passed.
    """
    from pyluo.vm.results.verdict import passed

    seen, counts = [], Counter[str]()
    for verdict in verdicts:
        seen.append(verdict)
        for leaf in verdict.leaves():
            counts[_word(leaf)] += 1
            _print(verdict.name, leaf)
    summary = ", ".join(f"{count} {word}" for word, count in counts.items())
    end = "PASSED" if passed(seen) else "FAILED"
    print(f"\n{end}: {suite} on Linux {kernel.release}: {summary or 'no test ran'}")
    return passed(seen)


def show_json(suite: str, kernel: Kernel, verdicts: Iterable[Verdict]) -> bool:
    """Print all verdicts as JSON after the last one has arrived; return whether the run passed."""
    from pyluo.vm.results import json_lines
    from pyluo.vm.results.verdict import passed

    seen = list(verdicts)
    data = {
        "suite": suite,
        "kernel": kernel.name,
        "release": kernel.release,
        "verdicts": [json_lines.to_data(verdict) for verdict in seen],
        "passed": passed(seen),
    }
    print(json.dumps(data, indent=2))
    return passed(seen)


@contextmanager
def write_files(
    suite: str, verdicts: Iterable[Verdict], junit_file: str | None, ktap_file: str | None
) -> Iterator[Iterator[Verdict]]:
    """Yield an iterator over the verdicts. When the ``with`` block ends, write the verdicts to the
    files.

    The files are emptied before the first test runs; if an exception leaves the block, they stay
    empty.

    Args:
        suite: the name of the run.
        verdicts: runs the tests while it is iterated over, and yields their verdicts.
        junit_file: the path of the file for JUnit XML; None for no such file.
        ktap_file: the path of the file for KTAP; None for no such file.

    Raises:
        OSError: a file cannot be opened (raised before the first test runs), or written at the end.
    """
    from pyluo.vm.results import junit, ktap_writer

    seen: list[Verdict] = []

    def pass_on() -> Iterator[Verdict]:
        for verdict in verdicts:
            seen.append(verdict)
            yield verdict

    with ExitStack() as files:
        junit_out, ktap_out = (
            files.enter_context(open(path, "w", encoding="utf-8")) if path else None
            for path in (junit_file, ktap_file)
        )
        yield pass_on()
        if junit_out:
            junit_out.write(junit.write(suite, seen))
        if ktap_out:
            ktap_out.write(ktap_writer.write(seen))


def _print(program: str, leaf: Verdict) -> None:
    name = f"{program}: {leaf.name}" if leaf.name else program
    reason = f"  # {leaf.reason}" if leaf.reason else ""
    print(f"{_word(leaf):6}  {name}{reason}", flush=True)
    for line in leaf.lines if leaf.bad else ():
        print(f"        {line}")


def _word(verdict: Verdict) -> str:
    return _WORDS[verdict.outcome.value]
