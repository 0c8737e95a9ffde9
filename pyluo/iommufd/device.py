"""`IommuDevice`: a device that is bound to an iommufd."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from pyluo._sys import constant
from pyluo.iommufd.bound_device import BoundDevice
from pyluo.iommufd.hw_info import HwCapability, HwInfo, HwInfoType, decode
from pyluo.iommufd.hwpt import HwptFlags, NestedHwpt, PagingHwpt
from pyluo.iommufd.requests import iommu_ioctl
from pyluo.iommufd.viommu import Viommu

if TYPE_CHECKING:
    from pyluo.iommufd.events import FaultQueue
    from pyluo.iommufd.hwpt import HwptData, RawData
    from pyluo.iommufd.ioas import Ioas
    from pyluo.iommufd.objects import IommuObject
    from pyluo.iommufd.viommu import ViommuType

__all__ = ["IommuDevice"]

_GET_HW_INFO = iommu_ioctl("IOMMU_GET_HW_INFO", "iommu_hw_info")
_HWPT_ALLOC = iommu_ioctl(
    "IOMMU_HWPT_ALLOC",
    "iommu_hwpt_alloc",
    {
        errno.EADDRINUSE: "A mapping or an allowed range lies where this device cannot reach",
    },
)
_VIOMMU_ALLOC = iommu_ioctl("IOMMU_VIOMMU_ALLOC", "iommu_viommu_alloc")

_INPUT_TYPE = constant("IOMMU_HW_INFO_FLAG_INPUT_TYPE")
_FAULT_ID_VALID = constant("IOMMU_HWPT_FAULT_ID_VALID")
_NO_DATA = constant("IOMMU_HWPT_DATA_NONE")
_NO_FLAGS = HwptFlags(0)
_USUAL_ROOM = 64  # bytes; the largest format of Linux 7.3 has 40 bytes


class IommuDevice(BoundDevice):
    """A device in an iommufd, created by `VfioDevice.bind` and destroyed with the VFIO device."""

    def hw_info(self, data_type: int | None = None) -> HwInfo:
        """Return the capabilities of the IOMMU that this device is behind.

        Args:
            data_type: the format of the driver's information, for drivers with several formats; by
                default the driver chooses.

        Raises:
            IommuUnsupportedError: the driver has no information in this format (EOPNOTSUPP).
            KernelTooOldError: this kernel does not support `data_type` (E2BIG).

        Source: include/uapi/linux/iommufd.h, IOMMU_GET_HW_INFO. Linux 6.6; `data_type` since 6.17.
        """
        room = _USUAL_ROOM
        asked = {} if data_type is None else {"flags": _INPUT_TYPE, "in_data_type": data_type}
        while True:
            data = bytearray(room)
            reply = _GET_HW_INFO(
                self.iommufd.fileno(),
                str(self),
                dev_id=self.id,
                data_len=room,
                data_uptr=data,
                **asked,
            )
            length = reply.integer("data_len")
            if length <= room:
                break
            room = length
        number = reply.integer("out_data_type")
        known = {int(one): one for one in HwInfoType}
        return HwInfo(
            data_type=known.get(number, number),
            capabilities=HwCapability(reply.integer("out_capabilities")),
            pasid_bits=reply.integer("out_max_pasid_log2"),
            data=bytes(data[:length]),
            # The struct of an older kernel may be shorter; as in ioctls, missing fields are zero.
            driver=decode(number, bytes(data)),
        )

    def alloc_hwpt(
        self,
        ioas: Ioas,
        *,
        flags: HwptFlags = _NO_FLAGS,
        fault_queue: FaultQueue | None = None,
        data: HwptData | None = None,
    ) -> PagingHwpt:
        """Allocate and return a page table for an IOAS, in the format of this device's IOMMU.

        The kernel updates the page table whenever memory is mapped or unmapped in the IOAS.

        Args:
            ioas: the IOAS whose mappings the page table contains.
            flags: the uses that the page table must support.
            fault_queue: the queue for page faults of devices that are attached to the page table.
            data: parameters for the driver; most drivers need none.

        Raises:
            IommuUnsupportedError: the IOMMU does not support a flag (EOPNOTSUPP).
            IommuError: memory is mapped at an address that the device cannot reach (EADDRINUSE);
                there is too little memory (ENOMEM).

        Source: include/uapi/linux/iommufd.h, IOMMU_HWPT_ALLOC. Linux 6.6; flags since 6.7.
        """
        number = self._alloc_hwpt(ioas, int(flags), fault_queue, data)
        hwpt = PagingHwpt(self.iommufd, number, ioas)
        if fault_queue is not None:
            fault_queue.serve(hwpt)
        return hwpt

    def alloc_nested_hwpt(
        self,
        parent: PagingHwpt | Viommu,
        data: HwptData,
        *,
        flags: HwptFlags = _NO_FLAGS,
        fault_queue: FaultQueue | None = None,
    ) -> NestedHwpt:
        """Allocate and return an HWPT for a page table of a guest, nested on a parent HWPT.

        Args:
            parent: a HWPT that was allocated with `HwptFlags.NEST_PARENT`, or a vIOMMU that was
                created from such a HWPT.
            data: the address and format of the guest's page table.
            flags: the uses that the page table must support.
            fault_queue: the queue for page faults of devices that are attached to the page table.

        Raises:
            IommuUnsupportedError: the IOMMU has no nested page tables of this format (EOPNOTSUPP).
            IommuError: the parent was not allocated as a parent, or belongs to another IOMMU
                (EINVAL); the driver refused the data (EIO).

        Source: include/uapi/linux/iommufd.h, IOMMU_HWPT_ALLOC. Linux 6.7; with a vIOMMU since 6.13.
        """
        hwpt = NestedHwpt(self.iommufd, self._alloc_hwpt(parent, int(flags), fault_queue, data))
        if fault_queue is not None:
            fault_queue.serve(hwpt)
        return hwpt

    def alloc_viommu(
        self, kind: ViommuType | int, parent: PagingHwpt, data: RawData | None = None
    ) -> Viommu:
        """Allocate and return a vIOMMU: the part of this device's IOMMU that one guest uses.

        Args:
            kind: the type of IOMMU that the guest sees.
            parent: a HWPT that was allocated with `HwptFlags.NEST_PARENT`.
            data: parameters for the driver; `Viommu.data` has the driver's answer.

        Raises:
            IommuUnsupportedError: the IOMMU has no vIOMMU of this type (EOPNOTSUPP).
            IommuError: the parent was not allocated as a parent (EINVAL).

        Source: include/uapi/linux/iommufd.h, IOMMU_VIOMMU_ALLOC. Linux 6.13; data since 6.17.
        """
        answer = bytearray(data.data if data else b"")
        reply = _VIOMMU_ALLOC(
            self.iommufd.fileno(),
            f"{self}, {parent}",
            type=int(kind),
            dev_id=self.id,
            hwpt_id=parent.id_in(self.iommufd),
            data_len=len(answer),
            data_uptr=answer or 0,
        )
        number = self.iommufd.claim_id(reply.integer("out_viommu_id"))
        return Viommu(self.iommufd, number, bytes(answer))

    def _alloc_hwpt(
        self,
        below: IommuObject,
        flags: int,
        fault_queue: FaultQueue | None,
        data: HwptData | None,
    ) -> int:
        packed = data.pack() if data else b""
        reply = _HWPT_ALLOC(
            self.iommufd.fileno(),
            f"{self}, {below}",
            flags=flags | (_FAULT_ID_VALID if fault_queue else 0),
            dev_id=self.id,
            pt_id=below.id_in(self.iommufd),
            data_type=data.data_type if data else _NO_DATA,
            data_len=len(packed),
            data_uptr=packed or 0,
            fault_id=fault_queue.id_in(self.iommufd) if fault_queue else 0,
        )
        return self.iommufd.claim_id(reply.integer("out_hwpt_id"))
