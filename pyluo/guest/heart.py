"""The first process's line to the host: beats, so that silence means something.

It goes its own way, beside the worker's port: a function that does not return, or a worker that
the kernel does not let go of, is not a dead machine.
"""

from __future__ import annotations

import os
import select
from contextlib import suppress

from pyluo.guest import port

__all__ = ["Heart"]

_INTERVAL = 1000  # milliseconds
_SHOW = b"show\n"
_BEAT, _SHOWN = b"beat\n", b"shown\n"
# Documentation/admin-guide/sysrq.rst: all levels to the console, tasks that are blocked, what all
# CPUs run.
_SYSRQ = "9", "w", "l"


class Heart:
    """Beats while this process is scheduled."""

    def __init__(self) -> None:
        # A host that does not read must not stop the first process.
        self._fd = port.open_by_name(port.HEART, os.O_NONBLOCK)

    def beat_until(self, child: int) -> int:
        """Beats, reaps orphans and shows the kernel's state on request, until the child ends.

        Returns:
            The child's wait status.
        """
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        poll.register(os.pidfd_open(child), select.POLLIN)
        while True:
            self._say(_BEAT)
            if any(fd == self._fd and event & select.POLLIN for fd, event in poll.poll(_INTERVAL)):
                self._answer()
            while ended := _reap():
                if ended[0] == child:
                    return ended[1]

    def _answer(self) -> None:
        if _SHOW in os.read(self._fd, 1 << 12):
            for key in _SYSRQ:
                with open("/proc/sysrq-trigger", "w") as trigger:
                    trigger.write(key)
            self._say(_SHOWN)

    def _say(self, word: bytes) -> None:
        with suppress(OSError):
            os.write(self._fd, word)


def _reap() -> tuple[int, int] | None:
    pid, status = os.waitpid(-1, os.WNOHANG)
    return (pid, status) if pid else None
