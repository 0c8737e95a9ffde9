"""Decoding the records of iommufd, without reading beyond their end."""

from __future__ import annotations

import struct
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyluo.iommufd import (
    AmdGuest,
    AmdInfo,
    DirtyBitmap,
    FaultAccess,
    HwInfoType,
    IovaRange,
    IovaRanges,
    PageFault,
    RawData,
    SmmuV3Command,
    SmmuV3Info,
    SmmuV3Ste,
    Tegra241Info,
    VirtualEvent,
    VirtualEventType,
    VtdInfo,
    VtdInvalidate,
    VtdStage1,
    VtdStage1Flags,
)
from pyluo.iommufd.events import event_size, parse_events, parse_faults
from pyluo.iommufd.hw_info import decode

if TYPE_CHECKING:
    from pyluo.iommufd import HwptData, Invalidation

FAULT = struct.Struct("=6IQ2I")
HEADER = struct.Struct("=2I")
LOST = 1
SEQUENCES = 1 << 31
FORMATS = {
    HwInfoType.INTEL_VTD: struct.Struct("=2I2Q"),
    HwInfoType.ARM_SMMUV3: struct.Struct("=10I"),
    HwInfoType.TEGRA241_CMDQV: struct.Struct("=I4B"),
    HwInfoType.AMD: struct.Struct("=2Q"),
}

u32 = st.integers(0, (1 << 32) - 1)
u64 = st.integers(0, (1 << 64) - 1)


# Capabilities of an IOMMU.


@given(st.integers(-1, 1 << 32), st.binary(max_size=80))
def test_information_is_decoded_or_refused_whatever_it_is(data_type: int, data: bytes) -> None:
    try:
        info = decode(data_type, data)
    except ValueError:
        assert len(data) < FORMATS[HwInfoType(data_type)].size
    else:
        assert (info is None) is (data_type not in FORMATS)
        read_all_properties(info)


@pytest.mark.parametrize("data_type", FORMATS)
@given(st.data())
def test_information_is_refused_exactly_if_it_is_too_short(
    data_type: HwInfoType, data: st.DataObject
) -> None:
    size = FORMATS[data_type].size
    whole = data.draw(st.binary(min_size=size, max_size=size + 40))
    read_all_properties(decode(data_type, whole))
    cut = data.draw(st.integers(0, size - 1))
    with pytest.raises(ValueError, match=f"does not lie within {cut} bytes"):
        decode(data_type, whole[:cut])


@given(u32, u64, u64)
def test_the_registers_of_a_vtd_unit_are_kept_as_they_are(flags: int, cap: int, ecap: int) -> None:
    data = FORMATS[HwInfoType.INTEL_VTD].pack(flags, 0, cap, ecap)
    assert decode(HwInfoType.INTEL_VTD, data) == VtdInfo(cap, ecap, bool(flags & 1))


def test_qemus_vtd_unit_is_what_it_was_made() -> None:
    plain = VtdInfo(0xD2008C22260206, 0xF00F4A, False)
    assert plain.domains == 65536
    assert plain.second_stage_widths == (39,)
    assert plain.max_address_width == 39
    assert plain.second_stage_huge_pages == (2 << 20, 1 << 30)
    assert plain.queued_invalidation
    assert plain.interrupt_remapping
    assert plain.pass_through
    absent = ("caching_mode", "device_tlbs", "snoop_control", "scalable_mode", "page_requests")
    assert [getattr(plain, name) for name in absent] == [False] * 5
    assert plain.pasid_bits == 0


def test_qemus_vtd_unit_with_48_bits_caching_and_device_tlbs_has_them() -> None:
    unit = VtdInfo(0xD2008C222F0686, 0xF00F4E, False)
    assert unit.second_stage_widths == (39, 48)
    assert unit.max_address_width == 48
    assert unit.caching_mode
    assert unit.device_tlbs


def test_qemus_vtd_unit_in_scalable_mode_has_a_second_stage_alone() -> None:
    unit = VtdInfo(0xD2008C222F0606, 0x480080F00F4A, False)
    assert unit.scalable_mode
    assert unit.second_stage
    absent = ("first_stage", "nested_translation", "second_stage_dirty_tracking")
    assert [getattr(unit, name) for name in absent] == [False] * 3


VTD_BITS = {
    "caching_mode": ("cap", 7),
    "first_stage_1gib_pages": ("cap", 56),
    "first_stage_5_levels": ("cap", 60),
    "queued_invalidation": ("ecap", 1),
    "device_tlbs": ("ecap", 2),
    "interrupt_remapping": ("ecap", 3),
    "pass_through": ("ecap", 6),
    "snoop_control": ("ecap", 7),
    "nested_translation": ("ecap", 26),
    "page_requests": ("ecap", 29),
    "scalable_mode": ("ecap", 43),
    "second_stage_dirty_tracking": ("ecap", 45),
    "second_stage": ("ecap", 46),
    "first_stage": ("ecap", 47),
}


@pytest.mark.parametrize("name", VTD_BITS)
def test_a_capability_of_vtd_is_one_bit_of_one_register(name: str) -> None:
    register, bit = VTD_BITS[name]
    every = (1 << 64) - 1
    alone = {"cap": 0, "ecap": 0} | {register: 1 << bit}
    but_it = {"cap": every, "ecap": every} | {register: every ^ 1 << bit}
    assert getattr(VtdInfo(**alone, no_read_only_nesting=False), name) is True
    assert getattr(VtdInfo(**but_it, no_read_only_nesting=False), name) is False


@pytest.mark.parametrize(
    ("ecap", "bits"),
    [(1 << 40 | 19 << 35, 20), (1 << 40, 1), (19 << 35, 0), (1 << 40 | 31 << 35, 32)],
)
def test_pasids_of_vtd_have_bits_only_if_there_are_any(ecap: int, bits: int) -> None:
    assert VtdInfo(0, ecap, False).pasid_bits == bits


def test_the_registers_of_an_smmuv3_are_read_by_their_fields() -> None:
    # As in QEMU, with substream ids, 52-bit addresses and 52-bit descriptors.
    idr0 = 1 << 27 | 1 << 26 | 1 << 24 | 2 << 21 | 1 << 12 | 1 << 4 | 2 << 2 | 1 << 1
    assert idr0 == 0xD40101A
    idr1 = 19 << 21 | 19 << 16 | 20 << 6 | 16
    idr3 = 2 << 11 | 1 << 10 | 1 << 2
    idr5 = 1 << 10 | 1 << 7 | 1 << 6 | 1 << 5 | 1 << 4 | 5
    data = struct.pack("=10I", 1, 0, idr0, idr1, 0, idr3, 0, idr5, 0x43B, 2)
    info = decode(HwInfoType.ARM_SMMUV3, data)
    assert info == SmmuV3Info((idr0, idr1, 0, idr3, 0, idr5), 0x43B, 2, True)
    assert info.two_level_stream_table
    assert (info.termination_model, info.stall_model, info.table_endianness) == (1, 1, 2)
    assert not info.two_level_context_table
    assert (info.asid_bits, info.table_formats) == (16, 2)
    assert (info.stream_id_bits, info.substream_id_bits) == (16, 20)
    assert (info.break_before_make_level, info.range_invalidation) == (2, True)
    assert info.virtual_address_extension == 1
    assert info.granules == (4096, 16384, 65536)
    assert info.descriptors_of_52_bits


def test_an_smmuv3_that_can_do_nothing_says_so() -> None:
    info = SmmuV3Info((0, 0, 0, 0, 0, 0), 0, 0, False)
    assert info.asid_bits == 8
    assert info.granules == ()
    assert not info.two_level_stream_table
    assert not info.range_invalidation
    assert SmmuV3Info((1 << 19, 0, 0, 0, 0, 1 << 5), 0, 0, False).two_level_context_table
    assert SmmuV3Info((3 << 27, 0, 0, 0, 0, 1 << 5), 0, 0, False).granules == (16384,)


def test_the_register_of_an_amd_iommu_is_read_by_its_fields() -> None:
    # From an EPYC, which the kernel describes as "PPR NX GT [5] IA GA PC GA_vAPIC".
    data = struct.pack("=2Q", 0x246577EFA2254AFA, 0x10)
    info = decode(HwInfoType.AMD, data)
    assert info == AmdInfo(0x246577EFA2254AFA, 0x10)
    assert info.page_requests
    assert info.guest_translation
    assert info.guest_apic
    assert (info.guest_levels, info.cr3_levels, info.pasid_bits) == (4, 2, 16)
    assert info.guest_io
    assert info.enhanced_page_requests


AMD_BITS = {
    "page_requests": 1,
    "guest_translation": 4,
    "guest_apic": 7,
    "guest_io": 48,
    "enhanced_page_requests": 50,
}


@pytest.mark.parametrize("name", AMD_BITS)
def test_a_capability_of_an_amd_iommu_is_one_bit(name: str) -> None:
    bit = 1 << AMD_BITS[name]
    assert getattr(AmdInfo(bit, 0), name) is True
    assert getattr(AmdInfo((1 << 64) - 1 ^ bit, (1 << 64) - 1), name) is False


def test_levels_and_pasids_of_an_amd_iommu_are_counted_from_their_least() -> None:
    assert (AmdInfo(0, 0).guest_levels, AmdInfo(2 << 12, 0).guest_levels) == (4, 6)
    assert (AmdInfo(0, 0).cr3_levels, AmdInfo(2 << 14, 0).cr3_levels) == (1, 3)
    assert (AmdInfo(0, 0).pasid_bits, AmdInfo(19 << 32, 0).pasid_bits) == (1, 20)


def test_numbers_of_tegra241_are_powers_of_two() -> None:
    data = struct.pack("=I4B", 0, 1, 1, 4, 0)
    assert decode(HwInfoType.TEGRA241_CMDQV, data) == Tegra241Info(1, 2, 16)


def read_all_properties(info: Any) -> None:
    """Read every property, to see that none raises."""
    for name in dir(type(info)):
        if isinstance(getattr(type(info), name), property):
            getattr(info, name)


# Page faults.


@given(st.binary(max_size=400))
def test_faults_are_parsed_or_refused_whatever_they_are(data: bytes) -> None:
    if len(data) % FAULT.size:
        with pytest.raises(ValueError, match="does not lie within"):
            parse_faults(data)
        return
    faults = parse_faults(data)
    assert len(faults) == len(data) // FAULT.size
    for fault, raw in zip(faults, FAULT.iter_unpack(data), strict=True):
        flags, device, pasid, group, access, _, address, length, cookie = raw
        assert fault == PageFault(
            device_id=device,
            pasid=pasid if flags & 1 else None,
            group=group,
            access=FaultAccess(access),
            address=address,
            length=length,
            cookie=cookie,
            last=bool(flags & 2),
        )


def test_a_group_of_faults_is_several_with_one_cookie_and_the_last_one_marked() -> None:
    first = FAULT.pack(1, 3, 5, 8, 1, 0, 0x1000, 8192, 77)
    second = FAULT.pack(1 | 2, 3, 5, 8, 3, 0, 0x2000, 4096, 77)
    assert parse_faults(first + second) == [
        PageFault(3, 5, 8, FaultAccess.READ, 0x1000, 8192, 77, False),
        PageFault(3, 5, 8, FaultAccess.READ | FaultAccess.WRITE, 0x2000, 4096, 77, True),
    ]


# Events.


@given(st.binary(max_size=200), st.integers(0, 40), st.integers(0, SEQUENCES - 1))
def test_events_are_parsed_or_refused_whatever_they_are(
    data: bytes, size: int, expected: int
) -> None:
    try:
        events = parse_events(data, size, expected)
    except ValueError:
        return
    assert sum(HEADER.size + len(event.data) for event in events) == len(data)
    for event in events:
        assert 0 <= event.sequence < SEQUENCES
        assert 0 <= event.lost <= SEQUENCES
        assert len(event.data) in (0, size)


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 5)), max_size=20),
    st.sampled_from([1, 4, 16, 32]),
    st.integers(0, SEQUENCES - 1),
)
def test_every_lost_event_is_counted_once(
    events: list[tuple[bool, int]], size: int, start: int
) -> None:
    data, sequence, delivered = b"", start, 0
    for lost_here, lost_before in events:
        sequence = (sequence + lost_before) % SEQUENCES
        data += HEADER.pack(LOST if lost_here else 0, sequence)
        data += b"" if lost_here else bytes(size)
        delivered += not lost_here
        sequence = (sequence + 1) % SEQUENCES
    parsed = parse_events(data, size, start)
    lost = sum(event.lost for event in parsed)
    assert (delivered + lost - (sequence - start)) % SEQUENCES == 0
    assert delivered == sum(bool(event.data) for event in parsed)


def test_after_the_last_number_comes_zero() -> None:
    data = HEADER.pack(0, SEQUENCES - 1) + b"abcd" + HEADER.pack(0, 1) + b"efgh"
    assert parse_events(data, 4, SEQUENCES - 2) == [
        VirtualEvent(SEQUENCES - 1, b"abcd", 1),
        VirtualEvent(1, b"efgh", 1),
    ]


def test_what_was_lost_before_the_first_event_that_is_seen_is_not_known() -> None:
    data = HEADER.pack(0, 7) + b"abcd" + HEADER.pack(LOST, 9)
    assert parse_events(data, 4, None) == [VirtualEvent(7, b"abcd", 0), VirtualEvent(9, b"", 2)]


@pytest.mark.parametrize("length", [1, 7, 8, 11])
def test_an_event_that_is_cut_off_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"{length} bytes"):
        parse_events((HEADER.pack(0, 0) + b"abcd")[:length], 4)


def test_events_are_not_of_less_than_no_length() -> None:
    with pytest.raises(ValueError, match="-8 bytes"):
        parse_events(bytes(16), -8)


def test_the_length_of_the_events_that_are_known_is_known() -> None:
    assert event_size(VirtualEventType.ARM_SMMUV3) == 32
    assert event_size(VirtualEventType.TEGRA241_CMDQV) == 16
    assert event_size(0xBEEFBEEF) == 0


# Dirty pages.


@given(st.sets(st.integers(0, 200)), st.integers(201, 260), st.sampled_from([1, 2048, 1 << 21]))
def test_a_bitmap_tells_the_pages_that_it_has(dirty: set[int], pages: int, size: int) -> None:
    words = -(-pages // 64) * 8
    bits = sum(1 << page for page in dirty).to_bytes(words, "little")
    bitmap = DirtyBitmap(0x5000, size, pages, bits)
    assert list(bitmap) == [0x5000 + page * size for page in sorted(dirty)]
    assert len(bitmap) == len(dirty)
    for page in range(pages):
        assert (0x5000 + page * size in bitmap) is (page in dirty)
        assert (0x5000 + page * size + size - 1 in bitmap) is (page in dirty)


@given(st.integers(-(1 << 70), 1 << 70))
def test_an_address_that_a_bitmap_is_not_about_is_not_in_it(iova: int) -> None:
    bitmap = DirtyBitmap(0x5000, 4096, 3, b"\xff" * 8)
    assert (iova in bitmap) is (0x5000 <= iova < 0x5000 + 3 * 4096)


# Data for a driver.


@pytest.mark.parametrize(
    ("data", "data_type", "packed"),
    [
        (
            VtdStage1(0x1000, 48, VtdStage1Flags.EXTENDED_ACCESS),
            1,
            struct.pack("=2Q2I", 2, 0x1000, 48, 0),
        ),
        (SmmuV3Ste((1, 2)), 2, struct.pack("=2Q", 1, 2)),
        (AmdGuest((1, 2, 3, 4)), 3, struct.pack("=4Q", 1, 2, 3, 4)),
        (VtdInvalidate(0x2000, 5), 0, struct.pack("=2Q2I", 0x2000, 5, 0, 0)),
        (VtdInvalidate(0, (1 << 64) - 1, True), 0, struct.pack("=2Q2I", 0, (1 << 64) - 1, 1, 0)),
        (SmmuV3Command((3, 4)), 1, struct.pack("=2Q", 3, 4)),
        (RawData(0xDEAD, b"anything"), 0xDEAD, b"anything"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_driver_is_told_has_the_kernels_layout(
    data: HwptData | Invalidation, data_type: int, packed: bytes
) -> None:
    assert (data.data_type, data.pack()) == (data_type, packed)


# Ranges of addresses.


@given(u64, u64, u64, u64)
def test_a_range_contains_what_lies_in_it_whole(a: int, b: int, c: int, d: int) -> None:
    outer, inner = IovaRange(min(a, b), max(a, b)), IovaRange(min(c, d), max(c, d))
    within = outer.start <= inner.start and inner.last <= outer.last
    assert (inner in outer) is within
    assert IovaRanges((outer,), 1).allow(inner) is within


def test_what_lies_across_two_ranges_is_not_allowed() -> None:
    allowed = IovaRanges((IovaRange(0, 4095), IovaRange(4096, 8191)), 1)
    assert allowed.allow(IovaRange(4096, 8191))
    assert not allowed.allow(IovaRange(4095, 4096))


def test_a_range_is_written_with_both_ends() -> None:
    assert str(IovaRange(0x1000, 0x1FFF)) == "0x1000..0x1fff"
    assert [field.name for field in fields(IovaRange)] == ["start", "last"]
