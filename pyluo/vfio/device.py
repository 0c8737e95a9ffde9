"""A VFIO device: opened by its character device, bound to an iommufd, attached to page tables."""

from __future__ import annotations

import errno
import os
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Self

from pyluo._sys import Ioctl, constant, raising
from pyluo.descriptor import OwnedFd
from pyluo.errors import DeviceInUseError, LuoError, NotBoundError, from_errno
from pyluo.iommufd.device import IommuDevice
from pyluo.iommufd.iova import IovaRange
from pyluo.vfio import reset
from pyluo.vfio.bus import PciDevice
from pyluo.vfio.config import ConfigSpace
from pyluo.vfio.dma_logging import DmaLogging
from pyluo.vfio.features import Features
from pyluo.vfio.info import DeviceInfo, IrqFlags, IrqInfo, PciIrq, PciRegion, RegionInfo
from pyluo.vfio.irqs import Irq
from pyluo.vfio.low_power import LowPower
from pyluo.vfio.migration import Migration
from pyluo.vfio.regions import Region
from pyluo.vfio.requests import request, whole

if TYPE_CHECKING:
    from collections.abc import Mapping
    from uuid import UUID

    from pyluo.iommufd.objects import IommuContext, IommuObject
    from pyluo.vfio.regions import RegionMapping
    from pyluo.vfio.reset import HotResetInfo

__all__ = ["VfioDevice"]

_BIND = Ioctl("VFIO_DEVICE_BIND_IOMMUFD", "vfio_device_bind_iommufd", size="argsz")
_ATTACH = Ioctl("VFIO_DEVICE_ATTACH_IOMMUFD_PT", "vfio_device_attach_iommufd_pt", size="argsz")
_DETACH = Ioctl("VFIO_DEVICE_DETACH_IOMMUFD_PT", "vfio_device_detach_iommufd_pt", size="argsz")
_GET_INFO = Ioctl("VFIO_DEVICE_GET_INFO", "vfio_device_info", size="argsz")
_GET_REGION_INFO = Ioctl("VFIO_DEVICE_GET_REGION_INFO", "vfio_region_info", size="argsz")
_GET_IRQ_INFO = Ioctl("VFIO_DEVICE_GET_IRQ_INFO", "vfio_irq_info", size="argsz")

_TOKEN = constant("VFIO_DEVICE_BIND_FLAG_TOKEN")
_ATTACH_PASID = constant("VFIO_DEVICE_ATTACH_PASID")
_DETACH_PASID = constant("VFIO_DEVICE_DETACH_PASID")
_WITH_TOKEN = (
    "The device takes no token, or the kernel does not (Linux 6.17); or another open file has it"
)
# Those that an iommufd is known of: so that one of a group learns where another one took it.
_related: weakref.WeakSet[VfioDevice] = weakref.WeakSet()
_RELAXABLE = "direct-relaxable"  # reserved for the host's own driver only


class VfioDevice(OwnedFd):
    """A device in the hands of userspace.

    In order: `open`, `bind`, `attach`, and then regions, interrupts and DMA. Closing it closes its
    mappings, detaches it, resets it and ends its `IommuDevice`, unless another process has the
    descriptor too.

    Not locked: use it, and what it gives, from one thread at a time.

    Attributes:
        may_sleep: whether `low_power.enter` let it, and `low_power.exit` did not end that.

    Source: drivers/vfio/device_cdev.c. Linux 6.6.
    """

    __slots__ = ("_attached", "_bound", "_iommu_device", "_mappings", "_name", "may_sleep")

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self._name = _name_of(fd)
        self._bound = False
        self._iommu_device: IommuDevice | None = None
        self._attached: dict[int | None, IommuObject] = {}
        self._mappings: weakref.WeakSet[RegionMapping] = weakref.WeakSet()
        self.may_sleep = False

    @classmethod
    def open(cls, device: PciDevice | str | os.PathLike[str]) -> Self:
        """Opens a device, of which nothing can be used before `bind`.

        Args:
            device: a PCI device that a VFIO driver has; or the path of a character device, such as
                ``/dev/vfio/devices/vfio0``.

        Raises:
            LuoPermissionError: EACCES, no right on the node; EPERM, a device without IOMMU needs
                CAP_SYS_RAWIO.
            LuoError: ENODEV, no VFIO driver has the device, or it is being taken away; ENOENT, no
                such node.
        """
        path = device.node if isinstance(device, PciDevice) else os.fspath(device)
        with raising("vfio open", path):
            return cls(os.open(path, os.O_RDWR | os.O_CLOEXEC))

    @classmethod
    def from_fd(cls, fd: int) -> Self:
        """Takes over an open device, as it came from another process, bound already or not.

        If it is, `adopt` tells which iommufd it is bound to.

        Raises:
            LuoError: EBADF, the descriptor is not open; ENODEV, it is not of a VFIO device. It
                stays the caller's.
        """
        with raising("fstat", f"descriptor {fd}"):
            os.fstat(fd)
        if _folder_of(fd) is None:
            raise from_errno(errno.ENODEV, "from_fd", f"descriptor {fd}")
        self = cls(fd)
        try:
            reply = _GET_INFO.attempt(fd)
            if reply.errno not in (0, errno.EINVAL):
                raise from_errno(reply.errno, _GET_INFO.name, str(self))
        except BaseException:
            self._fd = -1
            raise
        self._bound = not reply.errno
        return self

    def adopt(
        self,
        iommufd: IommuContext,
        object_id: int,
        *,
        attached: IommuObject | None,
        pasids: Mapping[int, IommuObject] | None = None,
    ) -> IommuDevice:
        """Notes what another process bound and attached it to. The kernel is asked nothing.

        Args:
            iommufd: what it is bound to.
            object_id: its number there, as `IommuDevice.id` was in the other process.
            attached: what it is attached to: an IOAS, or a HWPT; None if it is to nothing.
            pasids: what its PASIDs are attached to.

        Raises:
            ValueError: it is not bound, or its relation is known already.
        """
        if not self._bound or self._iommu_device is not None:
            state = "knows what it is" if self._bound else "is not"
            raise ValueError(f"{self} {state} bound to")
        known = IommuDevice(iommufd, object_id)
        self._relate(known)
        for pasid, target in (pasids or {}).items():
            self._note_attached(pasid, target)
        if attached is not None:
            self._note_attached(None, attached)
        return known

    @property
    def name(self) -> str:
        """The address of a PCI device; what sysfs calls any other."""
        return self._name

    @property
    def pci(self) -> PciDevice | None:
        """Its place on the PCI bus; None for a device that is on none."""
        with suppress(ValueError, FileNotFoundError):
            return PciDevice.at(self._name)
        return None

    @property
    def bound(self) -> bool:
        """Whether it is bound to an iommufd, by this process or before it came here."""
        return self._bound

    @property
    def iommu_device(self) -> IommuDevice:
        """What the iommufd knows it as, since `bind` or `adopt`.

        Raises:
            NotBoundError: EINVAL, there was neither.
        """
        if self._iommu_device is None:
            hint = "`adopt` tells what another process bound it to" if self._bound else ""
            raise NotBoundError(errno.EINVAL, "iommu_device", str(self), hint)
        return self._iommu_device

    def bind(self, iommufd: IommuContext, *, token: UUID | None = None) -> IommuDevice:
        """Binds it to an iommufd, until it is closed; from here on it can be used.

        The device is reset, DMA is blocked until `attach`, and needs `ConfigSpace.set_bus_master`
        as well.

        Args:
            iommufd: to which.
            token: the secret of a virtual function's physical function; Linux 6.17.

        Returns:
            What the iommufd knows it as; its end comes with `close`.

        Raises:
            DeviceInUseError: EINVAL or EBUSY, it is bound or in use through another descriptor.
            LuoPermissionError: EPERM, another iommufd has a device of its IOMMU group, or its
                interrupts cannot be isolated; EACCES, a token is missing or wrong.
            LuoError: EAGAIN, it is locked for a moment: try again; EBADFD, no iommufd; EINVAL with
                a token, the device takes none, or it is bound through another descriptor.

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
            raise LuoError(errno.EINVAL, _BIND.name, f"{self}, with a token", _WITH_TOKEN)
        if reply.errno:
            raise from_errno(reply.errno, _BIND.name, str(self))
        self._bound = True
        known = IommuDevice(iommufd, iommufd.claim_id(reply.integer("out_devid")))
        self._relate(known)
        return known

    def attach(self, target: IommuObject, *, pasid: int | None = None) -> int:
        """Attaches it to a page table; if it is attached to one, this replaces it.

        Between the old one and the new one no DMA is blocked, where the IOMMU can do that. The
        devices of its IOMMU group that are attached move with it. When it fails, nothing has
        changed. `detach_pt` undoes it.

        Args:
            target: an `Ioas`, for which the kernel chooses or makes a page table; a `PagingHwpt` or
                a `NestedHwpt`.
            pasid: for DMA with this PASID alone; without it, for DMA with none.

        Returns:
            The id of the page table: the HWPT's, or that of the one the kernel chose.

        Raises:
            NotBoundError: EINVAL, it is not bound.
            LuoError: EINVAL, the page table does not suit the device's IOMMU, or devices of its
                group are attached elsewhere; EADDRINUSE, something is mapped where the device
                cannot reach; EBUSY, it is being reset; ENOENT, the target is gone; EOPNOTSUPP, no
                PASIDs.
            ValueError: the target lives in another iommufd than the device.

        Source: include/uapi/linux/vfio.h, VFIO_DEVICE_ATTACH_IOMMUFD_PT. Linux 6.6; a PASID since
            6.15.
        """
        flags, number = (0, 0) if pasid is None else (_ATTACH_PASID, pasid)
        detail = f"{target}{_with(pasid)}"
        pt_id = target.id_in(self.iommu_device.iommufd)
        reply = request(self, _ATTACH, detail, flags=flags, pt_id=pt_id, pasid=number)
        self._note_attached(pasid, target)
        if pasid is None:
            self._note_group_moved(target)
        return reply.integer("pt_id")

    def detach_pt(self, *, pasid: int | None = None) -> None:
        """Detaches it from its page table, which blocks its DMA; without one nothing happens.

        (`detach` gives the descriptor up, as for every owner of one.)

        Args:
            pasid: as for `attach`.

        Raises:
            NotBoundError: EINVAL, it is not bound.

        Source: include/uapi/linux/vfio.h, VFIO_DEVICE_DETACH_IOMMUFD_PT. Linux 6.6.
        """
        flags, number = (0, 0) if pasid is None else (_DETACH_PASID, pasid)
        request(self, _DETACH, f"page table{_with(pasid)}", flags=flags, pasid=number)
        self._note_attached(pasid, None)

    @property
    def attached(self) -> IommuObject | None:
        """What it is attached to, as far as this process did it or was told."""
        return self._attached.get(None)

    @property
    def pasids(self) -> dict[int, IommuObject]:
        """What its PASIDs are attached to, likewise."""
        return {pasid: to for pasid, to in self._attached.items() if pasid is not None}

    @property
    def group(self) -> str:
        """The number of its IOMMU group; empty without one. Devices of a group move together."""
        return self._place("iommu_group")

    @property
    def iommu(self) -> str:
        """What sysfs calls the IOMMU before it; empty without one."""
        return self._place("iommu")

    def _place(self, link: str) -> str:
        path = f"{_folder_of(self.fileno())}/{link}"
        return os.path.basename(os.path.realpath(path)) if os.path.exists(path) else ""

    def reserved_iovas(self) -> tuple[IovaRange, ...]:
        """Where nothing can be mapped for it, attached or not: its IOMMU needs the addresses.

        Raises:
            LuoError: ENOENT, it has no IOMMU.

        Source: Documentation/ABI/testing/sysfs-kernel-iommu_groups
        """
        path = f"{_folder_of(self.fileno())}/iommu_group/reserved_regions"
        with raising("vfio reserved_regions", path), open(path) as file:
            lines = [line.split() for line in file]
        return tuple(
            IovaRange(int(first, 16), int(last, 16))
            for first, last, kind in lines
            if kind != _RELAXABLE
        )

    def info(self) -> DeviceInfo:
        """What it says about itself.

        Raises:
            NotBoundError: EINVAL, it is not bound.

        Source: include/uapi/linux/vfio.h, VFIO_DEVICE_GET_INFO. Linux 3.6.
        """
        return DeviceInfo.parse(whole(self, _GET_INFO))

    def region(self, index: int) -> Region:
        """One of its regions.

        Args:
            index: which; for PCI devices see `PciRegion`.

        Raises:
            NotBoundError: EINVAL, it is not bound.
            LuoError: EINVAL, there is no region of this index.

        Source: include/uapi/linux/vfio.h, VFIO_DEVICE_GET_REGION_INFO. Linux 3.6.
        """
        return Region(self, self._region_info(index))

    def regions(self) -> tuple[Region, ...]:
        """All regions that it has: those of a size, in the order of their indexes."""
        found = []
        for index in range(self.info().regions):
            try:
                info = self._region_info(index)
            except LuoError as error:
                # The kernel knows this one of VGA alone, and refuses it to the others.
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
            NotBoundError: EINVAL, it is not bound.
        """
        return ConfigSpace(self, self._region_info(PciRegion.CONFIG))

    def irq(self, index: int) -> Irq:
        """Its interrupts of one kind.

        Args:
            index: which kind; for PCI devices see `PciIrq`.

        Raises:
            NotBoundError: EINVAL, it is not bound.
            LuoError: EINVAL, there are no interrupts of this index.

        Source: include/uapi/linux/vfio.h, VFIO_DEVICE_GET_IRQ_INFO. Linux 3.6.
        """
        reply = request(self, _GET_IRQ_INFO, f"interrupt {index}", index=index)
        return Irq(self, IrqInfo(index, IrqFlags(reply.integer("flags")), reply.integer("count")))

    def irqs(self) -> tuple[Irq, ...]:
        """Its interrupts of all kinds that it has."""
        found = []
        for index in range(self.info().irqs):
            try:
                irq = self.irq(index)
            except LuoError as error:
                # Before Linux 7.3 only PCIe devices had this one, and others were refused it.
                if index != PciIrq.ERROR or error.errno != errno.EINVAL:
                    raise
                continue
            if irq.info.count:
                found.append(irq)
        return tuple(found)

    @property
    def features(self) -> Features:
        """Its optional features."""
        return Features(self)

    @property
    def migration(self) -> Migration:
        """Its own state, to be taken out of it or put into it."""
        return Migration(self)

    @property
    def dma_logging(self) -> DmaLogging:
        """Its record of what it wrote to."""
        return DmaLogging(self)

    @property
    def low_power(self) -> LowPower:
        """Whether it may sleep."""
        return LowPower(self)

    def reset(self) -> None:
        """Resets it alone. Its interrupts stay enabled; its registers lose what was in them.

        Raises:
            NotBoundError: EINVAL, it is not bound.
            LuoError: EINVAL, it has no such reset: see `DeviceFlags.RESET`; EAGAIN, it is locked
                for a moment: try again.

        Source: include/uapi/linux/vfio.h, VFIO_DEVICE_RESET. Linux 3.6.
        """
        reset.reset(self)

    def hot_reset_info(self) -> HotResetInfo:
        """What a hot reset would reset, and whether one is possible.

        Raises:
            NotBoundError: EINVAL, it is not bound.
            LuoError: ENODEV, neither its bus nor its slot can be reset.

        Source: include/uapi/linux/vfio.h, VFIO_DEVICE_GET_PCI_HOT_RESET_INFO. Linux 3.12; by
            iommufd since 6.6.
        """
        return reset.hot_reset_info(self)

    def hot_reset(self) -> None:
        """Resets everything on its slot or bus; all of it has to be this iommufd's.

        Raises:
            NotBoundError: EINVAL, it is not bound.
            LuoError: ENODEV, neither its bus nor its slot can be reset; EINVAL, a device that would
                be reset is not owned: see `hot_reset_info`; EBUSY, one is being accessed.

        Source: include/uapi/linux/vfio.h, VFIO_DEVICE_PCI_HOT_RESET. Linux 3.12; by iommufd since
            6.6.
        """
        reset.hot_reset(self)

    @property
    def mappings(self) -> tuple[RegionMapping, ...]:
        """The mappings of its regions that are open."""
        return tuple(mapping for mapping in self._mappings if not mapping.closed)

    def add_mapping(self, mapping: RegionMapping) -> None:
        """Notes a mapping, which is closed with the device."""
        self._mappings.add(mapping)

    def drop_mapping(self, mapping: RegionMapping) -> None:
        """Lets go of a mapping."""
        self._mappings.discard(mapping)

    def detach(self) -> int:
        """Gives the descriptor up, still open, bound and attached; the caller owns it now.

        Its mappings keep the device open too, until they are closed.
        """
        fd = super().detach()
        self._forget_relations()
        return fd

    def _close(self) -> None:
        # A mapping keeps the file open, and with it the device bound.
        for mapping in self.mappings:
            mapping.close()
        super()._close()
        self._forget_relations()

    def _relate(self, known: IommuDevice) -> None:
        known.add_user(str(self))
        known.hold_iommufd()
        self._iommu_device = known
        _related.add(self)

    def _note_attached(self, pasid: int | None, target: IommuObject | None) -> None:
        if (old := self._attached.pop(pasid, None)) is not None:
            old.remove_user(str(self))
        if target is not None:
            target.add_user(str(self))
            self._attached[pasid] = target

    def _note_group_moved(self, target: IommuObject) -> None:
        """The kernel moves a group as a whole: what of it was attached is attached to this now."""
        for other in list(_related):
            if other is self or other.attached in (None, target) or other._iommu_device is None:
                continue
            same_iommufd = other._iommu_device.iommufd is self.iommu_device.iommufd
            if same_iommufd and other.group == self.group:
                other._note_attached(None, target)

    def _forget_relations(self) -> None:
        for pasid in list(self._attached):
            self._note_attached(pasid, None)
        if (known := self._iommu_device) is not None:
            known.remove_user(str(self))
            known.forget()
        self._iommu_device = None
        self._bound = False

    def _region_info(self, index: int) -> RegionInfo:
        return RegionInfo.parse(whole(self, _GET_REGION_INFO, f"region {index}", index=index))

    def __str__(self) -> str:
        return f"VFIO device {self._name}"

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"fd={self._fd}"
        return f"<{type(self).__name__} {self._name} {state}>"


def _with(pasid: int | None) -> str:
    return "" if pasid is None else f", PASID {pasid}"


def _folder_of(fd: int) -> str | None:
    """The sysfs folder of the device behind a descriptor of a VFIO device; None for any other."""
    number = os.fstat(fd).st_rdev
    path = os.path.realpath(f"/sys/dev/char/{os.major(number)}:{os.minor(number)}")
    kind = os.path.dirname(path)
    return os.path.dirname(kind) if os.path.basename(kind) == "vfio-dev" else None


def _name_of(fd: int) -> str:
    return os.path.basename(_folder_of(fd) or f"of descriptor {fd}")
