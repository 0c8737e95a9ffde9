"""Run tests in a pytest process of their own, between chosen kernels."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
from contextlib import suppress
from typing import TYPE_CHECKING

from pyluo.vm.errors import HarnessError
from pyluo.vm.kernels.kernel import pin_kernels
from pyluo.vm.results import json_lines
from pyluo.vm.results.pytest_run import UNFINISHED, PytestRun
from pyluo.vm.run import checks

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import IO

    from pyluo.vm.kernels.kernel import Kernel
    from pyluo.vm.machine.options import GuestOptions

__all__ = ["run_tests"]

_GRACE = 10.0  # seconds for a pytest that is told to end


async def run_tests(
    tests: Sequence[str],
    options: GuestOptions,
    kernels: Sequence[Kernel],
    *,
    hops: int,
    limit: float,
    output: IO[bytes] | None = None,
    on_cancelled: Callable[[PytestRun], None] | None = None,
) -> PytestRun:
    """Run tests, and wait for their end.

    Args:
        tests: arguments for pytest: paths, node ids, options. If no path or node id is among them,
            the tests in `pyluo.vm.run.checks` run.
        options: the options of the guests.
        kernels: the kernels that the options name, as they were found.
        hops: how many live updates a test makes if it can make several.
        limit: seconds after which the tests are ended.
        output: where pytest prints to; without it, the output is kept in the result.
        on_cancelled: called with the result so far if this is cancelled.

    Raises:
        HarnessError: pytest could not be started.
    """
    # Neither file has a name, so that nothing is left behind, however this ends.
    with tempfile.TemporaryFile() as record, tempfile.TemporaryFile() as kept_output:
        record_path = f"/dev/fd/{record.fileno()}"
        command = [
            # A process in the background ignores SIGINT, and its children inherit that.
            *("env", "--default-signal=INT"),
            # If this process is killed, its guests must go too.
            *("setpriv", "--pdeathsig", "KILL", "--"),
            *(sys.executable, "-m", "pytest"),
            *options.words("--pyluo-"),
            f"--pyluo-hops={hops}",
            f"--pyluo-record={record_path}",
            *tests,
            *([] if _any_names_a_test(tests) else _own_checks()),
        ]
        environment = os.environ | pin_kernels(kernels, options.config)

        def result(status: int, *, timed_out: bool = False) -> PytestRun:
            kept_output.seek(0)
            text = kept_output.read().decode(errors="replace")
            verdicts = tuple(json_lines.read(record_path))
            return PytestRun(verdicts, status, text, limit if timed_out else None)

        try:
            status, timed_out = await _run_within(
                limit, command, environment, output or kept_output, record.fileno()
            )
        except asyncio.CancelledError:
            if on_cancelled:
                on_cancelled(result(UNFINISHED))
            raise
        return result(status, timed_out=timed_out)


def _any_names_a_test(words: Sequence[str]) -> bool:
    """Return whether arguments for pytest name tests.

    A path that does not exist need not count: it is an error to pytest, whatever else is named.
    """
    return any(word == "--pyargs" or os.path.exists(word.partition("::")[0]) for word in words)


def _own_checks() -> list[str]:
    """Return the arguments for the checks that come with pyluo, unaffected by other settings."""
    folder = os.path.dirname(checks.__file__)
    own = [f"--rootdir={folder}", f"--confcutdir={folder}"]
    return ["-p", "no:cacheprovider", "-c", os.devnull, *own, folder]


async def _run_within(
    limit: float,
    command: list[str],
    environment: dict[str, str],
    output: IO[bytes],
    record: int,
) -> tuple[int, bool]:
    """Run a program for `limit` seconds at most; return its status and whether it was ended."""
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            env=environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=asyncio.subprocess.STDOUT,
            pass_fds=[record],
        )
    except OSError as error:
        raise HarnessError(f"pytest cannot be started ({error})") from error
    timed_out = False
    try:
        await asyncio.wait_for(process.wait(), limit)
    except TimeoutError:
        timed_out = True
    finally:
        status = await _end(process)
    return status, timed_out


async def _end(process: asyncio.subprocess.Process) -> int:
    """Interrupt a process if it still runs, and kill it if that does not help."""
    if process.returncode is None:
        # A terminal's Ctrl-C has reached it already, which does no harm.
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGINT)
        try:
            await asyncio.wait_for(process.wait(), _GRACE)
        except TimeoutError:
            process.kill()
    return await process.wait()
