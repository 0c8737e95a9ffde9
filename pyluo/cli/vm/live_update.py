"""`pyluo vm live-update`: live-update a guest, once or many times."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from typing import TYPE_CHECKING

from pyluo.cli.exit import FAILED, PASSED, USAGE
from pyluo.cli.parsers import add_command
from pyluo.cli.vm import program, report
from pyluo.vm import progress
from pyluo.vm.machine import options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyluo.cli.parsers import Subparsers
    from pyluo.vm import VM, Jump, Kernel, Timeline

__all__ = ["add_parser"]


def add_parser(subparsers: Subparsers) -> None:
    """Add the `live-update` action."""
    update = add_command(
        subparsers,
        "live-update",
        "Live-update a guest, once or many times",
        "pyluo vm live-update --kernel previous --to stable --hops 50",
        "pyluo vm live-update --watch --cpus 2",
        "pyluo vm live-update --before 'pyluo save x /etc/hosts' --after 'pyluo restore x /tmp'",
        more="Shows how long each jump took; programs can run before the first and after the last.",
    )
    options.add(update.add_argument)
    program.add_timeout(update)
    report.add_option(update)
    update.add_argument(
        "--before",
        type=_split_command,
        metavar="CMD",
        help="a program to run before the first jump",
    )
    update.add_argument(
        "--after", type=_split_command, metavar="CMD", help="a program to run after the last jump"
    )
    update.add_argument(
        "--hops", type=options.count, default=1, metavar="N", help="how many jumps (default: 1)"
    )
    update.add_argument(
        "--watch",
        action="store_true",
        help="say on stderr when each event of a live update happens",
    )
    update.add_argument(
        "--plot",
        metavar="FILE",
        help="draw the live updates in time, as .svg or .png (needs pyluo[plot])",
    )
    update.add_argument(
        "--json", action="store_true", help="print JSON; not with --before or --after"
    )
    update.set_defaults(run=_live_update)


def _live_update(arguments: argparse.Namespace) -> int:
    if arguments.plot:
        from pyluo.vm.results import plot

        plot.check_format(arguments.plot)
    if arguments.before or arguments.after:
        if arguments.json:
            print("pyluo: --json excludes --before and --after", file=sys.stderr)
            return USAGE
        return _run_before_and_after(arguments)
    from pyluo.vm.run import hops

    guest = options.GuestOptions.of(arguments)
    kernel, to = guest.find_kernel(), guest.find_next()
    with report.written(arguments.report, [kernel, to]) as outcome:
        tally = hops.run_hops(lambda: _make_guest(arguments, kernel, to), arguments.hops)
        outcome.append(f"{tally.landed} of {tally.hops} live updates came back")
        outcome += map(str, tally.failures)
    if arguments.json:
        failures = [{"cause": each.cause.value, "text": str(each)} for each in tally.failures]
        data = {"hops": tally.hops, "landed": tally.landed, "median_blackout": tally.median}
        print(json.dumps(data | {"blackouts": tally.blackouts, "failures": failures}))
    else:
        median = f", blackout {tally.median:.2f} s (median)" if tally.median else ""
        print(f"{tally.landed} of {tally.hops} live updates came back{median}")
    _draw(tally.jumps, arguments.plot)
    return PASSED if tally.passed else FAILED


def _run_before_and_after(arguments: argparse.Namespace) -> int:
    """Run a program on the first kernel and another one on the last; return the exit status."""
    before, after = (command or ["true"] for command in (arguments.before, arguments.after))
    guest = options.GuestOptions.of(arguments)
    kernel, to = guest.find_kernel(), guest.find_next()
    with (
        report.written(arguments.report, [kernel, to]) as outcome,
        program.booted(_make_guest(arguments, kernel, to)) as vm,
    ):
        status = program.relay(vm, before, arguments.timeout)
        outcome.append(f"exit status {status} before the jump")
        if not status:
            for hop in range(1, arguments.hops + 1):
                with progress.status(f"live update {hop}"):
                    vm.live_update()
            status = program.relay(vm, after, arguments.timeout)
            outcome.append(f"exit status {status} after the jump")
        _draw(vm.jumps, arguments.plot)
        return status


def _draw(jumps: Sequence[Jump], path: str | None) -> None:
    if path:
        from pyluo.vm.results import plot

        sys.stdout.flush()  # what was printed is not lost if the file cannot be written
        plot.draw(jumps, path)


def _make_guest(arguments: argparse.Namespace, kernel: Kernel, to: Kernel | None) -> VM:
    vm = options.GuestOptions.of(arguments).guest(kernel, to)
    if arguments.watch:
        vm.on_event = _Watcher()
    return vm


class _Watcher:
    """Says on stderr when each event of a guest's boot and of its live updates happens."""

    def __init__(self) -> None:
        self._lives = 0

    def __call__(self, timeline: Timeline) -> None:
        """Show the last event."""
        if len(timeline.events) == 1:
            progress.say(f"live update {self._lives}" if self._lives else "cold boot")
            self._lives += 1
        event = timeline.events[-1]
        progress.say(f"{event.at - timeline.started:9.3f} s  {event.name}")


def _split_command(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{command!r} is not a command: {error}") from None
