"""Owners of a file descriptor, and the manners they share."""

from __future__ import annotations

import errno
import os
import warnings
from typing import TYPE_CHECKING, Protocol, Self, TypeVar

from pyluo._sys import raising
from pyluo.errors import from_errno

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["Descriptor", "HasFileno", "OwnedFd", "adopt", "number_of", "require_device"]


class HasFileno(Protocol):
    """Whatever has a descriptor: an owner of one, a file, a socket."""

    def fileno(self) -> int:
        """The number of the descriptor."""


D = TypeVar("D", bound="Descriptor")


class Descriptor:
    """An open file descriptor with one owner.

    This base neither closes nor warns: what the end of a descriptor means is for each kind to say.
    """

    __slots__ = ("__weakref__", "_fd")

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @classmethod
    def from_fd(cls, fd: int) -> Self:
        """Takes over an open descriptor; from here on it is this object's.

        Raises:
            LuoError: the descriptor is not open (EBADF), or not of this kind.
        """
        with raising("fstat", f"descriptor {fd}"):
            os.fstat(fd)
        return cls(fd)

    def fileno(self) -> int:
        """The number of the descriptor.

        Raises:
            ValueError: it is closed, or was detached.
        """
        if self._fd < 0:
            raise ValueError(f"{type(self).__name__} is closed")
        return self._fd

    @property
    def closed(self) -> bool:
        """Whether the descriptor is gone from this object: closed, or detached."""
        return self._fd < 0

    def detach(self) -> int:
        """Gives the descriptor up, still open; the caller owns it now."""
        fd = self.fileno()
        self._fd = -1
        return fd

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"fd={self._fd}"
        return f"<{type(self).__name__} {state}>"


class OwnedFd(Descriptor):
    """A descriptor that is closed with its owner; the type of what has no class of its own.

    Not locked: a close in one thread while another still uses the descriptor is the caller's to
    prevent, as with any file.
    """

    __slots__ = ()

    def close(self) -> None:
        """Closes the descriptor; a second time does nothing."""
        self._close()

    def __enter__(self) -> Self:
        self.fileno()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            warnings.warn(f"{self!r} was never closed", ResourceWarning, stacklevel=2, source=self)
            self._close()


def adopt(fd: int, kind: type[D]) -> D:
    """Makes a new descriptor that nobody else knows of into an object, or closes it."""
    try:
        return kind.from_fd(fd)
    except BaseException:
        os.close(fd)
        raise


def number_of(fd: Descriptor | int) -> int:
    """The number of a descriptor, which may be given as an object or as the number itself.

    Raises:
        ValueError: the object is closed.
    """
    return fd if isinstance(fd, int) else fd.fileno()


def require_device(fd: int, name: str) -> None:
    """Sees to it that a descriptor is of a device of the kernel's misc class.

    Args:
        fd: the descriptor.
        name: of the device, as in /sys/class/misc.

    Raises:
        LuoError: EBADF, the descriptor is not open; ENODEV, it is not of this device.
    """
    with raising("fstat", f"descriptor {fd}"):
        device = os.fstat(fd).st_rdev
    try:
        with open(f"/sys/class/misc/{name}/dev") as file:
            major, minor = file.read().split(":")
    except OSError:
        pass  # no such device on this system, so that nothing can be of it
    else:
        if device == os.makedev(int(major), int(minor)):
            return
    raise from_errno(errno.ENODEV, "from_fd", f"descriptor {fd}")
