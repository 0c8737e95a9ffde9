"""`pyluo vm shell`: a terminal in a fresh guest that survives live updates."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyluo.vm.machine import options

if TYPE_CHECKING:
    import argparse

    from pyluo.cli.parsers import Commands

__all__ = ["add_parser"]


def add_parser(actions: Commands) -> None:
    """Add the action to the parser."""
    shell = actions.add_parser(
        "shell",
        help="open a terminal in a fresh guest that survives live updates",
        description="Open a terminal in a fresh guest that survives live updates. Ctrl-] ? shows "
        "the keys for the host. If stdin is not a terminal, it is run as a script.",
    )
    options.add(shell.add_argument)
    shell.add_argument(
        "command",
        nargs="*",
        metavar="CMD",
        help="the program and its arguments, after --; without it, $SHELL or /bin/sh",
    )
    shell.set_defaults(run=_shell)


def _shell(arguments: argparse.Namespace) -> int:
    from pyluo.vm.terminal.shell import Shell

    with options.GuestOptions.of(arguments).guest() as vm:
        return Shell(vm, arguments.command).run()
