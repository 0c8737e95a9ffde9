"""The files that this process has open or mapped."""

from __future__ import annotations

import os
from contextlib import suppress

from pyluo.operation import raising

__all__ = ["FileId", "file_id", "files_in_use"]

FileId = tuple[int, int]
"""The device and the inode of a file."""


def file_id(fd: int) -> FileId:
    """Return the identity of the file behind a descriptor.

    Raises:
        RequestError: the descriptor is not open (EBADF).
    """
    with raising("fstat", f"descriptor {fd}"):
        status = os.fstat(fd)
    return status.st_dev, status.st_ino


def files_in_use() -> set[FileId]:
    """Return the files that this process has open or mapped.

    Source: /proc/PID/fd, /proc/PID/maps
    """
    found: set[FileId] = set()
    with raising("read maps", "/proc/self"):
        for number in os.listdir("/proc/self/fd"):
            with suppress(OSError):
                status = os.fstat(int(number))
                found.add((status.st_dev, status.st_ino))
        with open("/proc/self/maps") as file:
            for line in file:
                _, _, _, device, inode, *_ = line.split(maxsplit=5)
                if inode != "0":
                    major, minor = device.split(":")
                    found.add((os.makedev(int(major, 16), int(minor, 16)), int(inode)))
    return found
