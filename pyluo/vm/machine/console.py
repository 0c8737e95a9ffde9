"""The serial console of a guest: keeps its lines, and finds the kernel's complaints in them."""

from __future__ import annotations

import asyncio
import codecs
import re
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from pyluo.vm.machine.report import EARLY_DEATH, STAMP, Report, Severity, find_report

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Console"]

_TAIL_LENGTH = 60  # lines
_PAUSE = 1.0  # seconds without a line after which a trace counts as complete
_TRACE_LIMIT = 3.0  # seconds for a dying kernel to finish its trace
_LEAVING = "kexec_core: Starting new kernel"  # kernel/kexec_core.c, kernel_kexec()
_BEGINNING = re.compile(rf"{STAMP}Linux version |{EARLY_DEATH}")
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Console:
    """Reads and keeps everything that the guest prints on its console.

    All times are in seconds on the host's monotonic clock.

    Args:
        on_beginning: called when a kernel prints its first line, with the time.
        on_report: called when the first line of a report comes, with the report.
        on_death: called with the report that the kernel dies of, when its trace is complete.

    Attributes:
        reports: the reports that the kernels of all lives have printed.
        last_output: the time of the last output.
        left: the time at which the kernel printed that it starts the next kernel; None if it has
            not printed that in this life.
    """

    def __init__(
        self,
        on_beginning: Callable[[float], None],
        on_report: Callable[[Report], None],
        on_death: Callable[[Report], None],
    ) -> None:
        self._on_beginning = on_beginning
        self._on_report = on_report
        self._on_death = on_death
        self._lines: list[str] = []
        self._partial = ""
        self._open: Report | None = None  # the report whose lines are coming
        self._earlier: Report | None = None  # the last report of this life
        self._dying: Report | None = None  # the report that the kernel dies of
        self._deadline = 0.0  # when the trace of `_dying` counts as complete in any case
        self._timer: asyncio.TimerHandle | None = None
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._more = asyncio.Event()
        self.reports: list[Report] = []
        self.last_output: float = time.monotonic()
        self.left: float | None = None

    async def read(self, stream: asyncio.StreamReader) -> None:
        """Read the console until QEMU closes it."""
        with suppress(ConnectionResetError):  # QEMU was killed
            while data := await stream.read(1 << 16):
                self.last_output = time.monotonic()
                *lines, self._partial = (self._partial + self._decode(data)).split("\n")
                for line in lines:
                    self._take_line(_strip_controls(line), self.last_output)
                self._more.set()
        if self._partial:
            self._take_line(_strip_controls(self._partial), time.monotonic())
            self._partial = ""
        self._complete()

    def tail(self) -> tuple[str, ...]:
        """Return the last lines, including the unfinished one."""
        rest = [_strip_controls(self._partial)] if self._partial else []
        return tuple((self._lines + rest)[-_TAIL_LENGTH:])

    @property
    def text(self) -> str:
        """Everything that the guest has printed so far."""
        return "\n".join([*self._lines, _strip_controls(self._partial)])

    @property
    def length(self) -> int:
        """The number of finished lines so far."""
        return len(self._lines)

    def since(self, length: int) -> list[str]:
        """Return the finished lines after the first `length` ones."""
        return self._lines[length:]

    async def wait_for_pause(self, pause: float, limit: float) -> None:
        """Wait until there was no output for `pause` seconds, but for at most `limit` seconds."""
        start = time.monotonic()
        while True:
            due = min(max(self.last_output, start) + pause, start + limit)
            if due <= time.monotonic():
                return
            await asyncio.sleep(due - time.monotonic())

    async def wait_for_words(self, words: str, since: int, limit: float) -> bool:
        """Wait until a line contains these words.

        Args:
            words: the words.
            since: how many of the first lines to ignore.
            limit: how long to wait, in seconds.

        Returns:
            Whether such a line has come in time.
        """
        deadline = time.monotonic() + limit
        while not any(words in line for line in self._lines[since:]):
            if time.monotonic() >= deadline:
                return False
            self._more.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._more.wait(), deadline - time.monotonic())
        return True

    def _take_line(self, line: str, now: float) -> None:
        self._lines.append(line)
        if _LEAVING in line:
            self.left = now
        if _BEGINNING.search(line):
            self._open = self._earlier = None  # the new kernel has printed no report yet
            self._on_beginning(now)
        report = None if self._dying else find_report(line, self._earlier)
        # The first line of a report ends the report before it, which may have no last line that
        # can be recognized.
        if self._open and not report and self._open.add(line):
            if self._open is self._dying:
                self._complete()
            self._open = None
        if self._dying:
            if self._timer:
                self._wait_for_more()
            return
        if report:
            report.at = now
            self._open = self._earlier = report
            self.reports.append(report)
            self._on_report(report)
            if report.severity is Severity.FATAL:
                self._dying = report
                self._deadline = now + _TRACE_LIMIT
                self._wait_for_more()

    def _wait_for_more(self) -> None:
        if self._timer:
            self._timer.cancel()
        loop = asyncio.get_running_loop()
        pause = min(_PAUSE, max(0, self._deadline - time.monotonic()))
        self._timer = loop.call_later(pause, self._complete)

    def _complete(self) -> None:
        """Call `on_death` if the kernel is dying, because its trace is complete."""
        if self._timer and self._dying:
            self._timer.cancel()
            self._timer = None
            self._on_death(self._dying)


def _strip_controls(line: str) -> str:
    return _CONTROL.sub("", line)
