"""`pyluo doctor`: whether this machine can run the harness, and its kernel a live update."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

from pyluo.cli.exit import FAILED, PASSED
from pyluo.cli.parsers import add_command
from pyluo.doctor import Check, Verdict, check_live_update

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

    from pyluo.cli.parsers import Subparsers

__all__ = ["add_parser"]

_MARKS = {Verdict.READY: "ok", Verdict.LIMITED: "--", Verdict.MISSING: "NO"}
# The question of each part, and its answer if nothing is missing.
_QUESTIONS = {
    "live-update": ("Is this system ready for a live update?", "It is."),
    "harness": ("Can this machine run the harness?", "It can."),
}


def add_parser(subparsers: Subparsers) -> None:
    """Add the `doctor` command."""
    parser = add_command(
        subparsers,
        "doctor",
        "Check what live updates, or the harness, need, and say how to mend it",
        "pyluo doctor",
        "pyluo doctor live-update --json",
    )
    parser.add_argument(
        "part",
        nargs="?",
        choices=[*_QUESTIONS, "all"],
        default="all",
        help="what to check; the exit status is 1 if something of it cannot work (default: all, "
        "where one of the two is enough)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from pyluo.doctor.harness import check_harness

    parts: dict[str, Callable[[], Iterator[Check]]] = {
        "live-update": check_live_update,
        "harness": check_harness,
    }
    found = {
        name: list(check()) for name, check in parts.items() if arguments.part in (name, "all")
    }
    if arguments.json:
        print(json.dumps({name: [*map(dataclasses.asdict, each)] for name, each in found.items()}))
    else:
        for name, checks in found.items():
            _print(*_QUESTIONS[name], checks)
    return PASSED if any(map(_works, found.values())) else FAILED


def _works(checks: list[Check]) -> bool:
    return all(check.verdict is not Verdict.MISSING for check in checks)


def _print(question: str, answer: str, checks: list[Check]) -> None:
    print(question)
    for check in checks:
        print(f"  {_MARKS[check.verdict]}  {check.subject}: {check.found}")
        if check.remedy:
            print(f"        {check.remedy}")
    print(f"  {answer if _works(checks) else 'No.'}\n")
