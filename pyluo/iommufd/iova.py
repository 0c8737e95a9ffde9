"""I/O virtual addresses: ranges of them, and what is mapped at one."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from pyluo._sys import constant

__all__ = ["Access", "IovaRange", "IovaRanges", "Mapping"]


class Access(enum.IntFlag):
    """What a device may do with what is mapped.

    Source: include/uapi/linux/iommufd.h, IOMMU_IOAS_MAP_*
    """

    READ = constant("IOMMU_IOAS_MAP_READABLE")
    WRITE = constant("IOMMU_IOAS_MAP_WRITEABLE")


@dataclass(frozen=True, slots=True, order=True)
class IovaRange:
    """A range of I/O virtual addresses.

    Attributes:
        start: the first one.
        last: the last one, which is part of the range.
    """

    start: int
    last: int

    @property
    def length(self) -> int:
        """In bytes."""
        return self.last - self.start + 1

    def overlaps(self, other: IovaRange) -> bool:
        """Whether an address is in both."""
        return self.start <= other.last and other.start <= self.last

    def __contains__(self, other: IovaRange) -> bool:
        return self.start <= other.start and other.last <= self.last

    def __str__(self) -> str:
        return f"{self.start:#x}..{self.last:#x}"


@dataclass(frozen=True, slots=True)
class IovaRanges:
    """Where an IOAS can map something now; attaching a device narrows it, detaching widens it.

    Attributes:
        ranges: in order, without overlap.
        alignment: in bytes, of the start and the end of every mapping.
    """

    ranges: tuple[IovaRange, ...]
    alignment: int

    def allow(self, wanted: IovaRange) -> bool:
        """Whether all of `wanted` lies in one of the ranges."""
        return any(wanted in allowed for allowed in self.ranges)


@dataclass(frozen=True, slots=True)
class Mapping:
    """What is mapped somewhere in an IOAS.

    Attributes:
        iova: the first address of it.
        length: in bytes.
        access: what a device may do with it.
        file: of a mapping by file, device and inode number of the file; None for one by address.
        offset: of a mapping by file, in bytes from the start of the file; of one by address, from
            the start of the buffer.
    """

    iova: int
    length: int
    access: Access
    file: tuple[int, int] | None
    offset: int

    @property
    def range(self) -> IovaRange:
        """Where it is."""
        return IovaRange(self.iova, self.iova + self.length - 1)
