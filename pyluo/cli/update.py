"""`pyluo update`: update the host's kernel while its VMs live on."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pyluo import kexec
from pyluo.cli.exit import FAILED, PASSED
from pyluo.cli.kexec import add_image_options, load_image
from pyluo.cli.parsers import add_command
from pyluo.update import SOCKET

if TYPE_CHECKING:
    import argparse

    from pyluo.cli.parsers import Subparsers
    from pyluo.update.messages import Done, Status, Update

__all__ = ["add_parser"]

_LIMIT = 30.0  # seconds


def add_parser(subparsers: Subparsers) -> None:
    """Add the `update` command."""
    parser = add_command(
        subparsers,
        "update",
        "Update the host's kernel while its VMs live on",
        "pyluo update serve --network",
        "pyluo update run /boot/vmlinuz-next --reuse-cmdline",
    )
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION")
    serve = add_command(
        actions,
        "serve",
        "Coordinate updates: wait for VMMs to take part",
        "pyluo update serve",
        "pyluo update serve --network --socket /run/vms/update.socket",
        more="Runs all the time, as a service: examples/systemd/pyluo-update.service.",
    )
    serve.add_argument(
        "--network",
        action="store_true",
        help="make the host's bridges, VLANs, taps, addresses and routes again after the jump "
        "(needs pyluo[net])",
    )
    run = add_command(
        actions,
        "run",
        "Have all VMs stored, and jump to the next kernel",
        "pyluo update run /boot/vmlinuz-next --reuse-cmdline --expect vm0 vm1",
        "pyluo update run --dry-run --rounds 10",
        more="If one VM cannot be stored in time, or the kernel refuses, all of them run on.",
    )
    run.add_argument(
        "kernel", type=Path, nargs="?", help="the image; by default the one that is loaded"
    )
    add_image_options(run)
    run.add_argument(
        "--limit",
        type=float,
        default=_LIMIT,
        metavar="SECONDS",
        help="for all VMs to be stored; else all run on (default: %(default)g)",
    )
    run.add_argument(
        "--dry-run", action="store_true", help="let all VMs run on when they are stored"
    )
    run.add_argument("--rounds", type=int, default=1, metavar="N", help="how often, with --dry-run")
    run.add_argument(
        "--expect",
        nargs="+",
        default=[],
        metavar="NAME",
        help="refuse unless VMs of these names take part",
    )
    status = add_command(
        actions,
        "status",
        "Say which VMs take part, and lived through it last",
        "pyluo update status",
        "pyluo update status --json",
    )
    for action, function in ((serve, _serve), (run, _run), (status, _status)):
        action.add_argument(
            "--socket",
            type=Path,
            default=SOCKET,
            metavar="PATH",
            help="where the coordinator listens (default: %(default)s)",
        )
        action.set_defaults(run=function, parser=action)
    for action in (run, status):
        action.add_argument("--json", action="store_true", help="print a JSON object for each line")


def _serve(arguments: argparse.Namespace) -> int:
    from pyluo.update.coordinator import Coordinator
    from pyluo.update.host import Host

    host = Host(network=arguments.network)

    def log(text: str) -> None:
        print(f"pyluo update: {text}", file=sys.stderr, flush=True)

    async def serve() -> None:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        with suppress(asyncio.CancelledError):
            await Coordinator(host, log).serve(arguments.socket)

    asyncio.run(serve())
    return PASSED


def _run(arguments: argparse.Namespace) -> int:
    from pyluo.update.messages import VERSION, Update

    if arguments.rounds != 1 and not arguments.dry_run:
        arguments.parser.error("--rounds needs --dry-run")
    if arguments.rounds < 1 or arguments.limit <= 0:
        arguments.parser.error("--rounds and --limit are above zero")
    if arguments.kernel is not None:
        load_image(arguments)
    request = Update(
        version=VERSION,
        limit=arguments.limit,
        dry_run=arguments.dry_run,
        rounds=arguments.rounds,
        expected=arguments.expect,
    )
    done = _ask(arguments, request)
    if done is None:  # systemd stops the services, this one too, and jumps
        return PASSED
    if arguments.kernel is not None:
        kexec.unload()
    return FAILED if done.failure else PASSED


def _status(arguments: argparse.Namespace) -> int:
    from pyluo.update.messages import VERSION, Status

    _ask(arguments, Status(version=VERSION))
    return PASSED


def _ask(arguments: argparse.Namespace, request: Update | Status) -> Done | None:
    """Print the coordinator's answers, and return the last one; None if the host jumps."""
    from pyluo.update.client import ask
    from pyluo.update.messages import Done, Update

    for answer in ask(arguments.socket, request):
        if isinstance(answer, Done):
            if arguments.json:
                print(json.dumps({"failure": answer.failure}), flush=True)
            elif answer.failure:
                print(f"pyluo: no update: {answer.failure}", file=sys.stderr)
            return answer
        if arguments.json:
            members = {"seconds": answer.seconds, "name": answer.name, "text": answer.text}
            print(json.dumps(members), flush=True)
        else:
            when = f"{answer.seconds:8.3f} s  " if isinstance(request, Update) else ""
            print(f"{when}{answer.name or 'host'}: {answer.text}", flush=True)
    return None
