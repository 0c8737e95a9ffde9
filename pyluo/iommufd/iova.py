"""I/O virtual addresses: ranges of them, and mappings at them."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from pyluo._sys import constant

__all__ = ["Access", "IovaRange", "IovaRanges", "Mapping"]


class Access(enum.IntFlag):
    """What a device may do with mapped memory.

    Source: include/uapi/linux/iommufd.h, IOMMU_IOAS_MAP_*
    """

    READ = constant("IOMMU_IOAS_MAP_READABLE")
    WRITE = constant("IOMMU_IOAS_MAP_WRITEABLE")


@dataclass(frozen=True, slots=True, order=True)
class IovaRange:
    """A range of I/O virtual addresses.

    Attributes:
        start: the first address.
        last: the last address, which is part of the range.
    """

    start: int
    last: int

    @property
    def length(self) -> int:
        """The length in bytes."""
        return self.last - self.start + 1

    def overlaps(self, other: IovaRange) -> bool:
        """Return whether the ranges have an address in common."""
        return self.start <= other.last and other.start <= self.last

    def __contains__(self, other: IovaRange) -> bool:
        return self.start <= other.start and other.last <= self.last

    def __str__(self) -> str:
        return f"{self.start:#x}..{self.last:#x}"


@dataclass(frozen=True, slots=True)
class IovaRanges:
    """Where an IOAS can currently map; attaching a device narrows this, detaching widens it.

    Attributes:
        ranges: the ranges, in order and without overlap.
        alignment: the alignment of the start and end of every mapping, in bytes.
    """

    ranges: tuple[IovaRange, ...]
    alignment: int

    def allow(self, wanted: IovaRange) -> bool:
        """Return whether all of `wanted` lies in one of the ranges."""
        return any(wanted in allowed for allowed in self.ranges)


@dataclass(frozen=True, slots=True)
class Mapping:
    """A mapping in an IOAS.

    Attributes:
        iova: the first address.
        length: the length in bytes.
        access: what a device may do with the memory.
        file: the device and inode number of the mapped file; None if memory was mapped by address.
        offset: where the mapping begins, in bytes from the start of the file or buffer.
    """

    iova: int
    length: int
    access: Access
    file: tuple[int, int] | None
    offset: int

    @property
    def range(self) -> IovaRange:
        """The addresses of the mapping."""
        return IovaRange(self.iova, self.iova + self.length - 1)
