"""Virtual IOMMUs: the parts of an IOMMU that guests use, and the objects in a virtual IOMMU."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from pyluo._sys import Struct, constant
from pyluo.descriptor import OwnedFd
from pyluo.iommufd.events import (
    LARGEST_EVENT,
    VirtualEventQueue,
    VirtualEventType,
    event_size,
)
from pyluo.iommufd.hwpt import invalidate
from pyluo.iommufd.objects import IommuObject
from pyluo.iommufd.requests import iommu_ioctl
from pyluo.registers import MappedRegisters

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyluo.iommufd.bound_device import BoundDevice
    from pyluo.iommufd.hwpt import Invalidation
    from pyluo.iommufd.iova import IovaRange
    from pyluo.iommufd.objects import IommuContext

__all__ = ["HwQueue", "HwQueueType", "Vdevice", "Viommu", "ViommuMapping", "ViommuType"]

_VDEVICE_ALLOC = iommu_ioctl("IOMMU_VDEVICE_ALLOC", "iommu_vdevice_alloc")
_VEVENTQ_ALLOC = iommu_ioctl("IOMMU_VEVENTQ_ALLOC", "iommu_veventq_alloc")
_HW_QUEUE_ALLOC = iommu_ioctl("IOMMU_HW_QUEUE_ALLOC", "iommu_hw_queue_alloc")
_TEGRA241 = Struct("iommu_viommu_tegra241_cmdqv")


class ViommuType(enum.IntEnum):
    """The type of IOMMU that a guest sees.

    Source: include/uapi/linux/iommufd.h, enum iommu_viommu_type
    """

    ARM_SMMUV3 = constant("IOMMU_VIOMMU_TYPE_ARM_SMMUV3")
    """Linux 6.13."""
    TEGRA241_CMDQV = constant("IOMMU_VIOMMU_TYPE_TEGRA241_CMDQV")
    """Linux 6.17."""


class HwQueueType(enum.IntEnum):
    """The type of a queue that the hardware reads directly from a guest's memory.

    Source: include/uapi/linux/iommufd.h, enum iommu_hw_queue_type
    """

    TEGRA241_CMDQV = constant("IOMMU_HW_QUEUE_TYPE_TEGRA241_CMDQV")
    """A virtual command queue of a Tegra241. Linux 6.17."""


class Vdevice(IommuObject):
    """The connection between a device and the number by which a guest's vIOMMU knows it.

    The kernel destroys a vdevice together with its device, which only the vdevice's id outlives: a
    later `destroy` frees it. Before Linux 6.17, the vdevice must be destroyed before the device.

    Attributes:
        virtual_id: the device's number in the guest: a stream id or a requester id.
    """

    noun = "vdevice"

    def __init__(self, iommufd: IommuContext, object_id: int, virtual_id: int) -> None:
        super().__init__(iommufd, object_id)
        self.virtual_id = virtual_id


class HwQueue(IommuObject):
    """A queue in a guest's memory that the hardware reads directly.

    The memory of the queue cannot be unmapped until the queue is destroyed.
    """

    noun = "hardware queue"


class ViommuMapping(MappedRegisters):
    """Registers of a vIOMMU, which are mapped into this process.

    The vIOMMU cannot be destroyed until the mapping is closed. Closing the iommufd closes it.
    """

    __slots__ = ()


class Viommu(IommuObject):
    """A virtual IOMMU: the part of an IOMMU that one guest uses.

    `IommuDevice.alloc_viommu` creates one. Linux 6.13.

    Attributes:
        data: the driver's answer to the data that was given to `alloc_viommu`.
    """

    noun = "vIOMMU"

    def __init__(self, iommufd: IommuContext, object_id: int, data: bytes) -> None:
        super().__init__(iommufd, object_id)
        self.data = data

    @property
    def tegra241_region(self) -> tuple[int, int]:
        """The offset and the length in bytes of the registers of a Tegra241's vIOMMU, for `map`.

        Raises:
            ValueError: the vIOMMU has no such `data`.

        Source: include/uapi/linux/iommufd.h, struct iommu_viommu_tegra241_cmdqv. Linux 6.17.
        """
        raw = _TEGRA241.unpack(self.data)
        return raw.integer("out_vintf_mmap_offset"), raw.integer("out_vintf_mmap_length")

    def map(self, offset: int, length: int) -> ViommuMapping:
        """Map registers of the vIOMMU, which a guest may access directly.

        Args:
            offset: the offset in the iommufd that the driver returned in `data`.
            length: the length in bytes that it returned there.

        Raises:
            IommuError: there are no registers of this length at the offset (ENXIO).
            ValueError: the offset is not that of a page.

        Source: drivers/iommu/iommufd/main.c, iommufd_fops_mmap(). Linux 6.17.
        """
        subject = f"{self}: {length} bytes at {offset:#x}"
        fd = self.iommufd.fileno()
        mapping = ViommuMapping(fd, offset, length, writable=True, subject=subject)
        self.iommufd.add_mapping(mapping)
        return mapping

    def alloc_vdevice(self, device: BoundDevice, virtual_id: int) -> Vdevice:
        """Allocate and return a vdevice, which gives a device its number in the guest.

        Args:
            device: a device behind the same IOMMU.
            virtual_id: the number, which must be unique in this vIOMMU.

        Raises:
            IommuError: the device or the number has a vdevice already (EEXIST); the device is
                behind another IOMMU (EINVAL).

        Source: include/uapi/linux/iommufd.h, IOMMU_VDEVICE_ALLOC. Linux 6.13.
        """
        reply = _VDEVICE_ALLOC(
            self.iommufd.fileno(),
            f"{self}, {device}",
            viommu_id=self.id,
            dev_id=device.id_in(self.iommufd),
            virt_id=virtual_id,
        )
        number = self.iommufd.claim_id(reply.integer("out_vdevice_id"))
        return Vdevice(self.iommufd, number, virtual_id)

    def alloc_event_queue(
        self, kind: VirtualEventType | int, depth: int, *, size: int = 0
    ) -> VirtualEventQueue:
        """Allocate and return a queue of events, which are to be forwarded to the guest.

        Args:
            kind: the format of the events; a vIOMMU has at most one queue of each format.
            depth: the number of events that the queue can hold; further events are lost but
                counted.
            size: the size of an event in bytes, for a format that pyluo does not know.

        Raises:
            ValueError: pyluo does not know the format, and no size is given; or the size is not one
                of an event.
            IommuUnsupportedError: the vIOMMU has no events of this format (EOPNOTSUPP).
            IommuError: the vIOMMU has a queue of this format (EEXIST); the depth is 0 (EINVAL).

        Source: include/uapi/linux/iommufd.h, IOMMU_VEVENTQ_ALLOC. Linux 6.15.
        """
        size = size or event_size(kind)
        if not 0 < size <= LARGEST_EVENT:
            raise ValueError(f"{size} is not the size of events of type {kind:#x}: give `size`")
        reply = _VEVENTQ_ALLOC(
            self.iommufd.fileno(),
            str(self),
            viommu_id=self.id,
            type=int(kind),
            veventq_depth=depth,
        )
        file = OwnedFd(reply.integer("out_veventq_fd"))
        number = self.iommufd.claim_id(reply.integer("out_veventq_id"))
        return VirtualEventQueue(self.iommufd, number, file, size, next_sequence=0)

    def alloc_hw_queue(self, kind: HwQueueType | int, index: int, where: IovaRange) -> HwQueue:
        """Allocate and return a queue in the guest's memory, which the hardware reads directly.

        Args:
            kind: the type of the queue.
            index: the queue's index among the vIOMMU's queues of this type.
            where: the memory of the queue, in the address space of the parent HWPT. It cannot be
                unmapped while the queue exists.

        Raises:
            IommuUnsupportedError: the vIOMMU has no queues of this type (EOPNOTSUPP).
            IommuError: the memory is not mapped (ENOENT), or not contiguous in physical memory
                (EFAULT); there is a queue of this index already (EEXIST); the driver refused the
                queue (EINVAL); the queues of lower indexes must be allocated first (EIO).

        Source: include/uapi/linux/iommufd.h, IOMMU_HW_QUEUE_ALLOC. Linux 6.17.
        """
        reply = _HW_QUEUE_ALLOC(
            self.iommufd.fileno(),
            f"{self}, queue {index} at {where}",
            viommu_id=self.id,
            type=int(kind),
            index=index,
            nesting_parent_iova=where.start,
            length=where.last - where.start + 1,
        )
        return HwQueue(self.iommufd, self.iommufd.claim_id(reply.integer("out_hw_queue_id")))

    def invalidate(self, entries: Sequence[Invalidation]) -> int:
        """Invalidate caches of the IOMMU or its devices; see `hwpt.invalidate`. Linux 6.13."""
        return invalidate(self, entries)
