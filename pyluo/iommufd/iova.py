"""Ranges of I/O virtual addresses (IOVAs), and mappings of memory at them."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from pyluo._sys import constant

__all__ = ["Access", "IovaRange", "IovaRanges", "Mapping"]


class Access(enum.IntFlag):
    """The kinds of access that devices may make to mapped memory.

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

    Raises:
        ValueError: the range is empty, or an address is not one of 64 bits.
    """

    start: int
    last: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.last < 1 << 64:
            raise ValueError(f"{self} is not a range of IOVAs of 64 bits")

    @property
    def length(self) -> int:
        """The length of the range in bytes."""
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
    """The ranges in which an IOAS can currently map memory.

    Attaching a device can remove addresses; detaching it adds them again.

    Attributes:
        ranges: the ranges, sorted and without overlap.
        alignment: the alignment that the start and length of every mapping must have, in bytes.
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
        iova: the first IOVA.
        length: the length in bytes.
        access: whether devices may read and write the memory.
        file: the device number and inode number of the mapped file; None if memory was mapped by
            its address.
        offset: the offset in the file or buffer at which the mapping begins, in bytes.
    """

    iova: int
    length: int
    access: Access
    file: tuple[int, int] | None
    offset: int

    @property
    def range(self) -> IovaRange:
        """The IOVAs of the mapping."""
        return IovaRange(self.iova, self.iova + self.length - 1)
