"""`pyluo vm`: build kernels and roots, and run and live-update guests.

Each of its actions is a module of this package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyluo.cli.parsers import add_command
from pyluo.cli.vm import bisect, kernel, live_update, matrix, root, run, selftests, shell

if TYPE_CHECKING:
    from pyluo.cli.parsers import Subparsers

__all__ = ["add_parser"]


def add_parser(subparsers: Subparsers) -> None:
    """Add the `vm` command and its actions."""
    parser = add_command(
        subparsers,
        "vm",
        "Build kernels and roots, and live-update guests",
        "pyluo vm shell --to previous",
        "pyluo vm live-update --kernel previous --to stable --hops 10",
    )
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION")
    for action in (kernel, root, run, shell, live_update, selftests, matrix, bisect):
        action.add_parser(actions)
