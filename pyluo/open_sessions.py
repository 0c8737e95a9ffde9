"""The sessions that processes have open. The kernel keeps no list; /proc shows the descriptors."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyluo._sys import pidfd_getfd
from pyluo.errors import LuoError
from pyluo.file_kind import SESSION_LINK
from pyluo.liveupdate import DEVICE
from pyluo.session import find_direction

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["OpenSession", "open_sessions"]


@dataclass(frozen=True, slots=True)
class OpenSession:
    """A descriptor of a session, or of the device, that a process has open.

    Attributes:
        pid: the process.
        command: the name of the process, as in /proc/PID/comm.
        fd: the number of the descriptor in that process.
        session: the name of the session; None for the device.
        direction: "incoming" or "outgoing"; None for the device, and if the caller may not
            duplicate the descriptor or the kernel is older than 7.2.
    """

    pid: int
    command: str
    fd: int
    session: str | None
    direction: str | None


def open_sessions() -> list[OpenSession]:
    """Return the descriptors of sessions and of the device, in all processes the caller may see.

    Processes that end during the call are left out. Incoming sessions that nobody retrieved are not
    found, because only the kernel holds them.

    Source: /proc/PID/fd; pidfd_getfd(2), Linux 5.6, for the direction.
    """
    found: list[OpenSession] = []
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            with suppress(OSError):
                found += _scan_process(int(entry))
    return sorted(found, key=lambda each: (each.pid, each.fd))


def _scan_process(pid: int) -> Iterator[OpenSession]:
    folder = f"/proc/{pid}/fd"
    for number in os.listdir(folder):
        with suppress(FileNotFoundError):
            link = os.readlink(f"{folder}/{number}")
            if link == DEVICE:
                yield OpenSession(pid, _read_command(pid), int(number), None, None)
            elif link.startswith(SESSION_LINK):
                name = link.removeprefix(SESSION_LINK)
                yield OpenSession(
                    pid, _read_command(pid), int(number), name, _find_direction(pid, int(number))
                )


def _read_command(pid: int) -> str:
    with open(f"/proc/{pid}/comm", errors="replace") as file:
        return file.read().rstrip("\n")


def _find_direction(pid: int, fd: int) -> str | None:
    """Return the direction of another process's session, from a duplicate of its descriptor.

    If the other process ends meanwhile, closing the duplicate ends the session as usual.
    """
    try:
        pidfd = os.pidfd_open(pid)
        try:
            duplicate = pidfd_getfd(pidfd, fd)
        finally:
            os.close(pidfd)
    except (OSError, LuoError):
        return None
    try:
        return find_direction(duplicate)
    except LuoError:
        return None
    finally:
        os.close(duplicate)
