"""Hardware page tables: what an IOMMU walks for the devices that are attached."""

from __future__ import annotations

import enum
import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from pyluo._sys import Ioctl, Struct, constant
from pyluo.errors import InvalidationError, from_errno
from pyluo.iommufd.objects import IommuObject

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

_SET_DIRTY_TRACKING = Ioctl("IOMMU_HWPT_SET_DIRTY_TRACKING", "iommu_hwpt_set_dirty_tracking")
_GET_DIRTY_BITMAP = Ioctl("IOMMU_HWPT_GET_DIRTY_BITMAP", "iommu_hwpt_get_dirty_bitmap")
_INVALIDATE = Ioctl("IOMMU_HWPT_INVALIDATE", "iommu_hwpt_invalidate")

_ENABLE = constant("IOMMU_HWPT_DIRTY_TRACKING_ENABLE")
_NO_CLEAR = constant("IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR")
_VTD_STAGE1 = Struct("iommu_hwpt_vtd_s1")
_SMMUV3_STE = Struct("iommu_hwpt_arm_smmuv3")
_AMD_GUEST = Struct("iommu_hwpt_amd_guest")
_VTD_INVALIDATE = Struct("iommu_hwpt_vtd_s1_invalidate")
_SMMUV3_COMMAND = Struct("iommu_viommu_arm_smmuv3_invalidate")


class HwptFlags(enum.IntFlag):
    """What a HWPT is to be good for.

    Source: include/uapi/linux/iommufd.h, enum iommufd_hwpt_alloc_flags
    """

    NEST_PARENT = constant("IOMMU_HWPT_ALLOC_NEST_PARENT")
    """The lower stage of nested page tables. Linux 6.7."""
    DIRTY_TRACKING = constant("IOMMU_HWPT_ALLOC_DIRTY_TRACKING")
    """Only devices can be attached whose IOMMU notes what they write to. Linux 6.7."""
    PASID = constant("IOMMU_HWPT_ALLOC_PASID")
    """Can be attached to a PASID of a device. Linux 6.15."""


class HwptData(Protocol):
    """What a driver needs to know for a page table that the guest manages."""

    @property
    def data_type(self) -> int:
        """One of enum iommu_hwpt_data_type."""

    def pack(self) -> bytes:
        """The driver's struct."""


class Invalidation(Protocol):
    """One entry of a request to drop what an IOMMU has cached."""

    @property
    def data_type(self) -> int:
        """One of enum iommu_hwpt_invalidate_data_type."""

    def pack(self) -> bytes:
        """The driver's struct."""


@dataclass(frozen=True, slots=True)
class RawData:
    """A driver's struct that has no class of its own here, for a HWPT, a vIOMMU or an invalidation.

    Attributes:
        data_type: the kernel's number of its kind.
        data: the struct.
    """

    data_type: int
    data: bytes

    def pack(self) -> bytes:
        """The struct."""
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
    """A VT-d stage-1 page table.

    Attributes:
        page_table: its address, in the address space of the parent HWPT.
        address_width: in bits.
        flags: of its entries.

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
        """The kernel's struct."""
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
        """The kernel's struct."""
        return bytes(_SMMUV3_STE.pack(ste=self.words))


@dataclass(frozen=True, slots=True)
class AmdGuest:
    """A guest's device table entry, for an AMD IOMMU.

    Source: include/uapi/linux/iommufd.h, struct iommu_hwpt_amd_guest. Linux 7.0.
    """

    device_table_entry: tuple[int, int, int, int]

    @property
    def data_type(self) -> int:
        """IOMMU_HWPT_DATA_AMD_GUEST."""
        return constant("IOMMU_HWPT_DATA_AMD_GUEST")

    def pack(self) -> bytes:
        """The kernel's struct."""
        return bytes(_AMD_GUEST.pack(dte=self.device_table_entry))


@dataclass(frozen=True, slots=True)
class VtdInvalidate:
    """A range of a VT-d stage-1 page table that has changed.

    Attributes:
        address: a multiple of 4096 bytes.
        pages: how many of 4096 bytes each; from address 0, 2^64-1 of them mean everything.
        leaf_only: only entries of the last level are cached for it.

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
        """The kernel's struct."""
        flags = constant("IOMMU_VTD_INV_FLAGS_LEAF") if self.leaf_only else 0
        return bytes(_VTD_INVALIDATE.pack(addr=self.address, npages=self.pages, flags=flags))


@dataclass(frozen=True, slots=True)
class SmmuV3Command:
    """An invalidation command as the guest put it into its SMMUv3 command queue.

    Source: include/uapi/linux/iommufd.h, struct iommu_viommu_arm_smmuv3_invalidate. Linux 6.13.
    """

    words: tuple[int, int]

    @property
    def data_type(self) -> int:
        """IOMMU_VIOMMU_INVALIDATE_DATA_ARM_SMMUV3."""
        return constant("IOMMU_VIOMMU_INVALIDATE_DATA_ARM_SMMUV3")

    def pack(self) -> bytes:
        """The kernel's struct."""
        return bytes(_SMMUV3_COMMAND.pack(cmd=self.words))


@dataclass(frozen=True, slots=True)
class DirtyBitmap:
    """Which pages devices have written to.

    Attributes:
        start: the IOVA of the first page.
        page_size: in bytes.
        pages: how many there are.
        bits: one for each page, the first in the lowest bit of the first byte.
    """

    start: int
    page_size: int
    pages: int
    bits: bytes

    @staticmethod
    def room(wanted: IovaRange, page_size: int) -> tuple[bytearray, int]:
        """A buffer for the kernel to fill in, and for how many pages it is.

        Raises:
            ValueError: the page size is no power of two.
        """
        if page_size < 1 or page_size & (page_size - 1):
            raise ValueError(f"a page of {page_size} bytes: not a power of two")
        pages = -(-wanted.length // page_size)
        return bytearray(-(-pages // 64) * 8), pages  # the kernel writes whole words

    def __contains__(self, iova: int) -> bool:
        page = (iova - self.start) // self.page_size
        return 0 <= page < self.pages and bool(self.bits[page // 8] >> page % 8 & 1)

    def __iter__(self) -> Iterator[int]:
        """The IOVA of each dirty page, in order."""
        for index, byte in enumerate(self.bits):
            while byte:
                lowest = (byte & -byte).bit_length() - 1
                yield self.start + (index * 8 + lowest) * self.page_size
                byte &= byte - 1

    def __len__(self) -> int:
        """How many pages are dirty."""
        return int.from_bytes(self.bits, "little").bit_count()


class PagingHwpt(IommuObject):
    """A page table that the kernel fills with what is mapped in an IOAS.

    Made by `IommuDevice.alloc_hwpt`. Linux 6.6.
    """

    noun = "HWPT"

    def __init__(
        self, iommufd: IommuContext, object_id: int, ioas: Ioas, *uses: IommuObject
    ) -> None:
        super().__init__(iommufd, object_id, ioas, *uses)
        self._ioas = ioas

    @property
    def ioas(self) -> Ioas:
        """Of what it is the page table."""
        return self._ioas

    def set_dirty_tracking(self, enabled: bool) -> None:
        """Starts or stops noting what devices write to; starting forgets what was noted.

        Raises:
            IommuUnsupportedError: EOPNOTSUPP, it was not allocated with
                `HwptFlags.DIRTY_TRACKING`.

        Source: include/uapi/linux/iommufd.h, IOMMU_HWPT_SET_DIRTY_TRACKING. Linux 6.7.
        """
        _SET_DIRTY_TRACKING(
            self.iommufd.fileno(), str(self), hwpt_id=self.id, flags=_ENABLE if enabled else 0
        )

    def dirty_bitmap(
        self, wanted: IovaRange, *, page_size: int = 4096, clear: bool = True
    ) -> DirtyBitmap:
        """Which pages of a range were written to since tracking started, or the last clearing.

        Args:
            wanted: what to look at, a multiple of `page_size` in start and length.
            page_size: what one bit stands for, in bytes, a power of two; it may be larger than
                the pages of the IOMMU.
            clear: whether to forget what is returned. Without it, the IOMMU's caches are left
                alone too: for memory that is about to be unmapped.

        Raises:
            IommuUnsupportedError: EOPNOTSUPP, it was not allocated with
                `HwptFlags.DIRTY_TRACKING`.
            LuoError: EINVAL, the range or the page size does not fit; ENOENT, part of the range is
                not mapped, so that nothing is told or forgotten.
            ValueError: the page size is no power of two.

        Source: include/uapi/linux/iommufd.h, IOMMU_HWPT_GET_DIRTY_BITMAP. Linux 6.7.
        """
        bits, pages = DirtyBitmap.room(wanted, page_size)
        subject = f"{self}: {wanted} by {page_size} bytes"
        # Linux 7.3 stops at a hole, says nothing, and what lies behind it looks clean.
        if not self._ioas.maps(wanted):
            raise from_errno(errno.ENOENT, _GET_DIRTY_BITMAP.name, subject)
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
    """A page table of a guest's own, which translates to addresses of a parent HWPT.

    Made by `IommuDevice.alloc_nested_hwpt`. Linux 6.7.
    """

    noun = "nested HWPT"

    def invalidate(self, entries: Sequence[Invalidation]) -> int:
        """Drops what the IOMMU has cached of it; see `invalidate`. Linux 6.8."""
        return invalidate(self, entries)


def invalidate(target: IommuObject, entries: Sequence[Invalidation]) -> int:
    """Drops what an IOMMU has cached of a guest's page table.

    Args:
        target: a nested HWPT, or a vIOMMU for what is not about one page table.
        entries: all of one kind, carried out in order.

    Returns:
        How many were carried out: all of them.

    Raises:
        InvalidationError: one was refused, with the number of those before it that were carried
            out as `handled`: EINVAL, not understood; EOPNOTSUPP, of a kind that this IOMMU does not
            know; EIO, the IOMMU itself refused a command.
        ValueError: they are of several kinds, or none.

    Source: include/uapi/linux/iommufd.h, IOMMU_HWPT_INVALIDATE. Linux 6.8; a vIOMMU since 6.13.
    """
    packed = [entry.pack() for entry in entries]
    kinds = {(entry.data_type, len(data)) for entry, data in zip(entries, packed, strict=True)}
    if len(kinds) != 1:
        raise ValueError("the entries of one invalidation are all of one kind")
    [(data_type, length)] = kinds
    reply = _INVALIDATE.attempt(
        target.iommufd.fileno(),
        hwpt_id=target.id,
        data_uptr=b"".join(packed),
        data_type=data_type,
        entry_len=length,
        entry_num=len(packed),
    )
    if reply.errno in (errno.ENOTTY, errno.E2BIG):  # not even looked at, so nothing is counted
        raise from_errno(reply.errno, _INVALIDATE.name, str(target))
    handled = reply.integer("entry_num")
    if reply.errno:
        if handled == len(packed):  # a driver that found no memory to look at any leaves it so
            handled = 0
        error = InvalidationError(reply.errno, _INVALIDATE.name, f"{target}, entry {handled}")
        error.handled = handled
        raise error
    return handled


def can_invalidate(target: IommuObject, data_type: int) -> bool:
    """Whether a nested HWPT or a vIOMMU takes invalidations of a kind.

    Source: include/uapi/linux/iommufd.h, IOMMU_HWPT_INVALIDATE, with no entry. Linux 6.8.
    """
    reply = _INVALIDATE.attempt(target.iommufd.fileno(), hwpt_id=target.id, data_type=data_type)
    if reply.errno in (errno.EINVAL, errno.EOPNOTSUPP):
        return False
    if reply.errno:
        raise from_errno(reply.errno, _INVALIDATE.name, str(target))
    return True
