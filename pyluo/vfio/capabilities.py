"""Capability chains, which follow the fixed structs that VFIO's information requests return."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from pyluo._sys import Struct, constant

if TYPE_CHECKING:
    from pyluo._sys import Reply

__all__ = [
    "Area",
    "AtomicWidths",
    "Capability",
    "CapabilityError",
    "RegionType",
    "atomic_widths",
    "is_msix_mappable",
    "region_type",
    "sparse_areas",
    "walk",
]

_HEADER = Struct("vfio_info_cap_header")
_SPARSE_MMAP = Struct("vfio_region_info_cap_sparse_mmap")
_AREA = Struct("vfio_region_sparse_mmap_area")
_TYPE = Struct("vfio_region_info_cap_type")
_ATOMICS = Struct("vfio_device_info_cap_pci_atomic_comp")

_SPARSE_MMAP_ID = constant("VFIO_REGION_INFO_CAP_SPARSE_MMAP")
_TYPE_ID = constant("VFIO_REGION_INFO_CAP_TYPE")
_MSIX_MAPPABLE_ID = constant("VFIO_REGION_INFO_CAP_MSIX_MAPPABLE")
_ATOMICS_ID = constant("VFIO_DEVICE_INFO_CAP_PCI_ATOMIC_COMP")

_VERSION = 1  # of every capability that is decoded here
_PCI_VENDOR_TYPE = constant("VFIO_REGION_TYPE_PCI_VENDOR_TYPE") & 0xFFFF_FFFF
_PCI_VENDOR_MASK = constant("VFIO_REGION_TYPE_PCI_VENDOR_MASK")


class CapabilityError(ValueError):
    """A list of capabilities is malformed: it leads out of its buffer, or back to itself."""


class AtomicWidths(enum.IntFlag):
    """The widths of the atomic operations that a PCIe device can perform on memory.

    Source: include/uapi/linux/vfio.h, VFIO_PCI_ATOMIC_COMP*
    """

    BITS_32 = constant("VFIO_PCI_ATOMIC_COMP32")
    BITS_64 = constant("VFIO_PCI_ATOMIC_COMP64")
    BITS_128 = constant("VFIO_PCI_ATOMIC_COMP128")


@dataclass(frozen=True, slots=True)
class Capability:
    """One capability of a chain, undecoded.

    Attributes:
        id: the type of the capability; its meaning depends on the request.
        version: the version of the format.
        data: the bytes of the capability with its header, up to the next capability in memory or
            the end of the buffer.
    """

    id: int
    version: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Area:
    """A part of a region.

    Attributes:
        offset: the offset of the first byte in the region.
        size: the size in bytes.
    """

    offset: int
    size: int

    @property
    def end(self) -> int:
        """The offset of the first byte after the area."""
        return self.offset + self.size

    def __str__(self) -> str:
        return f"{self.size:#x} bytes at {self.offset:#x}"


@dataclass(frozen=True, slots=True)
class RegionType:
    """The type of a region that is not one of the fixed regions in `PciRegion`.

    Attributes:
        type: one of VFIO_REGION_TYPE_*, or the number of a PCI vendor with a flag.
        subtype: the subtype; its meaning depends on the type.
    """

    type: int
    subtype: int

    @property
    def pci_vendor(self) -> int | None:
        """The number of the PCI vendor that defines the subtypes; None if VFIO defines them."""
        return self.type & _PCI_VENDOR_MASK if self.type & _PCI_VENDOR_TYPE else None


def walk(data: bytes, first: int, start: int) -> tuple[Capability, ...]:
    """Return the capabilities of a chain, in the order of the chain.

    Args:
        data: the kernel's answer: the fixed struct, and all data after it.
        first: the offset of the first capability; 0 if there are none.
        start: the size of the fixed struct, which cannot contain a capability.

    Raises:
        CapabilityError: an offset points outside the data, into the fixed struct, or back to an
            earlier capability.

    Source: include/uapi/linux/vfio.h, struct vfio_info_cap_header
    """
    headers: dict[int, tuple[int, int]] = {}
    offset = first
    while offset:
        if offset < start or offset + _HEADER.size > len(data):
            raise CapabilityError(
                f"a capability at {offset}: the chain lies in bytes {start} to {len(data)}"
            )
        if offset in headers:
            raise CapabilityError(f"the chain comes back to {offset}")
        header = _HEADER.unpack(data, offset)
        headers[offset] = header.integer("id"), header.integer("version")
        offset = header.integer("next")
    ends = dict(_find_extents(sorted(headers), len(data)))
    return tuple(
        Capability(number, version, data[offset : ends[offset]])
        for offset, (number, version) in headers.items()
    )


def _find_extents(offsets: list[int], limit: int) -> list[tuple[int, int]]:
    """Return the begin and end of each capability, given their sorted begins.

    A header does not contain the size, so a capability ends where the next one in memory begins.
    """
    extents = list(pairwise([*offsets, limit]))
    for begin, end in extents:
        if end - begin < _HEADER.size:
            raise CapabilityError(f"the capabilities at {begin} and {end} overlap")
    return extents


def sparse_areas(chain: tuple[Capability, ...], size: int) -> tuple[Area, ...] | None:
    """Return the areas of a region that may be mapped; None if the chain does not limit them.

    Args:
        chain: the region's capabilities.
        size: the size of the region, in bytes.

    Raises:
        CapabilityError: the capability is too short for its areas, or an area does not lie within
            the region.
    """
    capability = _find(chain, _SPARSE_MMAP_ID)
    if capability is None:
        return None
    if capability.version != _VERSION:
        return ()  # map nothing: mapping an area that is not allowed may hang the machine
    count = _unpack(_SPARSE_MMAP, capability).integer("nr_areas")
    if _SPARSE_MMAP.size + count * _AREA.size > len(capability.data):
        raise CapabilityError(f"{count} areas in {len(capability.data)} bytes")
    areas = []
    for index in range(count):
        reply = _AREA.unpack(capability.data, _SPARSE_MMAP.size + index * _AREA.size)
        area = Area(reply.integer("offset"), reply.integer("size"))
        if area.end > size:
            raise CapabilityError(f"an area of {area} in a region of {size:#x} bytes")
        if area.size:
            areas.append(area)
    return tuple(areas)


def region_type(chain: tuple[Capability, ...]) -> RegionType | None:
    """Return the type of a region that is not one of the fixed regions; None for a fixed region.

    Raises:
        CapabilityError: the capability is cut short.
    """
    capability = _find_decodable(chain, _TYPE_ID)
    if capability is None:
        return None
    reply = _unpack(_TYPE, capability)
    return RegionType(reply.integer("type"), reply.integer("subtype"))


def is_msix_mappable(chain: tuple[Capability, ...]) -> bool:
    """Return whether the part of a region that has the MSI-X table may be mapped too."""
    return _find(chain, _MSIX_MAPPABLE_ID) is not None


def atomic_widths(chain: tuple[Capability, ...]) -> AtomicWidths:
    """Return the widths of the atomic operations that a device can perform on memory.

    Raises:
        CapabilityError: the capability is cut short.
    """
    capability = _find_decodable(chain, _ATOMICS_ID)
    if capability is None:
        return AtomicWidths(0)
    return AtomicWidths(_unpack(_ATOMICS, capability).integer("flags"))


def _find(chain: tuple[Capability, ...], wanted: int) -> Capability | None:
    return next((capability for capability in chain if capability.id == wanted), None)


def _find_decodable(chain: tuple[Capability, ...], wanted: int) -> Capability | None:
    capability = _find(chain, wanted)
    return capability if capability and capability.version == _VERSION else None


def _unpack(struct: Struct, capability: Capability) -> Reply:
    if struct.size > len(capability.data):
        raise CapabilityError(
            f"capability {capability.id} has {len(capability.data)} bytes of {struct.size}"
        )
    return struct.unpack(capability.data)
