"""The device /dev/liveupdate: creates sessions, and retrieves those of the previous kernel."""

from __future__ import annotations

import errno
import io
import os
import time
from contextlib import suppress
from typing import Self

from pyluo._sys import Ioctl, constant
from pyluo.descriptor import OwnedFd, require_device
from pyluo.errors import (
    DeviceBusyError,
    IncomingStateError,
    LiveUpdateUnavailableError,
    LuoError,
    NotPermittedError,
    RequestError,
    SessionExistsError,
    SessionNameError,
    SessionNotFoundError,
    SessionRetrievedError,
)
from pyluo.exclusive import Exclusive, exclusively
from pyluo.operation import Operation, raising
from pyluo.session import IncomingSession, OutgoingSession

__all__ = ["DEVICE", "LiveUpdate"]

DEVICE = "/dev/liveupdate"

_OPEN = Operation(
    "open /dev/liveupdate",
    LuoError,
    {
        errno.ENOENT: LiveUpdateUnavailableError,
        errno.ENODEV: LiveUpdateUnavailableError,
        errno.ENXIO: LiveUpdateUnavailableError,
        errno.EBUSY: DeviceBusyError,
        errno.EIO: IncomingStateError,
        errno.EACCES: NotPermittedError,
        errno.EPERM: NotPermittedError,
    },
)
_CREATE_SESSION = Ioctl(
    "LIVEUPDATE_IOCTL_CREATE_SESSION",
    "liveupdate_ioctl_create_session",
    LuoError,
    {
        errno.EINVAL: SessionNameError,
        errno.EEXIST: SessionExistsError,
    },
)
_RETRIEVE_SESSION = Ioctl(
    "LIVEUPDATE_IOCTL_RETRIEVE_SESSION",
    "liveupdate_ioctl_retrieve_session",
    LuoError,
    {
        errno.ENOENT: SessionNotFoundError,
        errno.EINVAL: SessionRetrievedError,
    },
)
_NAME_OF_PID_1 = "systemd"
_RETRY_INTERVAL = 0.01  # seconds
_NAME_LIMIT = constant("LIVEUPDATE_SESSION_NAME_LENGTH") - 1


class LiveUpdate(OwnedFd):
    """The open device /dev/liveupdate; the kernel allows one open file at a time.

    Sessions have descriptors of their own and stay open when the device is closed. Several threads
    can use the object; a lock lets one of them in at a time.

    Args:
        path: the path of the device.
        wait: for how many seconds to wait while the device is open elsewhere.

    Raises:
        LiveUpdateUnavailableError: the kernel offers no live update (ENOENT, ENODEV or ENXIO).
        DeviceBusyError: the device is open elsewhere (EBUSY), also after `wait` seconds.
        IncomingStateError: the kernel cannot read what the previous one handed over (EIO).
        NotPermittedError: the caller may not open the device (EACCES).

    Source: kernel/liveupdate/luo_core.c, luo_open(). Linux 6.19.
    """

    __slots__ = ("_exclusive", "_file")
    _file: io.FileIO | None

    def __init__(self, path: str | os.PathLike[str] = DEVICE, *, wait: float = 0.0) -> None:
        deadline = time.monotonic() + wait
        while True:
            try:
                with _OPEN.raising(os.fspath(path)):
                    # A signal handler may raise between any two instructions. A file object closes
                    # its descriptor even then; a lost number would keep everybody out for good.
                    self._file = io.FileIO(path, "r+")
                break
            except DeviceBusyError:
                if time.monotonic() >= deadline:
                    raise
            time.sleep(_RETRY_INTERVAL)  # the kernel has nothing to wait for
        super().__init__(self._file.fileno())
        self._exclusive = Exclusive(DEVICE)

    @classmethod
    def from_fd(cls, fd: int) -> Self:
        """Return an object that owns an open descriptor of the device.

        Raises:
            RequestError: the descriptor is not open (EBADF), or is not open on this device
                (ENODEV). The caller still owns the descriptor.
        """
        require_device(fd, "liveupdate")
        self = cls.__new__(cls)
        OwnedFd.__init__(self, fd)
        self._file = None
        self._exclusive = Exclusive(DEVICE)
        return self

    @exclusively
    def close(self) -> None:
        """Close the device, so that others can open it; closing it twice does nothing."""
        super().close()

    @exclusively
    def detach(self) -> int:
        """Return a descriptor of the open device; the caller owns it from now on."""
        if self._file is None:
            return super().detach()
        with raising("dup", DEVICE):
            duplicate = os.dup(self.fileno())
        self._close()
        return duplicate

    def _close(self) -> None:
        if self._file is None:
            super()._close()
        else:
            self._fd = -1
            self._file.close()

    @exclusively
    def create_session(self, name: str) -> OutgoingSession:
        """Create an outgoing session, which the next live update carries over.

        Args:
            name: 1 to 63 bytes in the file system's encoding, none of them zero. A session from
                the previous kernel may have the same name.

        Raises:
            SessionNameError: the name is not valid, or is "systemd", which PID 1 uses (EINVAL).
            SessionExistsError: an outgoing session of this name exists (EEXIST).

        Source: include/uapi/linux/liveupdate.h, LIVEUPDATE_IOCTL_CREATE_SESSION. Linux 6.19.
        """
        encoded = _encode(name, _CREATE_SESSION.name)
        try:
            return OutgoingSession.create(_CREATE_SESSION, self.fileno(), name, encoded)
        except SessionExistsError:
            self._correct_session_count()
            raise

    def _correct_session_count(self) -> None:
        """Work around a kernel bug, up to 7.3: EEXIST leaves the kernel's session count too high.

        These kernels hand sessions over in blocks of 51. If the number of sessions is a multiple of
        51, the wrong count adds an empty block, which the next kernel takes for damage and panics.
        Closing any outgoing session corrects the count, so this method creates a session with an
        unused name and closes it.

        Source: kernel/liveupdate/luo_session.c, luo_session_insert(), luo_session_remove()
        """
        with suppress(RequestError):
            unused = os.urandom(16).hex().encode()
            os.close(_CREATE_SESSION(self.fileno(), "", fd=-1, name=unused).integer("fd"))

    @exclusively
    def retrieve_session(self, name: str) -> IncomingSession:
        """Retrieve the session of this name that the previous kernel handed over.

        A session whose object this process has dropped without finishing it can be retrieved again.

        Raises:
            SessionNameError: no session can have this name (EINVAL).
            SessionNotFoundError: there is no such session, or it is finished (ENOENT).
            SessionRetrievedError: the session was retrieved before (EINVAL).

        Source: include/uapi/linux/liveupdate.h, LIVEUPDATE_IOCTL_RETRIEVE_SESSION. Linux 6.19.
        """
        encoded = _encode(name, _RETRIEVE_SESSION.name)
        return IncomingSession.retrieve_from(_RETRIEVE_SESSION, self.fileno(), name, encoded)


def _encode(name: str, operation: str) -> bytes:
    """Return the bytes of a session's name, or raise SessionNameError if the name is not valid.

    The kernel would silently cut a name at a zero byte or after 63 bytes.
    """
    encoded = os.fsencode(name)
    if name == _NAME_OF_PID_1:
        raise SessionNameError(
            errno.EINVAL,
            operation,
            f"session {name!r}",
            "systemd (261 and newer) keeps what it carries over itself in a session of this name, "
            "and would take this one for it: choose another name",
        )
    if not 0 < len(encoded) <= _NAME_LIMIT or b"\0" in encoded:
        raise SessionNameError(errno.EINVAL, operation, f"session {name!r} ({len(encoded)} bytes)")
    return encoded
