"""Requests to a device, which must be bound; their errors name the device."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Protocol

from pyluo.descriptor import fileno_of
from pyluo.errors import LuoError, NotBoundError, from_errno

if TYPE_CHECKING:
    from pyluo._sys import Buffer, Field, Ioctl, Reply
    from pyluo.descriptor import Descriptor

__all__ = ["OpenDevice", "attempt", "fileno", "request", "request_info", "subject"]

_ROOM_LIMIT = 1 << 20  # bytes; no answer comes near to this


class OpenDevice(Protocol):
    """The parts of a device that a request needs; errors name it by `str(device)`."""

    @property
    def bound(self) -> bool:
        """Whether the device is bound to an iommufd."""

    def fileno(self) -> int:
        """Return the number of the device's descriptor."""


def fileno(fd: Descriptor | int | None) -> int:
    """Return the number of a descriptor, or -1 for None, as the kernel's interface has it."""
    return -1 if fd is None else fileno_of(fd)


def attempt(
    device: OpenDevice, ioctl: Ioctl, detail: str = "", tail: Buffer = b"", /, **fields: Field
) -> Reply:
    """Call an ioctl on a bound device; see the reply's `errno` for whether it failed.

    Raises:
        NotBoundError: the device is not bound to an iommufd (EINVAL).
    """
    number = device.fileno()
    if not device.bound:
        raise NotBoundError(errno.EINVAL, ioctl.name, subject(device, detail))
    return ioctl.attempt(number, tail, **fields)


def request(
    device: OpenDevice, ioctl: Ioctl, detail: str = "", tail: Buffer = b"", /, **fields: Field
) -> Reply:
    """Call an ioctl on a bound device.

    Args:
        device: the device.
        ioctl: the ioctl.
        detail: the part of the device that the request is about, for the error.
        tail: the data after the struct.
        fields: members of the struct.

    Raises:
        NotBoundError: the device is not bound to an iommufd (EINVAL).
        LuoError: the kernel refused.
    """
    reply = attempt(device, ioctl, detail, tail, **fields)
    if reply.errno:
        raise from_errno(reply.errno, ioctl.name, subject(device, detail))
    return reply


def request_info(device: OpenDevice, ioctl: Ioctl, detail: str = "", /, **fields: Field) -> bytes:
    """Return the answer to a request for information, including everything after the struct.

    With too little room the kernel succeeds, leaves out the data after the struct, and sets `argsz`
    to the size needed; this may have grown by the next call.
    """
    room = 0
    while room <= _ROOM_LIMIT:
        reply = request(device, ioctl, detail, bytes(room), **fields)
        wanted = reply.integer("argsz") - ioctl.struct.size
        if wanted <= room:
            return reply.data()
        room = wanted
    raise LuoError(
        errno.E2BIG,
        ioctl.name,
        subject(device, detail),
        f"The kernel asks for room for {room} bytes of information, which is implausible",
    )


def subject(device: OpenDevice, detail: str) -> str:
    """Return the subject of an error message: the device, and the part of it."""
    return f"{device}, {detail}" if detail else str(device)
