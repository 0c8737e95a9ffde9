"""`pyluo status`: whether this system can live-update, and where it came from."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

from pyluo import kho
from pyluo.cli.exit import FAILED, PASSED

if TYPE_CHECKING:
    import argparse

    from pyluo.cli.parsers import Commands

__all__ = ["add_parser"]


def add_parser(commands: Commands) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser("status", help="whether this system can live-update")
    parser.add_argument("--json", action="store_true", help="as data")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    status = kho.status()
    if arguments.json:
        print(json.dumps(dataclasses.asdict(status), indent=2))
    else:
        _tell(status)
    return PASSED if status.live_update else FAILED


def _tell(status: kho.KhoStatus) -> None:
    if not status.live_update:
        print("This system cannot live-update:")
        for obstacle in status.obstacles:
            print(f"  {obstacle.missing}: {obstacle.remedy}.")
        return
    print(f"Linux {status.release} can live-update.")
    if status.handed_over is None:
        print("Its log no longer tells, or may not be read for, what it was handed.")
    elif not status.handed_over:
        print("It was booted cold: nothing was handed to it.")
    else:
        origin = status.from_release or "a kernel whose release is not logged"
        count = "an unknown number of" if status.updates is None else status.updates
        print(f"It was handed data by {origin}; live updates since the cold boot: {count}.")
