"""The optional features of a device: probing for them, and the simple ones."""

from __future__ import annotations

import enum
import errno
import os
from typing import TYPE_CHECKING

from pyluo._sys import Ioctl, Struct, constant
from pyluo.descriptor import OwnedFd
from pyluo.errors import FeatureNotSupportedError, KernelTooOldError, VfioError
from pyluo.operation import Operation
from pyluo.vfio.requests import attempt

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from uuid import UUID

    from pyluo._sys import Buffer, Request
    from pyluo.operation import Refusal
    from pyluo.vfio.capabilities import Area
    from pyluo.vfio.requests import OpenDevice

__all__ = ["Feature", "Features", "feature_data"]

_FEATURE = Ioctl("VFIO_DEVICE_FEATURE", "vfio_device_feature", VfioError, size="argsz")
_GET = constant("VFIO_DEVICE_FEATURE_GET")
_SET = constant("VFIO_DEVICE_FEATURE_SET")
_PROBE = constant("VFIO_DEVICE_FEATURE_PROBE")
_BUS_MASTER = Struct("vfio_device_feature_bus_master")
_DMA_BUF = Struct("vfio_device_feature_dma_buf")
_DMA_RANGE = Struct("vfio_region_dma_range")
_ZPCI_ERROR = Struct("vfio_device_feature_zpci_err")
_SET_MASTER = constant("VFIO_DEVICE_FEATURE_SET_MASTER")
_CLEAR_MASTER = constant("VFIO_DEVICE_FEATURE_CLEAR_MASTER")

# The kernel returns one of these if a device lacks a feature, or cannot get or set it.
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


def _feature(name: str, refusals: Mapping[int, Refusal] | None = None) -> Operation:
    usual: dict[int, Refusal] = {
        errno.ENOTTY: FeatureNotSupportedError,
        errno.EOPNOTSUPP: FeatureNotSupportedError,
        errno.E2BIG: KernelTooOldError,
    }
    return Operation(f"VFIO_DEVICE_FEATURE_{name}", VfioError, usual | dict(refusals or {}))


_OPERATIONS = {
    Feature.PCI_VF_TOKEN: _feature(
        "PCI_VF_TOKEN",
        {
            errno.ENOTTY: (
                FeatureNotSupportedError,
                "Only a physical function with SR-IOV has a token",
            ),
        },
    ),
    Feature.MIGRATION: _feature("MIGRATION"),
    Feature.MIGRATION_STATE: _feature(
        "MIG_DEVICE_STATE",
        {
            errno.EINVAL: (
                "The device does not support this state, or cannot reach it from its present "
                "state (see `Migration.state`)"
            ),
        },
    ),
    Feature.LOW_POWER_ENTRY: _feature(
        "LOW_POWER_ENTRY",
        {
            errno.EINVAL: "The device is already allowed to sleep: call `low_power.exit()` first",
        },
    ),
    Feature.LOW_POWER_ENTRY_WITH_WAKEUP: _feature(
        "LOW_POWER_ENTRY_WITH_WAKEUP",
        {
            errno.EINVAL: (
                "The device is already allowed to sleep (call `low_power.exit()` first), or "
                "the descriptor is not of an eventfd"
            ),
        },
    ),
    Feature.LOW_POWER_EXIT: _feature("LOW_POWER_EXIT"),
    Feature.DMA_LOGGING_START: _feature(
        "DMA_LOGGING_START",
        {
            errno.E2BIG: "The device cannot log so many ranges: merge adjacent ones",
            errno.EINVAL: (
                "Ranges overlap or are not aligned to the page size, there are none, or "
                "logging is on"
            ),
        },
    ),
    Feature.DMA_LOGGING_STOP: _feature("DMA_LOGGING_STOP"),
    Feature.DMA_LOGGING_REPORT: _feature(
        "DMA_LOGGING_REPORT",
        {
            errno.EINVAL: (
                "Logging is off, or the page size is not a power of two of at least 4096"
            ),
        },
    ),
    Feature.MIGRATION_DATA_SIZE: _feature("MIG_DATA_SIZE"),
    Feature.BUS_MASTER: _feature(
        "BUS_MASTER",
        {
            errno.ENOTTY: (
                FeatureNotSupportedError,
                "Only devices on a CDX bus have this feature; use "
                "`ConfigSpace.set_bus_master` for PCI devices",
            ),
        },
    ),
    Feature.DMA_BUF: _feature(
        "DMA_BUF",
        {
            errno.ENOTTY: (FeatureNotSupportedError, "The kernel needs CONFIG_VFIO_PCI_DMABUF"),
            errno.EINVAL: "Every area must consist of whole pages and lie within the BAR",
            errno.ENODEV: "The region is not a BAR, is empty, or is in use by another driver",
        },
    ),
    Feature.PRECOPY_INFO_V2: _feature(
        "MIG_PRECOPY_INFOv2",
        {
            errno.EINVAL: "The device has no PRE_COPY state",
        },
    ),
    Feature.ZPCI_ERROR: _feature("ZPCI_ERROR"),
}


class Features:
    """The optional features of a device; see `VfioDevice.features`.

    Features that consist of several requests are in separate objects: `VfioDevice.migration`,
    `VfioDevice.dma_logging` and `VfioDevice.low_power`.

    Each request raises FeatureNotSupportedError (ENOTTY or EOPNOTSUPP) if the device, its driver or
    the kernel lacks the feature.

    Source: include/uapi/linux/vfio.h, VFIO_DEVICE_FEATURE. Linux 5.7.
    """

    __slots__ = ("_device",)

    def __init__(self, device: OpenDevice) -> None:
        self._device = device

    def probe(self, feature: Feature, *, get: bool = False, set: bool = False) -> bool:  # noqa: A002
        """Return whether the device has a feature, and supports getting or setting it if requested.

        Args:
            feature: the feature.
            get: whether the feature must support "get" requests.
            set: whether the feature must support "set" requests.

        Raises:
            VfioError: the device refused the request otherwise than by saying that it lacks this.

        Source: include/uapi/linux/vfio.h, VFIO_DEVICE_FEATURE_PROBE. Linux 5.7.
        """
        access = (_GET if get else 0) | (_SET if set else 0)
        reply = attempt(self._device, _FEATURE, flags=feature | _PROBE | access)
        if reply.errno in _ABSENT:
            return False
        self._raise_if_failed(feature, reply)
        return True

    def supported(self) -> frozenset[Feature]:
        """Return all features that the device has."""
        return frozenset(feature for feature in Feature if self.probe(feature))

    def get(self, feature: Feature, data: Buffer) -> Request:
        """Make a "get" request for a feature, for example one that this class has no method for.

        Args:
            feature: the feature.
            data: the feature's struct, which the kernel fills in.

        Returns:
            The result of the request; `feature_data` returns the feature's struct in it.

        Raises:
            FeatureNotSupportedError: the device, its driver or the kernel does not have the feature
                (ENOTTY, EOPNOTSUPP).
            VfioError: the device refused the request; the errno depends on the feature.

        Source: include/uapi/linux/vfio.h, VFIO_DEVICE_FEATURE. Linux 5.7.
        """
        reply = attempt(self._device, _FEATURE, "", data, flags=feature | _GET)
        self._raise_if_failed(feature, reply)
        return reply

    def set(self, feature: Feature, data: Buffer = b"") -> Request:
        """Make a "set" request for a feature, for example one that this class has no method for.

        Args:
            feature: the feature.
            data: the feature's struct.

        Returns:
            The result of the request; `feature_data` returns the feature's struct in it.

        Raises:
            FeatureNotSupportedError: the device, its driver or the kernel does not have the feature
                (ENOTTY, EOPNOTSUPP).
            VfioError: the device refused the request; the errno depends on the feature.

        Source: include/uapi/linux/vfio.h, VFIO_DEVICE_FEATURE. Linux 5.7.
        """
        reply = attempt(self._device, _FEATURE, "", data, flags=feature | _SET)
        self._raise_if_failed(feature, reply)
        return reply

    def set_bus_master(self, allowed: bool) -> None:
        """Allow or forbid DMA by a device on a CDX bus.

        For PCI devices use `ConfigSpace.set_bus_master`.

        Source: include/uapi/linux/vfio.h, VFIO_DEVICE_FEATURE_BUS_MASTER. Linux 6.7.
        """
        op = _SET_MASTER if allowed else _CLEAR_MASTER
        self.set(Feature.BUS_MASTER, _BUS_MASTER.pack(op=op))

    def set_vf_token(self, token: UUID) -> None:
        """Set the secret that `VfioDevice.bind` requires for virtual functions of this device.

        Source: include/uapi/linux/vfio.h, VFIO_DEVICE_FEATURE_PCI_VF_TOKEN. Linux 5.7.
        """
        self.set(Feature.PCI_VF_TOKEN, token.bytes)

    def zpci_error(self, length: int) -> bytes | None:
        """Return the last error record of an s390 PCI device; None if it has none.

        Args:
            length: the length of the record in bytes, which the device's capability
                VFIO_DEVICE_INFO_CAP_ZPCI_BASE contains.

        Source: include/uapi/linux/vfio.h, VFIO_DEVICE_FEATURE_ZPCI_ERROR. Linux 7.3.
        """
        buffer = bytearray(length)
        data = _ZPCI_ERROR.pack(data=buffer)
        reply = attempt(self._device, _FEATURE, "", data, flags=Feature.ZPCI_ERROR | _GET)
        if reply.errno == errno.ENOMSG:
            return None
        self._raise_if_failed(Feature.ZPCI_ERROR, reply)
        return bytes(buffer)

    def export_dma_buf(self, region: int, areas: Sequence[Area]) -> OwnedFd:
        """Return a dma-buf of parts of a BAR, which other devices can access by DMA.

        The kernel revokes the access, and removes mappings of the dma-buf in IOMMUs, while memory
        access is off in the command register, while the device is in low power or being reset, and
        when the device is closed.

        Args:
            region: the index of the BAR.
            areas: the parts, which consist of whole pages. `Ioas.map_file` accepts only a dma-buf
                of a single area.

        Raises:
            FeatureNotSupportedError: the kernel lacks CONFIG_VFIO_PCI_DMABUF (ENOTTY).
            VfioError: the region is not a BAR, or consists of I/O ports (ENODEV); an area does not
                consist of whole pages, is empty, or does not lie within the BAR (EINVAL).

        Source: include/uapi/linux/vfio.h, VFIO_DEVICE_FEATURE_DMA_BUF. Linux 6.19.
        """
        header = _DMA_BUF.pack(
            region_index=region, open_flags=os.O_RDWR | os.O_CLOEXEC, nr_ranges=len(areas)
        )
        ranges = (_DMA_RANGE.pack(offset=area.offset, length=area.size) for area in areas)
        return OwnedFd(self.get(Feature.DMA_BUF, b"".join([header, *ranges])).result)

    def _raise_if_failed(self, feature: Feature, reply: Request) -> None:
        """If a reply has an errno, raise its exception, with the kernel's name of the feature."""
        if reply.errno:
            raise _OPERATIONS[feature].error(reply.errno, str(self._device))


def feature_data(reply: Request) -> bytes:
    """Return the feature's own struct in a reply: the bytes after struct vfio_device_feature.

    Source: include/uapi/linux/vfio.h, VFIO_DEVICE_FEATURE. Linux 5.7.
    """
    return reply.data()[_FEATURE.struct.size :]
