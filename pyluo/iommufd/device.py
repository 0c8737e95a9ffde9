"""A device that is bound to an iommufd."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyluo._sys import Ioctl, constant
from pyluo.iommufd.bound_device import BoundDevice
from pyluo.iommufd.hw_info import HwCapability, HwInfo, HwInfoType, decode
from pyluo.iommufd.hwpt import HwptFlags, NestedHwpt, PagingHwpt
from pyluo.iommufd.viommu import Vdevice, Viommu

if TYPE_CHECKING:
    from pyluo.iommufd.events import FaultQueue
    from pyluo.iommufd.hwpt import HwptData, RawData
    from pyluo.iommufd.ioas import Ioas
    from pyluo.iommufd.objects import IommuObject
    from pyluo.iommufd.viommu import ViommuType

__all__ = ["IommuDevice"]

_GET_HW_INFO = Ioctl("IOMMU_GET_HW_INFO", "iommu_hw_info")
_HWPT_ALLOC = Ioctl("IOMMU_HWPT_ALLOC", "iommu_hwpt_alloc")
_VIOMMU_ALLOC = Ioctl("IOMMU_VIOMMU_ALLOC", "iommu_viommu_alloc")

_INPUT_TYPE = constant("IOMMU_HW_INFO_FLAG_INPUT_TYPE")
_FAULT_ID_VALID = constant("IOMMU_HWPT_FAULT_ID_VALID")
_NO_DATA = constant("IOMMU_HWPT_DATA_NONE")
_NO_FLAGS = HwptFlags(0)
_USUAL_ROOM = 64  # bytes; the largest format of Linux 7.3 has 40


class IommuDevice(BoundDevice):
    """A device in an iommufd, made by `VfioDevice.bind`; it ends with the VFIO device."""

    def hw_info(self, data_type: int | None = None) -> HwInfo:
        """Return the abilities of the IOMMU that this device is behind.

        Args:
            data_type: the format to ask for, if a driver has several; by default the driver's usual
                one.

        Raises:
            IommuUnsupportedError: the driver has no information of this format (EOPNOTSUPP).
            KernelTooOldError: this kernel cannot be asked for a format (E2BIG).

        Source: include/uapi/linux/iommufd.h, IOMMU_GET_HW_INFO. Linux 6.6; a format since 6.17.
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
            # An older kernel may have a shorter struct; as in ioctls, missing fields are zero.
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
        """Return a new page table of an IOAS, in the format of this device's IOMMU.

        The page table follows when memory is mapped or unmapped in the IOAS later.

        Args:
            ioas: the IOAS whose mappings the device will see.
            flags: what the page table can be used for.
            fault_queue: where page faults of devices attached to it are reported.
            data: the driver's parameters, for a driver that needs some.

        Raises:
            IommuUnsupportedError: the IOMMU cannot do what the flags ask (EOPNOTSUPP).
            LuoError: something is mapped where the device cannot reach (EADDRINUSE); memory is
                short (ENOMEM).

        Source: include/uapi/linux/iommufd.h, IOMMU_HWPT_ALLOC. Linux 6.6; flags since 6.7.
        """
        number = self._alloc_hwpt(ioas, int(flags), fault_queue, data)
        used = () if fault_queue is None else (fault_queue,)
        return PagingHwpt(self.iommufd, number, ioas, *used)

    def alloc_nested_hwpt(
        self,
        parent: PagingHwpt | Viommu,
        data: HwptData,
        *,
        flags: HwptFlags = _NO_FLAGS,
        fault_queue: FaultQueue | None = None,
    ) -> NestedHwpt:
        """Return a guest's page table, nested on one of the host's.

        Args:
            parent: a HWPT allocated with `HwptFlags.NEST_PARENT`, or a vIOMMU made from such a
                HWPT.
            data: where the guest has its page table.
            flags: what the page table can be used for.
            fault_queue: where page faults of devices attached to it are reported.

        Raises:
            IommuUnsupportedError: the IOMMU has no nested page tables of this format (EOPNOTSUPP).
            LuoError: the parent is no nesting parent, or belongs to another IOMMU (EINVAL); the
                driver refused the data (EIO).

        Source: include/uapi/linux/iommufd.h, IOMMU_HWPT_ALLOC. Linux 6.7; with a vIOMMU since 6.13.
        """
        number = self._alloc_hwpt(parent, int(flags), fault_queue, data)
        used = (parent,) if fault_queue is None else (parent, fault_queue)
        return NestedHwpt(self.iommufd, number, *used)

    def alloc_viommu(
        self, kind: ViommuType | int, parent: PagingHwpt, data: RawData | None = None
    ) -> Viommu:
        """Return a new vIOMMU: the part of this device's IOMMU that belongs to one guest.

        Args:
            kind: the type of IOMMU that the guest sees.
            parent: a HWPT allocated with `HwptFlags.NEST_PARENT`.
            data: the driver's parameters; its answer becomes `Viommu.data`.

        Raises:
            IommuUnsupportedError: the IOMMU has no vIOMMU of this type (EOPNOTSUPP).
            LuoError: the parent is no nesting parent (EINVAL).

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
        return Viommu(self.iommufd, number, bytes(answer), parent)

    def forget(self) -> None:
        """Note that the device is gone, and its vdevice with it."""
        for user in self.users:
            if isinstance(user, Vdevice):
                user.forget()
        super().forget()

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
