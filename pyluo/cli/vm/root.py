"""`pyluo vm root`: make roots for guests."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from pyluo.cli.exit import PASSED
from pyluo.cli.parsers import add_command

if TYPE_CHECKING:
    import argparse

    from pyluo.cli.parsers import Subparsers

__all__ = ["add_parser"]


def add_parser(subparsers: Subparsers) -> None:
    """Add the `root` action."""
    root = add_command(
        subparsers,
        "root",
        "Make roots for guests, other than the host's own",
        "pyluo vm root build sid",
        "pyluo vm run --root sid -- systemctl --version",
    )
    verbs = root.add_subparsers(title="verbs", required=True, metavar="VERB")
    build = add_command(
        verbs,
        "build",
        "Make roots, unless the cache has them",
        "pyluo vm root build sid",
        "pyluo vm root build --update sid",
    )
    build.add_argument("names", nargs="+", metavar="NAME", help="a name in roots.toml")
    build.add_argument("--update", action="store_true", help="ask the archive for newer versions")
    build.add_argument("--json", action="store_true", help="print JSON")
    build.set_defaults(run=_build)


def _build(arguments: argparse.Namespace) -> int:
    from pyluo.vm import Root

    built = [Root.build(name, update=arguments.update) for name in arguments.names]
    if arguments.json:
        print(json.dumps([{"name": each.name, "folder": str(each.folder)} for each in built]))
    else:
        for each in built:
            print(f"{each.name}: {each.folder}")
    return PASSED
