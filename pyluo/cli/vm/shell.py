"""`pyluo vm shell`: open a terminal in a fresh guest; the terminal keeps working across live
updates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyluo.cli.parsers import add_command
from pyluo.cli.vm import program
from pyluo.vm.machine import options

if TYPE_CHECKING:
    import argparse

    from pyluo.cli.parsers import Subparsers

__all__ = ["add_parser"]


def add_parser(subparsers: Subparsers) -> None:
    """Add the `shell` action."""
    shell = add_command(
        subparsers,
        "shell",
        "Open a terminal in a fresh guest; the terminal keeps working across live updates",
        "pyluo vm shell --to previous",
        "pyluo vm shell --kernel ~/linux -- bash",
        more="Ctrl-] ? shows the keys that the host handles. If stdin is not a terminal, it is run "
        "as a script.",
    )
    options.add(shell.add_argument)
    shell.add_argument(
        "command",
        nargs="*",
        metavar="CMD",
        help="the program and its arguments, after -- (default: $SHELL or /bin/sh)",
    )
    shell.set_defaults(run=_shell)


def _shell(arguments: argparse.Namespace) -> int:
    from pyluo.vm.terminal.shell import Shell

    with program.booted(options.GuestOptions.of(arguments).guest()) as vm:
        return Shell(vm, arguments.command).run()
