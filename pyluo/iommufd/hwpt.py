"""Hardware page tables, with which an IOMMU translates the DMA of the devices attached to them."""

from __future__ import annotations

import enum
import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from pyluo._sys import Struct, constant
from pyluo.errors import InvalidationError
from pyluo.iommufd.objects import IommuObject
from pyluo.iommufd.requests import iommu_ioctl

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pyluo.iommufd.ioas import Ioas
    from pyluo.iommufd.iova import IovaRange
    from pyluo.iommufd.objects import IommuContext

__all__ = [
    "AmdGuest",
    "DirtyBitmap",
    "HwptData",
    "HwptFlags",
    "Invalidation",
    "NestedHwpt",
    "PagingHwpt",
    "RawData",
    "SmmuV3Command",
    "SmmuV3Ste",
    "VtdInvalidate",
    "VtdStage1",
    "VtdStage1Flags",
    "can_invalidate",
    "invalidate",
]

_SET_DIRTY_TRACKING = iommu_ioctl("IOMMU_HWPT_SET_DIRTY_TRACKING", "iommu_hwpt_set_dirty_tracking")
_GET_DIRTY_BITMAP = iommu_ioctl(
    "IOMMU_HWPT_GET_DIRTY_BITMAP",
    "iommu_hwpt_get_dirty_bitmap",
    {
        errno.ENOENT: (
            "Part of the range is not mapped: make one call for each run of adjacent mappings"
        ),
    },
)
_INVALIDATE = iommu_ioctl("IOMMU_HWPT_INVALIDATE", "iommu_hwpt_invalidate")

_ENABLE = constant("IOMMU_HWPT_DIRTY_TRACKING_ENABLE")
_NO_CLEAR = constant("IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR")
_VTD_STAGE1 = Struct("iommu_hwpt_vtd_s1")
_SMMUV3_STE = Struct("iommu_hwpt_arm_smmuv3")
_AMD_GUEST = Struct("iommu_hwpt_amd_guest")
_VTD_INVALIDATE = Struct("iommu_hwpt_vtd_s1_invalidate")
_SMMUV3_COMMAND = Struct("iommu_viommu_arm_smmuv3_invalidate")


class HwptFlags(enum.IntFlag):
    """The uses that a HWPT supports.

    Source: include/uapi/linux/iommufd.h, enum iommufd_hwpt_alloc_flags
    """

    NEST_PARENT = constant("IOMMU_HWPT_ALLOC_NEST_PARENT")
    """Can be the parent (stage 2) of nested page tables. Linux 6.7."""
    DIRTY_TRACKING = constant("IOMMU_HWPT_ALLOC_DIRTY_TRACKING")
    """Can track writes by devices; the IOMMU of each attached device must support it. Linux 6.7."""
    PASID = constant("IOMMU_HWPT_ALLOC_PASID")
    """Can be attached to a PASID of a device. Linux 6.15."""


class HwptData(Protocol):
    """A driver's parameters for a page table that the guest manages."""

    @property
    def data_type(self) -> int:
        """The type of the struct, a value of enum iommu_hwpt_data_type."""

    def pack(self) -> bytes:
        """Return the bytes of the driver's struct."""


class Invalidation(Protocol):
    """One entry of a request to invalidate an IOMMU's caches."""

    @property
    def data_type(self) -> int:
        """The type of the struct, a value of enum iommu_hwpt_invalidate_data_type."""

    def pack(self) -> bytes:
        """Return the bytes of the driver's struct."""


@dataclass(frozen=True, slots=True)
class RawData:
    """A driver's struct for which pyluo has no class: for a HWPT, a vIOMMU or an invalidation.

    Attributes:
        data_type: the kernel's number for the type of the struct.
        data: the bytes of the struct.
    """

    data_type: int
    data: bytes

    def pack(self) -> bytes:
        """Return the bytes of the struct."""
        return self.data


class VtdStage1Flags(enum.IntFlag):
    """Attributes of the entries of a VT-d stage-1 page table.

    Source: include/uapi/linux/iommufd.h, enum iommu_hwpt_vtd_s1_flags
    """

    SUPERVISOR_REQUEST = constant("IOMMU_VTD_S1_SRE")
    EXTENDED_ACCESS = constant("IOMMU_VTD_S1_EAFE")
    WRITE_PROTECT = constant("IOMMU_VTD_S1_WPE")


_NO_STAGE1_FLAGS = VtdStage1Flags(0)


@dataclass(frozen=True, slots=True)
class VtdStage1:
    """A VT-d stage-1 page table of a guest.

    Attributes:
        page_table: the address of the table, in the address space of the parent HWPT.
        address_width: the address width in bits.
        flags: the attributes of the entries.

    Source: include/uapi/linux/iommufd.h, struct iommu_hwpt_vtd_s1. Linux 6.7.
    """

    page_table: int
    address_width: int
    flags: VtdStage1Flags = _NO_STAGE1_FLAGS

    @property
    def data_type(self) -> int:
        """IOMMU_HWPT_DATA_VTD_S1."""
        return constant("IOMMU_HWPT_DATA_VTD_S1")

    def pack(self) -> bytes:
        """Return the kernel's struct."""
        return bytes(
            _VTD_STAGE1.pack(
                flags=int(self.flags), pgtbl_addr=self.page_table, addr_width=self.address_width
            )
        )


@dataclass(frozen=True, slots=True)
class SmmuV3Ste:
    """The first two words of an SMMUv3 stream table entry.

    Source: include/uapi/linux/iommufd.h, struct iommu_hwpt_arm_smmuv3. Linux 6.13.
    """

    words: tuple[int, int]

    @property
    def data_type(self) -> int:
        """IOMMU_HWPT_DATA_ARM_SMMUV3."""
        return constant("IOMMU_HWPT_DATA_ARM_SMMUV3")

    def pack(self) -> bytes:
        """Return the kernel's struct."""
        return bytes(_SMMUV3_STE.pack(ste=self.words))


@dataclass(frozen=True, slots=True)
class AmdGuest:
    """A guest's device table entry for an AMD IOMMU.

    Source: include/uapi/linux/iommufd.h, struct iommu_hwpt_amd_guest. Linux 7.0.
    """

    device_table_entry: tuple[int, int, int, int]

    @property
    def data_type(self) -> int:
        """IOMMU_HWPT_DATA_AMD_GUEST."""
        return constant("IOMMU_HWPT_DATA_AMD_GUEST")

    def pack(self) -> bytes:
        """Return the kernel's struct."""
        return bytes(_AMD_GUEST.pack(dte=self.device_table_entry))


@dataclass(frozen=True, slots=True)
class VtdInvalidate:
    """A range of a VT-d stage-1 page table that has changed.

    Attributes:
        address: the start of the range, a multiple of 4096 bytes.
        pages: the number of pages of 4096 bytes; 2^64 - 1 pages from address 0 stand for all
            addresses.
        leaf_only: whether to invalidate only cached leaf entries, and not cached upper levels.

    Source: include/uapi/linux/iommufd.h, struct iommu_hwpt_vtd_s1_invalidate. Linux 6.8.
    """

    address: int
    pages: int
    leaf_only: bool = False

    @property
    def data_type(self) -> int:
        """IOMMU_HWPT_INVALIDATE_DATA_VTD_S1."""
        return constant("IOMMU_HWPT_INVALIDATE_DATA_VTD_S1")

    def pack(self) -> bytes:
        """Return the kernel's struct."""
        flags = constant("IOMMU_VTD_INV_FLAGS_LEAF") if self.leaf_only else 0
        return bytes(_VTD_INVALIDATE.pack(addr=self.address, npages=self.pages, flags=flags))


@dataclass(frozen=True, slots=True)
class SmmuV3Command:
    """An invalidation command that the guest put into its SMMUv3 command queue.

    Source: include/uapi/linux/iommufd.h, struct iommu_viommu_arm_smmuv3_invalidate. Linux 6.13.
    """

    words: tuple[int, int]

    @property
    def data_type(self) -> int:
        """IOMMU_VIOMMU_INVALIDATE_DATA_ARM_SMMUV3."""
        return constant("IOMMU_VIOMMU_INVALIDATE_DATA_ARM_SMMUV3")

    def pack(self) -> bytes:
        """Return the kernel's struct."""
        return bytes(_SMMUV3_COMMAND.pack(cmd=self.words))


@dataclass(frozen=True, slots=True)
class DirtyBitmap:
    """The pages of a range that devices have written to.

    Iterating yields the IOVA of each such page; ``iova in bitmap`` tells whether the page at an
    IOVA was written to.

    Attributes:
        start: the IOVA of the first page of the range.
        page_size: the size of a page in bytes.
        pages: the number of pages in the range.
        bits: one bit per page; the lowest bit of the first byte stands for the first page.
    """

    start: int
    page_size: int
    pages: int
    bits: bytes

    @staticmethod
    def make_buffer(wanted: IovaRange, page_size: int) -> tuple[bytearray, int]:
        """Return a buffer for the bits of a range, and the number of pages in the range.

        Raises:
            ValueError: the page size is not a power of two.
        """
        if page_size < 1 or page_size & (page_size - 1):
            raise ValueError(f"a page of {page_size} bytes: not a power of two")
        pages = -(-wanted.length // page_size)
        return bytearray(-(-pages // 64) * 8), pages  # the kernel writes whole words

    def __contains__(self, iova: int) -> bool:
        page = (iova - self.start) // self.page_size
        return 0 <= page < self.pages and bool(self.bits[page // 8] >> page % 8 & 1)

    def __iter__(self) -> Iterator[int]:
        """Yield the IOVA of each dirty page, in order."""
        for index, byte in enumerate(self.bits):
            while byte:
                lowest = (byte & -byte).bit_length() - 1
                yield self.start + (index * 8 + lowest) * self.page_size
                byte &= byte - 1

    def __len__(self) -> int:
        """Return the number of dirty pages."""
        return int.from_bytes(self.bits, "little").bit_count()


class PagingHwpt(IommuObject):
    """A page table that the kernel fills with the mappings of an IOAS.

    `IommuDevice.alloc_hwpt` creates one. Linux 6.6.
    """

    noun = "HWPT"

    def __init__(self, iommufd: IommuContext, object_id: int, ioas: Ioas) -> None:
        super().__init__(iommufd, object_id)
        self._ioas = ioas

    @property
    def ioas(self) -> Ioas:
        """The IOAS whose mappings are in the page table."""
        return self._ioas

    def set_dirty_tracking(self, enabled: bool) -> None:
        """Start or stop tracking writes by devices; starting clears all dirty bits.

        Raises:
            IommuUnsupportedError: the HWPT was not allocated with `HwptFlags.DIRTY_TRACKING`
                (EOPNOTSUPP).

        Source: include/uapi/linux/iommufd.h, IOMMU_HWPT_SET_DIRTY_TRACKING. Linux 6.7.
        """
        _SET_DIRTY_TRACKING(
            self.iommufd.fileno(), str(self), hwpt_id=self.id, flags=_ENABLE if enabled else 0
        )

    def dirty_bitmap(
        self, wanted: IovaRange, *, page_size: int = 4096, clear: bool = True
    ) -> DirtyBitmap:
        """Return the pages of a range that devices have written to.

        Writes count since tracking started or the bits were last cleared.

        Args:
            wanted: the range; its start and length are multiples of `page_size`.
            page_size: the number of bytes that one bit stands for, a power of two; it may be larger
                than a page of the IOMMU.
            clear: whether to clear the returned bits. If false, the kernel also skips the IOTLB
                flush; use this for memory that is about to be unmapped.

        Raises:
            IommuUnsupportedError: the HWPT was not allocated with `HwptFlags.DIRTY_TRACKING`
                (EOPNOTSUPP).
            IommuError: the range or the page size is invalid for this HWPT (EINVAL); part of the
                range is not mapped, and no bits were cleared (ENOENT).
            ValueError: the page size is not a power of two.

        Source: include/uapi/linux/iommufd.h, IOMMU_HWPT_GET_DIRTY_BITMAP. Linux 6.7.
        """
        bits, pages = DirtyBitmap.make_buffer(wanted, page_size)
        subject = f"{self}: {wanted} by {page_size} bytes"
        # At a hole in the mappings Linux 7.3 stops without an error, so that all pages behind the
        # hole would look clean.
        if not self._ioas.maps(wanted):
            raise _GET_DIRTY_BITMAP.error(errno.ENOENT, subject)
        _GET_DIRTY_BITMAP(
            self.iommufd.fileno(),
            subject,
            hwpt_id=self.id,
            flags=0 if clear else _NO_CLEAR,
            iova=wanted.start,
            length=wanted.length,
            page_size=page_size,
            data=bits,
        )
        return DirtyBitmap(wanted.start, page_size, pages, bytes(bits))


class NestedHwpt(IommuObject):
    """A page table that a guest manages, and that translates to addresses of a parent HWPT.

    `IommuDevice.alloc_nested_hwpt` creates one. Linux 6.7.
    """

    noun = "nested HWPT"

    def invalidate(self, entries: Sequence[Invalidation]) -> int:
        """Invalidate cached entries of this page table; see `hwpt.invalidate`. Linux 6.8."""
        return invalidate(self, entries)


def invalidate(target: IommuObject, entries: Sequence[Invalidation]) -> int:
    """Invalidate entries of a guest's page table in the caches of an IOMMU.

    Args:
        target: a nested HWPT; or a vIOMMU, for commands that are not specific to one page table.
        entries: the invalidations, all of one type; they are carried out in order.

    Returns:
        The number of entries that were carried out, which is the number of all entries.

    Raises:
        InvalidationError: an entry was refused. The entry is not valid (EINVAL), this IOMMU does
            not know its type (EOPNOTSUPP), or the IOMMU reported an error for a command (EIO). The
            entries before this one were carried out; their number is the attribute `handled`.
        ValueError: the entries are of several types, or there are none.

    Source: include/uapi/linux/iommufd.h, IOMMU_HWPT_INVALIDATE. Linux 6.8; a vIOMMU since 6.13.
    """
    packed = [entry.pack() for entry in entries]
    kinds = {(entry.data_type, len(data)) for entry, data in zip(entries, packed, strict=True)}
    if len(kinds) != 1:
        raise ValueError("the entries of one invalidation must all be of one kind")
    [(data_type, length)] = kinds
    reply = _INVALIDATE.attempt(
        target.iommufd.fileno(),
        hwpt_id=target.id,
        data_uptr=b"".join(packed),
        data_type=data_type,
        entry_len=length,
        entry_num=len(packed),
    )
    if reply.errno in (errno.ENOTTY, errno.E2BIG):  # this kernel does not know the request
        raise _INVALIDATE.error(reply.errno, str(target))
    handled = reply.integer("entry_num")
    if reply.errno:
        # The driver ran out of memory before the first entry, and left entry_num unchanged.
        if handled == len(packed):
            handled = 0
        error = InvalidationError(reply.errno, _INVALIDATE.name, f"{target}, entry {handled}")
        error.handled = handled
        raise error
    return handled


def can_invalidate(target: IommuObject, data_type: int) -> bool:
    """Return whether a nested HWPT or a vIOMMU supports invalidations of a type.

    The kernel is asked to carry out no entries of this type.

    Raises:
        KernelTooOldError: the kernel knows no invalidations (ENOTTY).
        IommuError: another process has destroyed the object (ENOENT).

    Source: include/uapi/linux/iommufd.h, IOMMU_HWPT_INVALIDATE. Linux 6.8.
    """
    reply = _INVALIDATE.attempt(target.iommufd.fileno(), hwpt_id=target.id, data_type=data_type)
    if reply.errno in (errno.EINVAL, errno.EOPNOTSUPP):
        return False
    if reply.errno:
        raise _INVALIDATE.error(reply.errno, str(target))
    return True
