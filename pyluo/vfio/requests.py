"""Requests on a device: each names the device, and whether it is bound is seen to."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Protocol

from pyluo.descriptor import number_of
from pyluo.errors import LuoError, NotBoundError, from_errno

if TYPE_CHECKING:
    from pyluo._sys import Buffer, Field, Ioctl, Reply
    from pyluo.descriptor import Descriptor

__all__ = ["OpenDevice", "attempt", "fileno", "request", "subject", "whole"]

_ROOM_LIMIT = 1 << 20  # bytes; no information is a thousandth of it


class OpenDevice(Protocol):
    """What a request needs to know of a device; its name for errors is `str(device)`."""

    @property
    def bound(self) -> bool:
        """Whether the device is bound to an iommufd."""

    def fileno(self) -> int:
        """Return the number of the device's descriptor."""


def fileno(fd: Descriptor | int | None) -> int:
    """The number of a descriptor; -1, the kernel's word for none, for None."""
    return -1 if fd is None else number_of(fd)


def attempt(
    device: OpenDevice, ioctl: Ioctl, detail: str = "", tail: Buffer = b"", /, **fields: Field
) -> Reply:
    """Calls an ioctl on a bound device; how it went is in the reply's `errno`.

    Raises:
        NotBoundError: EINVAL, the device is not bound to an iommufd.
    """
    number = device.fileno()
    if not device.bound:
        raise NotBoundError(errno.EINVAL, ioctl.name, subject(device, detail))
    return ioctl.attempt(number, tail, **fields)


def request(
    device: OpenDevice, ioctl: Ioctl, detail: str = "", tail: Buffer = b"", /, **fields: Field
) -> Reply:
    """Calls an ioctl on a bound device.

    Args:
        device: what it is called on.
        ioctl: which one.
        detail: what of the device it is about, for the error.
        tail: what follows the struct.
        fields: members of the struct.

    Raises:
        NotBoundError: EINVAL, the device is not bound to an iommufd.
        LuoError: the kernel refused.
    """
    reply = attempt(device, ioctl, detail, tail, **fields)
    if reply.errno:
        raise from_errno(reply.errno, ioctl.name, subject(device, detail))
    return reply


def whole(device: OpenDevice, ioctl: Ioctl, detail: str = "", /, **fields: Field) -> bytes:
    """The answer to a request for information, with everything that follows the struct.

    With too little room the kernel succeeds, leaves out what follows, and says in `argsz` how much
    it would be; by the next time it can have grown.
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
        f"The kernel wants to give {room} bytes of information, which makes no sense",
    )


def subject(device: OpenDevice, detail: str) -> str:
    """What a request is tried on, in words."""
    return f"{device}, {detail}" if detail else str(device)
