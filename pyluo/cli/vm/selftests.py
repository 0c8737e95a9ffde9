"""`pyluo vm selftests`: the kernel's own selftests, in guests."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from pyluo.cli.exit import FAILED, PASSED, USAGE
from pyluo.cli.vm import program, verdicts
from pyluo.vm.machine import options

if TYPE_CHECKING:
    import argparse

    from pyluo.cli.parsers import Commands

__all__ = ["add_parser"]


def add_parser(actions: Commands) -> None:
    """Adds the action to the parser."""
    tests = actions.add_parser("selftests", help="run the kernel's own selftests")
    options.add(tests.add_argument)
    tests.set_defaults(kernel=None)  # each suite has its own
    program.add_timeout(tests)
    tests.add_argument(
        "suite", nargs="?", default="liveupdate", metavar="SUITE", help="liveupdate or iommu"
    )
    tests.add_argument("--json", action="store_true", help="as data")
    verdicts.add_files(tests)
    tests.set_defaults(run=_selftests)


def _selftests(arguments: argparse.Namespace) -> int:
    from pyluo.vm.run.programs import run
    from pyluo.vm.run.selftests import SUITES, programs

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
    tests = programs(suite, kernel)
    came = run(tests, lambda: guest.guest(kernel, to), timeout=arguments.timeout)
    show = verdicts.show_json if arguments.json else verdicts.show
    with verdicts.written(suite.name, came, arguments.junit, arguments.ktap) as told:
        return PASSED if show(suite.name, kernel, told) else FAILED
