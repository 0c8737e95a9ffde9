"""`pyluo vm`: kernels, and guests to live-update."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from typing import TYPE_CHECKING

from pyluo.cli import selftests
from pyluo.cli.exit import FAILED, PASSED, USAGE
from pyluo.cli.parsers import Commands, count, size

if TYPE_CHECKING:
    import argparse

    from pyluo.vm import VM

__all__ = ["add_parser"]

# As shells and timeout(1) have it.
_TIMED_OUT, _NOT_RUNNABLE, _NOT_FOUND, _SIGNALLED = 124, 126, 127, 128


def add_parser(commands: Commands) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser("vm", help="kernels, and guests to live-update")
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION")
    _add_kernel(actions)
    _add_run(actions)
    _add_live_update(actions)
    _add_selftests(actions)


def _add_kernel(actions: Commands) -> None:
    kernel = actions.add_parser("kernel", help="fetch, configure and build kernels")
    verbs = kernel.add_subparsers(title="verbs", required=True, metavar="VERB")
    build = verbs.add_parser("build", help="build kernels, unless the cache has them")
    build.add_argument(
        "names", nargs="*", default=["stable"], metavar="NAME",
        help="of kernels.toml, or the path of a tree or a tarball",
    )  # fmt: skip
    build.add_argument("--update", action="store_true", help="ask the archive for newer versions")
    build.add_argument("--json", action="store_true", help="as data")
    build.set_defaults(run=_build)


def _add_run(actions: Commands) -> None:
    run = actions.add_parser("run", help="run a program in a fresh guest")
    _add_guest_options(run)
    run.add_argument("command", nargs="+", metavar="CMD", help="after --")
    run.set_defaults(run=_run)


def _add_live_update(actions: Commands) -> None:
    update = actions.add_parser("live-update", help="live-update a guest, once or many times")
    _add_guest_options(update)
    update.add_argument("--before", metavar="CMD", help="to run before the first jump")
    update.add_argument("--after", metavar="CMD", help="to run after the last jump")
    update.add_argument("--to", metavar="KERNEL", help="to jump into; the same one without it")
    update.add_argument("--hops", type=count, default=1, metavar="N", help="how many jumps")
    update.add_argument("--json", action="store_true", help="the count as data; not with CMD")
    update.set_defaults(run=_live_update)


def _add_selftests(actions: Commands) -> None:
    tests = actions.add_parser("selftests", help="run the kernel's own selftests")
    _add_guest_options(tests)
    tests.set_defaults(kernel=None, memory=None)  # each suite has its own
    tests.add_argument(
        "suite", nargs="?", default="liveupdate", metavar="SUITE", help="liveupdate or iommu"
    )
    tests.add_argument("--to", metavar="KERNEL", help="to jump into; the same one without it")
    tests.add_argument("--json", action="store_true", help="as data")
    tests.add_argument("--junit", metavar="FILE", help="write the verdicts there as JUnit's XML")
    tests.add_argument("--ktap", metavar="FILE", help="write them there in KTAP")
    tests.set_defaults(run=_selftests)


def _add_guest_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kernel", default="stable", help="a name, or the path of a bzImage")
    parser.add_argument("--memory", type=size, default="1G", metavar="SIZE")
    parser.add_argument("--cpus", type=count, default=1, metavar="N")
    parser.add_argument(
        "--accel", choices=["kvm", "tcg"], help="KVM where it works and TCG elsewhere without it"
    )
    parser.add_argument("--append", default="", metavar="TEXT", help="to the command line")
    parser.add_argument("--timeout", type=count, default=600, metavar="S", help="of each CMD")


def _build(arguments: argparse.Namespace) -> int:
    from pyluo.vm import Kernel

    built = [Kernel.build(name, update=arguments.update) for name in arguments.names]
    if arguments.json:
        rows = [
            {"name": each.name, "release": each.release, "image": str(each.image)} for each in built
        ]
        print(json.dumps(rows, indent=2))
    else:
        for each in built:
            print(f"{each.name}: Linux {each.release}, {each.image}")
    return PASSED


def _run(arguments: argparse.Namespace) -> int:
    with _guest(arguments) as vm:
        return _program(vm, arguments.command, arguments.timeout)


def _live_update(arguments: argparse.Namespace) -> int:
    if arguments.before or arguments.after:
        if arguments.json:
            print("pyluo: --json counts live updates, and goes with no program", file=sys.stderr)
            return USAGE
        return _between(arguments)
    from pyluo.vm import hops

    tally = hops.run(lambda: _guest(arguments), to=arguments.to, hops=arguments.hops)
    if arguments.json:
        crashes = [{"death": each.death.value, "text": str(each)} for each in tally.crashes]
        data = {"hops": tally.hops, "landed": tally.landed, "median_blackout": tally.median}
        print(json.dumps(data | {"blackouts": tally.blackouts, "crashes": crashes}))
    else:
        median = f", blackout {tally.median:.2f} s (median)" if tally.median else ""
        print(f"{tally.landed} of {tally.hops} live updates came back{median}")
    return PASSED if tally.passed else FAILED


def _between(arguments: argparse.Namespace) -> int:
    """Runs a program on one kernel and another on the last."""
    with _guest(arguments) as vm:
        if status := _program(vm, shlex.split(arguments.before or "true"), arguments.timeout):
            return status
        for _ in range(arguments.hops):
            vm.live_update(arguments.to)
        return _program(vm, shlex.split(arguments.after or "true"), arguments.timeout)


def _selftests(arguments: argparse.Namespace) -> int:
    from pyluo.vm import Kernel
    from pyluo.vm.selftests import SUITES, programs
    from pyluo.vm.verdicts import run

    suite = SUITES.get(arguments.suite)
    if suite is None:
        known = ", ".join(SUITES)
        print(f"pyluo: there is no suite {arguments.suite}: name one of {known}", file=sys.stderr)
        return USAGE
    kernel = arguments.kernel = Kernel.find(arguments.kernel or suite.kernel)
    arguments.memory = arguments.memory or suite.memory
    arguments.append = f"{suite.append} {arguments.append}".strip()
    tests = programs(suite, kernel)
    verdicts = run(tests, lambda: _guest(arguments), to=arguments.to, timeout=arguments.timeout)
    show = selftests.show_json if arguments.json else selftests.show
    with selftests.written(suite.name, verdicts, arguments.junit, arguments.ktap) as verdicts:
        return PASSED if show(suite.name, kernel, verdicts) else FAILED


def _guest(arguments: argparse.Namespace) -> VM:
    from pyluo.vm import VM, Accelerator

    return VM(
        arguments.kernel,
        accelerator=Accelerator(arguments.accel) if arguments.accel else None,
        memory=arguments.memory,
        cpus=arguments.cpus,
        append=arguments.append,
    )


def _program(vm: VM, command: list[str], timeout: int) -> int:
    """Runs a program in the guest, relays what it said, and returns its status as a shell would."""
    try:
        done = vm.run(command, timeout)
    except FileNotFoundError as error:
        missing = error.filename or "current folder of the host"
        print(f"pyluo: the guest has no {missing}", file=sys.stderr)
        return _NOT_FOUND
    except PermissionError as error:
        print(f"pyluo: {error.filename} cannot be run", file=sys.stderr)
        return _NOT_RUNNABLE
    except subprocess.TimeoutExpired:
        print(f"pyluo: {command[0]} still ran after {timeout} s", file=sys.stderr)
        return _TIMED_OUT
    sys.stdout.buffer.write(done.stdout)
    sys.stdout.flush()
    sys.stderr.buffer.write(done.stderr)
    sys.stderr.flush()
    return done.returncode if done.returncode >= 0 else _SIGNALLED - done.returncode
