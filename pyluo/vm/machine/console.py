"""The guest's serial console: reads what its kernel prints."""

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

_TAIL = 60  # lines
_PAUSE = 1.0  # seconds without a line after which a trace is taken for complete
_TRACE_LIMIT = 3.0  # seconds for a dying kernel to finish its trace
_LEAVING = "kexec_core: Starting new kernel"  # kernel/kexec_core.c, kernel_kexec()
_BEGINNING = re.compile(rf"{STAMP}Linux version |{EARLY_DEATH}")
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Console:
    """Reads the console as it comes.

    Args:
        on_beginning: called with the time when a kernel prints its first line.
        on_report: called with each report when its first line comes.
        on_death: called with the report of what the kernel died of, once its trace is complete.

    Attributes:
        reports: the complaints of the kernels of all lives.
        last_output: when something was last printed, in seconds on the monotonic clock.
        left: when the kernel printed that it starts the next one, likewise; None if it has not, or
            if the next one has spoken since.
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
        self._open: Report | None = None  # the report that is being printed
        self._earlier: Report | None = None  # the last report of this life
        self._dying: Report | None = None  # the report that the kernel dies of
        self._deadline = 0.0  # when the trace of that report is taken for complete
        self._timer: asyncio.TimerHandle | None = None
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._more = asyncio.Event()
        self.reports: list[Report] = []
        self.last_output = time.monotonic()
        self.left: float | None = None

    async def read(self, stream: asyncio.StreamReader) -> None:
        """Read until QEMU closes the console."""
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
        """Return the last lines, including an unfinished one."""
        rest = [_strip_controls(self._partial)] if self._partial else []
        return tuple((self._lines + rest)[-_TAIL:])

    @property
    def text(self) -> str:
        """Everything that was printed so far."""
        return "\n".join([*self._lines, _strip_controls(self._partial)])

    @property
    def length(self) -> int:
        """The number of finished lines so far."""
        return len(self._lines)

    def since(self, length: int) -> list[str]:
        """Return the lines after the first `length`."""
        return self._lines[length:]

    async def wait_for_pause(self, pause: float, limit: float) -> None:
        """Wait until nothing has come for `pause` seconds, but no longer than `limit` seconds."""
        start = time.monotonic()
        while True:
            due = min(max(self.last_output, start) + pause, start + limit)
            if due <= time.monotonic():
                return
            await asyncio.sleep(due - time.monotonic())

    async def wait_for_words(self, words: str, since: int, limit: float) -> bool:
        """Wait until a line after the first `since` contains these words.

        Returns:
            Whether such a line came within `limit` seconds.
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
            self._open = self._earlier = None  # the new kernel has printed no report
            self._on_beginning(now)
        report = None if self._dying else find_report(line, self._earlier)
        # A line that begins a report ends the one before it, which may have no end of its own.
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
        """Report what the kernel died of, now that its trace is complete."""
        if self._timer and self._dying:
            self._timer.cancel()
            self._timer = None
            self._on_death(self._dying)


def _strip_controls(line: str) -> str:
    return _CONTROL.sub("", line)
