"""`IommuFd`: an open /dev/iommu."""

from __future__ import annotations

import errno
import os
from typing import Self

from pyluo._sys import constant
from pyluo.descriptor import OwnedFd, require_device
from pyluo.errors import IommuError, IommuUnavailableError, NotPermittedError
from pyluo.iommufd.events import FaultQueue
from pyluo.iommufd.ioas import Ioas
from pyluo.iommufd.objects import IommuContext
from pyluo.iommufd.requests import iommu_ioctl
from pyluo.operation import Operation

__all__ = ["DEVICE", "IommuFd"]

DEVICE = "/dev/iommu"

_OPEN = Operation(
    "open /dev/iommu",
    IommuError,
    {
        errno.ENOENT: IommuUnavailableError,
        errno.ENODEV: IommuUnavailableError,
        errno.ENXIO: IommuUnavailableError,
        errno.EACCES: NotPermittedError,
    },
)
_IOAS_ALLOC = iommu_ioctl("IOMMU_IOAS_ALLOC", "iommu_ioas_alloc")
_FAULT_QUEUE_ALLOC = iommu_ioctl("IOMMU_FAULT_QUEUE_ALLOC", "iommu_fault_alloc")
_VFIO_IOAS = iommu_ioctl("IOMMU_VFIO_IOAS", "iommu_vfio_ioas")

_VFIO_GET = constant("IOMMU_VFIO_IOAS_GET")
_VFIO_SET = constant("IOMMU_VFIO_IOAS_SET")
_VFIO_CLEAR = constant("IOMMU_VFIO_IOAS_CLEAR")


class IommuFd(IommuContext):
    """An open /dev/iommu, with the objects that were created in it.

    Closing the iommufd unmaps the memory that this process mapped by its address, and destroys all
    objects unless something else keeps the iommufd open: see `close`.

    Several threads can use the iommufd and its objects.

    Args:
        path: the path of the device.

    Raises:
        IommuUnavailableError: the kernel offers no iommufd (ENOENT or ENODEV).
        NotPermittedError: the caller may not open the device (EACCES).

    Source: drivers/iommu/iommufd/main.c, iommufd_fops_open(). Linux 6.2.
    """

    __slots__ = ()

    def __init__(self, path: str | os.PathLike[str] = DEVICE) -> None:
        with _OPEN.raising(os.fspath(path)):
            super().__init__(os.open(path, os.O_RDWR | os.O_CLOEXEC))

    @classmethod
    def from_fd(cls, fd: int) -> Self:
        """Return an object that owns an open descriptor of /dev/iommu.

        The new object does not know which iommufd objects another process created in it. To use
        them, construct `Ioas` and the other classes with the iommufd and the object's id, or call
        `IoasLayout.adopt`, which also tells this process about the mappings of an IOAS.

        Raises:
            RequestError: the descriptor is not open (EBADF), or is not of /dev/iommu (ENODEV). The
                caller still owns the descriptor.
        """
        require_device(fd, "iommu")
        self = cls.__new__(cls)
        IommuContext.__init__(self, fd)
        return self

    def alloc_ioas(self) -> Ioas:
        """Allocate and return an I/O address space, in which nothing is mapped.

        Source: include/uapi/linux/iommufd.h, IOMMU_IOAS_ALLOC. Linux 6.2.
        """
        return Ioas(self, self.claim_id(_IOAS_ALLOC(self.fileno()).integer("out_ioas_id")))

    def alloc_fault_queue(self) -> FaultQueue:
        """Allocate and return a queue of I/O page faults, to be given to new HWPTs.

        Source: include/uapi/linux/iommufd.h, IOMMU_FAULT_QUEUE_ALLOC. Linux 6.11.
        """
        reply = _FAULT_QUEUE_ALLOC(self.fileno())
        number = self.claim_id(reply.integer("out_fault_id"))
        return FaultQueue(self, number, OwnedFd(reply.integer("out_fault_fd")))

    @property
    def vfio_ioas(self) -> Ioas | None:
        """The IOAS that VFIO's container interface uses on this descriptor; None if there is none.

        Raises:
            KernelTooOldError: the kernel has no such interface (ENOTTY).
            IommuUnsupportedError: this kernel was built without it (EOPNOTSUPP).

        Source: include/uapi/linux/iommufd.h, IOMMU_VFIO_IOAS. Linux 6.2.
        """
        reply = _VFIO_IOAS.attempt(self.fileno(), op=_VFIO_GET)
        if reply.errno == errno.ENODEV:
            return None
        if reply.errno:
            raise _VFIO_IOAS.error(reply.errno)
        number = reply.integer("ioas_id")
        known = self._objects.get(number)
        return known if isinstance(known, Ioas) else Ioas(self, number)

    @vfio_ioas.setter
    def vfio_ioas(self, ioas: Ioas) -> None:
        _VFIO_IOAS(self.fileno(), str(ioas), op=_VFIO_SET, ioas_id=ioas.id_in(self))

    @vfio_ioas.deleter
    def vfio_ioas(self) -> None:
        _VFIO_IOAS(self.fileno(), op=_VFIO_CLEAR)
