"""`pyluo completion`: print what a shell needs to complete pyluo's command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pyluo.cli.exit import PASSED
from pyluo.cli.parsers import add_command, walk

if TYPE_CHECKING:
    import argparse

    from pyluo.cli.parsers import Subparsers

__all__ = ["add_parser"]

# Where each shell looks for completions of a user.
_PLACES = {
    "bash": "~/.local/share/bash-completion/completions/pyluo",
    "fish": "~/.config/fish/completions/pyluo.fish",
    "zsh": "~/.zfunc/_pyluo  # a folder of $fpath",
}


def add_parser(subparsers: Subparsers) -> None:
    """Add the `completion` command."""
    parser = add_command(
        subparsers,
        "completion",
        "Print a script that completes pyluo's command line in a shell",
        *(f"pyluo completion {shell} > {place}" for shell, place in _PLACES.items()),
    )
    parser.add_argument("shell", choices=list(_PLACES), help="the shell")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    import shtab

    from pyluo.cli import make_parser

    parser = make_parser()
    for command in walk(parser):
        for action in command._actions:
            if action.type is Path:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(parser, shell=arguments.shell))
    return PASSED
