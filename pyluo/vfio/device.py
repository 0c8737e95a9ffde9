"""`VfioDevice`: a device that userspace drives through VFIO."""

from __future__ import annotations

import errno
import os
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Self

from pyluo._sys import Ioctl, constant
from pyluo.descriptor import OwnedFd
from pyluo.errors import DeviceInUseError, NotPermittedError, RequestError, VfioError
from pyluo.exclusive import Exclusive, exclusively
from pyluo.iommufd.device import IommuDevice
from pyluo.iommufd.iova import IovaRange
from pyluo.operation import Operation, raising
from pyluo.vfio import reset
from pyluo.vfio.bus import PciDevice, find_users
from pyluo.vfio.config import ConfigSpace
from pyluo.vfio.dma_logging import DmaLogging
from pyluo.vfio.features import Features
from pyluo.vfio.info import DeviceInfo, IrqFlags, IrqInfo, PciIrq, PciRegion, RegionInfo
from pyluo.vfio.irqs import Irq
from pyluo.vfio.low_power import LowPower
from pyluo.vfio.migration import Migration
from pyluo.vfio.regions import Region
from pyluo.vfio.requests import request, request_info

if TYPE_CHECKING:
    from collections.abc import Mapping
    from uuid import UUID

    from pyluo.iommufd.objects import IommuContext, IommuObject
    from pyluo.vfio.regions import RegionMapping
    from pyluo.vfio.reset import HotResetInfo

__all__ = ["VfioDevice"]

_OPEN = Operation(
    "open VFIO device",
    VfioError,
    {
        errno.EACCES: NotPermittedError,
        errno.EPERM: NotPermittedError,
        errno.ENOENT: (
            "There is no such node: the device is bound to no VFIO driver "
            "(`PciDevice.bind_driver`), or the kernel lacks CONFIG_VFIO_DEVICE_CDEV "
            "(Linux 6.6 or newer)"
        ),
        errno.ENODEV: "The device is being unbound from its VFIO driver",
    },
)
_FROM_FD = Operation("from_fd", VfioError)
_RESERVED_REGIONS = Operation("read reserved_regions", VfioError)
_BIND = Ioctl(
    "VFIO_DEVICE_BIND_IOMMUFD",
    "vfio_device_bind_iommufd",
    VfioError,
    {
        errno.EBUSY: DeviceInUseError,
        errno.EPERM: (
            "Another device of the same IOMMU group is in use by a host driver or bound "
            "to another iommufd (see `PciDevice.group_devices`); or the IOMMU does not "
            "remap interrupts: boot with intremap=on, or set iommufd's parameter "
            "allow_unsafe_interrupts"
        ),
        errno.EACCES: (
            NotPermittedError,
            "The device is a virtual function, or has virtual functions in use: pass their token",
        ),
        errno.EAGAIN: "The device is locked for a moment: try again",
    },
    size="argsz",
)
_ATTACH = Ioctl(
    "VFIO_DEVICE_ATTACH_IOMMUFD_PT",
    "vfio_device_attach_iommufd_pt",
    VfioError,
    {
        errno.EINVAL: (
            "The page table does not suit the device's IOMMU, or other devices of the "
            "same IOMMU group are attached to another page table"
        ),
        errno.EADDRINUSE: "A mapping or an allowed range lies where this device cannot reach",
        errno.EBUSY: "The device is being reset: try again",
        errno.ENOENT: "The iommufd that the device is bound to has no such object",
        errno.EOPNOTSUPP: "The device's VFIO driver does not support PASIDs",
    },
    size="argsz",
)
_DETACH = Ioctl(
    "VFIO_DEVICE_DETACH_IOMMUFD_PT", "vfio_device_detach_iommufd_pt", VfioError, size="argsz"
)
_GET_INFO = Ioctl(
    "VFIO_DEVICE_GET_INFO",
    "vfio_device_info",
    VfioError,
    {
        errno.EINVAL: "Call `VfioDevice.bind` first",
    },
    size="argsz",
)
_GET_REGION_INFO = Ioctl(
    "VFIO_DEVICE_GET_REGION_INFO",
    "vfio_region_info",
    VfioError,
    {
        errno.EINVAL: "The device has no region of this index",
    },
    size="argsz",
)
_GET_IRQ_INFO = Ioctl(
    "VFIO_DEVICE_GET_IRQ_INFO",
    "vfio_irq_info",
    VfioError,
    {
        errno.EINVAL: "The device has no interrupts of this index",
    },
    size="argsz",
)

_TOKEN = constant("VFIO_DEVICE_BIND_FLAG_TOKEN")
_ATTACH_PASID = constant("VFIO_DEVICE_ATTACH_PASID")
_DETACH_PASID = constant("VFIO_DEVICE_DETACH_PASID")
_TOKEN_HINT = (
    "The device or the kernel (before Linux 6.17) takes no token, or the device is bound through "
    "another open file"
)
# All devices whose iommufd is known: attaching one of them moves the others of its IOMMU group.
_devices_with_iommufd: weakref.WeakSet[VfioDevice] = weakref.WeakSet()
_DIRECT = "direct"  # a range that the firmware requires to be mapped one to one, always
_RELAXABLE = "direct-relaxable"  # a range that is reserved only while a host driver has the device


class VfioDevice(OwnedFd):
    """A device that userspace drives through VFIO.

    First `open` the device, then `bind` it to an iommufd and `attach` it to an IOAS or a HWPT.
    After that its regions, interrupts and DMA can be used. Closing the device closes its mappings
    and, unless another process has the descriptor too, detaches it, resets it and destroys its
    `IommuDevice`.

    A lock lets one thread at a time bind, attach, detach or close the device. There is none for the
    objects that it returns: use each of them from one thread at a time.

    Attributes:
        may_sleep: whether `low_power.enter` was called, and `low_power.exit` was not called since.

    Source: drivers/vfio/device_cdev.c. Linux 6.6.
    """

    __slots__ = (
        "_attached",
        "_bound",
        "_config_info",
        "_exclusive",
        "_iommu_device",
        "_mappings",
        "_name",
        "may_sleep",
    )

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self._name = _device_name(fd)
        self._exclusive = Exclusive(str(self))
        self._config_info: RegionInfo | None = None
        self._bound = False
        self._iommu_device: IommuDevice | None = None
        self._attached: dict[int | None, IommuObject] = {}
        self._mappings: weakref.WeakSet[RegionMapping] = weakref.WeakSet()
        self.may_sleep: bool = False

    @classmethod
    def open(cls, device: PciDevice | str | os.PathLike[str]) -> Self:
        """Open a device; call `bind` before any other request.

        Args:
            device: a PCI device that is bound to a VFIO driver; or the path of a character device,
                such as ``/dev/vfio/devices/vfio0``.

        Raises:
            NotPermittedError: the caller may not open the character device (EACCES); the device is
                not behind an IOMMU, and the caller lacks CAP_SYS_RAWIO (EPERM).
            VfioError: the device is not bound to a VFIO driver, or is being unbound (ENODEV); the
                character device does not exist (ENOENT).
        """
        path = device.node if isinstance(device, PciDevice) else os.fspath(device)
        with _OPEN.raising(path):
            return cls(os.open(path, os.O_RDWR | os.O_CLOEXEC))

    @classmethod
    def from_fd(cls, fd: int) -> Self:
        """Return an object that owns the open descriptor of a VFIO device.

        If another process has bound the device, call `adopt` next.

        Raises:
            RequestError: the descriptor is not open (EBADF), or does not refer to a VFIO device
                (ENODEV). The caller still owns the descriptor.

        Source: include/uapi/linux/vfio.h, VFIO_DEVICE_GET_INFO. Linux 6.6.
        """
        with raising("fstat", f"descriptor {fd}"):
            os.fstat(fd)
        if _find_sysfs_folder(fd) is None:
            raise _FROM_FD.error(errno.ENODEV, f"descriptor {fd}")
        self = cls(fd)
        try:
            reply = _GET_INFO.attempt(fd)
            if reply.errno not in (0, errno.EINVAL):
                raise _GET_INFO.error(reply.errno, str(self))
        except BaseException:
            self._fd = -1
            raise
        self._bound = not reply.errno
        return self

    @exclusively
    def adopt(
        self,
        iommufd: IommuContext,
        object_id: int,
        *,
        attached: IommuObject | None,
        pasids: Mapping[int, IommuObject] | None = None,
    ) -> IommuDevice:
        """Record to which objects another process bound and attached the device.

        The kernel is not asked.

        Args:
            iommufd: the iommufd that the device is bound to.
            object_id: the `IommuDevice.id` of the device in the other process.
            attached: the IOAS or HWPT that the device is attached to; None if it is not attached.
            pasids: for each attached PASID, the IOAS or HWPT that it is attached to.

        Returns:
            The device as the iommufd knows it.

        Raises:
            ValueError: the device is not bound; or its iommufd is already known.
        """
        if not self._bound or self._iommu_device is not None:
            state = "its iommufd is known already" if self._bound else "it is not bound"
            raise ValueError(f"{self} cannot be adopted: {state}")
        iommu_device = IommuDevice(iommufd, object_id)
        self._set_iommu_device(iommu_device)
        for pasid, target in (pasids or {}).items():
            self._note_attached(pasid, target)
        if attached is not None:
            self._note_attached(None, attached)
        return iommu_device

    @property
    def name(self) -> str:
        """The address of the device if it is a PCI device; otherwise its name in sysfs."""
        return self._name

    @property
    def pci(self) -> PciDevice | None:
        """The PCI device; None if the device is not on a PCI bus."""
        with suppress(ValueError, FileNotFoundError):
            return PciDevice.at(self._name)
        return None

    @property
    def bound(self) -> bool:
        """Whether the device is bound to an iommufd, by this process or another."""
        return self._bound

    @property
    def iommu_device(self) -> IommuDevice:
        """The device as its iommufd knows it.

        Raises:
            VfioError: neither `bind` nor `adopt` was called (EINVAL).
        """
        if self._iommu_device is None:
            hint = "`adopt` tells what another process bound it to" if self._bound else ""
            raise VfioError(errno.EINVAL, "iommu_device", str(self), hint)
        return self._iommu_device

    @exclusively
    def bind(self, iommufd: IommuContext, *, token: UUID | None = None) -> IommuDevice:
        """Bind the device to an iommufd, until the device is closed, and reset the device.

        Afterwards the device can be used, but its DMA is blocked until `attach` and
        `ConfigSpace.set_bus_master` are called.

        Args:
            iommufd: the iommufd.
            token: for a virtual function, the secret that was set for its physical function;
                Linux 6.17.

        Returns:
            The device as the iommufd knows it, until the device is closed.

        Raises:
            DeviceInUseError: the device is bound already, or open elsewhere (EINVAL or EBUSY).
            NotPermittedError: another iommufd has a device of the same IOMMU group, or the
                device's interrupts cannot be isolated (EPERM); the token is missing or wrong
                (EACCES).
            VfioError: the device is locked at the moment: try again (EAGAIN); `iommufd` is not an
                iommufd (EBADFD); the firmware requires one-to-one mappings for the device, or the
                IOMMU is not coherent with the caches (EINVAL); with a token: the device accepts no
                token, or is bound through another descriptor (EINVAL).

        Source: include/uapi/linux/vfio.h, VFIO_DEVICE_BIND_IOMMUFD. Linux 6.6.
        """
        if self._bound:
            hint = "It is bound already, by this descriptor: a device is bound once"
            raise DeviceInUseError(errno.EINVAL, _BIND.name, str(self), hint)
        secret: dict[str, int | bytes] = {}
        if token is not None:
            secret = {"flags": _TOKEN, "token_uuid_ptr": token.bytes}
        reply = _BIND.attempt(self.fileno(), iommufd=iommufd.fileno(), **secret)
        if reply.errno == errno.EINVAL and secret:
            raise VfioError(errno.EINVAL, _BIND.name, f"{self}, with a token", _TOKEN_HINT)
        if reply.errno == errno.EINVAL:
            raise self._explain_refusal()
        if reply.errno:
            raise _BIND.error(reply.errno, str(self))
        self._bound = True
        iommu_device = IommuDevice(iommufd, iommufd.claim_id(reply.integer("out_devid")))
        self._set_iommu_device(iommu_device)
        return iommu_device

    def _explain_refusal(self) -> RequestError:
        """Return the exception for EINVAL, by which the kernel refuses to bind for three reasons.

        Source: drivers/vfio/device_cdev.c, vfio_df_ioctl_bind_iommufd(); drivers/iommu/iommu.c,
        iommu_claim_dma_owner(); drivers/iommu/iommufd/device.c, iommufd_device_bind()
        """
        with suppress(RequestError):
            fixed = [where for where, kind in self._read_reserved_regions() if kind == _DIRECT]
            if fixed:
                return VfioError(
                    errno.EINVAL,
                    _BIND.name,
                    str(self),
                    f"The firmware requires one-to-one mappings for it, at "
                    f"{', '.join(map(str, fixed))}: no process can have it",
                )
        number = os.fstat(self.fileno()).st_rdev
        if users := find_users(number, besides=self.fileno()):
            hint = f"Another open file has it, in {', '.join(users)}"
            return DeviceInUseError(errno.EINVAL, _BIND.name, str(self), hint)
        return VfioError(
            errno.EINVAL,
            _BIND.name,
            str(self),
            "The IOMMU is not coherent with the CPUs' caches; or the device is open in a process "
            "that this one may not inspect",
        )

    @exclusively
    def attach(self, target: IommuObject, *, pasid: int | None = None) -> int:
        """Attach the device to a page table, in place of one that it is already attached to.

        If the IOMMU supports it, DMA continues while one page table replaces another. All attached
        devices of the same IOMMU group move together. If the call fails, nothing has changed.
        `detach_pt` detaches the device.

        Args:
            target: a `PagingHwpt` or a `NestedHwpt`; or an `Ioas`, for which the kernel chooses or
                allocates a page table.
            pasid: the PASID whose DMA is attached; by default DMA without a PASID is attached.

        Returns:
            The id of the page table in the iommufd.

        Raises:
            VfioError: the device is not bound (EINVAL); the page table does not suit the device's
                IOMMU, or devices of the same group are attached to another one (EINVAL); memory is
                mapped at an address that the device cannot reach (EADDRINUSE); the device is being
                reset (EBUSY); the target no longer exists (ENOENT); the device does not support
                PASIDs (EOPNOTSUPP).
            ValueError: the target and the device are in different iommufds.

        Source: include/uapi/linux/vfio.h, VFIO_DEVICE_ATTACH_IOMMUFD_PT. Linux 6.6; `pasid` since
            6.15.
        """
        flags, number = (0, 0) if pasid is None else (_ATTACH_PASID, pasid)
        detail = f"{target}{_pasid_suffix(pasid)}"
        pt_id = target.id_in(self.iommu_device.iommufd)
        reply = request(self, _ATTACH, detail, flags=flags, pt_id=pt_id, pasid=number)
        self._note_attached(pasid, target)
        if pasid is None:
            self._note_group_moved(target)
        return reply.integer("pt_id")

    @exclusively
    def detach_pt(self, *, pasid: int | None = None) -> None:
        """Detach the device from its page table, which blocks its DMA.

        A device that is not attached stays unchanged. (`detach` has nothing to do with page tables:
        in every class that owns a descriptor, it gives up the descriptor.)

        Args:
            pasid: see `attach`.

        Raises:
            VfioError: the device is not bound (EINVAL).

        Source: include/uapi/linux/vfio.h, VFIO_DEVICE_DETACH_IOMMUFD_PT. Linux 6.6.
        """
        flags, number = (0, 0) if pasid is None else (_DETACH_PASID, pasid)
        request(self, _DETACH, f"page table{_pasid_suffix(pasid)}", flags=flags, pasid=number)
        self._note_attached(pasid, None)

    @property
    def attached(self) -> IommuObject | None:
        """The IOAS or HWPT that the device is attached to, if this process knows it."""
        return self._attached.get(None)

    @property
    def pasids(self) -> dict[int, IommuObject]:
        """The IOAS or HWPT that each PASID is attached to, if this process knows it."""
        return {pasid: to for pasid, to in self._attached.items() if pasid is not None}

    @property
    def group(self) -> str:
        """The number of the device's IOMMU group, as text; empty if it has none."""
        return self._read_link_name("iommu_group")

    @property
    def iommu(self) -> str:
        """The sysfs name of the IOMMU that the device is behind; empty if there is none."""
        return self._read_link_name("iommu")

    def _read_link_name(self, link: str) -> str:
        path = f"{_find_sysfs_folder(self.fileno())}/{link}"
        return os.path.basename(os.path.realpath(path)) if os.path.exists(path) else ""

    def reserved_iovas(self) -> tuple[IovaRange, ...]:
        """Return the ranges of IOVAs that are reserved, so that memory cannot be mapped there.

        Raises:
            VfioError: the device is not behind an IOMMU (ENOENT).

        Source: Documentation/ABI/testing/sysfs-kernel-iommu_groups
        """
        return tuple(where for where, kind in self._read_reserved_regions() if kind != _RELAXABLE)

    def _read_reserved_regions(self) -> list[tuple[IovaRange, str]]:
        path = f"{_find_sysfs_folder(self.fileno())}/iommu_group/reserved_regions"
        with _RESERVED_REGIONS.raising(path), open(path) as file:
            lines = [line.split() for line in file]
        return [(IovaRange(int(first, 16), int(last, 16)), kind) for first, last, kind in lines]

    def info(self) -> DeviceInfo:
        """Return the device's description of itself.

        Raises:
            VfioError: the device is not bound (EINVAL).

        Source: include/uapi/linux/vfio.h, VFIO_DEVICE_GET_INFO. Linux 3.6.
        """
        return DeviceInfo.parse(request_info(self, _GET_INFO))

    def region(self, index: int) -> Region:
        """Return one of the device's regions.

        Args:
            index: the index of the region; for PCI devices see `PciRegion`.

        Raises:
            VfioError: the device is not bound (EINVAL); the device has no region of this index
                (EINVAL).

        Source: include/uapi/linux/vfio.h, VFIO_DEVICE_GET_REGION_INFO. Linux 3.6.
        """
        return Region(self, self._region_info(index))

    def regions(self) -> tuple[Region, ...]:
        """Return all regions that are not empty, in the order of their indexes."""
        found = []
        for index in range(self.info().regions):
            try:
                info = self._region_info(index)
            except RequestError as error:
                # The kernel refuses the index VGA for a device that is not a VGA controller.
                if index != PciRegion.VGA or error.errno != errno.EINVAL:
                    raise
                continue
            if info.size:
                found.append(Region(self, info))
        return tuple(found)

    @property
    def config(self) -> ConfigSpace:
        """The configuration space of a PCI device.

        Raises:
            VfioError: the device is not bound (EINVAL).
        """
        if self._config_info is None:
            self._config_info = self._region_info(PciRegion.CONFIG)  # it never changes
        return ConfigSpace(self, self._config_info)

    def irq(self, index: int) -> Irq:
        """Return the device's interrupts of one type.

        Args:
            index: the type; for PCI devices see `PciIrq`.

        Raises:
            VfioError: the device is not bound (EINVAL); the device has no interrupts of this type
                (EINVAL).

        Source: include/uapi/linux/vfio.h, VFIO_DEVICE_GET_IRQ_INFO. Linux 3.6.
        """
        reply = request(self, _GET_IRQ_INFO, f"interrupt {index}", index=index)
        return Irq(self, IrqInfo(index, IrqFlags(reply.integer("flags")), reply.integer("count")))

    def irqs(self) -> tuple[Irq, ...]:
        """Return the interrupts of every type that the device has."""
        found = []
        for index in range(self.info().irqs):
            try:
                irq = self.irq(index)
            except RequestError as error:
                # Before Linux 7.3 the kernel refused the index ERROR for devices that are not PCIe.
                if index != PciIrq.ERROR or error.errno != errno.EINVAL:
                    raise
                continue
            if irq.info.count:
                found.append(irq)
        return tuple(found)

    @property
    def features(self) -> Features:
        """Access to the device's optional features."""
        return Features(self)

    @property
    def migration(self) -> Migration:
        """Access to the device's internal state, to save and restore it."""
        return Migration(self)

    @property
    def dma_logging(self) -> DmaLogging:
        """Access to the device's own log of the memory that it wrote to."""
        return DmaLogging(self)

    @property
    def low_power(self) -> LowPower:
        """Control over whether the device may sleep."""
        return LowPower(self)

    def reset(self) -> None:
        """Reset this PCI function alone; its registers lose their contents.

        Interrupts stay enabled.

        Raises:
            VfioError: the device is not bound (EINVAL); the device does not support this reset: see
                `DeviceFlags.RESET` (EINVAL); the device is locked at the moment: try again
                (EAGAIN).

        Source: include/uapi/linux/vfio.h, VFIO_DEVICE_RESET. Linux 3.6.
        """
        reset.reset(self)

    def hot_reset_info(self) -> HotResetInfo:
        """Return which devices a hot reset would reset, and whether it is possible.

        Raises:
            VfioError: the device is not bound (EINVAL); neither the device's bus nor its slot can
                be reset (ENODEV).

        Source: include/uapi/linux/vfio.h, VFIO_DEVICE_GET_PCI_HOT_RESET_INFO. Linux 3.12; with
            iommufd since 6.6.
        """
        return reset.hot_reset_info(self)

    def hot_reset(self) -> None:
        """Reset all devices of the same slot or bus; this iommufd must own all of them.

        Raises:
            VfioError: the device is not bound (EINVAL); neither the device's bus nor its slot can
                be reset (ENODEV); this iommufd does not own one of the devices: see
                `hot_reset_info` (EINVAL); one of the devices is being accessed (EBUSY).

        Source: include/uapi/linux/vfio.h, VFIO_DEVICE_PCI_HOT_RESET. Linux 3.12; with iommufd since
            6.6.
        """
        reset.hot_reset(self)

    @property
    def mappings(self) -> tuple[RegionMapping, ...]:
        """The open mappings of the device's regions."""
        return tuple(mapping for mapping in self._mappings if not mapping.closed)

    def add_mapping(self, mapping: RegionMapping) -> None:
        """Add a mapping to `mappings`, so that it is closed with the device."""
        self._mappings.add(mapping)

    def drop_mapping(self, mapping: RegionMapping) -> None:
        """Remove a mapping from `mappings`."""
        self._mappings.discard(mapping)

    @exclusively
    def detach(self) -> int:
        """Return the descriptor without closing it; the caller owns it from now on.

        The device stays bound and attached, and its DMA goes on. Mappings of its regions keep it
        open too, until they are closed.
        """
        fd = super().detach()
        self._forget_iommufd()
        return fd

    @exclusively
    def close(self) -> None:
        """Close the device and the mappings of its regions; closing it twice does nothing."""
        super().close()

    def _close(self) -> None:
        # An open mapping would keep the file open, and so the device bound.
        for mapping in self.mappings:
            mapping.close()
        super()._close()
        self._forget_iommufd()

    def _set_iommu_device(self, iommu_device: IommuDevice) -> None:
        self._iommu_device = iommu_device
        _devices_with_iommufd.add(self)

    def _note_attached(self, pasid: int | None, target: IommuObject | None) -> None:
        if target is None:
            self._attached.pop(pasid, None)
        else:
            self._attached[pasid] = target

    def _note_group_moved(self, target: IommuObject) -> None:
        """Update the other attached devices of the IOMMU group, which the kernel moved as well."""
        for other in list(_devices_with_iommufd):
            if other is self or other.attached in (None, target) or other._iommu_device is None:
                continue
            same_iommufd = other._iommu_device.iommufd is self.iommu_device.iommufd
            if same_iommufd and other.group == self.group:
                other._note_attached(None, target)

    def _forget_iommufd(self) -> None:
        self._attached.clear()
        if self._iommu_device is not None:
            self._iommu_device.forget()
        self._iommu_device = None
        self._bound = False

    def _region_info(self, index: int) -> RegionInfo:
        return RegionInfo.parse(
            request_info(self, _GET_REGION_INFO, f"region {index}", index=index)
        )

    def __str__(self) -> str:
        return f"VFIO device {self._name}"

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"fd={self._fd}"
        return f"<{type(self).__name__} {self._name} {state}>"


def _pasid_suffix(pasid: int | None) -> str:
    return "" if pasid is None else f", PASID {pasid}"


def _find_sysfs_folder(fd: int) -> str | None:
    """Return the sysfs folder of the VFIO device behind a descriptor; None for another file."""
    number = os.fstat(fd).st_rdev
    path = os.path.realpath(f"/sys/dev/char/{os.major(number)}:{os.minor(number)}")
    kind = os.path.dirname(path)
    return os.path.dirname(kind) if os.path.basename(kind) == "vfio-dev" else None


def _device_name(fd: int) -> str:
    return os.path.basename(_find_sysfs_folder(fd) or f"of descriptor {fd}")
