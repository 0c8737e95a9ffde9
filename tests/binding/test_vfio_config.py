"""Parsing the capability lists of PCI configuration space, whatever its bytes are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyluo.vfio import CapabilityError, PciCapability
from pyluo.vfio.config import walk_capabilities, walk_extended_capabilities

PLAIN, EXTENDED = 256, 4096
STATUS, POINTER = 0x06, 0x34
ALL_ONES = b"\xff" * EXTENDED

PLACES = st.integers(0x40 // 4, (PLAIN - 4) // 4).map(lambda word: word * 4)
FURTHER = st.integers(PLAIN // 4 + 1, (EXTENDED - 4) // 4).map(lambda word: word * 4)


def config_space(places: list[int], ids: list[int], *, low_bits: int = 0) -> bytearray:
    """Return a configuration space with capabilities at these offsets, linked in this order."""
    data = bytearray(PLAIN)
    data[STATUS] = 0x10
    pointers = [*places, 0]
    data[POINTER] = pointers[0] | low_bits
    for place, number, after in zip(places, ids, pointers[1:], strict=False):
        data[place : place + 2] = bytes([number, after | low_bits if after else 0])
    return data


def extended_config_space(places: list[int], headers: list[tuple[int, int]]) -> bytearray:
    """Return a configuration space with extended capabilities at these offsets, from 0x100 on."""
    data = bytearray(EXTENDED)
    for place, after, (number, version) in zip(places, [*places[1:], 0], headers, strict=False):
        header = after << 20 | version << 16 | number
        data[place : place + 4] = header.to_bytes(4, "little")
    return data


@given(st.lists(PLACES, unique=True, max_size=20), st.integers(0, 3), st.data())
def test_capabilities_are_found_in_the_order_of_their_list(
    places: list[int], low_bits: int, data: st.DataObject
) -> None:
    ids = [data.draw(st.integers(0, 255)) for _ in places]
    expected = [PciCapability(number, place) for number, place in zip(ids, places, strict=True)]
    assert list(walk_capabilities(bytes(config_space(places, ids, low_bits=low_bits)))) == expected


@given(st.binary(min_size=PLAIN, max_size=PLAIN + 8))
def test_whatever_configuration_space_has_in_it_the_walk_ends_within_it(data: bytes) -> None:
    try:
        found = walk_capabilities(data)
    except CapabilityError:
        return
    assert len({one.offset for one in found}) == len(found)
    assert all(0x40 <= one.offset <= PLAIN - 4 and one.offset % 4 == 0 for one in found)


@given(st.lists(PLACES, unique=True, min_size=1, max_size=8), st.data())
def test_a_list_that_comes_back_is_refused(places: list[int], data: st.DataObject) -> None:
    looped = config_space(places, [5] * len(places))
    looped[places[-1] + 1] = data.draw(st.sampled_from(places))
    with pytest.raises(CapabilityError, match="comes back"):
        walk_capabilities(bytes(looped))


@pytest.mark.parametrize("place", [0x04, 0x3C])
def test_a_capability_within_the_header_is_refused(place: int) -> None:
    broken = config_space([], [])
    broken[POINTER] = place
    with pytest.raises(CapabilityError, match="within the header"):
        walk_capabilities(bytes(broken))


def test_without_the_bit_for_it_there_is_no_list() -> None:
    data = config_space([0x40], [5])
    data[STATUS] = 0
    assert walk_capabilities(bytes(data)) == ()


@pytest.mark.parametrize("size", [0, 64, 255])
def test_less_than_a_configuration_space_is_refused(size: int) -> None:
    with pytest.raises(CapabilityError, match="too short for a configuration space"):
        walk_capabilities(bytes(size))


def test_a_device_that_does_not_answer_is_told_as_such() -> None:
    with pytest.raises(CapabilityError, match="does not answer"):
        walk_capabilities(ALL_ONES)
    with pytest.raises(CapabilityError, match="does not answer"):
        walk_extended_capabilities(ALL_ONES)


@given(st.lists(FURTHER, unique=True, max_size=20), st.data())
def test_extended_capabilities_are_found_in_the_order_of_their_list(
    further: list[int], data: st.DataObject
) -> None:
    places = [PLAIN, *further]
    headers = [(data.draw(st.integers(1, 0xFFFF)), data.draw(st.integers(0, 15))) for _ in places]
    expected = [
        PciCapability(number, place, version)
        for (number, version), place in zip(headers, places, strict=True)
    ]
    assert (
        list(walk_extended_capabilities(bytes(extended_config_space(places, headers)))) == expected
    )


def test_an_extended_capability_that_the_kernel_hides_is_passed_over() -> None:
    data = extended_config_space([PLAIN, 0x140], [(0, 0), (3, 1)])
    assert walk_extended_capabilities(bytes(data)) == (PciCapability(3, 0x140, 1),)


def test_without_extended_capabilities_there_are_none() -> None:
    assert walk_extended_capabilities(bytes(EXTENDED)) == ()
    assert walk_extended_capabilities(bytes(PLAIN)) == ()


@given(
    st.binary(max_size=64).flatmap(
        lambda tail: st.builds(lambda words: bytes(PLAIN) + words + tail, st.binary(max_size=512))
    )
)
def test_whatever_extended_space_has_in_it_the_walk_ends_within_it(data: bytes) -> None:
    try:
        found = walk_extended_capabilities(data)
    except CapabilityError:
        return
    assert len({one.offset for one in found}) == len(found)
    assert all(PLAIN <= one.offset <= len(data) - 4 for one in found)


@pytest.mark.parametrize("after", [0x004, 0x0FC, 0xFFC])
def test_an_extended_capability_outside_is_refused(after: int) -> None:
    data = extended_config_space([PLAIN], [(1, 1)])[:0x800]
    data[PLAIN : PLAIN + 4] = (after << 20 | 0x10001).to_bytes(4, "little")
    with pytest.raises(CapabilityError, match="an extended capability at"):
        walk_extended_capabilities(bytes(data))


@given(st.lists(FURTHER, unique=True, max_size=8), st.data())
def test_an_extended_list_that_comes_back_is_refused(
    further: list[int], data: st.DataObject
) -> None:
    places = [PLAIN, *further]
    looped = extended_config_space(places, [(1, 1)] * len(places))
    back = data.draw(st.sampled_from(places))
    looped[places[-1] : places[-1] + 4] = (back << 20 | 0x10001).to_bytes(4, "little")
    with pytest.raises(CapabilityError, match="comes back"):
        walk_extended_capabilities(bytes(looped))
