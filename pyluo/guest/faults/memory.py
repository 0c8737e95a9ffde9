"""Memory that is short."""

from __future__ import annotations

import mmap
import os
import select
import signal

__all__ = ["MemoryHog"]

_CHUNK = 4 << 20
_MEMINFO = "/proc/meminfo"


class MemoryHog:
    """A process that takes memory until little is left, and keeps it until it is released.

    Where the kernel has to kill somebody, it takes this process first.

    Args:
        left: bytes that are to stay available, as MemAvailable counts them.

    Raises:
        MemoryError: the kernel killed it before it got there.
    """

    def __init__(self, left: int) -> None:
        there, theirs = os.pipe()
        self._pid = os.fork()
        if not self._pid:
            try:
                taken = _fill(left)
                os.write(theirs, b"full")
                while taken:
                    signal.pause()
            finally:
                os._exit(1)
        os.close(theirs)
        try:
            full = os.read(there, 4)  # or nothing, once the process is gone
        finally:
            os.close(there)
        if not full:
            self.release()
            raise MemoryError(f"the kernel did not let a process leave {left} bytes")

    @property
    def alive(self) -> bool:
        """Whether it has its memory still: it was neither released nor killed by the kernel."""
        if self._pid:
            pidfd = os.pidfd_open(self._pid)  # which can be read once the process has ended
            try:
                return not select.select([pidfd], [], [], 0)[0]
            finally:
                os.close(pidfd)
        return False

    def release(self) -> None:
        """Gives the memory back; a second time does nothing."""
        pid, self._pid = self._pid, 0
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    def __repr__(self) -> str:
        return f"MemoryHog(alive={self.alive})"


def _fill(left: int) -> list[mmap.mmap]:
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    taken: list[mmap.mmap] = []
    while (room := _available() - left) > 0:
        size = max(min(room // 2, _CHUNK) // mmap.PAGESIZE, 1) * mmap.PAGESIZE
        taken.append(mmap.mmap(-1, size, mmap.MAP_PRIVATE))
        taken[-1].write(b"\x5a" * size)
    return taken


def _available() -> int:
    with open(_MEMINFO) as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    raise RuntimeError(f"{_MEMINFO} has no MemAvailable")
