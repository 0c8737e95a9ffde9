"""`pyluo vm bisect`: the command for `git bisect run`; it tests the checked-out commit."""

from __future__ import annotations

import argparse
import json
import re
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pyluo.cli.exit import UNTESTABLE
from pyluo.cli.parsers import add_command
from pyluo.cli.vm import program
from pyluo.vm.machine import options

if TYPE_CHECKING:
    from pyluo.cli.parsers import Subparsers
    from pyluo.vm.run.bisection import Step

__all__ = ["add_parser"]


_NOTES = """\
Exit status: 0 the tests passed; 1 a test failed, or its guest died; 125 the kernel does not compile
or boot, or the harness or the command line was at fault, so that git skips the commit. Ctrl-C ends
the bisection.
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the `bisect` action."""
    bisect = add_command(
        subparsers,
        "bisect",
        "Build the kernel tree in this folder, test it, and exit as `git bisect run` expects",
        "git bisect start BAD GOOD && git bisect run pyluo vm bisect tests/test_seals.py",
        "git bisect run pyluo vm bisect --from stable --match 'seal'",
        notes=_NOTES,
    )
    options.add(bisect.add_argument, without=["kernel", "to"])
    side = bisect.add_mutually_exclusive_group()
    side.add_argument(
        "--from", dest="kernel", metavar="KERNEL",
        help="the kernel to live-update from (default: the kernel of the tree)",
    )  # fmt: skip
    side.add_argument(
        "--to", metavar="KERNEL",
        help="the kernel to live-update to (default: the kernel of the tree)",
    )  # fmt: skip
    bisect.add_argument(
        "--hops", type=options.count, default=1, metavar="N",
        help="how many live updates, for tests that can make several (default: 1)",
    )  # fmt: skip
    bisect.add_argument(
        "--match", type=_compile_pattern, metavar="REGEX",
        help="count only failures whose text matches; skip a commit that fails in another way",
    )  # fmt: skip
    bisect.add_argument(
        "--unbootable", choices=["skip", "bad"], default="skip",
        help="the verdict on a kernel that does not boot (default: skip)",
    )  # fmt: skip
    program.add_limit(bisect)
    bisect.add_argument(
        "--tree", type=Path, default=Path(), help="the kernel tree (default: this folder)"
    )
    bisect.add_argument("--json", action="store_true", help="print JSON")
    bisect.add_argument(
        "tests", nargs="*", metavar="TEST",
        help="arguments for pytest: files, node ids, options after --; without any, pyluo's own "
        "checks run",
    )  # fmt: skip
    bisect.set_defaults(run=_bisect)


def _bisect(arguments: argparse.Namespace) -> int:
    """Test the checked-out commit, and return the exit status for git.

    An error of this program must not look like a verdict on the commit, so the commit is skipped.
    """
    try:
        from pyluo.vm.run import bisection

        # With --json, pytest's output must not be mixed with the JSON.
        output = sys.stderr if arguments.json else sys.stdout
        output.flush()
        step = bisection.try_commit(
            arguments.tree.resolve(),
            arguments.tests,
            options.GuestOptions.of(arguments),
            hops=arguments.hops,
            limit=arguments.limit,
            match=arguments.match,
            unbootable=bisection.Mark[arguments.unbootable.upper()],
            output=output.buffer,
        )
        _print_result(step, as_json=arguments.json)
        return step.mark
    except Exception:
        with suppress(OSError):
            traceback.print_exc()
        return UNTESTABLE


def _print_result(step: Step, *, as_json: bool) -> None:
    if as_json:
        from pyluo.vm.results import json_lines

        verdicts = step.run.verdicts if step.run else ()
        tests = [json_lines.to_data(verdict) for verdict in verdicts]
        data = {"mark": step.mark.name.lower(), "reason": step.reason, "release": step.release}
        print(json.dumps(data | {"tests": tests}), flush=True)
    else:
        kernel = f"Linux {step.release}" if step.release else "this commit"
        reason = f": {step.reason}" if step.reason else ""
        print(f"pyluo: {kernel} is {_WORDS[step.mark.name]}{reason}", flush=True)


_WORDS = {"GOOD": "good", "BAD": "bad", "SKIP": "skipped"}


def _compile_pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a pattern: {error}") from None
