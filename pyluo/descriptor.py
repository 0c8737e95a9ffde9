"""The base classes of objects that own a file descriptor, and functions for descriptors."""

from __future__ import annotations

import errno
import os
import warnings
import weakref
from typing import TYPE_CHECKING, Protocol, Self, TypeVar

from pyluo._sys import FdNumber
from pyluo.errors import RequestError
from pyluo.file_kind import SESSION_LINK, read_link
from pyluo.operation import raising

if TYPE_CHECKING:
    from types import TracebackType

__all__ = [
    "Descriptor",
    "HasFileno",
    "OwnedFd",
    "ReceivedFd",
    "fileno_of",
    "fileno_to_share",
    "guarded",
    "require_device",
    "wrap_new_fd",
]


class HasFileno(Protocol):
    """An object with a descriptor, such as a `Descriptor`, a file or a socket."""

    def fileno(self) -> int:
        """Return the number of the descriptor."""


_FD_LIMIT = 1 << 31
# The objects whose `refuse_to_share` may raise.
guarded: weakref.WeakSet[Descriptor] = weakref.WeakSet()

D = TypeVar("D", bound="Descriptor")


class Descriptor:
    """An open file descriptor, owned by this object.

    This base class has no close() and does not warn about leaked descriptors, because closing has a
    different effect in each subclass.
    """

    __slots__ = ("__weakref__", "_number")

    def __init__(self, fd: int) -> None:
        self._number = FdNumber(fd)

    @property
    def _fd(self) -> int:
        """The number of the descriptor; -1 if there is none."""
        return self._number.value if hasattr(self, "_number") else -1

    @_fd.setter
    def _fd(self, fd: int) -> None:
        self._number.value = fd

    @property
    def fd_number(self) -> FdNumber:
        """Where this object has its number, for what moves descriptors in one step."""
        return self._number

    @classmethod
    def from_fd(cls, fd: int) -> Self:
        """Return a new object that owns an open descriptor.

        Raises:
            RequestError: the descriptor is not open (EBADF), or is not of the kind that the class
                is for. The caller still owns the descriptor.
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
        """Return the descriptor without closing it; the caller owns it from now on."""
        fd = self.fileno()
        # In one line: a trace function that raises can do so before each line.
        self._fd = -1; return fd  # noqa: E702  # fmt: skip

    def refuse_to_share(self, operation: str) -> None:
        """Raise RequestError if another process must not get the descriptor now.

        A class that overrides this method adds its objects to `guarded`.

        Args:
            operation: what would give the descriptor away, for the message of the error.
        """

    def _close(self) -> None:
        self._number.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"fd={self._fd}"
        return f"<{type(self).__name__} {state}>"


class OwnedFd(Descriptor):
    """A descriptor that can be closed.

    Files for which pyluo has no other class get this one. There is no lock: the caller must not
    close the object while another thread uses it.
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
        if self._fd < 0:
            return
        try:
            warnings.warn(f"{self!r} was never closed", ResourceWarning, stacklevel=2, source=self)
        finally:  # a filter may make an error of the warning
            self._close()


class ReceivedFd(OwnedFd):
    """A descriptor that came from another process or program, of a kind that is not known yet.

    If the last descriptor of a live update session is closed, the session's files are lost. So the
    descriptor of a session stays open when this object is dropped.

    Attributes:
        undecided: whether the descriptor may be the last one of its file, as its sender may be
            dead: it then stays open as well. What is dropped together with this object may decide
            that later, because the garbage collector keeps to no order.
    """

    __slots__ = ("undecided",)

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self.undecided: bool = False

    @property
    def is_session(self) -> bool:
        """Whether the descriptor is one of a live update session."""
        return self._fd >= 0 and read_link(self._fd).startswith(SESSION_LINK)

    def __del__(self) -> None:
        if self._fd >= 0 and getattr(self, "undecided", False):
            what = (
                "was dropped before the handoff was decided; it stays open, as it may be the last"
            )
            warnings.warn(f"{self!r} {what}", ResourceWarning, stacklevel=2, source=self)
        elif self.is_session:
            what = "was dropped; it stays open, because closing it could lose a session's files"
            warnings.warn(f"{self!r} {what}", ResourceWarning, stacklevel=2, source=self)
        else:
            super().__del__()


def wrap_new_fd(fd: int, kind: type[D]) -> D:
    """Return an object of class `kind` that owns a descriptor that was just created.

    If that fails, the descriptor is closed, because no one else will close it.
    """
    try:
        return kind.from_fd(fd)
    except BaseException:
        os.close(fd)
        raise


def fileno_of(fd: Descriptor | int) -> int:
    """Return the number of a descriptor, which is given as an object or as a number.

    Raises:
        ValueError: the object is closed, or the number is not one of 31 bits.
    """
    number = fd if isinstance(fd, int) else fd.fileno()
    if not -_FD_LIMIT <= number < _FD_LIMIT:
        raise ValueError(f"{number} is not the number of a descriptor")
    return number


def fileno_to_share(fd: Descriptor | int, operation: str) -> int:
    """Return the number of a descriptor that another process or program is to get.

    Raises:
        RequestError: see `Descriptor.refuse_to_share`. A number stands for the object that owns the
            descriptor; duplicates of the descriptor are not recognized.
        ValueError: see `fileno_of`.
    """
    number = fileno_of(fd)
    for one in list(guarded):
        if one._fd == number:
            one.refuse_to_share(operation)
    return number


def require_device(fd: int, name: str) -> None:
    """Raise RequestError unless a descriptor is open on a certain misc device.

    Args:
        fd: the descriptor.
        name: the name of the device in /sys/class/misc.

    Raises:
        RequestError: the descriptor is not open (EBADF), or is not open on this device (ENODEV).
    """
    with raising("fstat", f"descriptor {fd}"):
        device = os.fstat(fd).st_rdev
    try:
        with open(f"/sys/class/misc/{name}/dev") as file:
            major, minor = file.read().split(":")
    except OSError:
        pass  # this system has no such device, so the descriptor refers to another file
    else:
        if device == os.makedev(int(major), int(minor)):
            return
    raise RequestError(errno.ENODEV, "from_fd", f"descriptor {fd}")
