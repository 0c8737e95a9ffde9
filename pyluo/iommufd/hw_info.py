"""The capabilities of a device's IOMMU, as its driver reports them."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from pyluo._sys import Struct, constant

__all__ = [
    "AmdInfo",
    "HwCapability",
    "HwInfo",
    "HwInfoType",
    "SmmuV3Info",
    "Tegra241Info",
    "VtdInfo",
    "decode",
]

_VTD = Struct("iommu_hw_info_vtd")
_SMMUV3 = Struct("iommu_hw_info_arm_smmuv3")
_TEGRA241 = Struct("iommu_hw_info_tegra241_cmdqv")
_AMD = Struct("iommu_hw_info_amd")

_ERRATUM_772415 = constant("IOMMU_HW_INFO_VTD_ERRATA_772415_SPR17")
_ERRATUM_REPEAT = constant("IOMMU_HW_INFO_ARM_SMMUV3_ERRATA_REPEAT_TLBI_CFGI")


class HwInfoType(enum.IntEnum):
    """The format of the driver-specific data in `HwInfo`.

    Source: include/uapi/linux/iommufd.h, enum iommu_hw_info_type
    """

    NONE = constant("IOMMU_HW_INFO_TYPE_NONE")
    INTEL_VTD = constant("IOMMU_HW_INFO_TYPE_INTEL_VTD")
    ARM_SMMUV3 = constant("IOMMU_HW_INFO_TYPE_ARM_SMMUV3")
    TEGRA241_CMDQV = constant("IOMMU_HW_INFO_TYPE_TEGRA241_CMDQV")
    AMD = constant("IOMMU_HW_INFO_TYPE_AMD")


class HwCapability(enum.IntFlag):
    """Capabilities that an IOMMU of any vendor may have.

    Source: include/uapi/linux/iommufd.h, enum iommufd_hw_capabilities
    """

    DIRTY_TRACKING = constant("IOMMU_HW_CAP_DIRTY_TRACKING")
    PASID_EXECUTE = constant("IOMMU_HW_CAP_PCI_PASID_EXEC")
    PASID_PRIVILEGED = constant("IOMMU_HW_CAP_PCI_PASID_PRIV")
    ATS_NOT_SUPPORTED = constant("IOMMU_HW_CAP_PCI_ATS_NOT_SUPPORTED")


def _bits(value: int, high: int, low: int) -> int:
    """Return the field of a register from bit `low` to bit `high`, both included."""
    return value >> low & (1 << high - low + 1) - 1


@dataclass(frozen=True, slots=True)
class VtdInfo:
    """An Intel VT-d remapping unit.

    The docstrings of the properties begin with the field's name in the VT-d specification,
    sections 11.4.2 and 11.4.3.

    Attributes:
        cap: the capability register.
        ecap: the extended capability register.
        no_read_only_nesting: whether erratum 772415 is present: the parent HWPT of a nested one
            must have no read-only mappings.

    Source: include/uapi/linux/iommufd.h, struct iommu_hw_info_vtd. Linux 6.6.
    """

    cap: int
    ecap: int
    no_read_only_nesting: bool

    @property
    def domains(self) -> int:
        """ND: the number of domains."""
        return 1 << 4 + 2 * _bits(self.cap, 2, 0)

    @property
    def caching_mode(self) -> bool:
        """CM: the unit may also cache entries that are not present, as emulated units do."""
        return bool(_bits(self.cap, 7, 7))

    @property
    def second_stage_widths(self) -> tuple[int, ...]:
        """SAGAW: the address widths that second-stage page tables can have, in bits."""
        widths = {1: 39, 2: 48, 3: 57}
        sagaw = _bits(self.cap, 12, 8)
        return tuple(width for bit, width in widths.items() if sagaw >> bit & 1)

    @property
    def max_address_width(self) -> int:
        """MGAW: the width of the largest address that a device can use, in bits."""
        return _bits(self.cap, 21, 16) + 1

    @property
    def second_stage_huge_pages(self) -> tuple[int, ...]:
        """SSLPS: the sizes of huge pages in the second stage, in bytes."""
        sizes = {0: 1 << 21, 1: 1 << 30}
        supported = _bits(self.cap, 37, 34)
        return tuple(size for bit, size in sizes.items() if supported >> bit & 1)

    @property
    def first_stage_1gib_pages(self) -> bool:
        """FS1GP: first-stage page tables can map pages of 1 GiB."""
        return bool(_bits(self.cap, 56, 56))

    @property
    def first_stage_5_levels(self) -> bool:
        """FS5LP: first-stage page tables can have 5 levels."""
        return bool(_bits(self.cap, 60, 60))

    @property
    def queued_invalidation(self) -> bool:
        """QI: invalidation commands can be given through a queue."""
        return bool(_bits(self.ecap, 1, 1))

    @property
    def device_tlbs(self) -> bool:
        """DT: devices can cache translations in TLBs of their own (ATS)."""
        return bool(_bits(self.ecap, 2, 2))

    @property
    def interrupt_remapping(self) -> bool:
        """IR: the unit can remap interrupts."""
        return bool(_bits(self.ecap, 3, 3))

    @property
    def pass_through(self) -> bool:
        """PT: the unit can pass the requests of a device through without translation."""
        return bool(_bits(self.ecap, 6, 6))

    @property
    def snoop_control(self) -> bool:
        """SC: page tables can force DMA to snoop the processors' caches."""
        return bool(_bits(self.ecap, 7, 7))

    @property
    def nested_translation(self) -> bool:
        """NEST: a guest's page table can be nested on a page table of the host."""
        return bool(_bits(self.ecap, 26, 26))

    @property
    def page_requests(self) -> bool:
        """PRS: devices can send page requests."""
        return bool(_bits(self.ecap, 29, 29))

    @property
    def pasid_bits(self) -> int:
        """PSS: the width of a PASID in bits; 0 if PASIDs are not supported."""
        return _bits(self.ecap, 39, 35) + 1 if _bits(self.ecap, 40, 40) else 0

    @property
    def scalable_mode(self) -> bool:
        """SMTS: the unit supports scalable mode."""
        return bool(_bits(self.ecap, 43, 43))

    @property
    def second_stage_dirty_tracking(self) -> bool:
        """SSADS: second-stage page tables have bits for accessed and for written pages."""
        return bool(_bits(self.ecap, 45, 45))

    @property
    def second_stage(self) -> bool:
        """SSTS: scalable mode supports second-stage translation."""
        return bool(_bits(self.ecap, 46, 46))

    @property
    def first_stage(self) -> bool:
        """FSTS: scalable mode supports first-stage translation."""
        return bool(_bits(self.ecap, 47, 47))


@dataclass(frozen=True, slots=True)
class SmmuV3Info:
    """An ARM SMMUv3.

    There are properties only for the register fields that the kernel allows userspace to rely on.
    Their docstrings begin with the field's name in the SMMUv3 specification.

    Attributes:
        idr: the identification registers 0 to 5.
        iidr: the implementation identification register.
        aidr: the architecture identification register.
        repeat_invalidations: whether erratum T264-SMMU-3 is present: each invalidation command must
            be given twice.

    Source: include/uapi/linux/iommufd.h, struct iommu_hw_info_arm_smmuv3. Linux 6.13.
    """

    idr: tuple[int, ...]
    iidr: int
    aidr: int
    repeat_invalidations: bool

    @property
    def two_level_stream_table(self) -> bool:
        """ST_LEVEL: the stream table can have two levels."""
        return _bits(self.idr[0], 28, 27) == 1

    @property
    def termination_model(self) -> int:
        """TERM_MODEL: 1 if a faulting transaction is always aborted."""
        return _bits(self.idr[0], 26, 26)

    @property
    def stall_model(self) -> int:
        """STALL_MODEL: what faults can do: 0 stall or terminate, 1 only terminate, 2 only stall."""
        return _bits(self.idr[0], 25, 24)

    @property
    def table_endianness(self) -> int:
        """TTENDIAN: the endianness of translation tables: 0 mixed, 2 little, 3 big."""
        return _bits(self.idr[0], 22, 21)

    @property
    def two_level_context_table(self) -> bool:
        """CD2L: the table of context descriptors can have two levels."""
        return bool(_bits(self.idr[0], 19, 19))

    @property
    def asid_bits(self) -> int:
        """ASID16: the width of an ASID in bits: 8 or 16."""
        return 16 if _bits(self.idr[0], 12, 12) else 8

    @property
    def table_formats(self) -> int:
        """TTF: the formats of translation tables: 1 AArch32, 2 AArch64, 3 both."""
        return _bits(self.idr[0], 3, 2)

    @property
    def stream_id_bits(self) -> int:
        """SIDSIZE: the width of a stream id in bits."""
        return _bits(self.idr[1], 5, 0)

    @property
    def substream_id_bits(self) -> int:
        """SSIDSIZE: the width of a substream id in bits; 0 if they are not supported."""
        return _bits(self.idr[1], 10, 6)

    @property
    def break_before_make_level(self) -> int:
        """BBML: the level of support for changing block sizes without break-before-make."""
        return _bits(self.idr[3], 12, 11)

    @property
    def range_invalidation(self) -> bool:
        """RIL: one invalidation command can name a range of addresses."""
        return bool(_bits(self.idr[3], 10, 10))

    @property
    def virtual_address_extension(self) -> int:
        """VAX: 0 for virtual addresses of 48 bits, 1 for 52 bits."""
        return _bits(self.idr[5], 11, 10)

    @property
    def granules(self) -> tuple[int, ...]:
        """GRAN4K, GRAN16K, GRAN64K: the supported page sizes, in bytes."""
        sizes = {4: 4 << 10, 5: 16 << 10, 6: 64 << 10}
        return tuple(size for bit, size in sizes.items() if self.idr[5] >> bit & 1)

    @property
    def descriptors_of_52_bits(self) -> bool:
        """DS: translation table descriptors can contain addresses of 52 bits."""
        return bool(_bits(self.idr[5], 7, 7))


@dataclass(frozen=True, slots=True)
class Tegra241Info:
    """The virtual command queues of an NVIDIA Tegra241 (CMDQ-V).

    Attributes:
        version: the version of the hardware.
        queues: the number of virtual command queues of one virtual interface.
        stream_ids: the number of virtual stream ids that one virtual interface can translate.

    Source: include/uapi/linux/iommufd.h, struct iommu_hw_info_tegra241_cmdqv. Linux 6.17.
    """

    version: int
    queues: int
    stream_ids: int


@dataclass(frozen=True, slots=True)
class AmdInfo:
    """An AMD IOMMU.

    There are properties only for the register fields that the kernel shows to guests. Their
    docstrings begin with the field's name in AMD's specification.

    Attributes:
        efr: the extended feature register.
        efr2: the extended feature 2 register.

    Source: include/uapi/linux/iommufd.h, struct iommu_hw_info_amd. Linux 7.0.
    """

    efr: int
    efr2: int

    @property
    def page_requests(self) -> bool:
        """PPRSup: devices can send page requests."""
        return bool(_bits(self.efr, 1, 1))

    @property
    def guest_translation(self) -> bool:
        """GTSup: the IOMMU can use page tables of guests."""
        return bool(_bits(self.efr, 4, 4))

    @property
    def guest_apic(self) -> bool:
        """GASup: the IOMMU can deliver interrupts to a guest's virtual APIC."""
        return bool(_bits(self.efr, 7, 7))

    @property
    def guest_levels(self) -> int:
        """GATS: the most levels that a guest's page table can have: 4, 5 or 6."""
        return 4 + _bits(self.efr, 13, 12)

    @property
    def cr3_levels(self) -> int:
        """GLX: the most levels that the table of a guest's CR3 values can have: 1, 2 or 3."""
        return 1 + _bits(self.efr, 15, 14)

    @property
    def pasid_bits(self) -> int:
        """PASmax: the width of a PASID in bits."""
        return _bits(self.efr, 36, 32) + 1

    @property
    def guest_io(self) -> bool:
        """GioSup: the IOMMU supports guest I/O protection."""
        return bool(_bits(self.efr, 48, 48))

    @property
    def enhanced_page_requests(self) -> bool:
        """EPHSup: the IOMMU supports enhanced handling of page requests."""
        return bool(_bits(self.efr, 50, 50))


DriverInfo = VtdInfo | SmmuV3Info | Tegra241Info | AmdInfo


@dataclass(frozen=True, slots=True)
class HwInfo:
    """The capabilities of the IOMMU that a device is behind.

    Attributes:
        data_type: the format of `data`; a plain number if pyluo does not know the format.
        capabilities: the capabilities that an IOMMU of any vendor may have.
        pasid_bits: the width of this device's PASIDs in bits; 0 if it has no PASIDs.
        data: the driver-specific data, as the kernel returned it.
        driver: the decoded `data`; None if it is empty or pyluo does not know its format.

    Source: include/uapi/linux/iommufd.h, struct iommu_hw_info. Linux 6.6.
    """

    data_type: HwInfoType | int
    capabilities: HwCapability
    pasid_bits: int
    data: bytes
    driver: DriverInfo | None


def decode(data_type: int, data: bytes) -> DriverInfo | None:
    """Decode driver-specific data; return None if pyluo does not know the format.

    Raises:
        ValueError: the data is shorter than the struct of this format.
    """
    if data_type == HwInfoType.INTEL_VTD:
        raw = _VTD.unpack(data)
        erratum = bool(raw.integer("flags") & _ERRATUM_772415)
        return VtdInfo(raw.integer("cap_reg"), raw.integer("ecap_reg"), erratum)
    if data_type == HwInfoType.ARM_SMMUV3:
        raw = _SMMUV3.unpack(data)
        erratum = bool(raw.integer("flags") & _ERRATUM_REPEAT)
        return SmmuV3Info(raw.integers("idr"), raw.integer("iidr"), raw.integer("aidr"), erratum)
    if data_type == HwInfoType.TEGRA241_CMDQV:
        raw = _TEGRA241.unpack(data)
        return Tegra241Info(
            raw.integer("version"), 1 << raw.integer("log2vcmdqs"), 1 << raw.integer("log2vsids")
        )
    if data_type == HwInfoType.AMD:
        raw = _AMD.unpack(data)
        return AmdInfo(raw.integer("efr"), raw.integer("efr2"))
    return None
