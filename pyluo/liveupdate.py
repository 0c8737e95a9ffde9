"""/dev/liveupdate: where sessions are created, and where they are found again."""

from __future__ import annotations

import errno
import os
import threading
from contextlib import suppress
from typing import Self

from pyluo._sys import Ioctl, constant, raising
from pyluo.descriptor import OwnedFd, require_device
from pyluo.errors import LuoError, SessionExistsError, SessionNameError
from pyluo.session import IncomingSession, OutgoingSession

__all__ = ["DEVICE", "LiveUpdate"]

DEVICE = "/dev/liveupdate"

_CREATE_SESSION = Ioctl("LIVEUPDATE_IOCTL_CREATE_SESSION", "liveupdate_ioctl_create_session")
_RETRIEVE_SESSION = Ioctl("LIVEUPDATE_IOCTL_RETRIEVE_SESSION", "liveupdate_ioctl_retrieve_session")
_NAME_LIMIT = constant("LIVEUPDATE_SESSION_NAME_LENGTH") - 1


class LiveUpdate(OwnedFd):
    """The one open file of the device that the system allows at a time.

    Closing it loses nothing: sessions live by their own descriptors. Safe to use from several
    threads, which take turns.

    Args:
        path: the device.

    Raises:
        LiveUpdateUnavailableError: ENOENT, ENODEV or ENXIO; the kernel offers no live update.
        DeviceBusyError: EBUSY, it is open elsewhere.
        IncomingStateError: EIO, what the previous kernel handed over could not be read.
        LuoPermissionError: EACCES.

    Source: kernel/liveupdate/luo_core.c, luo_open(). Linux 6.19.
    """

    __slots__ = ("_lock",)

    def __init__(self, path: str | os.PathLike[str] = DEVICE) -> None:
        with raising("open", os.fspath(path)):
            super().__init__(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        self._lock = threading.Lock()

    @classmethod
    def from_fd(cls, fd: int) -> Self:
        """Takes over an open descriptor of the device, as received from another process.

        Raises:
            LuoError: EBADF, it is not open; ENODEV, it is not of this device. It stays the
                caller's.
        """
        require_device(fd, "liveupdate")
        self = cls.__new__(cls)
        OwnedFd.__init__(self, fd)
        self._lock = threading.Lock()
        return self

    def close(self) -> None:
        """Closes the device, for another to open it; a second time does nothing."""
        with self._lock:
            super().close()

    def create_session(self, name: str) -> OutgoingSession:
        """A new session, to be carried over by the next live update.

        Args:
            name: 1 to 63 bytes in the file system's encoding, none of them zero. A session that
                came in from the previous kernel may have the same one.

        Raises:
            SessionNameError: EINVAL.
            SessionExistsError: EEXIST.

        Source: include/uapi/linux/liveupdate.h, LIVEUPDATE_IOCTL_CREATE_SESSION. Linux 6.19.
        """
        encoded = _encode(name, _CREATE_SESSION.name)
        with self._lock:
            try:
                reply = _CREATE_SESSION(self.fileno(), f"session {name!r}", fd=-1, name=encoded)
            except SessionExistsError:
                self._correct_session_count()
                raise
        return OutgoingSession(reply.integer("fd"), name)

    def _correct_session_count(self) -> None:
        """Undoes what a refused name leaves behind on the kernels up to 7.3.

        After EEXIST they keep room for a session more than there is, and with a multiple of 51
        sessions the next kernel takes the empty block for damage and panics. The end of any
        outgoing session gives the room back: so one of a name that nobody has is made and ended.

        Source: kernel/liveupdate/luo_session.c, luo_session_insert(), luo_session_remove()
        """
        with suppress(LuoError):
            unused = os.urandom(16).hex().encode()
            os.close(_CREATE_SESSION(self.fileno(), "", fd=-1, name=unused).integer("fd"))

    def retrieve_session(self, name: str) -> IncomingSession:
        """The session of this name that the previous kernel handed over.

        Raises:
            SessionNameError: EINVAL, no session can have this name.
            SessionNotFoundError: ENOENT.
            SessionRetrievedError: EINVAL, it was retrieved before.

        Source: include/uapi/linux/liveupdate.h, LIVEUPDATE_IOCTL_RETRIEVE_SESSION. Linux 6.19.
        """
        encoded = _encode(name, _RETRIEVE_SESSION.name)
        with self._lock:
            reply = _RETRIEVE_SESSION(self.fileno(), f"session {name!r}", fd=-1, name=encoded)
        return IncomingSession(reply.integer("fd"), name)


def _encode(name: str, operation: str) -> bytes:
    """The bytes of a session's name; the kernel would cut a name at a zero, and at 63 bytes."""
    encoded = os.fsencode(name)
    if not 0 < len(encoded) <= _NAME_LIMIT or b"\0" in encoded:
        raise SessionNameError(errno.EINVAL, operation, f"session {name!r} ({len(encoded)} bytes)")
    return encoded
