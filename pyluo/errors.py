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
    "DeviceInUseError",
    "DriverNotFoundError",
    "FdStoreError",
    "FeatureNotSupportedError",
    "HandoffError",
    "HandoverError",
    "ImageRejectedError",
    "IncomingStateError",
    "InvalidationError",
    "IoasLayoutError",
    "IommuUnavailableError",
    "IommuUnsupportedError",
    "IovaInUseError",
    "KernelTooOldError",
    "KexecBusyError",
    "LiveUpdateUnavailableError",
    "LuoError",
    "LuoPermissionError",
    "NoImageLoadedError",
    "NotBoundError",
    "NotPreservableError",
    "ObjectInUseError",
    "PciDeviceNotFoundError",
    "PreservedMemoryError",
    "SealedError",
    "SessionExistsError",
    "SessionNameError",
    "SessionNotFoundError",
    "SessionRetrievedError",
    "TokenInUseError",
    "TokenNotFoundError",
    "UserMappingError",
    "WrongSessionError",
]


# Linux has one number for both names, and the kernel's documentation the other one.
_NAMES = dict(_errno.errorcode) | {_errno.EOPNOTSUPP: "EOPNOTSUPP"}


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
        name = _NAMES.get(self.errno or 0, f"errno {self.errno}")
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


class HandoffError(LuoError):
    """What one process hands to its successor did not arrive, or is not what was handed over."""

    default_hint = "Who had the descriptors before has them still"


class HandoverError(LuoError):
    """The next kernel would take nothing over, or may not; refused by pyluo."""

    default_hint = "What is preserved would be lost"


class IommuUnavailableError(LuoError, FileNotFoundError):
    """This kernel offers no iommufd."""

    default_hint = "The kernel needs CONFIG_IOMMUFD; if that is a module, `modprobe iommufd`"


class IommuUnsupportedError(LuoError):
    """The IOMMU, its driver or the object cannot do this."""

    default_hint = (
        "The IOMMU, its driver or the object cannot do this; `IommuDevice.hw_info` says what the "
        "IOMMU can"
    )


class ObjectInUseError(LuoError):
    """Something still hangs on this object of an iommufd.

    The message names what is known to.
    """

    default_hint = (
        "Still used by something that this process knows nothing of: a device attached, or another "
        "process with the same iommufd"
    )


class IovaInUseError(LuoError, FileExistsError):
    """Something is mapped at this I/O virtual address."""

    default_hint = "Unmap what is there first, or let the kernel choose the address"


class UserMappingError(LuoError):
    """An iommufd with memory mapped by its address cannot change its process."""

    default_hint = (
        "Memory that was mapped by its address belongs to the process that mapped it: unmap it, "
        "and map a memfd with `Ioas.map_file` instead"
    )


class InvalidationError(LuoError):
    """An IOMMU did not carry out all of a request to drop what it has cached.

    Attributes:
        handled: how many entries were carried out before the one that failed.
    """

    default_hint = "Those before it were carried out: see `handled`"
    handled = 0


class IoasLayoutError(LuoError):
    """What is mapped in an IOAS cannot be recorded, or not be repeated here; refused by pyluo."""

    default_hint = "Nothing was mapped"


class PciDeviceNotFoundError(LuoError, FileNotFoundError):
    """There is no PCI device at this address."""

    default_hint = "`PciDevice.all` gives the devices that there are"


class DriverNotFoundError(LuoError, FileNotFoundError):
    """The kernel has no PCI driver of this name."""

    default_hint = "If the driver is a module, load it first: `modprobe vfio-pci`, for that one"


class DeviceInUseError(LuoError):
    """Somebody else has this device: another open file, a VFIO group, or whoever opened it."""

    default_hint = (
        "Another open file has it, in this process or another, or its group is open; one file has "
        "it at a time, and closing that one gives it free"
    )


class NotBoundError(LuoError):
    """This VFIO device is bound to no iommufd, and until then nothing can be done with it."""

    default_hint = "`VfioDevice.bind` comes first"


class FeatureNotSupportedError(LuoError):
    """This device, its VFIO driver or the kernel lacks the feature."""

    default_hint = (
        "The device, its VFIO driver or Linux {release} lacks it; `VfioDevice.features.supported` "
        "says what there is"
    )


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
    ("iommufd open", _errno.ENOENT): IommuUnavailableError,
    ("iommufd open", _errno.ENODEV): IommuUnavailableError,
    ("iommufd open", _errno.ENXIO): IommuUnavailableError,
    ("iommufd open", _errno.EACCES): LuoPermissionError,
    ("IOMMU_DESTROY", _errno.EBUSY): ObjectInUseError,
    ("IOMMU_OPTION", _errno.EPERM): LuoPermissionError,
    ("IOMMU_OPTION", _errno.EBUSY): ObjectInUseError,
    ("IOMMU_IOAS_MAP", _errno.EEXIST): IovaInUseError,
    ("IOMMU_IOAS_MAP_FILE", _errno.EEXIST): IovaInUseError,
    ("IOMMU_IOAS_COPY", _errno.EEXIST): IovaInUseError,
    ("IOMMU_IOAS_CHANGE_PROCESS", _errno.EINVAL): UserMappingError,
    ("IOMMU_IOAS_NOIOMMU_GET_PA", _errno.EPERM): LuoPermissionError,
    ("reboot", _errno.EBUSY): KexecBusyError,
    ("reboot", _errno.EPERM): LuoPermissionError,
    ("driver bind", _errno.EACCES): LuoPermissionError,
    ("driver bind", _errno.EPERM): LuoPermissionError,
    ("driver unbind", _errno.EACCES): LuoPermissionError,
    ("driver unbind", _errno.EPERM): LuoPermissionError,
    ("driver_override", _errno.EACCES): LuoPermissionError,
    ("driver_override", _errno.EPERM): LuoPermissionError,
    ("vfio open", _errno.EACCES): LuoPermissionError,
    ("vfio open", _errno.EPERM): LuoPermissionError,
    ("VFIO_DEVICE_BIND_IOMMUFD", _errno.EINVAL): DeviceInUseError,
    ("VFIO_DEVICE_BIND_IOMMUFD", _errno.EBUSY): DeviceInUseError,
    ("VFIO_DEVICE_BIND_IOMMUFD", _errno.EPERM): LuoPermissionError,
    ("VFIO_DEVICE_BIND_IOMMUFD", _errno.EACCES): LuoPermissionError,
    ("VFIO_DEVICE_GET_INFO", _errno.EINVAL): NotBoundError,
    ("VFIO_DEVICE_FEATURE_DMA_LOGGING_START", _errno.E2BIG): LuoError,
}

_LOST = (
    "the kernel gives every later attempt the same answer, and the file is lost: a session is best "
    "retrieved early, by root, outside any memory limit"
)

_UNMAPPABLE = (
    "The address or the length is not a multiple of the alignment, or lies outside what "
    "`Ioas.iova_ranges` gives"
)
_LOCKED_MEMORY = (
    "No memory, or no room under RLIMIT_MEMLOCK, which counts for processes without CAP_IPC_LOCK; "
    "see `IommuFd.accounting`"
)
_NO_MEMORY_ACCESS = (
    "Memory access is off in the device's command register (see `ConfigSpace.command`), the device "
    "is in D3, or it gave less than was asked for"
)
_NO_BUS_RESET = "Neither its bus nor its slot can be reset, as on a root bus"
_HUGE_PAGES = "Huge pages can be switched off only before a device has what is mapped"
_NO_IOVA = "There is no gap of this size in what `Ioas.iova_ranges` gives"

_HINTS: dict[tuple[str, int], str] = {
    ("IOMMU_OPTION", _errno.EPERM): "This needs CAP_SYS_RESOURCE",
    ("IOMMU_OPTION", _errno.EBUSY): (
        "The accounting can be chosen only before the first object of the iommufd is made"
    ),
    ("IOMMU_OPTION", _errno.EINVAL): _HUGE_PAGES,
    ("IOMMU_OPTION", _errno.EADDRINUSE): _HUGE_PAGES,
    ("IOMMU_IOAS_MAP", _errno.EINVAL): _UNMAPPABLE,
    ("IOMMU_IOAS_MAP_FILE", _errno.EINVAL): (
        _UNMAPPABLE + "; or the kernel cannot map this kind of file: a memfd it can"
    ),
    ("IOMMU_IOAS_COPY", _errno.EINVAL): _UNMAPPABLE,
    ("IOMMU_IOAS_MAP", _errno.ENOMEM): _LOCKED_MEMORY,
    ("IOMMU_IOAS_MAP_FILE", _errno.ENOMEM): _LOCKED_MEMORY,
    ("IOMMU_IOAS_CHANGE_PROCESS", _errno.ENOMEM): _LOCKED_MEMORY + "; nothing has changed",
    ("IOMMU_IOAS_MAP", _errno.ENOSPC): _NO_IOVA,
    ("IOMMU_IOAS_MAP_FILE", _errno.ENOSPC): _NO_IOVA,
    ("IOMMU_IOAS_COPY", _errno.ENOSPC): _NO_IOVA,
    ("IOMMU_IOAS_COPY", _errno.ENOENT): "Not all of the range is mapped in the source",
    ("IOMMU_IOAS_COPY", _errno.EPERM): "It was mapped without write access",
    ("IOMMU_IOAS_UNMAP", _errno.ENOENT): (
        "Nothing is mapped there, or a mapping reaches beyond the range: mappings go as a whole"
    ),
    ("IOMMU_IOAS_UNMAP", _errno.EBUSY): "A hardware queue uses it, or another thread unmaps it",
    ("IOMMU_IOAS_ALLOW_IOVAS", _errno.EADDRINUSE): (
        "A device that is attached does not have the whole range, see `Ioas.iova_ranges`"
    ),
    ("IOMMU_HWPT_ALLOC", _errno.EADDRINUSE): (
        "Something is mapped, or allowed to be, where this device cannot reach"
    ),
    ("IOMMU_HWPT_GET_DIRTY_BITMAP", _errno.ENOENT): (
        "Not all of the range is mapped: ask for each mapping, or those side by side, alone"
    ),
    ("IOMMU_IOAS_NOIOMMU_GET_PA", _errno.EPERM): "This needs CAP_SYS_RAWIO",
    ("IOMMU_IOAS_NOIOMMU_GET_PA", _errno.ENOENT): "Nothing is mapped there",
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
    ("send handoff", _errno.ETIMEDOUT): (
        "The other process said nothing in time; is it in receive()? Nothing was handed over"
    ),
    ("send handoff", _errno.EPIPE): "The other process has hung up; nothing was handed over",
    ("send handoff", _errno.ETOOMANYREFS): (
        "Too many descriptors of this user are on their way through sockets: raise RLIMIT_NOFILE, "
        "or try again when others were received; nothing was handed over"
    ),
    ("receive handoff", _errno.ETIMEDOUT): (
        "The other process said nothing in time; is it in send()? Nothing was taken over"
    ),
    ("receive handoff", _errno.EPIPE): "The other process has hung up; nothing was taken over",
    ("connect for handoff", _errno.EAGAIN): "Others wait there already: try again",
    ("exec handoff", _errno.EMFILE): (
        "No number is left for a duplicate: raise RLIMIT_NOFILE; nothing has changed"
    ),
    ("driver bind", _errno.ENODEV): (
        "The driver does not know the device, or the device is another driver's by now"
    ),
    ("driver bind", _errno.EBUSY): "Another driver has it, or its virtual functions are in use",
    ("vfio open", _errno.ENOENT): (
        "There is no such node: the device is bound to no VFIO driver (`PciDevice.bind_driver`), "
        "or the kernel lacks CONFIG_VFIO_DEVICE_CDEV (Linux 6.6 or newer)"
    ),
    ("vfio open", _errno.ENODEV): "The device is being taken from its VFIO driver",
    ("VFIO_DEVICE_BIND_IOMMUFD", _errno.EPERM): (
        "Another device of its IOMMU group has a driver of the host's, or is another iommufd's "
        "(see `PciDevice.group_devices`); or the IOMMU does not remap interrupts, which "
        "intremap=on, or iommufd's parameter allow_unsafe_interrupts, would be for"
    ),
    ("VFIO_DEVICE_BIND_IOMMUFD", _errno.EINVAL): (
        "Another open file has it; or the firmware wants its addresses mapped one to one, see "
        "`direct` in its IOMMU group's reserved_regions; or the IOMMU is not coherent with caches"
    ),
    ("VFIO_DEVICE_BIND_IOMMUFD", _errno.EACCES): (
        "It is a virtual function, or has some in use: their token is needed, and the right one"
    ),
    ("VFIO_DEVICE_BIND_IOMMUFD", _errno.EAGAIN): "It is locked for a moment: try again",
    ("VFIO_DEVICE_ATTACH_IOMMUFD_PT", _errno.EINVAL): (
        "The page table does not suit the device's IOMMU, or other devices of its IOMMU group are "
        "attached to another one"
    ),
    ("VFIO_DEVICE_ATTACH_IOMMUFD_PT", _errno.EADDRINUSE): (
        "Something is mapped, or allowed to be, where this device cannot reach"
    ),
    ("VFIO_DEVICE_ATTACH_IOMMUFD_PT", _errno.EBUSY): "It is being reset: try again",
    ("VFIO_DEVICE_ATTACH_IOMMUFD_PT", _errno.ENOENT): (
        "The iommufd that the device is bound to has no such object"
    ),
    ("VFIO_DEVICE_ATTACH_IOMMUFD_PT", _errno.EOPNOTSUPP): "Its VFIO driver knows no PASIDs",
    ("VFIO_DEVICE_GET_REGION_INFO", _errno.EINVAL): "The device has no region of this index",
    ("VFIO_DEVICE_GET_IRQ_INFO", _errno.EINVAL): "The device has no interrupts of this index",
    ("VFIO_DEVICE_SET_IRQS", _errno.EINVAL): (
        "Of INTx, MSI and MSI-X one is on at a time: disable the other first. Masking, triggering "
        "and disabling need the kind to be on; vectors of a kind with `IrqFlags.NORESIZE` have to "
        "be enabled together"
    ),
    ("VFIO_DEVICE_SET_IRQS", _errno.ENOTTY): "The driver cannot do this to interrupts of this kind",
    ("VFIO_DEVICE_SET_IRQS", _errno.EBUSY): (
        "An eventfd is set for it already; or the device shares INTx with one that cannot share"
    ),
    ("VFIO_DEVICE_SET_IRQS", _errno.ENOSPC): (
        "The system has no interrupt vectors left for all of them: enable fewer"
    ),
    ("VFIO_DEVICE_SET_IRQS", _errno.EBADF): "The descriptor is not open, or of no eventfd",
    ("VFIO_DEVICE_RESET", _errno.EINVAL): (
        "The device cannot be reset alone, see `DeviceInfo.flags`; `hot_reset` may do"
    ),
    ("VFIO_DEVICE_RESET", _errno.EAGAIN): "It is locked for a moment: try again",
    ("VFIO_DEVICE_GET_PCI_HOT_RESET_INFO", _errno.ENODEV): _NO_BUS_RESET,
    ("VFIO_DEVICE_PCI_HOT_RESET", _errno.ENODEV): _NO_BUS_RESET,
    ("VFIO_DEVICE_PCI_HOT_RESET", _errno.EINVAL): (
        "A device on the same bus or slot is not owned by this iommufd: `hot_reset_info` names it"
    ),
    ("VFIO_DEVICE_PCI_HOT_RESET", _errno.ENOTTY): (
        "The bus was reset, and the kernel did not see its link come back: see dmesg"
    ),
    ("VFIO_DEVICE_PCI_HOT_RESET", _errno.EBUSY): "One of the devices is being accessed: try again",
    ("VFIO_DEVICE_FEATURE_DMA_BUF", _errno.ENOTTY): "The kernel needs CONFIG_VFIO_PCI_DMABUF",
    ("VFIO_DEVICE_FEATURE_DMA_BUF", _errno.EINVAL): (
        "Every area has to be of whole pages, and to lie within the BAR"
    ),
    ("VFIO_DEVICE_FEATURE_DMA_BUF", _errno.ENODEV): (
        "The region is no BAR, has nothing in it, or another driver has it"
    ),
    ("VFIO_DEVICE_FEATURE_DMA_LOGGING_START", _errno.E2BIG): (
        "Too many ranges for the device: merge those that lie side by side"
    ),
    ("VFIO_DEVICE_FEATURE_DMA_LOGGING_START", _errno.EINVAL): (
        "Ranges overlap or are not aligned to the page size, there is none, or logging is on"
    ),
    ("VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT", _errno.EINVAL): (
        "Logging is off, or the page size is no power of two from 4096 on"
    ),
    ("VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE", _errno.EINVAL): (
        "The device has no such state, or no way leads there from where it is; "
        "`Migration.state` tells where that is now"
    ),
    ("VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2", _errno.EINVAL): "The device has no PRE_COPY state",
    ("VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY", _errno.EINVAL): (
        "The device may sleep already: `low_power.exit()` ends that"
    ),
    ("VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP", _errno.EINVAL): (
        "The device may sleep already (`low_power.exit()` ends that), or that is no eventfd"
    ),
    ("VFIO_DEVICE_FEATURE_PCI_VF_TOKEN", _errno.ENOTTY): (
        "Only a physical function with SR-IOV has a token"
    ),
    ("VFIO_DEVICE_FEATURE_BUS_MASTER", _errno.ENOTTY): (
        "It is for devices of the CDX bus; PCI devices have `ConfigSpace.set_bus_master`"
    ),
    ("VFIO_DEVICE_IOEVENTFD", _errno.EEXIST): "An eventfd is set for this register and value",
    ("VFIO_DEVICE_IOEVENTFD", _errno.ENODEV): "None is set for this register and value",
    ("VFIO_DEVICE_IOEVENTFD", _errno.EINVAL): "Only registers of a BAR, outside the MSI-X table",
    ("pread", _errno.EIO): _NO_MEMORY_ACCESS,
    ("pwrite", _errno.EIO): _NO_MEMORY_ACCESS,
    ("memfd_create", _errno.ENOMEM): "For huge pages, reserve some first: see vm.nr_hugepages",
    ("memfd_create", _errno.ENODEV): "This kernel has no huge pages of that size",
    ("memfd_create", _errno.EACCES): "vm.memfd_noexec=2 forbids memfds that could be executed",
    ("mmap", _errno.ENOMEM): "For huge pages, reserve some first: see vm.nr_hugepages",
}


def from_errno(errno: int, operation: str, subject: str = "") -> LuoError:
    """The exception that `errno`, answered to `operation`, stands for."""
    chosen = _CLASSES.get((operation, errno)) or _common(errno, operation)
    return chosen(errno, operation, subject, _HINTS.get((operation, errno), ""))


def _common(errno: int, operation: str) -> type[LuoError]:
    """What an errno means to all requests alike, by the conventions of the uAPI headers."""
    if operation.endswith(" handoff"):
        return HandoffError
    if operation.startswith("VFIO_DEVICE_FEATURE_") and errno in (
        _errno.ENOTTY,
        _errno.EOPNOTSUPP,
    ):
        return FeatureNotSupportedError
    if errno == _errno.E2BIG:
        return KernelTooOldError
    if operation.startswith("IOMMU_"):
        return {
            _errno.ENOTTY: KernelTooOldError,
            _errno.EOPNOTSUPP: IommuUnsupportedError,
        }.get(errno, LuoError)
    return LuoError
