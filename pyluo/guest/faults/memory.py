"""A shortage of memory."""

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

    If the kernel runs out of memory, it kills this process first.

    Args:
        left: how many bytes of MemAvailable in /proc/meminfo to leave.

    Raises:
        MemoryError: the kernel killed the process before it had taken enough.
    """

    def __init__(self, left: int) -> None:
        read_end, write_end = os.pipe()
        self._pid = os.fork()
        if not self._pid:
            try:
                chunks = _fill(left)
                os.write(write_end, b"full")
                while chunks:
                    signal.pause()
            finally:
                os._exit(1)
        os.close(write_end)
        try:
            full = os.read(read_end, 4)  # empty if the process was killed
        finally:
            os.close(read_end)
        if not full:
            self.release()
            raise MemoryError(f"the kernel did not let a process leave {left} bytes")

    @property
    def alive(self) -> bool:
        """Whether the process still has its memory: it was not released, and the kernel has not
        killed it.
        """
        if self._pid:
            pidfd = os.pidfd_open(self._pid)  # it becomes readable when the process ends
            try:
                return not select.select([pidfd], [], [], 0)[0]
            finally:
                os.close(pidfd)
        return False

    def release(self) -> None:
        """Kill the process, which releases the memory; releasing it twice does nothing."""
        pid, self._pid = self._pid, 0
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    def __repr__(self) -> str:
        return f"MemoryHog(alive={self.alive})"


def _fill(left: int) -> list[mmap.mmap]:
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    chunks: list[mmap.mmap] = []
    while (room := _read_available() - left) > 0:
        size = max(min(room // 2, _CHUNK) // mmap.PAGESIZE, 1) * mmap.PAGESIZE
        chunks.append(mmap.mmap(-1, size, mmap.MAP_PRIVATE))
        chunks[-1].write(b"\x5a" * size)
    return chunks


def _read_available() -> int:
    with open(_MEMINFO) as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    raise RuntimeError(f"{_MEMINFO} has no MemAvailable")
