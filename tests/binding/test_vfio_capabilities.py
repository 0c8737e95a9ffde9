"""Parsing the capability chains of VFIO, whatever their bytes are."""

from __future__ import annotations

import struct
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pyluo._sys import constant
from pyluo.vfio import (
    Area,
    AtomicWidths,
    Capability,
    CapabilityError,
    DeviceFlags,
    DeviceInfo,
    RegionFlags,
    RegionInfo,
    RegionType,
)
from pyluo.vfio.capabilities import sparse_areas, walk

HEADER = struct.Struct("=HHI")
REGION = struct.Struct("=IIIIQQ")
DEVICE = struct.Struct("=IIIIII")

SPARSE_MMAP = constant("VFIO_REGION_INFO_CAP_SPARSE_MMAP")
TYPE = constant("VFIO_REGION_INFO_CAP_TYPE")
MSIX_MAPPABLE = constant("VFIO_REGION_INFO_CAP_MSIX_MAPPABLE")
ATOMICS = constant("VFIO_DEVICE_INFO_CAP_PCI_ATOMIC_COMP")

EVERYTHING = int(RegionFlags.READ | RegionFlags.WRITE | RegionFlags.MMAP | RegionFlags.CAPABILITIES)
ALIGNED_SIZES = st.integers(0, 5).map(lambda words: 8 * words)


@st.composite
def contents(draw: st.DrawFn) -> tuple[int, int, bytes]:
    """Draw the id, the version and the contents of a capability that a kernel could return."""
    size = draw(ALIGNED_SIZES)
    return (
        draw(st.integers(0, 0xFFFF)),
        draw(st.integers(0, 0xFFFF)),
        draw(st.binary(min_size=size, max_size=size)),
    )


def make_chain(
    capabilities: list[tuple[int, int, bytes]], start: int, order: list[int] | None = None
) -> tuple[bytes, int]:
    """Return capabilities after a fixed struct, linked in `order`, and the offset of the first."""
    order = list(range(len(capabilities))) if order is None else order
    offsets, end = [], start
    for _, _, data in capabilities:
        offsets.append(end)
        end += HEADER.size + len(data)
    following = {one: offsets[after] for one, after in pairwise(order)}
    laid_out = b"".join(
        HEADER.pack(number, version, following.get(index, 0)) + data
        for index, (number, version, data) in enumerate(capabilities)
    )
    return bytes(start) + laid_out, offsets[order[0]] if order else 0


def region(capabilities: list[tuple[int, int, bytes]], *, size: int = 1 << 16) -> bytes:
    data, first = make_chain(capabilities, REGION.size)
    fixed = REGION.pack(len(data), EVERYTHING, 2, first, size, 2 << 40)
    return fixed + data[REGION.size :]


def sparse(*areas: tuple[int, int], count: int | None = None) -> tuple[int, int, bytes]:
    number = len(areas) if count is None else count
    data = struct.pack("=II", number, 0) + b"".join(struct.pack("=QQ", *area) for area in areas)
    return SPARSE_MMAP, 1, data


@given(st.lists(contents(), max_size=6), st.randoms(use_true_random=False), ALIGNED_SIZES)
def test_a_chain_is_walked_in_its_own_order_wherever_its_parts_lie(
    given_ones: list[tuple[int, int, bytes]], random: object, start: int
) -> None:
    order = list(range(len(given_ones)))
    random.shuffle(order)  # type: ignore[attr-defined]
    start = max(start, 8)  # at 0 there is no first one
    data, first = make_chain(given_ones, start, order)
    found = walk(data, first, start)
    assert [(one.id, one.version) for one in found] == [given_ones[place][:2] for place in order]
    assert [one.data[HEADER.size :] for one in found] == [given_ones[place][2] for place in order]


@given(st.binary(max_size=200), st.integers(0, 300), st.integers(0, 300))
@example(HEADER.pack(1, 1, 8) * 2, 8, 8)
@example(bytes(16), 0xFFFF_FFF8, 8)
def test_whatever_bytes_a_chain_is_made_of_it_ends_within_them(
    data: bytes, first: int, start: int
) -> None:
    try:
        found = walk(data, first, start)
    except CapabilityError:
        return
    assert len(found) <= len(data) // HEADER.size
    assert sum(len(one.data) for one in found) <= max(0, len(data) - start)
    for one in found:
        assert one.data in data[start:]
        assert struct.unpack_from("=HH", one.data) == (one.id, one.version)


@given(st.data())
def test_a_chain_changed_anywhere_is_walked_or_refused(data: st.DataObject) -> None:
    given_ones = data.draw(st.lists(contents(), min_size=1, max_size=5))
    whole, first = make_chain(given_ones, 8)
    changed = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(8, len(changed) - 1))
        changed[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(changed)))
    try:
        found = walk(bytes(changed[:cut]), first, 8)
    except CapabilityError:
        return
    assert sum(len(one.data) for one in found) <= cut - 8


@given(st.integers(1, 12))
def test_a_chain_that_comes_back_is_refused(length: int) -> None:
    given_ones = [(number, 1, b"") for number in range(length)]
    whole, first = make_chain(given_ones, 8)
    for back in range(length):
        looped = bytearray(whole)
        struct.pack_into("=I", looped, 8 + (length - 1) * 8 + 4, 8 + back * 8)
        with pytest.raises(CapabilityError, match="comes back"):
            walk(bytes(looped), first, 8)


@pytest.mark.parametrize("first", [1, 7, 17, 24, 25, 1 << 31, 0xFFFF_FFFF])
def test_a_capability_outside_of_the_chain_is_refused(first: int) -> None:
    with pytest.raises(CapabilityError, match="bytes 8 to 24"):
        walk(bytes(24), first, 8)


def test_capabilities_that_overlap_are_refused() -> None:
    data = bytes(8) + HEADER.pack(1, 1, 12) + bytes(8)
    with pytest.raises(CapabilityError, match="overlap"):
        walk(data, 8, 8)


@given(st.binary(max_size=300))
def test_whatever_a_region_says_of_itself_is_read_or_refused(data: bytes) -> None:
    try:
        info = RegionInfo.parse(data)
    except CapabilityError:
        return
    except ValueError:
        assert len(data) < REGION.size
        return
    for area in info.areas:
        assert area.size > 0
        assert area.end <= info.size


@given(st.binary(max_size=300))
def test_whatever_a_device_says_of_itself_is_read_or_refused(data: bytes) -> None:
    try:
        info = DeviceInfo.parse(data)
    except CapabilityError:
        return
    except ValueError:
        assert len(data) < DEVICE.size
        return
    assert info.capabilities == () or DeviceFlags.CAPABILITIES in info.flags


@given(
    st.lists(
        st.tuples(
            st.sampled_from([SPARSE_MMAP, TYPE, MSIX_MAPPABLE]),
            st.integers(0, 2),
            st.binary(max_size=64),
        ),
        max_size=4,
    ),
    st.integers(0, 1 << 20),
)
def test_a_known_capability_with_any_contents_is_read_or_refused(
    given_ones: list[tuple[int, int, bytes]], size: int
) -> None:
    try:
        info = RegionInfo.parse(region(given_ones, size=size))
    except CapabilityError:
        return
    assert all(area.end <= size for area in info.areas)


def test_a_region_without_capabilities_can_be_mapped_as_a_whole() -> None:
    flags = RegionFlags.READ | RegionFlags.MMAP
    info = RegionInfo.parse(REGION.pack(REGION.size, int(flags), 0, 0, 0x2000, 0))
    assert info.areas == (Area(0, 0x2000),)
    assert info.capabilities == ()
    assert info.type is None


@pytest.mark.parametrize(("flags", "size"), [(RegionFlags.READ, 0x2000), (RegionFlags.MMAP, 0)])
def test_a_region_that_cannot_be_mapped_has_no_areas(flags: RegionFlags, size: int) -> None:
    assert RegionInfo.parse(REGION.pack(REGION.size, int(flags), 0, 0, size, 0)).areas == ()


def test_only_the_areas_of_a_sparse_region_can_be_mapped() -> None:
    info = RegionInfo.parse(region([sparse((0, 0x1000), (0x3000, 0x2000), (0x8000, 0))]))
    assert info.areas == (Area(0, 0x1000), Area(0x3000, 0x2000))
    assert RegionInfo.parse(region([sparse()])).areas == ()


def test_a_sparse_region_of_an_unknown_version_is_not_mapped_at_all() -> None:
    number, _, data = sparse((0, 0x1000))
    assert RegionInfo.parse(region([(number, 2, data)])).areas == ()


@pytest.mark.parametrize("count", [2, 3, 0xFFFF_FFFF])
def test_more_areas_than_there_are_bytes_for_are_refused(count: int) -> None:
    with pytest.raises(CapabilityError, match="areas in"):
        RegionInfo.parse(region([sparse((0, 0x1000), count=count)]))


@pytest.mark.parametrize("area", [(0, 0x10001), (0x10000, 1), (1 << 63, 1 << 63), (0xF000, 0x2000)])
def test_an_area_outside_of_its_region_is_refused(area: tuple[int, int]) -> None:
    with pytest.raises(CapabilityError, match="region of 0x10000 bytes"):
        RegionInfo.parse(region([sparse(area)]))


def test_the_type_of_a_region_and_its_vendor_are_told() -> None:
    vendor = constant("VFIO_REGION_TYPE_PCI_VENDOR_TYPE") & 0xFFFF_FFFF | 0x8086
    info = RegionInfo.parse(region([(TYPE, 1, struct.pack("=II", vendor, 3))]))
    assert info.type == RegionType(vendor, 3)
    assert info.type.pci_vendor == 0x8086
    assert RegionType(constant("VFIO_REGION_TYPE_GFX"), 1).pci_vendor is None


def test_a_type_that_is_cut_short_is_refused() -> None:
    with pytest.raises(CapabilityError, match="of 16"):
        RegionInfo.parse(region([(TYPE, 1, bytes(4))]))


def test_a_region_with_the_msix_table_in_it_is_told() -> None:
    info = RegionInfo.parse(region([(MSIX_MAPPABLE, 1, b"")]))
    assert info.msix_mappable
    assert info.areas == (Area(0, 1 << 16),)
    assert not RegionInfo.parse(region([])).msix_mappable


def test_capabilities_that_nobody_knows_are_kept_as_they_came() -> None:
    info = RegionInfo.parse(region([(77, 9, b"something"), (MSIX_MAPPABLE, 1, b"")]))
    unknown, known = info.capabilities
    assert unknown == Capability(77, 9, HEADER.pack(77, 9, 49) + b"something")
    assert known.id == MSIX_MAPPABLE


def test_a_chain_without_the_room_for_it_is_none() -> None:
    fixed = REGION.pack(REGION.size + 16, EVERYTHING, 0, 0, 0x1000, 0)
    assert RegionInfo.parse(fixed).capabilities == ()


def test_the_atomics_of_a_device_are_told() -> None:
    flags = int(DeviceFlags.PCI | DeviceFlags.CAPABILITIES)
    widths = int(AtomicWidths.BITS_32 | AtomicWidths.BITS_64)
    chain, first = make_chain([(ATOMICS, 1, struct.pack("=II", widths, 0))], DEVICE.size)
    data = DEVICE.pack(len(chain), flags, 9, 5, first, 0) + chain[DEVICE.size :]
    info = DeviceInfo.parse(data)
    assert info.atomics == AtomicWidths.BITS_32 | AtomicWidths.BITS_64
    assert (info.regions, info.irqs) == (9, 5)
    without = DeviceInfo.parse(DEVICE.pack(DEVICE.size, int(DeviceFlags.PCI), 9, 5, 99, 0))
    assert without.atomics == AtomicWidths(0)


def test_a_chain_without_a_sparse_capability_limits_nothing() -> None:
    assert sparse_areas((), 4096) is None
