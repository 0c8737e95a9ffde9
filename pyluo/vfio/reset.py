"""Resetting a device alone, or all devices on its bus or slot."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyluo._sys import Ioctl, PlainIoctl, Struct, constant
from pyluo.errors import VfioError
from pyluo.vfio.requests import NOT_BOUND, attempt, request, subject

if TYPE_CHECKING:
    from pyluo._sys import Request
    from pyluo.vfio.requests import OpenDevice

__all__ = ["AffectedDevice", "HotResetInfo", "hot_reset", "hot_reset_info", "reset"]

_RESET = PlainIoctl(
    "VFIO_DEVICE_RESET",
    VfioError,
    {
        errno.EINVAL: (
            "The device cannot be reset on its own (see `DeviceInfo.flags`); try `hot_reset`"
        ),
        errno.EAGAIN: "The device is locked for a moment: try again",
    },
)
_NO_BUS_RESET = "Neither the device's bus nor its slot can be reset; a root bus never can"
_INFO = Ioctl(
    "VFIO_DEVICE_GET_PCI_HOT_RESET_INFO",
    "vfio_pci_hot_reset_info",
    VfioError,
    {
        errno.ENODEV: _NO_BUS_RESET,
    },
    size="argsz",
)
_HOT_RESET = Ioctl(
    "VFIO_DEVICE_PCI_HOT_RESET",
    "vfio_pci_hot_reset",
    VfioError,
    {
        errno.ENODEV: _NO_BUS_RESET,
        errno.EINVAL: (
            "A device on the same bus or slot is not owned by this iommufd: "
            "`hot_reset_info` names it"
        ),
        errno.ENOTTY: "The bus was reset, but its link did not come back: see dmesg",
        errno.EBUSY: "One of the devices is being accessed: try again",
    },
    size="argsz",
)
_AFFECTED = Struct("vfio_pci_dependent_device")
_BY_ID = constant("VFIO_PCI_HOT_RESET_FLAG_DEV_ID")
_ALL_OWNED = constant("VFIO_PCI_HOT_RESET_FLAG_DEV_ID_OWNED")
_OWNED = constant("VFIO_PCI_DEVID_OWNED")
_NOT_OWNED = constant("VFIO_PCI_DEVID_NOT_OWNED") & 0xFFFF_FFFF

_ROOM = 8  # devices; doubled until all devices fit
_ROOM_LIMIT = 1 << 16  # devices; no PCI domain has more


@dataclass(frozen=True, slots=True)
class AffectedDevice:
    """A device that a hot reset would reset.

    Attributes:
        address: the PCI address, such as ``0000:01:00.0``.
        owned: whether this iommufd owns the device: the device, or another device of its IOMMU
            group, is bound to the iommufd.
        id: the device's id in the iommufd; None if the device is not bound to it.
    """

    address: str
    owned: bool
    id: int | None


@dataclass(frozen=True, slots=True)
class HotResetInfo:
    """The effect of a hot reset.

    Attributes:
        devices: all devices that would be reset, including this one.
        possible: whether this iommufd owns all of them; otherwise the kernel refuses a hot reset.
    """

    devices: tuple[AffectedDevice, ...]
    possible: bool


def reset(device: OpenDevice) -> None:
    """Reset the PCI function alone; see `VfioDevice.reset`."""
    number = device.fileno()
    if not device.bound:
        raise VfioError(errno.EINVAL, _RESET.name, str(device), NOT_BOUND)
    _RESET(number, str(device))


def hot_reset(device: OpenDevice) -> None:
    """Reset the bus or slot; see `VfioDevice.hot_reset`."""
    request(device, _HOT_RESET)


def hot_reset_info(device: OpenDevice) -> HotResetInfo:
    """Return which devices a hot reset would reset; see `VfioDevice.hot_reset_info`."""
    room = _ROOM
    while True:
        reply = attempt(device, _INFO, "", bytes(room * _AFFECTED.size))
        # Unlike other requests for information, this one fails if there is too little room.
        if reply.errno != errno.ENOSPC or room >= _ROOM_LIMIT:
            break
        room *= 2
    if reply.errno:
        raise _INFO.error(reply.errno, subject(device, ""))
    return _parse(reply)


def _parse(reply: Request) -> HotResetInfo:
    data, flags = reply.data(), reply.integer("flags")
    by_id = bool(flags & _BY_ID)  # if false, `devid` is the number of an IOMMU group
    devices = []
    for index in range(reply.integer("count")):
        one = _AFFECTED.unpack(data, _INFO.struct.size + index * _AFFECTED.size)
        bus, devfn, number = one.integer("bus"), one.integer("devfn"), one.integer("devid")
        devices.append(
            AffectedDevice(
                f"{one.integer('segment'):04x}:{bus:02x}:{devfn >> 3:02x}.{devfn & 7}",
                by_id and number != _NOT_OWNED,
                number if by_id and number not in (_OWNED, _NOT_OWNED) else None,
            )
        )
    return HotResetInfo(tuple(devices), bool(flags & _ALL_OWNED))
