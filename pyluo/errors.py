"""The exceptions: one class for each kind of failure that a caller may want to handle.

The operation and the errno together determine the class, because the same errno means different
things for different operations. Two tables below map the pair (operation, errno) to a class and to
a hint.
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
    "StoreError",
    "TokenInUseError",
    "TokenNotFoundError",
    "UserMappingError",
    "WrongSessionError",
]


# ENOTSUP and EOPNOTSUPP are the same number on Linux; the kernel's documentation uses EOPNOTSUPP.
_NAMES = dict(_errno.errorcode) | {_errno.EOPNOTSUPP: "EOPNOTSUPP"}


class LuoError(OSError):
    """A request that the kernel, or pyluo before it, refused.

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


class LuoPermissionError(LuoError, PermissionError):
    """The caller lacks a privilege."""

    default_hint = "This needs root, or permission on the file"


class KernelTooOldError(LuoError):
    """The running kernel does not know this request, or one of its fields."""

    default_hint = "Linux {release} does not know this request"


class SessionNameError(LuoError, ValueError):
    """The name is not valid: a session's name is 1 to 63 bytes, none of them zero."""

    default_hint = "A session's name is 1 to 63 bytes, none of them zero"


class SessionExistsError(LuoError, FileExistsError):
    """An outgoing session of this name exists already."""

    default_hint = "Choose another name, or discard the outgoing session of this name"


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


class TokenNotFoundError(LuoError, FileNotFoundError):
    """The session has no file with this token, or is finished."""

    default_hint = "Nothing was preserved under this token, or the session is finished"


class WrongSessionError(LuoError):
    """The session has the wrong direction for the request, or the descriptor does not refer to a
    session.
    """

    default_hint = "An outgoing session can preserve; an incoming session can retrieve and finish"


class SealedError(LuoError, PermissionError):
    """A seal of the memfd forbids the operation, or the memfd is preserved."""

    default_hint = "A seal forbids this, or the file is preserved, so that its size cannot change"


class ImageRejectedError(LuoError):
    """The kernel does not accept this image for kexec."""

    default_hint = "A bzImage built with CONFIG_RELOCATABLE=y is needed"


class KexecBusyError(LuoError):
    """Another kexec operation is running."""

    default_hint = "Another kexec load, unload or reboot is running: try again"


class StoreError(LuoError):
    """A store cannot do this, or its table of contents cannot be read.

    Attributes:
        session: if the table cannot be read, the incoming session, which is open and not finished:
            its files can still be retrieved by their tokens. Otherwise None. This attribute is not
            pickled with the exception.
    """

    default_hint = "Nothing was finished, and nothing is lost"
    session: Any = None

    def __reduce__(self) -> tuple[type[LuoError], tuple[Any, ...], dict[str, Any]]:
        kind, arguments, state = super().__reduce__()
        return kind, arguments, {name: item for name, item in state.items() if name != "session"}


class HandoffError(LuoError):
    """A handoff of descriptors to another process or program failed."""

    default_hint = "The process that had the descriptors still has them"


class HandoverError(LuoError):
    """pyluo refuses to load or start a kernel that would, or might, take nothing over."""

    default_hint = "Everything that is preserved would be lost"


class IommuUnavailableError(LuoError, FileNotFoundError):
    """This kernel offers no iommufd."""

    default_hint = "The kernel needs CONFIG_IOMMUFD; if that is a module, `modprobe iommufd`"


class IommuUnsupportedError(LuoError):
    """The IOMMU, its driver or the iommufd object does not support the request."""

    default_hint = (
        "The IOMMU, its driver or the object cannot do this; `IommuDevice.hw_info` says what the "
        "IOMMU can"
    )


class ObjectInUseError(LuoError):
    """An object of an iommufd is still in use; the message names the users that are known."""

    default_hint = (
        "It is still in use by something that this process does not know of, such as an attached "
        "device or another process with the same iommufd"
    )


class IovaInUseError(LuoError, FileExistsError):
    """Memory is already mapped at this I/O virtual address."""

    default_hint = "Unmap that memory first, or let the kernel choose the address"


class UserMappingError(LuoError):
    """The iommufd cannot move to another process: memory is mapped by its address in a process."""

    default_hint = (
        "Memory that was mapped by its address belongs to the process that mapped it: unmap it, "
        "and map a memfd with `Ioas.map_file` instead"
    )


class InvalidationError(LuoError):
    """An IOMMU refused an entry of a cache invalidation.

    Attributes:
        handled: the number of entries before the refused one; these were carried out.
    """

    default_hint = "The entries before this one were carried out: see `handled`"
    handled = 0


class IoasLayoutError(LuoError):
    """The mappings of an IOAS cannot be recorded, or cannot be rebuilt on this system."""

    default_hint = "Nothing was mapped"


class PciDeviceNotFoundError(LuoError, FileNotFoundError):
    """There is no PCI device at this address."""

    default_hint = "`PciDevice.all` lists the devices of this system"


class DriverNotFoundError(LuoError, FileNotFoundError):
    """The kernel has no PCI driver of this name."""

    default_hint = "If the driver is a module, load it first, as with `modprobe vfio-pci`"


class DeviceInUseError(LuoError):
    """The device is in use through another open file or through its VFIO group."""

    default_hint = (
        "The device is in use through another open file, in this or another process, or its VFIO "
        "group is open: close that file first"
    )


class NotBoundError(LuoError):
    """The VFIO device is not bound to an iommufd yet, so it accepts no other request."""

    default_hint = "Call `VfioDevice.bind` first"


class FeatureNotSupportedError(LuoError):
    """The device, its VFIO driver or the kernel lacks the feature."""

    default_hint = (
        "The device, its VFIO driver or Linux {release} lacks it; `VfioDevice.features.supported` "
        "lists what they have"
    )


class NoImageLoadedError(LuoError):
    """No image of a next kernel is loaded."""

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
    ("kvm open", _errno.EACCES): LuoPermissionError,
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
    "every later attempt will fail in the same way, so the file is lost: retrieve files early, as "
    "root, outside any memory limit"
)

_UNMAPPABLE = (
    "The address or the length is not a multiple of the alignment, or the range is not within "
    "`Ioas.iova_ranges`"
)
_LOCKED_MEMORY = (
    "There is no memory, or RLIMIT_MEMLOCK, which applies to processes without CAP_IPC_LOCK, is "
    "too low; see `IommuFd.accounting`"
)
_NO_MEMORY_ACCESS = (
    "Memory access is off in the device's command register (see `ConfigSpace.command`), the device "
    "is in D3, or it returned fewer bytes than requested"
)
_NO_PAGES = "There is not enough memory, or too few huge pages are reserved: see vm.nr_hugepages"
_NO_BUS_RESET = "Neither the device's bus nor its slot can be reset; a root bus never can"
_HUGE_PAGES = "Huge pages can be turned off only before a device can access the mappings"
_NO_IOVA = "`Ioas.iova_ranges` have no free gap of this size"

_NO_KVM = (
    "The kernel needs CONFIG_KVM, with the module for the vendor of the CPU; the CPU and its "
    "firmware must offer virtualization"
)

_HINTS: dict[tuple[str, int], str] = {
    ("kvm open", _errno.ENOENT): _NO_KVM,
    ("kvm open", _errno.ENODEV): _NO_KVM,
    ("KVM_CREATE_VCPU", _errno.EINVAL): "`Kvm.check(Capability.MAX_VCPUS)` is how many can be",
    ("KVM_SET_SREGS2", _errno.EINVAL): (
        "The registers contradict one another, or need what CPUID does not tell the VM of"
    ),
    ("KVM_SET_USER_MEMORY_REGION", _errno.EEXIST): "Another slot has memory at these addresses",
    ("IOMMU_OPTION", _errno.EPERM): "This needs CAP_SYS_RESOURCE",
    ("IOMMU_OPTION", _errno.EBUSY): (
        "The accounting can be chosen only before the first object of the iommufd is created"
    ),
    ("IOMMU_OPTION", _errno.EINVAL): _HUGE_PAGES,
    ("IOMMU_OPTION", _errno.EADDRINUSE): _HUGE_PAGES,
    ("IOMMU_IOAS_MAP", _errno.EINVAL): _UNMAPPABLE,
    ("IOMMU_IOAS_MAP_FILE", _errno.EINVAL): (
        _UNMAPPABLE + "; or the kernel cannot map this kind of file: use a memfd"
    ),
    ("IOMMU_IOAS_COPY", _errno.EINVAL): _UNMAPPABLE,
    ("IOMMU_IOAS_MAP", _errno.ENOMEM): _LOCKED_MEMORY,
    ("IOMMU_IOAS_MAP_FILE", _errno.ENOMEM): _LOCKED_MEMORY,
    ("IOMMU_IOAS_CHANGE_PROCESS", _errno.ENOMEM): _LOCKED_MEMORY + "; nothing has changed",
    ("IOMMU_IOAS_MAP", _errno.ENOSPC): _NO_IOVA,
    ("IOMMU_IOAS_MAP_FILE", _errno.ENOSPC): _NO_IOVA,
    ("IOMMU_IOAS_COPY", _errno.ENOSPC): _NO_IOVA,
    ("IOMMU_IOAS_COPY", _errno.ENOENT): "The range is not fully mapped in the source",
    ("IOMMU_IOAS_COPY", _errno.EPERM): "The source was mapped without write access",
    ("IOMMU_IOAS_UNMAP", _errno.ENOENT): (
        "Nothing is mapped there, or a mapping reaches beyond the range: mappings can only be "
        "unmapped as a whole"
    ),
    ("IOMMU_IOAS_UNMAP", _errno.EBUSY): (
        "A hardware queue uses the mapping, or another thread is unmapping it"
    ),
    ("IOMMU_IOAS_ALLOW_IOVAS", _errno.EADDRINUSE): (
        "An attached device cannot reach the whole range, see `Ioas.iova_ranges`"
    ),
    ("IOMMU_HWPT_ALLOC", _errno.EADDRINUSE): (
        "A mapping or an allowed range lies where this device cannot reach"
    ),
    ("IOMMU_HWPT_GET_DIRTY_BITMAP", _errno.ENOENT): (
        "Part of the range is not mapped: make one call for each run of adjacent mappings"
    ),
    ("IOMMU_IOAS_NOIOMMU_GET_PA", _errno.EPERM): "This needs CAP_SYS_RAWIO",
    ("IOMMU_IOAS_NOIOMMU_GET_PA", _errno.ENOENT): "Nothing is mapped there",
    ("LIVEUPDATE_SESSION_PRESERVE_FD", _errno.EINVAL): (
        "The kernel supports this kind of file but could not preserve this one; see dmesg"
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
        "No image is loaded; or a preserved file could not be frozen: dmesg says which one. The "
        "system keeps running, unchanged"
    ),
    ("LIVEUPDATE_SESSION_PRESERVE_FD", _errno.EOPNOTSUPP): (
        "The memfd has seals that this kernel cannot carry over"
    ),
    ("LIVEUPDATE_SESSION_PRESERVE_FD", _errno.EFBIG): "The file has more than 2^32 pages",
    ("LIVEUPDATE_SESSION_PRESERVE_FD", _errno.EBADF): "The descriptor is not open",
    ("LIVEUPDATE_SESSION_PRESERVE_FD", _errno.ENOMEM): (
        "Preserving allocates every page of the file, even where it has holes: free memory, or "
        "preserve less"
    ),
    ("LIVEUPDATE_SESSION_GET_NAME", _errno.EINVAL): (
        "Only Linux 7.2 and newer can report the name of a session; this kernel is {release}"
    ),
    ("LIVEUPDATE_SESSION_PRESERVE_FD", _errno.ENOSPC): (
        "Linux {release} has no room for another file in this session"
    ),
    ("LIVEUPDATE_SESSION_FINISH", _errno.EBUSY): (
        "The kernel still needs one of the files; nothing was finished: try again"
    ),
    ("kexec_file_load", _errno.ENOSYS): "The kernel needs CONFIG_KEXEC_FILE=y",
    ("kexec_file_load", _errno.EPERM): (
        "Loading needs CAP_SYS_BOOT, and /proc/sys/kernel/kexec_load_disabled to be 0"
    ),
    ("send handoff", _errno.ETIMEDOUT): (
        "The other process sent nothing in time; is it in receive()? Nothing was handed over"
    ),
    ("send handoff", _errno.EPIPE): "The other process has hung up; nothing was handed over",
    ("send handoff", _errno.ETOOMANYREFS): (
        "Too many descriptors of this user are in flight through sockets: raise RLIMIT_NOFILE, or "
        "try again when others were received; nothing was handed over"
    ),
    ("receive handoff", _errno.ETIMEDOUT): (
        "The other process sent nothing in time; is it in send()? Nothing was taken over"
    ),
    ("receive handoff", _errno.EPIPE): "The other process has hung up; nothing was taken over",
    ("connect for handoff", _errno.EAGAIN): (
        "Other connections are waiting to be accepted there: try again"
    ),
    ("exec handoff", _errno.EMFILE): (
        "No descriptor number is free for a duplicate: raise RLIMIT_NOFILE; nothing has changed"
    ),
    ("driver bind", _errno.ENODEV): (
        "The driver does not support the device, or another driver has taken the device"
    ),
    ("driver bind", _errno.EBUSY): (
        "Another driver has the device, or its virtual functions are in use"
    ),
    ("vfio open", _errno.ENOENT): (
        "There is no such node: the device is bound to no VFIO driver (`PciDevice.bind_driver`), "
        "or the kernel lacks CONFIG_VFIO_DEVICE_CDEV (Linux 6.6 or newer)"
    ),
    ("vfio open", _errno.ENODEV): "The device is being unbound from its VFIO driver",
    ("VFIO_DEVICE_BIND_IOMMUFD", _errno.EPERM): (
        "Another device of the same IOMMU group is in use by a host driver or bound to another "
        "iommufd (see `PciDevice.group_devices`); or the IOMMU does not remap interrupts: boot "
        "with intremap=on, or set iommufd's parameter allow_unsafe_interrupts"
    ),
    ("VFIO_DEVICE_BIND_IOMMUFD", _errno.EINVAL): (
        "Another open file has the device; or the firmware requires one-to-one mappings for it "
        "(see `direct` in reserved_regions of its IOMMU group); or the IOMMU is not cache-coherent"
    ),
    ("VFIO_DEVICE_BIND_IOMMUFD", _errno.EACCES): (
        "The device is a virtual function, or has virtual functions in use: pass their token"
    ),
    ("VFIO_DEVICE_BIND_IOMMUFD", _errno.EAGAIN): "The device is locked for a moment: try again",
    ("VFIO_DEVICE_ATTACH_IOMMUFD_PT", _errno.EINVAL): (
        "The page table does not suit the device's IOMMU, or other devices of the same IOMMU group "
        "are attached to another page table"
    ),
    ("VFIO_DEVICE_ATTACH_IOMMUFD_PT", _errno.EADDRINUSE): (
        "A mapping or an allowed range lies where this device cannot reach"
    ),
    ("VFIO_DEVICE_ATTACH_IOMMUFD_PT", _errno.EBUSY): "The device is being reset: try again",
    ("VFIO_DEVICE_ATTACH_IOMMUFD_PT", _errno.ENOENT): (
        "The iommufd that the device is bound to has no such object"
    ),
    ("VFIO_DEVICE_ATTACH_IOMMUFD_PT", _errno.EOPNOTSUPP): (
        "The device's VFIO driver does not support PASIDs"
    ),
    ("VFIO_DEVICE_GET_REGION_INFO", _errno.EINVAL): "The device has no region of this index",
    ("VFIO_DEVICE_GET_IRQ_INFO", _errno.EINVAL): "The device has no interrupts of this index",
    ("VFIO_DEVICE_SET_IRQS", _errno.EINVAL): (
        "Only one of INTx, MSI and MSI-X can be enabled at a time: disable the other first. "
        "Masking, triggering and disabling need an enabled kind; the vectors of a kind with "
        "`IrqFlags.NORESIZE` must be enabled together"
    ),
    ("VFIO_DEVICE_SET_IRQS", _errno.ENOTTY): (
        "The driver does not support this for interrupts of this kind"
    ),
    ("VFIO_DEVICE_SET_IRQS", _errno.EBUSY): (
        "An eventfd is already set for this vector; or the INTx line is shared with a device that "
        "cannot share it"
    ),
    ("VFIO_DEVICE_SET_IRQS", _errno.ENOSPC): (
        "The system has no interrupt vectors left for all of them: enable fewer"
    ),
    ("VFIO_DEVICE_SET_IRQS", _errno.EBADF): "The descriptor is not open, or not of an eventfd",
    ("VFIO_DEVICE_RESET", _errno.EINVAL): (
        "The device cannot be reset on its own (see `DeviceInfo.flags`); try `hot_reset`"
    ),
    ("VFIO_DEVICE_RESET", _errno.EAGAIN): "The device is locked for a moment: try again",
    ("VFIO_DEVICE_GET_PCI_HOT_RESET_INFO", _errno.ENODEV): _NO_BUS_RESET,
    ("VFIO_DEVICE_PCI_HOT_RESET", _errno.ENODEV): _NO_BUS_RESET,
    ("VFIO_DEVICE_PCI_HOT_RESET", _errno.EINVAL): (
        "A device on the same bus or slot is not owned by this iommufd: `hot_reset_info` names it"
    ),
    ("VFIO_DEVICE_PCI_HOT_RESET", _errno.ENOTTY): (
        "The bus was reset, but its link did not come back: see dmesg"
    ),
    ("VFIO_DEVICE_PCI_HOT_RESET", _errno.EBUSY): "One of the devices is being accessed: try again",
    ("VFIO_DEVICE_FEATURE_DMA_BUF", _errno.ENOTTY): "The kernel needs CONFIG_VFIO_PCI_DMABUF",
    ("VFIO_DEVICE_FEATURE_DMA_BUF", _errno.EINVAL): (
        "Every area must consist of whole pages and lie within the BAR"
    ),
    ("VFIO_DEVICE_FEATURE_DMA_BUF", _errno.ENODEV): (
        "The region is not a BAR, is empty, or is in use by another driver"
    ),
    ("VFIO_DEVICE_FEATURE_DMA_LOGGING_START", _errno.E2BIG): (
        "The device cannot log so many ranges: merge adjacent ones"
    ),
    ("VFIO_DEVICE_FEATURE_DMA_LOGGING_START", _errno.EINVAL): (
        "Ranges overlap or are not aligned to the page size, there are none, or logging is on"
    ),
    ("VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT", _errno.EINVAL): (
        "Logging is off, or the page size is not a power of two of at least 4096"
    ),
    ("VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE", _errno.EINVAL): (
        "The device does not support this state, or cannot reach it from its present state (see "
        "`Migration.state`)"
    ),
    ("VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2", _errno.EINVAL): "The device has no PRE_COPY state",
    ("VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY", _errno.EINVAL): (
        "The device is already allowed to sleep: call `low_power.exit()` first"
    ),
    ("VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP", _errno.EINVAL): (
        "The device is already allowed to sleep (call `low_power.exit()` first), or the descriptor "
        "is not of an eventfd"
    ),
    ("VFIO_DEVICE_FEATURE_PCI_VF_TOKEN", _errno.ENOTTY): (
        "Only a physical function with SR-IOV has a token"
    ),
    ("VFIO_DEVICE_FEATURE_BUS_MASTER", _errno.ENOTTY): (
        "Only devices on a CDX bus have this feature; use `ConfigSpace.set_bus_master` for PCI "
        "devices"
    ),
    ("VFIO_DEVICE_IOEVENTFD", _errno.EEXIST): (
        "An eventfd is set for this register and value already"
    ),
    ("VFIO_DEVICE_IOEVENTFD", _errno.ENODEV): "No eventfd is set for this register and value",
    ("VFIO_DEVICE_IOEVENTFD", _errno.EINVAL): (
        "Only registers of a BAR, outside the MSI-X table, can have an eventfd"
    ),
    ("pread", _errno.EIO): _NO_MEMORY_ACCESS,
    ("pwrite", _errno.EIO): _NO_MEMORY_ACCESS,
    ("memfd_create", _errno.ENOMEM): "For huge pages, reserve some first: see vm.nr_hugepages",
    ("memfd_create", _errno.ENODEV): "This kernel has no huge pages of that size",
    ("memfd_create", _errno.EACCES): "vm.memfd_noexec=2 forbids executable memfds",
    ("mmap", _errno.ENOMEM): "For huge pages, reserve some first: see vm.nr_hugepages",
    ("mbind", _errno.ENOSYS): "The kernel needs CONFIG_NUMA",
    ("mbind", _errno.EINVAL): (
        "A node does not exist, has no memory or is outside this process's cpuset; or the mode "
        "needs other nodes, or a newer kernel than Linux {release}"
    ),
    ("MADV_HUGEPAGE", _errno.EINVAL): "The kernel needs CONFIG_TRANSPARENT_HUGEPAGE",
    ("MADV_POPULATE_READ", _errno.EFAULT): _NO_PAGES,
    ("MADV_POPULATE_WRITE", _errno.EFAULT): _NO_PAGES,
}


def from_errno(errno: int, operation: str, subject: str = "") -> LuoError:
    """Return the exception, with its hint, for an errno that `operation` returned."""
    chosen = _CLASSES.get((operation, errno)) or _default_class(errno, operation)
    return chosen(errno, operation, subject, _HINTS.get((operation, errno), ""))


def _default_class(errno: int, operation: str) -> type[LuoError]:
    """Return the class for a pair that is not in the table, by the conventions of the uAPI."""
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
