"""Runs tests in a pytest of their own, between chosen kernels, and says what came of each."""

from __future__ import annotations

import asyncio
import enum
import os
import signal
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyluo.vm.errors import HarnessError
from pyluo.vm.kernels.kernel import settled
from pyluo.vm.pytest.recorder import FAILURES, Outcome, Record, read
from pyluo.vm.run import checks

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import IO

    from pyluo.vm.kernels.kernel import Kernel
    from pyluo.vm.machine.options import GuestOptions

__all__ = ["NOT_RUN", "Result", "Run", "run"]

# pytest's exit statuses: all passed, some failed, there were none.
_PASSED, _FAILED, _NO_TESTS = 0, 1, 5
_NEVER = 130  # no status of pytest's
_GRACE = 10.0  # seconds for a pytest that is told to end


class Result(enum.Enum):
    """What a run says of the kernels that it ran on."""

    PASSED = "passed"
    FAILED = "failed"
    NO_VERDICT = "no verdict"


@dataclass(frozen=True, slots=True)
class Run:
    """A run of tests that has ended.

    Attributes:
        records: what came of each test.
        status: pytest's exit status.
        said: what it printed, unless that went elsewhere.
        limit: seconds after which it was ended; None if it came to its end by itself.
    """

    records: tuple[Record, ...]
    status: int
    said: str
    limit: float | None = None

    @property
    def result(self) -> Result:
        """A test that failed, or a guest that died, is one. That nothing failed is one only if all
        ran that was to run, and something did."""
        outcomes = {record.outcome for record in self.records}
        if outcomes & FAILURES:
            return Result.FAILED
        proven = self.status == _PASSED and Outcome.PASSED in outcomes and not self.limit
        return Result.PASSED if proven else Result.NO_VERDICT

    @property
    def reason(self) -> str:
        """Why the result is what it is, in a line; empty if all passed."""
        failed = [record for record in self.records if record.outcome in FAILURES]
        if self.limit and not failed:
            return f"the tests still ran after {self.limit:g} s"
        for record in failed or self.records:
            if record.bad:
                return f"{record.test}: {record.reason}"
        if self.status == _NO_TESTS or (self.status == _PASSED and not self.records):
            return "no test ran"
        if self.status == _NEVER:
            return "it was not run to its end"
        if self.status == _FAILED:
            return "pytest failed, and no test tells why"
        if self.status != _PASSED:
            return f"pytest ended with status {self.status}"
        return "" if self.result is Result.PASSED else "no test passed"


NOT_RUN = Run((), _NEVER, "")


async def run(
    tests: Sequence[str],
    options: GuestOptions,
    kernels: Sequence[Kernel],
    *,
    hops: int,
    limit: float,
    output: IO[bytes] | None = None,
    cut_off: Callable[[Run], None] | None = None,
) -> Run:
    """Runs tests, and waits for their end.

    Args:
        tests: arguments for pytest: paths, node ids, options; of `pyluo.vm.run.checks`, if no path
            or node id is among them.
        options: of the guests.
        kernels: what those that the options name were when they were found.
        hops: how many live updates tests are to make that can make several.
        limit: seconds after which they are ended.
        output: where pytest prints to; without it, what it prints is kept.
        cut_off: called with what there is by then if this is cancelled.

    Raises:
        HarnessError: pytest could not be started.
    """
    # Neither has a name, so that nothing is left however this ends.
    with tempfile.TemporaryFile() as record, tempfile.TemporaryFile() as said:
        kept = f"/dev/fd/{record.fileno()}"
        command = [
            # A process in the background ignores interruptions, and so would what it starts.
            *("env", "--default-signal=INT"),
            # Should this process be killed, its guests are to go too.
            *("setpriv", "--pdeathsig", "KILL", "--"),
            *(sys.executable, "-m", "pytest"),
            *options.words("--pyluo-"),
            f"--pyluo-hops={hops}",
            f"--pyluo-record={kept}",
            *tests,
            *([] if _named(tests) else _own_checks()),
        ]
        environment = os.environ | settled(kernels, options.config)

        def ended(status: int, *, late: bool = False) -> Run:
            said.seek(0)
            text = said.read().decode(errors="replace")
            return Run(tuple(read(kept)), status, text, limit if late else None)

        try:
            status, late = await _attend(
                command, environment, output or said, record.fileno(), limit
            )
        except asyncio.CancelledError:
            if cut_off:
                cut_off(ended(_NEVER))
            raise
        return ended(status, late=late)


def _named(words: Sequence[str]) -> bool:
    """Whether arguments for pytest name tests. A name that leads nowhere need not count: it is an
    error to pytest whatever else is named."""
    return any(word == "--pyargs" or os.path.exists(word.partition("::")[0]) for word in words)


def _own_checks() -> list[str]:
    """The arguments for the checks that come with pyluo; no other project's settings apply."""
    folder = os.path.dirname(checks.__file__)
    own = [f"--rootdir={folder}", f"--confcutdir={folder}"]
    return ["-p", "no:cacheprovider", "-c", os.devnull, *own, folder]


async def _attend(
    command: list[str],
    environment: dict[str, str],
    output: IO[bytes],
    record: int,
    limit: float,
) -> tuple[int, bool]:
    """Runs a program; its exit status, and whether it had to be ended."""
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
    late = False
    try:
        await asyncio.wait_for(process.wait(), limit)
    except TimeoutError:
        late = True
    finally:
        status = await _end(process)
    return status, late


async def _end(process: asyncio.subprocess.Process) -> int:
    """Interrupts it if it still runs, and kills it if that does not help."""
    if process.returncode is None:
        # A terminal's Ctrl-C has reached it already, which does no harm.
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGINT)
        try:
            await asyncio.wait_for(process.wait(), _GRACE)
        except TimeoutError:
            process.kill()
    return await process.wait()
