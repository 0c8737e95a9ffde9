"""The optional features of a device: probing for them, and those that take a single request."""

from __future__ import annotations

import enum
import errno
import os
from typing import TYPE_CHECKING

from pyluo._sys import Ioctl, Struct, constant
from pyluo.descriptor import OwnedFd
from pyluo.errors import from_errno
from pyluo.vfio.requests import attempt

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from pyluo._sys import Buffer, Reply
    from pyluo.vfio.capabilities import Area
    from pyluo.vfio.requests import OpenDevice

__all__ = ["Feature", "Features", "feature_data"]

_FEATURE = Ioctl("VFIO_DEVICE_FEATURE", "vfio_device_feature", size="argsz")
_GET = constant("VFIO_DEVICE_FEATURE_GET")
_SET = constant("VFIO_DEVICE_FEATURE_SET")
_PROBE = constant("VFIO_DEVICE_FEATURE_PROBE")
_BUS_MASTER = Struct("vfio_device_feature_bus_master")
_DMA_BUF = Struct("vfio_device_feature_dma_buf")
_DMA_RANGE = Struct("vfio_region_dma_range")
_ZPCI_ERROR = Struct("vfio_device_feature_zpci_err")
_SET_MASTER = constant("VFIO_DEVICE_FEATURE_SET_MASTER")
_CLEAR_MASTER = constant("VFIO_DEVICE_FEATURE_CLEAR_MASTER")

# The kernel's errors for a feature, or a way to use it, that is not there.
_ABSENT = (errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL)


class Feature(enum.IntEnum):
    """The optional features that a device may have.

    Source: include/uapi/linux/vfio.h, VFIO_DEVICE_FEATURE_*
    """

    PCI_VF_TOKEN = constant("VFIO_DEVICE_FEATURE_PCI_VF_TOKEN")
    MIGRATION = constant("VFIO_DEVICE_FEATURE_MIGRATION")
    MIGRATION_STATE = constant("VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE")
    LOW_POWER_ENTRY = constant("VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY")
    LOW_POWER_ENTRY_WITH_WAKEUP = constant("VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP")
    LOW_POWER_EXIT = constant("VFIO_DEVICE_FEATURE_LOW_POWER_EXIT")
    DMA_LOGGING_START = constant("VFIO_DEVICE_FEATURE_DMA_LOGGING_START")
    DMA_LOGGING_STOP = constant("VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP")
    DMA_LOGGING_REPORT = constant("VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT")
    MIGRATION_DATA_SIZE = constant("VFIO_DEVICE_FEATURE_MIG_DATA_SIZE")
    BUS_MASTER = constant("VFIO_DEVICE_FEATURE_BUS_MASTER")
    DMA_BUF = constant("VFIO_DEVICE_FEATURE_DMA_BUF")
    PRECOPY_INFO_V2 = constant("VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2")
    ZPCI_ERROR = constant("VFIO_DEVICE_FEATURE_ZPCI_ERROR")


_KERNEL_NAMES = {
    Feature.MIGRATION_STATE: "MIG_DEVICE_STATE",
    Feature.MIGRATION_DATA_SIZE: "MIG_DATA_SIZE",
    Feature.PRECOPY_INFO_V2: "MIG_PRECOPY_INFOv2",
}


class Features:
    """The optional features of a device; see `VfioDevice.features`.

    Features that take several requests have classes of their own: `VfioDevice.migration`,
    `dma_logging` and `low_power`.

    Every request raises FeatureNotSupportedError (ENOTTY or EOPNOTSUPP) if the device, its driver
    or the kernel lacks the feature.

    Source: include/uapi/linux/vfio.h, VFIO_DEVICE_FEATURE. Linux 5.7.
    """

    __slots__ = ("_device",)

    def __init__(self, device: OpenDevice) -> None:
        self._device = device

    def probe(self, feature: Feature, *, get: bool = False, set: bool = False) -> bool:  # noqa: A002
        """Return whether the device has a feature, and supports getting or setting it as asked."""
        access = (_GET if get else 0) | (_SET if set else 0)
        reply = attempt(self._device, _FEATURE, flags=feature | _PROBE | access)
        if reply.errno in _ABSENT:
            return False
        self._raise(feature, reply)
        return True

    def supported(self) -> frozenset[Feature]:
        """Return all features that the device has."""
        return frozenset(feature for feature in Feature if self.probe(feature))

    def get(self, feature: Feature, data: Buffer) -> Reply:
        """Get a feature that has no method here.

        Args:
            feature: the feature.
            data: the struct for the kernel, which fills it in; see `feature_data`.

        Returns:
            The struct as the kernel left it, and the result of the request.
        """
        reply = attempt(self._device, _FEATURE, "", data, flags=feature | _GET)
        self._raise(feature, reply)
        return reply

    def set(self, feature: Feature, data: Buffer = b"") -> Reply:
        """Set a feature that has no method here.

        Args:
            feature: the feature.
            data: the struct for the kernel.

        Returns:
            The struct as the kernel left it.
        """
        reply = attempt(self._device, _FEATURE, "", data, flags=feature | _SET)
        self._raise(feature, reply)
        return reply

    def set_bus_master(self, allowed: bool) -> None:
        """Allow or forbid DMA by a device on a CDX bus.

        For PCI devices use `ConfigSpace.set_bus_master`.

        Source: include/uapi/linux/vfio.h, VFIO_DEVICE_FEATURE_BUS_MASTER. Linux 6.7.
        """
        op = _SET_MASTER if allowed else _CLEAR_MASTER
        self.set(Feature.BUS_MASTER, _BUS_MASTER.pack(op=op))

    def set_vf_token(self, token: UUID) -> None:
        """Set the secret that is needed to open virtual functions of this device.

        Source: include/uapi/linux/vfio.h, VFIO_DEVICE_FEATURE_PCI_VF_TOKEN. Linux 5.7.
        """
        self.set(Feature.PCI_VF_TOKEN, token.bytes)

    def zpci_error(self, length: int) -> bytes | None:
        """Return the last error record of an s390 PCI device; None without one.

        Args:
            length: its length in bytes, as given by the capability VFIO_DEVICE_INFO_CAP_ZPCI_BASE.

        Source: include/uapi/linux/vfio.h, VFIO_DEVICE_FEATURE_ZPCI_ERROR. Linux 7.3.
        """
        buffer = bytearray(length)
        data = _ZPCI_ERROR.pack(data=buffer)
        reply = attempt(self._device, _FEATURE, "", data, flags=Feature.ZPCI_ERROR | _GET)
        if reply.errno == errno.ENOMSG:
            return None
        self._raise(Feature.ZPCI_ERROR, reply)
        return bytes(buffer)

    def export_dma_buf(self, region: int, areas: Sequence[Area]) -> OwnedFd:
        """Return a dma-buf of parts of a BAR, for other devices to access by DMA.

        Access, and with it any mapping in an IOMMU, is revoked while memory access is off in the
        command register, in low power, during a reset, and when the device is closed.

        Args:
            region: the index of a BAR.
            areas: the parts, in whole pages; `Ioas.map_file` accepts only a dma-buf of one area.

        Raises:
            FeatureNotSupportedError: the kernel lacks CONFIG_VFIO_PCI_DMABUF (ENOTTY).
            LuoError: the region is not a BAR, or one of I/O ports (ENODEV); an area is not of whole
                pages, is empty, or does not lie within the BAR (EINVAL).

        Source: include/uapi/linux/vfio.h, VFIO_DEVICE_FEATURE_DMA_BUF. Linux 6.19.
        """
        header = _DMA_BUF.pack(
            region_index=region, open_flags=os.O_RDWR | os.O_CLOEXEC, nr_ranges=len(areas)
        )
        ranges = (_DMA_RANGE.pack(offset=area.offset, length=area.size) for area in areas)
        return OwnedFd(self.get(Feature.DMA_BUF, b"".join([header, *ranges])).result)

    def _raise(self, feature: Feature, reply: Reply) -> None:
        """Raise the error of a failed request, under the kernel's name of the feature."""
        if reply.errno:
            name = _KERNEL_NAMES.get(feature, feature.name)
            raise from_errno(reply.errno, f"{_FEATURE.name}_{name}", str(self._device))


def feature_data(reply: Reply) -> bytes:
    """Return the kernel's answer for a feature, without the struct before it."""
    return reply.data()[_FEATURE.struct.size :]
