"""A guest's signs of life: the beats of its first process, and what its console prints."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyluo.vm.machine.console import Console

__all__ = ["LATENESS", "Vitals"]

LATENESS = 1.0
"""Seconds that a timer may be late; beyond that, the host is to blame for a silence."""
_BEAT_INTERVAL = 3.0  # seconds in which a living guest beats at least once


class Vitals:
    """Keeps track of a guest's signs of life.

    Args:
        console: the guest's console.

    Attributes:
        excused: when silence was last not the guest's fault, in seconds on the monotonic clock.
        traces_shown: done when the guest's first process has made the kernel show what it does.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last_beat = time.monotonic()
        self._writer: asyncio.StreamWriter | None = None
        self.excused = self._last_beat
        self.traces_shown: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def listen(self, stream: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Read the beats of the first process until QEMU closes the port."""
        self._writer = writer
        with suppress(ConnectionResetError):
            while line := await stream.readline():
                self._last_beat = time.monotonic()
                if line.strip() == b"shown" and not self.traces_shown.done():
                    self.traces_shown.set_result(None)

    @property
    def last_sign(self) -> float:
        """When there was the last sign of life, in seconds on the monotonic clock."""
        return max(self._last_beat, self._console.last_output)

    @property
    def beats(self) -> bool:
        """Whether the first process is alive."""
        return time.monotonic() - self._last_beat < _BEAT_INTERVAL

    def excuse_silence(self) -> None:
        """Do not blame the guest for its silence until now."""
        self.excused = time.monotonic()

    def ask_for_traces(self) -> None:
        """Ask the first process to make the kernel show what all CPUs do."""
        if self._writer is not None:
            self._writer.write(b"show\n")

    async def sleep(self, seconds: float) -> None:
        """Sleep; a host that did not wake this up in time cannot tell what the guest did."""
        due = time.monotonic() + seconds
        await asyncio.sleep(seconds)
        if time.monotonic() > due + LATENESS:
            self.excuse_silence()
