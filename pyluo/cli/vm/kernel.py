"""`pyluo vm kernel`: fetch, configure and build kernels."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from pyluo.cli.exit import PASSED
from pyluo.cli.parsers import add_command
from pyluo.vm.machine import options

if TYPE_CHECKING:
    import argparse

    from pyluo.cli.parsers import Subparsers

__all__ = ["add_parser"]


def add_parser(subparsers: Subparsers) -> None:
    """Add the `kernel` action."""
    kernel = add_command(
        subparsers,
        "kernel",
        "Fetch, configure and build kernels",
        "pyluo vm kernel build stable previous",
        "pyluo vm kernel build --config CONFIG_KASAN=y ~/linux",
    )
    verbs = kernel.add_subparsers(title="verbs", required=True, metavar="VERB")
    build = add_command(
        verbs,
        "build",
        "Build kernels, unless the cache has them",
        "pyluo vm kernel build stable previous",
        "pyluo vm kernel build --update --json stable",
        more="The cache is $XDG_CACHE_HOME/pyluo.",
    )
    build.add_argument(
        "names", nargs="*", default=["stable"], metavar="NAME",
        help="a name in kernels.toml, or the path of a tree or a tarball",
    )  # fmt: skip
    options.add(build.add_argument, only=["config"])
    build.add_argument("--update", action="store_true", help="ask the archive for newer versions")
    build.add_argument("--json", action="store_true", help="print JSON")
    build.set_defaults(run=_build)


def _build(arguments: argparse.Namespace) -> int:
    from pyluo.vm import Kernel

    built = [
        Kernel.build(name, config=arguments.config, update=arguments.update)
        for name in arguments.names
    ]
    if arguments.json:
        rows = [
            {"name": each.name, "release": each.release, "image": str(each.image)} for each in built
        ]
        print(json.dumps(rows, indent=2))
    else:
        for each in built:
            print(f"{each.name}: Linux {each.release}, {each.image}")
    return PASSED
