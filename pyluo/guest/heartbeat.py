"""The init process's connection to the host: heartbeats, so that a silent guest counts as hung.

It has a port of its own, apart from the worker's: if a function does not return, or the worker is
stuck in the kernel, the machine is still alive.
"""

from __future__ import annotations

import os
import select
from contextlib import suppress

from pyluo.guest import port

__all__ = ["Heartbeat"]

_INTERVAL = 1000  # milliseconds
_SHOW = b"show\n"
_BEAT, _SHOWN = b"beat\n", b"shown\n"
# Documentation/admin-guide/sysrq.rst: log all levels to the console, show blocked tasks, show what
# all CPUs run.
_SYSRQ = "9", "w", "l"


class Heartbeat:
    """Sends a heartbeat every second while this process is scheduled."""

    def __init__(self) -> None:
        # A host that does not read must not block the init process.
        self._fd = port.open_by_name(port.HEARTBEAT, os.O_NONBLOCK)

    def beat_until(self, child: int) -> int:
        """Send heartbeats, reap orphans and show the kernel's state on request, until a child ends.

        Returns:
            The child's wait status.
        """
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        poll.register(os.pidfd_open(child), select.POLLIN)
        while True:
            self._send(_BEAT)
            if any(fd == self._fd and event & select.POLLIN for fd, event in poll.poll(_INTERVAL)):
                self._handle_request()
            while ended := _reap():
                if ended[0] == child:
                    return ended[1]

    def _handle_request(self) -> None:
        if _SHOW in os.read(self._fd, 1 << 12):
            for key in _SYSRQ:
                with open("/proc/sysrq-trigger", "w") as trigger:
                    trigger.write(key)
            self._send(_SHOWN)

    def _send(self, word: bytes) -> None:
        with suppress(OSError):
            os.write(self._fd, word)


def _reap() -> tuple[int, int] | None:
    pid, status = os.waitpid(-1, os.WNOHANG)
    return (pid, status) if pid else None
