"""`pyluo demo`: show a live update of a guest that preserves a memfd, or a whole VM."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

from pyluo.cli.exit import FAILED, PASSED
from pyluo.cli.parsers import add_command
from pyluo.vm.machine.options import size
from pyluo.vm.machine.timeline import Jump

if TYPE_CHECKING:
    import argparse

    from pyluo.cli.parsers import Subparsers
    from pyluo.vm.run.round_trip import RoundTrip
    from pyluo.vm.run.vm_round_trip import VmLine, VmRoundTrip

__all__ = ["add_parser"]

_SIZE = 4 << 20  # bytes


def add_parser(subparsers: Subparsers) -> None:
    """Add the `demo` command."""
    parser = add_command(
        subparsers,
        "demo",
        "Carry a memfd, or a VM, through a real live update, in QEMU",
        "pyluo demo",
        "pyluo demo --vm",
        more="The first run builds a kernel.",
    )
    parser.add_argument("--kernel", default="stable", metavar="KERNEL", help="the kernel to boot")
    parser.add_argument(
        "--to", metavar="KERNEL", help="the kernel to jump to (default: the same kernel)"
    )
    parser.add_argument("--size", type=size, help="the size of the memfd (default: 4M)")
    parser.add_argument("--corrupt", action="store_true", help="flip a byte, to see the check fail")
    parser.add_argument(
        "--vm",
        action="store_true",
        help="carry a running VM of QEMU through it instead, whose host the guest is",
    )
    parser.add_argument(
        "--plot",
        metavar="FILE",
        help="draw the live update in time, as .svg or .png (needs pyluo[plot])",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_run, parser=parser)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.vm:
        return _run_vm(arguments)
    from pyluo.vm.results import plot
    from pyluo.vm.run.round_trip import run_round_trip

    if arguments.plot:
        plot.check_format(arguments.plot)
    result = run_round_trip(
        arguments.kernel, arguments.to, size=arguments.size or _SIZE, corrupt=arguments.corrupt
    )
    if arguments.json:
        data = dataclasses.asdict(result)
        print(json.dumps(data | {"passed": result.passed, "blackout": result.timeline.blackout}))
    else:
        _print(result)
    if arguments.plot:
        jump = Jump(arguments.kernel, arguments.to or arguments.kernel, True, result.timeline)
        plot.draw([jump], arguments.plot)
    return PASSED if result.passed else FAILED


def _run_vm(arguments: argparse.Namespace) -> int:
    from pyluo.vm.run.vm_round_trip import run_vm_round_trip

    if arguments.corrupt or arguments.plot or arguments.size is not None:
        arguments.parser.error("--size, --corrupt and --plot are about the memfd, not about a VM")
    result = run_vm_round_trip(arguments.kernel, arguments.to)
    if arguments.json:
        print(json.dumps(dataclasses.asdict(result) | {"passed": result.passed}))
    else:
        _print_vm(result)
    return PASSED if result.passed else FAILED


def _print_vm(result: VmRoundTrip) -> None:
    print(f"Linux {result.before} live-updated to Linux {result.after}, with a VM in QEMU.\n")
    said = {"first line of the VM": result.first}
    print(f"    0.000 s  {'VM told to pause':30}{_describe(result.last)}")
    for event in result.events:
        line = _describe(said[event.name]) if event.name in said else ""
        print(f"  {event.at:7.3f} s  {event.name:30}{line}".rstrip())
    print(f"{'... and later':43}{_describe(result.later)}\n")
    if result.passed:
        print("PASSED: the VM never booted again, and found its memory and files as they were")
    else:
        print(f"FAILED: the VM said {result.last}, {result.first}, {result.later}")


def _describe(line: VmLine) -> str:
    return (
        f"VM: line {line.number}, its clock {line.clock:.3f} s, {line.changed} pages changed, "
        f"{line.wrong} words wrong"
    )


def _print(result: RoundTrip) -> None:
    print(f"Linux {result.before} live-updated to Linux {result.after}, in QEMU.\n")
    for event in result.timeline.events:
        print(f"  {event.at - result.timeline.started:7.3f} s  {event.name}")
    print(f"\n  blackout {result.timeline.blackout:.3f} s, from reboot() to the descriptor\n")
    print(f"  preserved  {result.preserved}  {result.size} bytes of random data")
    print(f"  retrieved  {result.retrieved}")
    gone = "gone, as they should be" if not result.survivors else ", ".join(result.survivors)
    print(f"  neighbours that were not preserved: {gone}\n")
    print("PASSED" if result.passed else "FAILED: not exactly the preserved memory survived")
