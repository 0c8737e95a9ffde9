"""Functions that make requests to a bound device and name the device in errors."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Protocol

from pyluo.descriptor import fileno_of
from pyluo.errors import VfioError

if TYPE_CHECKING:
    from pyluo._sys import Buffer, Field, Ioctl, Request
    from pyluo.descriptor import Descriptor

__all__ = ["NOT_BOUND", "OpenDevice", "attempt", "fileno", "request", "request_info", "subject"]

NOT_BOUND = "Call `VfioDevice.bind` first"

_ROOM_LIMIT = 1 << 20  # bytes; real answers are much smaller


class OpenDevice(Protocol):
    """The attributes and methods of a device that a request uses.

    An error message contains `str(device)`.
    """

    @property
    def bound(self) -> bool:
        """Whether the device is bound to an iommufd."""

    def fileno(self) -> int:
        """Return the number of the device's descriptor."""


def fileno(fd: Descriptor | int | None) -> int:
    """Return the number of a descriptor; -1 for None, which the kernel takes as no descriptor."""
    return -1 if fd is None else fileno_of(fd)


def attempt(
    device: OpenDevice, ioctl: Ioctl, detail: str = "", tail: Buffer = b"", /, **fields: Field
) -> Request:
    """Call an ioctl on a bound device; if it fails, the reply's `errno` is not 0.

    Raises:
        VfioError: the device is not bound to an iommufd (EINVAL).
    """
    number = device.fileno()
    if not device.bound:
        raise VfioError(errno.EINVAL, ioctl.name, subject(device, detail), NOT_BOUND)
    return ioctl.attempt(number, tail, **fields)


def request(
    device: OpenDevice, ioctl: Ioctl, detail: str = "", tail: Buffer = b"", /, **fields: Field
) -> Request:
    """Call an ioctl on a bound device.

    Args:
        device: the device.
        ioctl: the ioctl.
        detail: words for the part of the device that the request is about, for error messages.
        tail: the data after the struct.
        fields: the values of members of the struct.

    Raises:
        VfioError: the device is not bound to an iommufd (EINVAL); the kernel refused the request.
    """
    reply = attempt(device, ioctl, detail, tail, **fields)
    if reply.errno:
        raise ioctl.error(reply.errno, subject(device, detail))
    return reply


def request_info(device: OpenDevice, ioctl: Ioctl, detail: str = "", /, **fields: Field) -> bytes:
    """Return the answer to a request for information: the struct, and all data after it.

    If there is too little room for the data after the struct, the kernel leaves it out, sets
    `argsz` to the necessary size and returns success. The request is then repeated with more room.
    That happens again if the data has grown in the meantime.
    """
    room = 0
    while room <= _ROOM_LIMIT:
        reply = request(device, ioctl, detail, bytes(room), **fields)
        wanted = reply.integer("argsz") - ioctl.struct.size
        if wanted <= room:
            return reply.data()
        room = wanted
    raise VfioError(
        errno.E2BIG,
        ioctl.name,
        subject(device, detail),
        f"The kernel asks for room for {room} bytes of information, which is implausible",
    )


def subject(device: OpenDevice, detail: str) -> str:
    """Return the subject of an error message: the device, and the part of it if given."""
    return f"{device}, {detail}" if detail else str(device)
