"""The base classes of objects that own a file descriptor."""

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
    """Any object that has a descriptor: a `Descriptor`, a file, a socket."""

    def fileno(self) -> int:
        """Return the number of the descriptor."""


D = TypeVar("D", bound="Descriptor")


class Descriptor:
    """An open file descriptor, owned by this object.

    This base class neither closes the descriptor nor warns about it: closing means something else
    for each subclass.
    """

    __slots__ = ("__weakref__", "_fd")

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @classmethod
    def from_fd(cls, fd: int) -> Self:
        """Take over an open descriptor; the new object owns it.

        Raises:
            LuoError: the descriptor is not open (EBADF), or not of this kind.
        """
        with raising("fstat", f"descriptor {fd}"):
            os.fstat(fd)
        return cls(fd)

    def fileno(self) -> int:
        """Return the number of the descriptor.

        Raises:
            ValueError: the descriptor is closed, or was detached.
        """
        if self._fd < 0:
            raise ValueError(f"{type(self).__name__} is closed")
        return self._fd

    @property
    def closed(self) -> bool:
        """Whether the descriptor was closed or detached."""
        return self._fd < 0

    def detach(self) -> int:
        """Return the descriptor, still open; the caller owns it now."""
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
    """A descriptor that can be closed; also the class for files that have no class of their own.

    There is no lock: as with any file, the caller must not close it while another thread uses it.
    """

    __slots__ = ()

    def close(self) -> None:
        """Close the descriptor; closing it twice does nothing."""
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
    """Make an object of a new descriptor; if that fails, close it, because nobody else knows it."""
    try:
        return kind.from_fd(fd)
    except BaseException:
        os.close(fd)
        raise


def number_of(fd: Descriptor | int) -> int:
    """Return the number of a descriptor given as an object or as the number itself.

    Raises:
        ValueError: the object is closed.
    """
    return fd if isinstance(fd, int) else fd.fileno()


def require_device(fd: int, name: str) -> None:
    """Check that a descriptor is of a certain misc device.

    Args:
        fd: the descriptor.
        name: the name of the device in /sys/class/misc.

    Raises:
        LuoError: the descriptor is not open (EBADF), or not of this device (ENODEV).
    """
    with raising("fstat", f"descriptor {fd}"):
        device = os.fstat(fd).st_rdev
    try:
        with open(f"/sys/class/misc/{name}/dev") as file:
            major, minor = file.read().split(":")
    except OSError:
        pass  # this system has no such device, so the descriptor cannot be of it
    else:
        if device == os.makedev(int(major), int(minor)):
            return
    raise from_errno(errno.ENODEV, "from_fd", f"descriptor {fd}")
