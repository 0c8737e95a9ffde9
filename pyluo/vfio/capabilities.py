"""Capability chains: what VFIO's information requests have to say beyond their fixed structs."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from itertools import pairwise

from pyluo._sys import Struct, constant

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
    """A list of capabilities that leads out of its buffer, or back into itself."""


class AtomicWidths(enum.IntFlag):
    """The widths of atomic operations that a PCIe device can do on memory.

    Source: include/uapi/linux/vfio.h, VFIO_PCI_ATOMIC_COMP*
    """

    BITS_32 = constant("VFIO_PCI_ATOMIC_COMP32")
    BITS_64 = constant("VFIO_PCI_ATOMIC_COMP64")
    BITS_128 = constant("VFIO_PCI_ATOMIC_COMP128")


@dataclass(frozen=True, slots=True)
class Capability:
    """One capability of a chain, as it came.

    Attributes:
        id: what it is; its meaning depends on the request.
        version: of its contents.
        data: all of it, header included, up to the next one in memory or the end of the buffer.
    """

    id: int
    version: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Area:
    """A part of a region.

    Attributes:
        offset: of the first byte, from the start of the region.
        size: in bytes.
    """

    offset: int
    size: int

    @property
    def end(self) -> int:
        """The offset of the first byte after it."""
        return self.offset + self.size

    def __str__(self) -> str:
        return f"{self.size:#x} bytes at {self.offset:#x}"


@dataclass(frozen=True, slots=True)
class RegionType:
    """What a region beyond the fixed ones is.

    Attributes:
        type: see VFIO_REGION_TYPE_*.
        subtype: which of that type.
    """

    type: int
    subtype: int

    @property
    def pci_vendor(self) -> int | None:
        """The PCI vendor that defines the subtypes; None for a type of VFIO's own."""
        return self.type & _PCI_VENDOR_MASK if self.type & _PCI_VENDOR_TYPE else None


def walk(data: bytes, first: int, start: int) -> tuple[Capability, ...]:
    """The capabilities of a chain, in its order.

    Args:
        data: what the kernel gave back: the fixed struct, and what follows it.
        first: the offset of the first capability; 0 for none.
        start: the size of the fixed struct, in which no capability can lie.

    Raises:
        CapabilityError: an offset points outside of the data, into the fixed struct, or to where a
            capability has been.

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
    ends = dict(_extents(sorted(headers), len(data)))
    return tuple(
        Capability(number, version, data[offset : ends[offset]])
        for offset, (number, version) in headers.items()
    )


def _extents(offsets: list[int], limit: int) -> list[tuple[int, int]]:
    """Where each capability ends; its header does not say."""
    extents = list(pairwise([*offsets, limit]))
    for begin, end in extents:
        if end - begin < _HEADER.size:
            raise CapabilityError(f"the capabilities at {begin} and {end} overlap")
    return extents


def sparse_areas(chain: tuple[Capability, ...], size: int) -> tuple[Area, ...] | None:
    """The areas of a region that may be mapped; None if the chain does not limit them.

    Args:
        chain: of a region.
        size: of the region, in bytes.

    Raises:
        CapabilityError: there are more areas than bytes, or one does not lie within the region.
    """
    capability = _find(chain, _SPARSE_MMAP_ID)
    if capability is None:
        return None
    if capability.version != _VERSION:
        return ()  # mapping what is not allowed may hang the machine
    count = _unpackable(_SPARSE_MMAP, capability).unpack(capability.data).integer("nr_areas")
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
    """What a region beyond the fixed ones is; None if the chain does not say.

    Raises:
        CapabilityError: the capability is cut short.
    """
    capability = _decodable(chain, _TYPE_ID)
    if capability is None:
        return None
    reply = _unpackable(_TYPE, capability).unpack(capability.data)
    return RegionType(reply.integer("type"), reply.integer("subtype"))


def is_msix_mappable(chain: tuple[Capability, ...]) -> bool:
    """Whether the part of a region that has the MSI-X table may be mapped with the rest."""
    return _find(chain, _MSIX_MAPPABLE_ID) is not None


def atomic_widths(chain: tuple[Capability, ...]) -> AtomicWidths:
    """Which atomic operations a device can do on memory.

    Raises:
        CapabilityError: the capability is cut short.
    """
    capability = _decodable(chain, _ATOMICS_ID)
    if capability is None:
        return AtomicWidths(0)
    return AtomicWidths(_unpackable(_ATOMICS, capability).unpack(capability.data).integer("flags"))


def _find(chain: tuple[Capability, ...], wanted: int) -> Capability | None:
    return next((capability for capability in chain if capability.id == wanted), None)


def _decodable(chain: tuple[Capability, ...], wanted: int) -> Capability | None:
    capability = _find(chain, wanted)
    return capability if capability and capability.version == _VERSION else None


def _unpackable(struct: Struct, capability: Capability) -> Struct:
    if struct.size > len(capability.data):
        raise CapabilityError(
            f"capability {capability.id} has {len(capability.data)} bytes of {struct.size}"
        )
    return struct
