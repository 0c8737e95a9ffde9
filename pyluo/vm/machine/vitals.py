"""A guest's signs of life: the heartbeats of its init process, and the output on its console."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyluo.vm.machine.console import Console

__all__ = ["LATENESS", "Vitals"]

LATENESS = 1.0
"""Seconds that a timer may be late. If one is later, the host may have caused a guest's silence."""
_BEAT_INTERVAL = 3.0  # seconds in which a living guest sends at least one heartbeat


class Vitals:
    """Keeps track of a guest's signs of life.

    Args:
        console: the guest's console.

    Attributes:
        excused: until when silence was not the guest's fault, in seconds on the monotonic clock.
        traces_shown: done when the guest's init process has made the kernel print backtraces.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last_beat = time.monotonic()
        self._writer: asyncio.StreamWriter | None = None
        self.excused: float = self._last_beat
        self.traces_shown: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def listen(self, stream: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Read the heartbeats of the init process until QEMU closes the port."""
        self._writer = writer
        with suppress(ConnectionError):  # QEMU has ended
            while line := await stream.readline():
                self._last_beat = time.monotonic()
                if line.strip() == b"shown" and not self.traces_shown.done():
                    self.traces_shown.set_result(None)

    @property
    def last_sign(self) -> float:
        """The time of the last sign of life, in seconds on the monotonic clock."""
        return max(self._last_beat, self._console.last_output)

    @property
    def beats(self) -> bool:
        """Whether the init process is alive: a heartbeat has come a short time ago."""
        return time.monotonic() - self._last_beat < _BEAT_INTERVAL

    def excuse_silence(self) -> None:
        """Record that a silence of the guest until now is not its fault."""
        self.excused = time.monotonic()

    def ask_for_traces(self) -> None:
        """Ask the init process to make the kernel print the backtraces of all CPUs."""
        if self._writer is not None:
            self._writer.write(b"show\n")

    async def sleep(self, seconds: float) -> None:
        """Sleep for some seconds; excuse the guest's silence if the host wakes this task late.

        The host was overloaded or suspended then, and so may the guest have been.
        """
        due = time.monotonic() + seconds
        await asyncio.sleep(seconds)
        if time.monotonic() > due + LATENESS:
            self.excuse_silence()
