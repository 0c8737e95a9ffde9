"""The heartbeats of a guest: its init process sends them, so that the host notices a hang.

The heartbeats have a virtio-serial port of their own. They go on while the worker runs a long
function or is stuck in the kernel, because the machine is alive then.
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
# Documentation/admin-guide/sysrq.rst: print messages of all log levels on the console (9), show
# blocked tasks (w), show the backtraces of all CPUs (l).
_SYSRQ = "9", "w", "l"


class Heartbeat:
    """Sends heartbeats to the host, at least one a second."""

    def __init__(self) -> None:
        # Nonblocking, because the init process must go on even if the host does not read.
        self._fd = port.open_by_name(port.HEARTBEAT, os.O_NONBLOCK)

    def beat_until(self, child: int) -> int:
        """Send heartbeats until a child process ends.

        Meanwhile, reap orphans, and show what the kernel does if the host asks for it.

        Args:
            child: the process id of the child.

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
