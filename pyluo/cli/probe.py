"""`pyluo probe`: print which kinds of file the running kernel can preserve."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from typing import TYPE_CHECKING

from pyluo import probe
from pyluo.cli.exit import PASSED
from pyluo.cli.parsers import add_command

if TYPE_CHECKING:
    import argparse

    from pyluo.cli.parsers import Subparsers

__all__ = ["add_parser"]


def add_parser(subparsers: Subparsers) -> None:
    """Add the `probe` command."""
    parser = add_command(
        subparsers,
        "probe",
        "Print which kinds of file this kernel preserves",
        "pyluo probe",
        "pyluo probe --json",
        more="Asks the running kernel, with a session of its own that it discards.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    findings = probe.probe()
    release = os.uname().release
    if arguments.json:
        kinds = [
            dataclasses.asdict(finding) | {"verdict": finding.verdict.value} for finding in findings
        ]
        print(json.dumps({"release": release, "kinds": kinds}, indent=2))
        return PASSED
    print(f"Linux {release} was offered a file of each kind:")
    width = max(len(finding.kind) for finding in findings)
    for finding in findings:
        print(f"  {finding.kind:{width}}  {finding.verdict.value:9}  {_explain(finding)}".rstrip())
    return PASSED


def _explain(finding: probe.Finding) -> str:
    if finding.verdict is probe.Verdict.PRESERVED:
        return finding.reason
    name = errno.errorcode.get(finding.errno, str(finding.errno))
    return f"{name}: {finding.reason}" if finding.verdict is probe.Verdict.ABSENT else name
