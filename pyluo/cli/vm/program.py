"""Boot a guest, and run a program given on the command line in it; add --timeout and --limit."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from pyluo.vm import progress
from pyluo.vm.machine.options import count, seconds

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    from pyluo.vm import VM

__all__ = ["add_limit", "add_timeout", "booted", "relay"]

# The exit statuses of shells and of timeout(1) for these cases.
_TIMED_OUT, _NOT_RUNNABLE, _NOT_FOUND, _SIGNALLED = 124, 126, 127, 128


def add_timeout(parser: argparse.ArgumentParser) -> None:
    """Add the option --timeout: how long a program may take."""
    parser.add_argument(
        "--timeout", type=count, default=600, metavar="S", help="seconds for each program"
    )


def add_limit(parser: argparse.ArgumentParser) -> None:
    """Add the option --limit: how long a run of tests may take."""
    parser.add_argument(
        "--limit", type=seconds, default=3600.0, metavar="S",
        help="seconds for the tests, after which there is no verdict (default: 3600)",
    )  # fmt: skip


@contextmanager
def booted(guest: VM) -> Iterator[VM]:
    """Boot a guest for the block, and show on a terminal that it is booting."""
    with ExitStack() as stack:
        with progress.status("booting"):
            vm = stack.enter_context(guest)
        yield vm


def relay(vm: VM, command: Sequence[str], timeout: int) -> int:
    """Run a program in the guest and print its output.

    Args:
        vm: the guest.
        command: the program and its arguments.
        timeout: how long the program may take, in seconds.

    Returns:
        The exit status, as from a shell or from timeout(1): the program's own; 128 + N after signal
        N; 127 if the program, or the host's current folder, is not found in the guest; 126 if the
        program cannot be run; 124 after a timeout.
    """
    try:
        with progress.status(f"running {command[0]}"):
            done = vm.run(command, timeout)
    except FileNotFoundError as error:
        missing = error.filename or "folder like the host's current one"
        print(f"pyluo: the guest has no {missing}", file=sys.stderr)
        return _NOT_FOUND
    except OSError as error:
        name = error.filename or command[0]
        print(f"pyluo: {name} cannot be run: {error.strerror}", file=sys.stderr)
        return _NOT_RUNNABLE
    except subprocess.TimeoutExpired:
        print(f"pyluo: {command[0]} still ran after {timeout} s", file=sys.stderr)
        return _TIMED_OUT
    sys.stdout.buffer.write(done.stdout)
    sys.stdout.flush()
    sys.stderr.buffer.write(done.stderr)
    sys.stderr.flush()
    return done.returncode if done.returncode >= 0 else _SIGNALLED - done.returncode
