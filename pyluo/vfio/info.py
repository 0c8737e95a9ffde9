"""The kernel's descriptions of a VFIO device, its regions and its interrupts."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from pyluo._sys import Struct, constant
from pyluo.vfio import capabilities
from pyluo.vfio.capabilities import Area

if TYPE_CHECKING:
    from pyluo.vfio.capabilities import AtomicWidths, Capability, RegionType

__all__ = [
    "DeviceFlags",
    "DeviceInfo",
    "IrqFlags",
    "IrqInfo",
    "PciIrq",
    "PciRegion",
    "RegionFlags",
    "RegionInfo",
]

_DEVICE = Struct("vfio_device_info")
_REGION = Struct("vfio_region_info")


class PciRegion(enum.IntEnum):
    """The indexes of a PCI device's fixed regions; other regions have a `RegionInfo.type`.

    Source: include/uapi/linux/vfio.h, VFIO_PCI_*_REGION_INDEX
    """

    BAR0 = constant("VFIO_PCI_BAR0_REGION_INDEX")
    BAR1 = constant("VFIO_PCI_BAR1_REGION_INDEX")
    BAR2 = constant("VFIO_PCI_BAR2_REGION_INDEX")
    BAR3 = constant("VFIO_PCI_BAR3_REGION_INDEX")
    BAR4 = constant("VFIO_PCI_BAR4_REGION_INDEX")
    BAR5 = constant("VFIO_PCI_BAR5_REGION_INDEX")
    ROM = constant("VFIO_PCI_ROM_REGION_INDEX")
    CONFIG = constant("VFIO_PCI_CONFIG_REGION_INDEX")
    VGA = constant("VFIO_PCI_VGA_REGION_INDEX")


class PciIrq(enum.IntEnum):
    """The types of a PCI device's interrupts.

    Only one of INTX, MSI and MSIX can be enabled at a time.

    Source: include/uapi/linux/vfio.h, VFIO_PCI_*_IRQ_INDEX
    """

    INTX = constant("VFIO_PCI_INTX_IRQ_INDEX")
    MSI = constant("VFIO_PCI_MSI_IRQ_INDEX")
    MSIX = constant("VFIO_PCI_MSIX_IRQ_INDEX")
    ERROR = constant("VFIO_PCI_ERR_IRQ_INDEX")
    """The device reported an uncorrected error. Before Linux 7.3 only PCIe devices have this."""
    REQUEST = constant("VFIO_PCI_REQ_IRQ_INDEX")
    """The kernel wants the device back, and waits until the process closes it."""


class DeviceFlags(enum.IntFlag):
    """The kind of a device, and what it supports.

    Source: include/uapi/linux/vfio.h, VFIO_DEVICE_FLAGS_*
    """

    RESET = constant("VFIO_DEVICE_FLAGS_RESET")
    PCI = constant("VFIO_DEVICE_FLAGS_PCI")
    PLATFORM = constant("VFIO_DEVICE_FLAGS_PLATFORM")
    AMBA = constant("VFIO_DEVICE_FLAGS_AMBA")
    CCW = constant("VFIO_DEVICE_FLAGS_CCW")
    AP = constant("VFIO_DEVICE_FLAGS_AP")
    FSL_MC = constant("VFIO_DEVICE_FLAGS_FSL_MC")
    CAPABILITIES = constant("VFIO_DEVICE_FLAGS_CAPS")
    CDX = constant("VFIO_DEVICE_FLAGS_CDX")


class RegionFlags(enum.IntFlag):
    """The ways in which a region can be accessed.

    Source: include/uapi/linux/vfio.h, VFIO_REGION_INFO_FLAG_*
    """

    READ = constant("VFIO_REGION_INFO_FLAG_READ")
    WRITE = constant("VFIO_REGION_INFO_FLAG_WRITE")
    MMAP = constant("VFIO_REGION_INFO_FLAG_MMAP")
    CAPABILITIES = constant("VFIO_REGION_INFO_FLAG_CAPS")


class IrqFlags(enum.IntFlag):
    """The properties of interrupts of one type.

    Source: include/uapi/linux/vfio.h, VFIO_IRQ_INFO_*
    """

    EVENTFD = constant("VFIO_IRQ_INFO_EVENTFD")
    MASKABLE = constant("VFIO_IRQ_INFO_MASKABLE")
    AUTOMASKED = constant("VFIO_IRQ_INFO_AUTOMASKED")
    """The kernel masks the interrupt when it is signalled; it must be unmasked for the next one."""
    NORESIZE = constant("VFIO_IRQ_INFO_NORESIZE")
    """Vectors cannot be enabled later: all of them must be enabled by the first call."""


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """The kernel's description of a device.

    Attributes:
        flags: the kind of the device, and whether it can be reset.
        regions: the number of region indexes; the device may lack some of these regions.
        irqs: the number of interrupt types; the device may lack interrupts of some types.
        atomics: the widths of the atomic operations that the device can perform on memory.
        capabilities: the capability chain, undecoded.
    """

    flags: DeviceFlags
    regions: int
    irqs: int
    atomics: AtomicWidths
    capabilities: tuple[Capability, ...]

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Parse a struct vfio_device_info and the data after it.

        Raises:
            CapabilityError: the capability chain is malformed.
            ValueError: the data is cut short.
        """
        reply = _DEVICE.unpack(data)
        flags = DeviceFlags(reply.integer("flags"))
        chain: tuple[Capability, ...] = ()
        if DeviceFlags.CAPABILITIES in flags:
            chain = capabilities.walk(data, reply.integer("cap_offset"), _DEVICE.size)
        return cls(
            flags,
            reply.integer("num_regions"),
            reply.integer("num_irqs"),
            capabilities.atomic_widths(chain),
            chain,
        )


@dataclass(frozen=True, slots=True)
class RegionInfo:
    """The kernel's description of a region.

    Attributes:
        index: the region's index; for PCI devices see `PciRegion`.
        flags: the ways in which the region can be accessed.
        size: the size in bytes; 0 if the device does not have this region.
        offset: the offset in the device's file at which the region begins.
        areas: the parts of the region that may be mapped; empty if no part may be mapped.
        type: the type of the region; None for the fixed regions in `PciRegion`.
        msix_mappable: whether the part with the MSI-X table may be mapped too. In any case do not
            write to the table; `Irq` sets up interrupts.
        capabilities: the capability chain, undecoded.
    """

    index: int
    flags: RegionFlags
    size: int
    offset: int
    areas: tuple[Area, ...]
    type: RegionType | None
    msix_mappable: bool
    capabilities: tuple[Capability, ...]

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Parse a struct vfio_region_info and the data after it.

        Raises:
            CapabilityError: the capability chain is malformed.
            ValueError: the data is cut short.
        """
        reply = _REGION.unpack(data)
        flags = RegionFlags(reply.integer("flags"))
        size = reply.integer("size")
        chain: tuple[Capability, ...] = ()
        if RegionFlags.CAPABILITIES in flags:
            chain = capabilities.walk(data, reply.integer("cap_offset"), _REGION.size)
        areas = capabilities.sparse_areas(chain, size)
        if RegionFlags.MMAP not in flags or not size:
            areas = ()
        elif areas is None:
            areas = (Area(0, size),)
        return cls(
            reply.integer("index"),
            flags,
            size,
            reply.integer("offset"),
            areas,
            capabilities.region_type(chain),
            capabilities.is_msix_mappable(chain),
            chain,
        )


@dataclass(frozen=True, slots=True)
class IrqInfo:
    """The kernel's description of a device's interrupts of one type.

    Attributes:
        index: the type; for PCI devices see `PciIrq`.
        flags: the properties of the interrupts.
        count: the number of vectors; 0 if the device has no interrupts of this type.
    """

    index: int
    flags: IrqFlags
    count: int
