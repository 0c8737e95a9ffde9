"""`pyluo demo`: show a live update of a guest that preserves a memfd."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

from pyluo.cli.exit import FAILED, PASSED
from pyluo.vm.machine.options import size

if TYPE_CHECKING:
    import argparse

    from pyluo.cli.parsers import Subparsers
    from pyluo.vm.run.round_trip import RoundTrip

__all__ = ["add_parser"]


def add_parser(subparsers: Subparsers) -> None:
    """Add the `demo` command."""
    parser = subparsers.add_parser("demo", help="carry a memfd through a real live update, in QEMU")
    parser.add_argument("--kernel", default="stable", metavar="KERNEL", help="the kernel to boot")
    parser.add_argument(
        "--to", metavar="KERNEL", help="the kernel to jump to (default: the same kernel)"
    )
    parser.add_argument(
        "--size", type=size, default="4M", help="the size of the memfd (default: 4M)"
    )
    parser.add_argument("--corrupt", action="store_true", help="flip a byte, to see the check fail")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from pyluo.vm.run.round_trip import run_round_trip

    result = run_round_trip(
        arguments.kernel, arguments.to, size=arguments.size, corrupt=arguments.corrupt
    )
    if arguments.json:
        data = dataclasses.asdict(result)
        print(json.dumps(data | {"passed": result.passed, "blackout": result.timeline.blackout}))
    else:
        _print(result)
    return PASSED if result.passed else FAILED


def _print(result: RoundTrip) -> None:
    print(f"Linux {result.before} live-updated to Linux {result.after}, in QEMU.\n")
    for event in result.timeline.events:
        print(f"  {event.at - result.timeline.started:7.3f} s  {event.name}")
    print(f"\n  blackout {result.timeline.blackout:.3f} s, from reboot() to the descriptor\n")
    print(f"  preserved  {result.preserved}  {result.size} bytes of random data")
    print(f"  retrieved  {result.retrieved}")
    gone = "gone, as they should be" if not result.survivors else ", ".join(result.survivors)
    print(f"  neighbours that were not preserved: {gone}\n")
    print("PASSED" if result.passed else "FAILED: not exactly the preserved memory survived")
