"""A list of the sessions that processes have open, from the links in /proc/PID/fd.

The kernel itself offers no such list.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyluo._sys import pidfd_getfd
from pyluo.errors import RequestError, SessionNotFoundError
from pyluo.file_kind import SESSION_LINK
from pyluo.liveupdate import DEVICE
from pyluo.session import find_direction

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["OpenSession", "open_sessions", "require_sessions"]


@dataclass(frozen=True, slots=True)
class OpenSession:
    """A descriptor of a session, or of the device, that a process has open.

    Attributes:
        pid: the PID of the process.
        command: the name of the process, from /proc/PID/comm.
        fd: the number of the descriptor in that process.
        session: the name of the session; None for the device.
        direction: "incoming" or "outgoing"; None for the device, or if the direction is unknown
            because the caller may not duplicate the descriptor or the kernel is older than 7.2.
    """

    pid: int
    command: str
    fd: int
    session: str | None
    direction: str | None


def open_sessions() -> list[OpenSession]:
    """Return the open sessions and open devices of all processes that the caller may inspect.

    The result leaves out processes that end during the call, and incoming sessions that were not
    retrieved, because only the kernel has these.

    Source: /proc/PID/fd; for the direction pidfd_getfd(2), Linux 5.6
    """
    found: list[OpenSession] = []
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            with suppress(OSError):
                found += _scan_process(int(entry))
    return sorted(found, key=lambda each: (each.pid, each.fd))


def require_sessions(names: Iterable[str]) -> None:
    """Refuse to go on unless a process has an outgoing session of each name open.

    Raises:
        SessionNotFoundError: sessions of some names are not open, or not known to be outgoing (see
            `OpenSession`), so that a jump might not carry them over (ENOENT).
    """
    held = {each.session for each in open_sessions() if each.direction == "outgoing"}
    if missing := [name for name in names if name not in held]:
        raise SessionNotFoundError(
            errno.ENOENT,
            "require sessions",
            ", ".join(repr(name) for name in missing),
            "No process is known to have these outgoing sessions open, so a jump would not carry "
            "them over. Reading the direction takes Linux 7.2 and the rights of root",
        )


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
    """Return the direction of a session that another process has open; None if it is unknown.

    The direction is read from a duplicate of the descriptor. If the other process ends in the
    meantime, the duplicate is the last descriptor, and closing it ends the session.
    """
    try:
        pidfd = os.pidfd_open(pid)
        try:
            duplicate = pidfd_getfd(pidfd, fd)
        finally:
            os.close(pidfd)
    except OSError:
        return None
    try:
        return find_direction(duplicate)
    except RequestError:
        return None
    finally:
        os.close(duplicate)
