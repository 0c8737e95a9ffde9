"""/dev/iommu: the context in which I/O address spaces and page tables are made."""

from __future__ import annotations

import enum
import errno
import os
from typing import TYPE_CHECKING, Self

from pyluo._sys import Ioctl, constant, raising
from pyluo.descriptor import OwnedFd, require_device
from pyluo.errors import LuoError, UserMappingError, from_errno
from pyluo.iommufd.events import FaultQueue
from pyluo.iommufd.ioas import Ioas

if TYPE_CHECKING:
    from pyluo.iommufd.objects import IommuObject

__all__ = ["DEVICE", "Accounting", "IommuFd"]

DEVICE = "/dev/iommu"

_IOAS_ALLOC = Ioctl("IOMMU_IOAS_ALLOC", "iommu_ioas_alloc")
_FAULT_QUEUE_ALLOC = Ioctl("IOMMU_FAULT_QUEUE_ALLOC", "iommu_fault_alloc")
_OPTION = Ioctl("IOMMU_OPTION", "iommu_option")
_VFIO_IOAS = Ioctl("IOMMU_VFIO_IOAS", "iommu_vfio_ioas")
_CHANGE_PROCESS = Ioctl("IOMMU_IOAS_CHANGE_PROCESS", "iommu_ioas_change_process")

_RLIMIT_MODE = constant("IOMMU_OPTION_RLIMIT_MODE")
_OP_SET = constant("IOMMU_OPTION_OP_SET")
_OP_GET = constant("IOMMU_OPTION_OP_GET")
_VFIO_GET = constant("IOMMU_VFIO_IOAS_GET")
_VFIO_SET = constant("IOMMU_VFIO_IOAS_SET")
_VFIO_CLEAR = constant("IOMMU_VFIO_IOAS_CLEAR")

_GONE = (
    "With accounting by process, the kernels up to 7.3 answer so when the process that mapped the "
    "memory is gone, as after exec: the memory is this process's now, but stays charged to it. "
    "Hand over by socket while the old process lives, or account by user"
)


class Accounting(enum.Enum):
    """Against whose RLIMIT_MEMLOCK mapped memory counts; nobody's with CAP_IPC_LOCK.

    Source: include/uapi/linux/iommufd.h, IOMMU_OPTION_RLIMIT_MODE
    """

    USER = 0
    """The sum over all processes of a user."""
    PROCESS = 1
    """Each process by itself, as VFIO's containers do."""


class IommuFd(OwnedFd):
    """An open /dev/iommu, and the objects that were made in it.

    Closing it ends all of them, unless another process has the descriptor too. While a VFIO device
    is bound to it they live on in the kernel, and the device goes on doing DMA: the buffers that
    are mapped are kept until the last such device is closed.

    Not locked: use it and its objects from one thread at a time.

    Args:
        path: the device.

    Raises:
        IommuUnavailableError: ENOENT or ENODEV; the kernel offers no iommufd.
        LuoPermissionError: EACCES.

    Source: drivers/iommu/iommufd/main.c, iommufd_fops_open(). Linux 6.2.
    """

    __slots__ = ("_objects",)

    def __init__(self, path: str | os.PathLike[str] = DEVICE) -> None:
        with raising("iommufd open", os.fspath(path)):
            super().__init__(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        self._objects: dict[int, IommuObject] = {}

    @classmethod
    def from_fd(cls, fd: int) -> Self:
        """Takes over an open descriptor of the device, as received from another process.

        What was made in it is unknown here: `Ioas` and the other classes take an iommufd and an
        id, and `IoasLayout.adopt` takes over a whole address space.

        Raises:
            LuoError: EBADF, it is not open; ENODEV, it is not of this device. It stays the
                caller's.
        """
        require_device(fd, "iommu")
        self = cls.__new__(cls)
        OwnedFd.__init__(self, fd)
        self._objects = {}
        return self

    @property
    def objects(self) -> tuple[IommuObject, ...]:
        """What was made in it by this process, or made known to it, in the order of making."""
        return tuple(self._objects.values())

    def register(self, new: IommuObject, object_id: int) -> None:
        """Keeps an object until it is destroyed, or the iommufd is closed."""
        if object_id in self._objects:
            raise ValueError(f"the id {object_id} is of {self._objects[object_id]} already")
        self._objects[object_id] = new

    def fresh(self, object_id: int) -> int:
        """An id that the kernel has just given out: what it was of before is gone.

        As when another process that has the iommufd too destroyed that.
        """
        if object_id in self._objects:
            self._objects[object_id].forget()
        return object_id

    def unregister(self, object_id: int) -> None:
        """Lets go of an object."""
        gone = self._objects.pop(object_id, None)
        if gone is not None and gone.keeps_iommufd and self.closed and not self._bound():
            self._forget_objects()

    def close(self) -> None:
        """Closes it, which ends its objects; a second time does nothing."""
        super().close()
        if not self._bound():
            self._forget_objects()

    def detach(self) -> int:
        """Gives the descriptor up, still open, with all that was made in it.

        Raises:
            UserMappingError: EBUSY, a buffer of this process is mapped by its address, and would be
                free to go while devices write to it.
        """
        if by_address := self._mapped_by_address():
            raise UserMappingError(errno.EBUSY, "detach", by_address)
        fd = super().detach()
        for left in reversed(self.objects):
            left.give_up()
        return fd

    def _bound(self) -> bool:
        """Whether the kernel keeps it for a device, whatever becomes of the descriptor."""
        return any(one.keeps_iommufd for one in self._objects.values())

    def _forget_objects(self) -> None:
        while self._objects:
            _, last = self._objects.popitem()
            last.forget()

    def alloc_ioas(self) -> Ioas:
        """A new I/O address space, with nothing mapped in it.

        Source: include/uapi/linux/iommufd.h, IOMMU_IOAS_ALLOC. Linux 6.2.
        """
        return Ioas(self, self.fresh(_IOAS_ALLOC(self.fileno()).integer("out_ioas_id")))

    def alloc_fault_queue(self) -> FaultQueue:
        """A new queue of I/O page faults, for HWPTs to be made with.

        Source: include/uapi/linux/iommufd.h, IOMMU_FAULT_QUEUE_ALLOC. Linux 6.11.
        """
        reply = _FAULT_QUEUE_ALLOC(self.fileno())
        number = self.fresh(reply.integer("out_fault_id"))
        return FaultQueue(self, number, OwnedFd(reply.integer("out_fault_fd")))

    @property
    def accounting(self) -> Accounting:
        """Against whose limit memory counts that is mapped without CAP_IPC_LOCK.

        Setting it is possible only before the first object is made.

        Raises:
            LuoPermissionError: EPERM, setting it needs CAP_SYS_RESOURCE.
            ObjectInUseError: EBUSY, there are objects already.

        Source: include/uapi/linux/iommufd.h, IOMMU_OPTION_RLIMIT_MODE. Linux 6.2.
        """
        reply = _OPTION(self.fileno(), option_id=_RLIMIT_MODE, op=_OP_GET)
        return Accounting(reply.integer("val64"))

    @accounting.setter
    def accounting(self, mode: Accounting) -> None:
        _OPTION(self.fileno(), f"{mode}", option_id=_RLIMIT_MODE, op=_OP_SET, val64=mode.value)

    def change_process(self) -> None:
        """Makes this process the one whose memory is pinned and counted, for every map.

        For an iommufd that came from another process; DMA goes on meanwhile. Nothing changes if
        it fails.

        Raises:
            UserMappingError: EINVAL, something is mapped by its address in a process; memory that
                is to move is mapped by file.
            LuoError: ENOMEM, this process's RLIMIT_MEMLOCK, or its user's, has no room for it;
                EBUSY, a map or unmap is running: try again; EINVAL, with `Accounting.PROCESS` the
                process that mapped the memory is gone. The kernels up to 7.3 warn then, and have
                moved it all the same, except that this process is charged for ever.

        Source: include/uapi/linux/iommufd.h, IOMMU_IOAS_CHANGE_PROCESS. Linux 6.13.
        """
        before = _locked()
        reply = _CHANGE_PROCESS.attempt(self.fileno())
        # What is refused for a mapping by address is not charged to anybody first.
        if reply.errno == errno.EINVAL and _locked() > before:
            raise LuoError(reply.errno, _CHANGE_PROCESS.name, hint=_GONE)
        if reply.errno:
            raise from_errno(reply.errno, _CHANGE_PROCESS.name, self._mapped_by_address())

    def _mapped_by_address(self) -> str:
        """What is known to be mapped by its address, in words; empty if nothing is."""
        return ", ".join(
            f"{mapping.range} of {ioas}"
            for ioas in self._objects.values()
            if isinstance(ioas, Ioas)
            for mapping in ioas.mappings
            if mapping.file is None
        )

    @property
    def vfio_ioas(self) -> Ioas | None:
        """The IOAS that VFIO's older container interface uses on this descriptor; None: none yet.

        Source: include/uapi/linux/iommufd.h, IOMMU_VFIO_IOAS. Linux 6.2.
        """
        reply = _VFIO_IOAS.attempt(self.fileno(), op=_VFIO_GET)
        if reply.errno == errno.ENODEV:
            return None
        if reply.errno:
            raise from_errno(reply.errno, _VFIO_IOAS.name)
        number = reply.integer("ioas_id")
        known = self._objects.get(number)
        return known if isinstance(known, Ioas) else Ioas(self, number)

    @vfio_ioas.setter
    def vfio_ioas(self, ioas: Ioas) -> None:
        _VFIO_IOAS(self.fileno(), str(ioas), op=_VFIO_SET, ioas_id=ioas.id_in(self))

    @vfio_ioas.deleter
    def vfio_ioas(self) -> None:
        _VFIO_IOAS(self.fileno(), op=_VFIO_CLEAR)


def _locked() -> int:
    """How much memory is locked for this process, in KiB."""
    with raising("open status", "/proc/self/status"), open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmLck:"))
