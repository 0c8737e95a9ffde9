"""`pyluo vm selftests`: run the kernel's own selftests in guests."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from pyluo.cli.exit import FAILED, PASSED, USAGE
from pyluo.cli.parsers import add_command
from pyluo.cli.vm import program, verdicts
from pyluo.vm.machine import options

if TYPE_CHECKING:
    import argparse

    from pyluo.cli.parsers import Subparsers

__all__ = ["add_parser"]


def add_parser(subparsers: Subparsers) -> None:
    """Add the `selftests` action."""
    tests = add_command(
        subparsers,
        "selftests",
        "Run the kernel's own selftests",
        "pyluo vm selftests --kernel previous --to stable",
        "pyluo vm selftests iommu --junit iommu.xml",
        more="They are built from the kernel's own source, and each program runs in a fresh guest.",
    )
    # Their programs are linked with the host's libraries.
    options.add(tests.add_argument, without=["root"])
    tests.set_defaults(kernel=None)  # each suite has its own default kernel
    program.add_timeout(tests)
    tests.add_argument(
        "suite", nargs="?", default="liveupdate", metavar="SUITE", help="liveupdate or iommu"
    )
    tests.add_argument("--json", action="store_true", help="print JSON")
    verdicts.add_file_options(tests)
    tests.set_defaults(run=_selftests)


def _selftests(arguments: argparse.Namespace) -> int:
    from pyluo.vm.run.programs import run_selftests
    from pyluo.vm.run.selftests import SUITES, find_selftests

    suite = SUITES.get(arguments.suite)
    if suite is None:
        known = ", ".join(SUITES)
        print(f"pyluo: there is no suite {arguments.suite}: name one of {known}", file=sys.stderr)
        return USAGE
    given = options.GuestOptions.of(arguments)
    guest = replace(
        given,
        kernel=given.kernel or suite.kernel,
        append=f"{suite.append} {given.append}".strip(),
    )
    kernel, to = guest.find_kernel(), guest.find_next()
    selftests = find_selftests(suite, kernel)
    results = run_selftests(selftests, lambda: guest.guest(kernel, to), timeout=arguments.timeout)
    show = verdicts.show_json if arguments.json else verdicts.show
    with verdicts.write_files(suite.name, results, arguments.junit, arguments.ktap) as passed_on:
        return PASSED if show(suite.name, kernel, passed_on) else FAILED
