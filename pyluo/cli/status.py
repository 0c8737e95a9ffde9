"""`pyluo status`: whether this system can live-update.

If it can, the command also prints whether it was booted cold or was handed data by another kernel
(and by which), which sessions are open, how much more memory can be preserved, and whether the next
kernel is loaded. If it cannot, the command prints what is missing.
"""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

from pyluo import guards, kexec, kho
from pyluo.cli.exit import FAILED, PASSED
from pyluo.cli.parsers import add_command
from pyluo.open_sessions import OpenSession, open_sessions

if TYPE_CHECKING:
    import argparse

    from pyluo.cli.parsers import Subparsers

__all__ = ["add_parser"]


def add_parser(subparsers: Subparsers) -> None:
    """Add the `status` command."""
    parser = add_command(
        subparsers,
        "status",
        "Print whether this system can live-update",
        "pyluo status",
        "pyluo status --json",
        more="Also who holds which sessions, and how much memory can still be preserved.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    status = kho.status()
    if arguments.json:
        print(json.dumps(_collect_data(status), indent=2))
    else:
        _print_status(status)
        if status.live_update:
            _print_open_sessions(open_sessions())
            _print_readiness()
    return PASSED if status.live_update else FAILED


def _collect_data(status: kho.KhoStatus) -> dict[str, object]:
    data = dataclasses.asdict(status)
    if status.live_update:
        data["held"] = [dataclasses.asdict(each) for each in open_sessions()]
        data["image_loaded"] = kexec.loaded()
        data["preservable"] = max(guards.preservable_memory() - guards.RESERVE, 0)
    return data


def _print_status(status: kho.KhoStatus) -> None:
    if not status.live_update:
        print("This system cannot live-update:")
        for obstacle in status.obstacles:
            print(f"  {obstacle.missing}: {obstacle.remedy}.")
        return
    print(f"Linux {status.release} can live-update.")
    if status.handed_over is None:
        print("What was handed to it is unknown: its log no longer says so, or may not be read.")
    elif not status.handed_over:
        print("It was booted cold: nothing was handed to it.")
    else:
        origin = status.from_release or "a kernel whose release is not logged"
        count = "an unknown number of" if status.updates is None else status.updates
        print(f"It was handed data by {origin}; live updates since the cold boot: {count}.")


def _print_open_sessions(found: list[OpenSession]) -> None:
    sessions = [each for each in found if each.session is not None]
    print(f"Sessions held: {len(sessions) or 'none'}{':' if sessions else '.'}")
    for each in sessions:
        direction = each.direction or "of unknown direction"
        print(
            f"  {each.session!r}, {direction}, by {each.command!r} (pid {each.pid}, fd {each.fd})"
        )
    for each in found:
        if each.session is None:
            print(f"The device is open in {each.command!r} (pid {each.pid}, fd {each.fd}).")


def _print_readiness() -> None:
    room = max(guards.preservable_memory() - guards.RESERVE, 0) >> 20
    image = "is loaded" if kexec.loaded() else "is not loaded yet"
    print(f"About {room} MiB more can be preserved; the next kernel {image}.")
