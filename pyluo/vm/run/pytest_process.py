"""Run tests in a separate pytest process; their guests jump from and to the chosen kernels."""

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

_GRACE = 10.0  # seconds that pytest has to exit after SIGINT, before SIGKILL


# The options of pytest and pytest-xdist whose value may be a word of its own.
_OPTIONS_WITH_VALUE = frozenset({
    "-c", "-k", "-m", "-n", "-o", "-p", "-r", "-W", "--basetemp", "--capture", "--code-highlight",
    "--color", "--config-file", "--confcutdir", "--debug", "--deselect", "--dist", "--durations",
    "--durations-min", "--ignore", "--ignore-glob", "--import-mode", "--junit-prefix",
    "--junit-xml", "--junitprefix", "--junitxml", "--lfnf", "--last-failed-no-failures",
    "--log-auto-indent", "--log-cli-date-format", "--log-cli-format", "--log-cli-level",
    "--log-date-format", "--log-disable", "--log-file", "--log-file-date-format",
    "--log-file-format", "--log-file-level", "--log-file-mode", "--log-format", "--log-level",
    "--maxfail", "--maxprocesses", "--max-worker-restart", "--numprocesses", "--override-ini",
    "--pastebin", "--pdbcls", "--pythonwarnings", "--rootdir", "--rsyncdir", "--rsyncignore",
    "--show-capture", "--tb", "--tx", "--verbosity",
})  # fmt: skip


# If a shell started this process in the background, it ignores SIGINT, and pytest inherits that.
_PYTEST = """
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, "")
runpy.run_module("pytest", run_name="__main__", alter_sys=True)
"""


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
    """Run tests, wait until they have ended, and return the results.

    Args:
        tests: arguments for pytest: paths, node ids, options. If no path or node id is among them,
            the tests in `pyluo.vm.run.checks` run.
        options: the options of the guests.
        kernels: the `Kernel` objects that the names in `options` stand for; the tests use exactly
            these.
        hops: how many live updates a test makes if it can make several.
        limit: seconds after which the tests are ended.
        output: the file for pytest's output; None to keep the output in the result.
        on_cancelled: called with the results so far if this coroutine is cancelled.

    Raises:
        HarnessError: pytest could not be started.
    """
    # These files have no names, so that nothing is left behind if this process is killed.
    with tempfile.TemporaryFile() as record, tempfile.TemporaryFile() as kept_output:
        record_path = f"/dev/fd/{record.fileno()}"
        command = [
            # If this process is killed, pytest and its guests must end, too.
            *("setpriv", "--pdeathsig", "KILL", "--"),
            *(sys.executable, "-c", _PYTEST),
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
    """Return whether one of the arguments for pytest names a test.

    The value of an option names none, even if there is such a path: `-k kernel`. A path that does
    not exist is ignored here; pytest reports it as an error anyway.
    """
    previous = ""
    for word in words:
        is_value = previous in _OPTIONS_WITH_VALUE
        if not is_value and (word == "--pyargs" or os.path.exists(word.partition("::")[0])):
            return True
        previous = "" if is_value else word
    return False


def _own_checks() -> list[str]:
    """Return the arguments for pytest that run pyluo's own checks.

    The checks are isolated from the user's pytest configuration and conftest files.
    """
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
    """Run a program for at most `limit` seconds.

    Returns:
        The program's exit status, and whether it exceeded the limit.
    """
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
    """End a process: interrupt it, and kill it if it still runs after that; return its status."""
    if process.returncode is None:
        # If the user pressed Ctrl-C, the process already got a SIGINT from the terminal; a second
        # one is harmless.
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGINT)
        try:
            await asyncio.wait_for(process.wait(), _GRACE)
        except TimeoutError:
            process.kill()
    return await process.wait()
