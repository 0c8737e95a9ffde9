"""The exceptions: one class for each kind of failure after which a caller does something else.

Which errno of which request raises which of them is said where the request is declared: see
`pyluo.operation`.
"""

from __future__ import annotations

import errno as _errno
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any

__all__ = [
    "AlreadyPreservedError",
    "DeviceBusyError",
    "DeviceInUseError",
    "DriverNotFoundError",
    "FeatureNotSupportedError",
    "HandoffError",
    "HandoverError",
    "ImageRejectedError",
    "ImageSignatureError",
    "IncomingStateError",
    "InvalidationError",
    "IoasLayoutError",
    "IommuError",
    "IommuUnavailableError",
    "IommuUnsupportedError",
    "KeeperError",
    "KernelTooOldError",
    "KexecBusyError",
    "KexecError",
    "KvmError",
    "LiveUpdateUnavailableError",
    "LuoError",
    "NotPermittedError",
    "NotPreservableError",
    "PciDeviceNotFoundError",
    "PreservedMemoryError",
    "RequestError",
    "SealedError",
    "SessionExistsError",
    "SessionNameError",
    "SessionNotFoundError",
    "SessionRetrievedError",
    "StoreError",
    "TokenInUseError",
    "TokenNotFoundError",
    "UserMappingError",
    "VfioError",
]

# ENOTSUP and EOPNOTSUPP are the same number on Linux; the kernel's documentation uses EOPNOTSUPP.
_NAMES = dict(_errno.errorcode) | {_errno.EOPNOTSUPP: "EOPNOTSUPP"}


class RequestError(OSError):
    """A request that the kernel, or pyluo before it, refused.

    It is of this class itself if it is about a file, a process or memory, as with any program.

    Args:
        errno: the error number that the kernel returned, or that stands for pyluo's reason.
        operation: the name of the request, such as ``LIVEUPDATE_SESSION_PRESERVE_FD``.
        subject: words for the object of the request, such as the session, the token and the file.
        hint: the reason, or what the caller can do; by default the hint of the class.

    Attributes:
        preserved: the tokens of the files that `OutgoingSession.preserve_many` had preserved before
            the error.
    """

    default_hint = ""
    preserved: tuple[int, ...] = ()

    def __init__(self, errno: int, operation: str, subject: str = "", hint: str = "") -> None:
        super().__init__(errno, os.strerror(errno))
        self.operation = operation
        self.subject = subject
        # Fill in the release now, because the exception may be pickled and shown on another kernel.
        self.hint: str = (hint or self.default_hint).replace("{release}", os.uname().release)

    def __str__(self) -> str:
        on = f" on {self.subject}" if self.subject else ""
        name = errno_name(self.errno or 0)
        text = f"{self.operation}{on}: {self.strerror} ({name})"
        return f"{text}. {self.hint}" if self.hint else text

    def __reduce__(self) -> tuple[type[RequestError], tuple[Any, ...], dict[str, Any]]:
        arguments = (self.errno, self.operation, self.subject, self.hint)
        return type(self), arguments, self.__dict__


def errno_name(number: int) -> str:
    """Return the kernel's name of an errno."""
    return _NAMES.get(number, f"errno {number}")


class NotPermittedError(RequestError, PermissionError):
    """The caller lacks a privilege."""

    default_hint = "This needs root, or permission on the file"


class KernelTooOldError(RequestError):
    """The running kernel does not know this request, or one of its fields."""

    default_hint = "Linux {release} does not know this request"


class SealedError(RequestError, PermissionError):
    """A seal of the memfd forbids the operation, or the memfd is preserved."""

    default_hint = "A seal forbids this, or the file is preserved, so that its size cannot change"


class KvmError(RequestError):
    """A request to KVM, or about the state of one of its VMs, failed."""


class LuoError(RequestError):
    """A request about live update failed: of the device, of a session, or of a store."""


class LiveUpdateUnavailableError(LuoError, FileNotFoundError):
    """This kernel offers no live update."""

    default_hint = (
        "The kernel needs CONFIG_LIVEUPDATE (Linux 6.19 or newer) and liveupdate=on on its "
        "command line; `pyluo status` says which of them is missing"
    )


class DeviceBusyError(LuoError):
    """/dev/liveupdate is open already; the system allows one open file of it at a time."""

    default_hint = (
        "The system allows one open file of the device at a time, within a process too; "
        "close the other one, its sessions stay"
    )


class IncomingStateError(LuoError):
    """The kernel cannot read what the previous kernel handed over; every later open fails too."""

    default_hint = (
        "The preserved memory is lost, and the kernel does not reuse it; see the lines of `luo:` "
        "in dmesg, then reboot"
    )


class SessionExistsError(LuoError, FileExistsError):
    """An outgoing session of this name exists already."""

    default_hint = "Choose another name, or discard the outgoing session of this name"


class SessionNameError(LuoError, ValueError):
    """The name is not valid: a session's name is 1 to 63 bytes, none of them zero."""

    default_hint = "A session's name is 1 to 63 bytes, none of them zero"


class SessionNotFoundError(LuoError, FileNotFoundError):
    """The previous kernel handed over no session of this name, or the session is finished."""

    default_hint = (
        "The last live update carried over no session of this name, or it is finished already"
    )


class SessionRetrievedError(LuoError):
    """The session was retrieved before, and a process may still have it open."""

    default_hint = (
        "A session can be retrieved only once; the process that has it open can pass on its "
        "descriptor"
    )


class TokenInUseError(LuoError, FileExistsError):
    """The session has a file with this token already."""

    default_hint = "Each file in a session needs a different token"


class TokenNotFoundError(LuoError, FileNotFoundError):
    """The session has no file with this token, or is finished."""

    default_hint = "Nothing was preserved under this token, or the session is finished"


class AlreadyPreservedError(LuoError):
    """The file is already in this session, in another one, or in an unfinished incoming session."""

    default_hint = (
        "A file can be in one session at a time; a retrieved file can be preserved again after its "
        "incoming session is finished"
    )


class NotPreservableError(LuoError):
    """The kernel has no live update support for this kind of file."""

    default_hint = (
        "Linux {release} has no live update support for this kind of file; `pyluo probe` lists the "
        "supported kinds"
    )


class PreservedMemoryError(LuoError, MemoryError):
    """Preserving or retrieving a file needs too much memory; pyluo refuses before the request."""

    default_hint = "Preserving allocates every page of the file, even where it has holes"


class StoreError(LuoError):
    """A store cannot do this, or its table of contents cannot be read.

    Attributes:
        session: if the table cannot be read, the incoming session, which is open and not finished:
            its files can still be retrieved by their tokens. Otherwise None. This attribute is not
            pickled with the exception.
    """

    default_hint = "Nothing was finished, and nothing is lost"
    session: Any = None

    def __reduce__(self) -> tuple[type[RequestError], tuple[Any, ...], dict[str, Any]]:
        kind, arguments, state = super().__reduce__()
        return kind, arguments, {name: item for name, item in state.items() if name != "session"}


class KeeperError(RequestError):
    """A keeper of sessions failed: a holder process, or systemd's file descriptor store."""

    default_hint = "The session is open in this process, which has to stay alive to keep it"


class KexecError(RequestError):
    """Loading the next kernel, or starting it, failed; this kernel runs on, unchanged."""


class ImageRejectedError(KexecError):
    """The kernel does not accept this image for kexec."""

    default_hint = "A bzImage built with CONFIG_RELOCATABLE=y is needed"


class ImageSignatureError(ImageRejectedError):
    """This kernel loads only images with a valid signature, and the image has none."""

    default_hint = (
        "This kernel loads only images that are signed by a key that it trusts. Nothing has "
        "changed, and what is preserved is intact"
    )


class KexecBusyError(KexecError):
    """Another kexec operation is running."""

    default_hint = "Another kexec load, unload or reboot is running: try again"


class HandoverError(KexecError):
    """pyluo refuses to load or start a kernel that would, or might, take nothing over."""

    default_hint = "Everything that is preserved would be lost"


class HandoffError(RequestError):
    """A handoff of descriptors to another process or program failed.

    Attributes:
        unfinished: if this side does not know who owns the files now, the `Sending` or `Receiving`,
            which can go on, or take the files over once the other process is dead. Otherwise None:
            they are the sender's. This attribute is not pickled with the exception.
    """

    default_hint = "The process that had the descriptors still has them"
    unfinished: Any = None

    def __reduce__(self) -> tuple[type[RequestError], tuple[Any, ...], dict[str, Any]]:
        kind, arguments, state = super().__reduce__()
        return kind, arguments, {name: item for name, item in state.items() if name != "unfinished"}


class IommuError(RequestError):
    """A request to an iommufd, or about the layout of an IOAS, failed."""


class IommuUnavailableError(IommuError, FileNotFoundError):
    """This kernel offers no iommufd."""

    default_hint = "The kernel needs CONFIG_IOMMUFD; if that is a module, `modprobe iommufd`"


class IommuUnsupportedError(IommuError):
    """The IOMMU, its driver or the iommufd object does not support the request."""

    default_hint = (
        "The IOMMU, its driver or the object cannot do this; `IommuDevice.hw_info` says what the "
        "IOMMU can"
    )


class UserMappingError(IommuError):
    """The iommufd cannot move to another process: memory is mapped by its address in a process."""

    default_hint = (
        "Memory that was mapped by its address belongs to the process that mapped it: unmap it, "
        "and map a memfd with `Ioas.map_file` instead"
    )


class InvalidationError(IommuError):
    """An IOMMU refused an entry of a cache invalidation.

    Attributes:
        handled: the number of entries before the refused one; these were carried out.
    """

    default_hint = "The entries before this one were carried out: see `handled`"
    handled = 0


class IoasLayoutError(IommuError):
    """The mappings of an IOAS cannot be recorded, or cannot be rebuilt on this system."""

    default_hint = "Nothing was mapped"


class VfioError(RequestError):
    """A request to a device, or about its driver, failed."""


class PciDeviceNotFoundError(VfioError, FileNotFoundError):
    """There is no PCI device at this address."""

    default_hint = "`PciDevice.all` lists the devices of this system"


class DriverNotFoundError(VfioError, FileNotFoundError):
    """The kernel has no PCI driver of this name."""

    default_hint = "If the driver is a module, load it first, as with `modprobe vfio-pci`"


class DeviceInUseError(VfioError):
    """The device is in use through another open file or through its VFIO group."""

    default_hint = (
        "The device is in use through another open file, in this or another process, or its VFIO "
        "group is open: close that file first"
    )


class FeatureNotSupportedError(VfioError):
    """The device, its VFIO driver or the kernel lacks the feature."""

    default_hint = (
        "The device, its VFIO driver or Linux {release} lacks it; `VfioDevice.features.supported` "
        "lists what they have"
    )
