"""What can go wrong between userspace and the kernel, one class for each thing worth handling.

Which class a failure becomes is decided by the pair (operation, errno), since one errno means
different things to different operations; the table below is the whole of that knowledge.
"""

from __future__ import annotations

import errno as _errno
import os
from typing import Any

__all__ = [
    "AlreadyPreservedError",
    "DeviceBusyError",
    "FdStoreError",
    "HandoverError",
    "ImageRejectedError",
    "IncomingStateError",
    "KernelTooOldError",
    "KexecBusyError",
    "LiveUpdateUnavailableError",
    "LuoError",
    "LuoPermissionError",
    "NoImageLoadedError",
    "NotPreservableError",
    "PreservedMemoryError",
    "SealedError",
    "SessionExistsError",
    "SessionNameError",
    "SessionNotFoundError",
    "SessionRetrievedError",
    "TokenInUseError",
    "TokenNotFoundError",
    "WrongSessionError",
]


class LuoError(OSError):
    """A request that the kernel refused.

    Args:
        errno: what the kernel answered.
        operation: the kernel's name of the request, such as ``LIVEUPDATE_SESSION_PRESERVE_FD``.
        subject: what it was tried on, in words: the session, the token, the file.
        hint: what to do about it; without one, the class's own.

    Attributes:
        preserved: of a request for many files, the tokens that were preserved before it failed.
    """

    default_hint = ""
    preserved: tuple[int, ...] = ()

    def __init__(self, errno: int, operation: str, subject: str = "", hint: str = "") -> None:
        super().__init__(errno, os.strerror(errno))
        self.operation = operation
        self.subject = subject
        # The release is of the kernel that answered, also when the error crosses to another.
        self.hint = (hint or self.default_hint).replace("{release}", os.uname().release)

    def __str__(self) -> str:
        on = f" on {self.subject}" if self.subject else ""
        name = _errno.errorcode.get(self.errno or 0, f"errno {self.errno}")
        text = f"{self.operation}{on}: {self.strerror} ({name})"
        return f"{text}. {self.hint}" if self.hint else text

    def __reduce__(self) -> tuple[type[LuoError], tuple[Any, ...], dict[str, Any]]:
        arguments = (self.errno, self.operation, self.subject, self.hint)
        return type(self), arguments, self.__dict__


class LiveUpdateUnavailableError(LuoError, FileNotFoundError):
    """This kernel offers no live update."""

    default_hint = (
        "The kernel needs CONFIG_LIVEUPDATE (Linux 6.19 or newer) and liveupdate=on on its "
        "command line; `pyluo status` says which of them is missing"
    )


class DeviceBusyError(LuoError):
    """/dev/liveupdate is open already: one open file at a time, in the whole system."""

    default_hint = (
        "Only one open file of the device exists at a time, within one process too; "
        "close the other one, its sessions stay"
    )


class IncomingStateError(LuoError):
    """What the previous kernel handed over could not be read, now and at every later open."""

    default_hint = (
        "The preserved memory cannot be reached any more, and the kernel keeps it from reuse; "
        "see the lines of `luo:` in dmesg, then reboot"
    )


class LuoPermissionError(LuoError, PermissionError):
    """The caller lacks the privilege."""

    default_hint = "This needs root, or the right on the file"


class KernelTooOldError(LuoError):
    """The running kernel does not know this request, or a field of it."""

    default_hint = "Linux {release} is older than the request"


class SessionNameError(LuoError, ValueError):
    """A session's name is 1 to 63 bytes, none of them zero."""

    default_hint = "A session's name is 1 to 63 bytes, none of them zero"


class SessionExistsError(LuoError, FileExistsError):
    """An outgoing session of this name exists."""

    default_hint = "Choose another name, or discard the outgoing session that has this one"


class SessionNotFoundError(LuoError, FileNotFoundError):
    """The previous kernel handed over no session of this name, or it is finished."""

    default_hint = "No such session came in with the last live update, or it is finished already"


class SessionRetrievedError(LuoError):
    """The session was retrieved before, and someone may still hold it."""

    default_hint = "A session is retrieved once; its holder can pass the descriptor on"


class TokenInUseError(LuoError, FileExistsError):
    """The session has a file under this token."""

    default_hint = "Every file in a session has a token of its own"


class AlreadyPreservedError(LuoError):
    """The file is in a session already: this one, another one, or an unfinished incoming one."""

    default_hint = (
        "A file is preserved once in the whole system; one that was retrieved can be preserved "
        "again after its incoming session is finished"
    )


class NotPreservableError(LuoError):
    """The kernel has no live update support for this kind of file."""

    default_hint = (
        "Linux {release} has no live update support for this kind of file; `pyluo probe` lists the "
        "kinds that it has support for"
    )


class PreservedMemoryError(LuoError, MemoryError):
    """There is not enough memory of the kind that can be preserved; refused by pyluo."""

    default_hint = "Preserving allocates every page of the file, holes too"


class TokenNotFoundError(LuoError, FileNotFoundError):
    """The session has no file under this token, or is finished."""

    default_hint = "Nothing was preserved under this token, or the session is finished"


class WrongSessionError(LuoError):
    """The descriptor is of a session of the other direction, or of none."""

    default_hint = "Outgoing sessions preserve; incoming sessions retrieve and finish"


class SealedError(LuoError, PermissionError):
    """A seal of the memfd, or its preservation, forbids this."""

    default_hint = "A seal forbids this; the size of a file cannot change while it is preserved"


class ImageRejectedError(LuoError):
    """The kernel does not accept this image for kexec."""

    default_hint = "A bzImage built with CONFIG_RELOCATABLE=y is needed"


class KexecBusyError(LuoError):
    """Another kexec operation is running."""

    default_hint = "Another kexec load, unload or reboot is running: try again"


class FdStoreError(LuoError):
    """A descriptor store was asked for what it cannot do, or its table cannot be read.

    Attributes:
        session: the incoming session of a table that cannot be read: open, with nothing finished,
            so that its files can still be retrieved by their tokens. It does not cross to another
            process with the exception.
    """

    default_hint = "Nothing was finished, and nothing is lost"
    session: Any = None

    def __reduce__(self) -> tuple[type[LuoError], tuple[Any, ...], dict[str, Any]]:
        kind, arguments, state = super().__reduce__()
        return kind, arguments, {name: item for name, item in state.items() if name != "session"}


class HandoverError(LuoError):
    """The next kernel would take nothing over, or may not; refused by pyluo."""

    default_hint = "What is preserved would be lost"


class NoImageLoadedError(LuoError):
    """There is no next kernel to jump into."""

    default_hint = "Load one first, with kexec.load()"


_CLASSES: dict[tuple[str, int], type[LuoError]] = {
    ("open", _errno.ENOENT): LiveUpdateUnavailableError,
    ("open", _errno.ENODEV): LiveUpdateUnavailableError,
    ("open", _errno.ENXIO): LiveUpdateUnavailableError,
    ("open", _errno.EBUSY): DeviceBusyError,
    ("open", _errno.EIO): IncomingStateError,
    ("open", _errno.EACCES): LuoPermissionError,
    ("open", _errno.EPERM): LuoPermissionError,
    ("LIVEUPDATE_IOCTL_CREATE_SESSION", _errno.EINVAL): SessionNameError,
    ("LIVEUPDATE_IOCTL_CREATE_SESSION", _errno.EEXIST): SessionExistsError,
    ("LIVEUPDATE_IOCTL_RETRIEVE_SESSION", _errno.ENOENT): SessionNotFoundError,
    ("LIVEUPDATE_IOCTL_RETRIEVE_SESSION", _errno.EINVAL): SessionRetrievedError,
    ("LIVEUPDATE_SESSION_PRESERVE_FD", _errno.EEXIST): TokenInUseError,
    ("LIVEUPDATE_SESSION_PRESERVE_FD", _errno.EBUSY): AlreadyPreservedError,
    ("LIVEUPDATE_SESSION_PRESERVE_FD", _errno.ENOENT): NotPreservableError,
    ("LIVEUPDATE_SESSION_PRESERVE_FD", _errno.EOPNOTSUPP): NotPreservableError,
    ("LIVEUPDATE_SESSION_PRESERVE_FD", _errno.EFBIG): NotPreservableError,
    ("LIVEUPDATE_SESSION_RETRIEVE_FD", _errno.ENOENT): TokenNotFoundError,
    ("LIVEUPDATE_SESSION_FINISH", _errno.EINVAL): WrongSessionError,
    ("LIVEUPDATE_SESSION_GET_NAME", _errno.EINVAL): KernelTooOldError,
    ("F_ADD_SEALS", _errno.EPERM): SealedError,
    ("ftruncate", _errno.EPERM): SealedError,
    ("pwrite", _errno.EPERM): SealedError,
    ("mmap", _errno.EPERM): SealedError,
    ("mmap", _errno.EACCES): SealedError,
    ("memfd_create", _errno.EACCES): LuoPermissionError,
    ("kexec_file_load", _errno.EPERM): LuoPermissionError,
    ("kexec_file_load", _errno.ENOEXEC): ImageRejectedError,
    ("kexec_file_load", _errno.EBUSY): KexecBusyError,
    ("kexec_file_load", _errno.ENOSYS): KernelTooOldError,
    ("reboot", _errno.EBUSY): KexecBusyError,
    ("reboot", _errno.EPERM): LuoPermissionError,
}

_LOST = (
    "the kernel gives every later attempt the same answer, and the file is lost: a session is best "
    "retrieved early, by root, outside any memory limit"
)

_HINTS: dict[tuple[str, int], str] = {
    ("LIVEUPDATE_SESSION_PRESERVE_FD", _errno.EINVAL): (
        "The support for this kind of file could not preserve it; see dmesg"
    ),
    ("LIVEUPDATE_SESSION_RETRIEVE_FD", _errno.EINVAL): (
        "The kernel could not read what was handed over for this token, see dmesg; " + _LOST
    ),
    ("LIVEUPDATE_SESSION_RETRIEVE_FD", _errno.ENOMEM): (
        "There was no memory for the file, or none in the caller's memory cgroup; " + _LOST
    ),
    ("LIVEUPDATE_SESSION_RETRIEVE_FD", _errno.ENOSPC): (
        "There was no memory for the file, or vm.overcommit_memory=2 allows no more; " + _LOST
    ),
    ("LIVEUPDATE_SESSION_RETRIEVE_FD", _errno.ENFILE): (
        "The system has too many open files, see fs.file-max; " + _LOST
    ),
    ("LIVEUPDATE_SESSION_RETRIEVE_FD", _errno.EMFILE): (
        "This process has too many open files, see RLIMIT_NOFILE; the file is still in the session"
    ),
    ("reboot", _errno.EINVAL): (
        "No image is loaded, or a preserved file could not be frozen: then the system runs on as "
        "it was, and dmesg tells which"
    ),
    ("LIVEUPDATE_SESSION_PRESERVE_FD", _errno.EOPNOTSUPP): (
        "The memfd has seals that this kernel cannot carry over"
    ),
    ("LIVEUPDATE_SESSION_PRESERVE_FD", _errno.EFBIG): "The file has more than 2^32 pages",
    ("LIVEUPDATE_SESSION_PRESERVE_FD", _errno.EBADF): "The descriptor is not open",
    ("LIVEUPDATE_SESSION_PRESERVE_FD", _errno.ENOMEM): (
        "Preserving allocates every page of the file, holes too: free memory, or preserve less"
    ),
    ("LIVEUPDATE_SESSION_GET_NAME", _errno.EINVAL): (
        "Sessions tell their names by ioctl since Linux 7.2, and this is {release}"
    ),
    ("LIVEUPDATE_SESSION_PRESERVE_FD", _errno.ENOSPC): (
        "Linux {release} has no room for a further file in this session"
    ),
    ("LIVEUPDATE_SESSION_FINISH", _errno.EBUSY): (
        "The kernel still needs one of the files; nothing is finished, and it may be tried again"
    ),
    ("kexec_file_load", _errno.ENOSYS): "The kernel needs CONFIG_KEXEC_FILE=y",
    ("kexec_file_load", _errno.EPERM): (
        "Loading needs CAP_SYS_BOOT, and /proc/sys/kernel/kexec_load_disabled to be 0"
    ),
    ("memfd_create", _errno.ENOMEM): "For huge pages, reserve some first: see vm.nr_hugepages",
    ("memfd_create", _errno.ENODEV): "This kernel has no huge pages of that size",
    ("memfd_create", _errno.EACCES): "vm.memfd_noexec=2 forbids memfds that could be executed",
    ("mmap", _errno.ENOMEM): "For huge pages, reserve some first: see vm.nr_hugepages",
}


def from_errno(errno: int, operation: str, subject: str = "") -> LuoError:
    """The exception that `errno`, answered to `operation`, stands for."""
    default = KernelTooOldError if errno == _errno.E2BIG else LuoError
    chosen = _CLASSES.get((operation, errno), default)
    return chosen(errno, operation, subject, _HINTS.get((operation, errno), ""))
