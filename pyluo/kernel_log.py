"""What the kernel's log says about live updates.

This is separate from `kho` so that a process that only counts live updates does not import the
modules that `kho` needs.
"""

from __future__ import annotations

import errno
import os
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["KernelLog"]

_RECORD_LIMIT = 8192
_FOUND = "KHO: found kexec handover data."
_NO_SCRATCH = "KHO: Failed to reserve scratch area"
_UPDATES = re.compile(r"luo: Retrieved live update data, liveupdate number: (\d+)")
_EXEC_FROM = re.compile(r"KHO: exec from: (\S+) \(count (\d+)\)")


class KernelLog:
    """The kernel's messages since this kernel booted, read when the object is created.

    A property that can be None is None if the answer is unknown: the log has no message about it,
    and the caller may not read the log or the log no longer has its first messages.

    Attributes:
        messages: the messages, oldest first; empty if the caller may not read the log.

    Source: the messages in kernel/liveupdate/kexec_handover.c and luo_core.c. Linux 6.19; for
    `from_release` and `kexecs` 7.0.
    """

    def __init__(self) -> None:
        self.messages: list[str] = []
        first = None
        for record in _read_records():
            header, _, message = record.partition(";")
            if first is None:
                first = int(header.split(",")[1])
            self.messages.append(message.split("\n", 1)[0])
        self._complete = first == 0

    @property
    def handed_over(self) -> bool | None:
        """Whether the previous kernel handed data over to this one."""
        if any(_FOUND in message for message in self.messages):
            return True
        return False if self._complete else None

    @property
    def lacks_scratch(self) -> bool:
        """Whether the kernel found no room for its scratch areas and turned KHO off."""
        return any(_NO_SCRATCH in message for message in self.messages)

    @property
    def updates(self) -> int | None:
        """The number of live updates since the cold boot."""
        found = self._search(_UPDATES)
        return int(found[1]) if found else self._zero_if_cold_boot

    @property
    def kexecs(self) -> int | None:
        """The number of kexecs with handover since the cold boot."""
        found = self._search(_EXEC_FROM)
        return int(found[2]) if found else self._zero_if_cold_boot

    @property
    def from_release(self) -> str | None:
        """The release of the previous kernel."""
        found = self._search(_EXEC_FROM)
        return found[1] if found else None

    @property
    def _zero_if_cold_boot(self) -> int | None:
        return 0 if self.handed_over is False else None

    def _search(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        return next(filter(None, map(pattern.search, self.messages)), None)


def _read_records() -> Iterator[str]:
    """Yield the records of /dev/kmsg, oldest first; yield nothing if it cannot be opened."""
    try:
        fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return
    try:
        while True:
            try:
                yield os.read(fd, _RECORD_LIMIT).decode(errors="replace")
            except BlockingIOError:
                return
            except OSError as error:
                # EPIPE: the record was overwritten; the next read continues with the oldest one.
                if error.errno != errno.EPIPE:
                    return
    finally:
        os.close(fd)
