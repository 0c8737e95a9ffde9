"""iommufd: I/O address spaces and hardware page tables that userspace manages.

An IOAS (I/O address space) maps memory at IOVAs (I/O virtual addresses), at which devices reach the
memory by DMA. A HWPT (hardware page table) has these mappings in the format of one IOMMU.
"""

from __future__ import annotations

from pyluo.iommufd.context import DEVICE, IommuFd
from pyluo.iommufd.device import IommuDevice
from pyluo.iommufd.events import (
    FaultAccess,
    FaultQueue,
    PageFault,
    VirtualEvent,
    VirtualEventQueue,
    VirtualEventType,
)
from pyluo.iommufd.hw_info import (
    AmdInfo,
    HwCapability,
    HwInfo,
    HwInfoType,
    SmmuV3Info,
    Tegra241Info,
    VtdInfo,
)
from pyluo.iommufd.hwpt import (
    AmdGuest,
    DirtyBitmap,
    HwptData,
    HwptFlags,
    Invalidation,
    NestedHwpt,
    PagingHwpt,
    RawData,
    SmmuV3Command,
    SmmuV3Ste,
    VtdInvalidate,
    VtdStage1,
    VtdStage1Flags,
    can_invalidate,
)
from pyluo.iommufd.ioas import Ioas
from pyluo.iommufd.iova import Access, IovaRange, IovaRanges, Mapping
from pyluo.iommufd.objects import Accounting, IommuContext, IommuObject
from pyluo.iommufd.viommu import (
    HwQueue,
    HwQueueType,
    Vdevice,
    Viommu,
    ViommuMapping,
    ViommuType,
)

__all__ = [
    "DEVICE",
    "Access",
    "Accounting",
    "AmdGuest",
    "AmdInfo",
    "DirtyBitmap",
    "FaultAccess",
    "FaultQueue",
    "HwCapability",
    "HwInfo",
    "HwInfoType",
    "HwQueue",
    "HwQueueType",
    "HwptData",
    "HwptFlags",
    "Invalidation",
    "Ioas",
    "IommuContext",
    "IommuDevice",
    "IommuFd",
    "IommuObject",
    "IovaRange",
    "IovaRanges",
    "Mapping",
    "NestedHwpt",
    "PageFault",
    "PagingHwpt",
    "RawData",
    "SmmuV3Command",
    "SmmuV3Info",
    "SmmuV3Ste",
    "Tegra241Info",
    "Vdevice",
    "Viommu",
    "ViommuMapping",
    "ViommuType",
    "VirtualEvent",
    "VirtualEventQueue",
    "VirtualEventType",
    "VtdInfo",
    "VtdInvalidate",
    "VtdStage1",
    "VtdStage1Flags",
    "can_invalidate",
]
