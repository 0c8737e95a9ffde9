"""`pyluo vm run`: run a program in a fresh guest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyluo.cli.parsers import add_command
from pyluo.cli.vm import program, report
from pyluo.vm.machine import options

if TYPE_CHECKING:
    import argparse

    from pyluo.cli.parsers import Subparsers

__all__ = ["add_parser"]


def add_parser(subparsers: Subparsers) -> None:
    """Add the `run` action."""
    run = add_command(
        subparsers,
        "run",
        "Run a program in a fresh guest",
        "pyluo vm run -- uname -a",
        "pyluo vm run --kernel ~/linux --cpus 2 --memory 2G -- ./my_selftest",
        more="The guest has the host's files, read-only; the exit status is the program's own.",
    )
    options.add(run.add_argument, without=["to"])
    program.add_timeout(run)
    report.add_option(run)
    run.add_argument(
        "command", nargs="+", metavar="CMD", help="the program and its arguments, after --"
    )
    run.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    guest = options.GuestOptions.of(arguments)
    kernel = guest.find_kernel()
    with (
        report.written(arguments.report, [kernel]) as outcome,
        program.booted(guest.guest(kernel)) as vm,
    ):
        status = program.relay(vm, arguments.command, arguments.timeout)
        outcome.append(f"exit status {status}")
        return status
