"""VFIO: devices that userspace drives through character devices and an iommufd."""

from __future__ import annotations

from pyluo.registers import Registers
from pyluo.vfio.bus import DriverBinding, PciDevice
from pyluo.vfio.capabilities import (
    Area,
    AtomicWidths,
    Capability,
    CapabilityError,
    RegionType,
)
from pyluo.vfio.config import (
    Bar,
    Command,
    ConfigSpace,
    PciCapability,
    PciCapabilityId,
    PciExtendedCapabilityId,
    Status,
)
from pyluo.vfio.device import VfioDevice
from pyluo.vfio.dma_logging import DmaLogging
from pyluo.vfio.features import Feature, Features, feature_data
from pyluo.vfio.info import (
    DeviceFlags,
    DeviceInfo,
    IrqFlags,
    IrqInfo,
    PciIrq,
    PciRegion,
    RegionFlags,
    RegionInfo,
)
from pyluo.vfio.irqs import Irq
from pyluo.vfio.kvm import KvmVfio
from pyluo.vfio.low_power import LowPower
from pyluo.vfio.migration import (
    Migration,
    MigrationData,
    MigrationFlags,
    MigrationState,
    PrecopyInfo,
)
from pyluo.vfio.regions import Region, RegionMapping
from pyluo.vfio.reset import AffectedDevice, HotResetInfo

__all__ = [
    "AffectedDevice",
    "Area",
    "AtomicWidths",
    "Bar",
    "Capability",
    "CapabilityError",
    "Command",
    "ConfigSpace",
    "DeviceFlags",
    "DeviceInfo",
    "DmaLogging",
    "DriverBinding",
    "Feature",
    "Features",
    "HotResetInfo",
    "Irq",
    "IrqFlags",
    "IrqInfo",
    "KvmVfio",
    "LowPower",
    "Migration",
    "MigrationData",
    "MigrationFlags",
    "MigrationState",
    "PciCapability",
    "PciCapabilityId",
    "PciDevice",
    "PciExtendedCapabilityId",
    "PciIrq",
    "PciRegion",
    "PrecopyInfo",
    "Region",
    "RegionFlags",
    "RegionInfo",
    "RegionMapping",
    "RegionType",
    "Registers",
    "Status",
    "VfioDevice",
    "feature_data",
]
