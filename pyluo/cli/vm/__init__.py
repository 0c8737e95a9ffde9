"""`pyluo vm`: build kernels, and run and live-update guests. Each action is a module here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyluo.cli.vm import bisect, kernel, live_update, matrix, run, selftests, shell

if TYPE_CHECKING:
    from pyluo.cli.parsers import Commands

__all__ = ["add_parser"]


def add_parser(commands: Commands) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("vm", help="kernels, and guests to live-update")
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION")
    for action in (kernel, run, shell, live_update, selftests, matrix, bisect):
        action.add_parser(actions)
