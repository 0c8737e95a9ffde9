"""Tests of the RAM of a guest in an IOAS and in a layout, with the kernel's mock device."""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from iommufd.guest_mock import FIRST, LAST, CpuAccess, MockDevice, maps_buffer, opened
from pyluo import GuestRam, IoasLayout, IoasLayoutError, IommuError, Memfd, RequestError
from pyluo.iommu_layout import NamedMapping
from pyluo.iommufd import Access, IommuFd, IovaRange

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pyluo.iommufd import Ioas
    from pyluo.vm import VM

pytestmark = pytest.mark.in_guest

PAGE = 4096
PART = 2 * PAGE
SIZE = 2 * PART + PAGE
READ_WRITE = Access.READ | Access.WRITE
WHOLE = IovaRange(FIRST, FIRST + SIZE - 1)


@pytest.fixture
def shared_vm(mock_vm: Callable[[], VM]) -> VM:
    return mock_vm()


@contextmanager
def opened_with_ram() -> Iterator[tuple[IommuFd, GuestRam]]:
    with opened() as iommufd, GuestRam.create("ram", SIZE, part_size=PART) as ram:
        yield iommufd, ram


def test_a_ram_is_mapped_at_consecutive_addresses_and_unmapped_as_one() -> None:
    with opened_with_ram() as (iommufd, ram), ram.map() as pages:
        ioas = iommufd.alloc_ioas()
        mock = MockDevice(iommufd, ioas)
        mapped = ioas.map_ram(ram, iova=FIRST)
        assert mapped == WHOLE
        assert places(ioas) == [
            (FIRST, PART, 0),
            (FIRST + PART, PART, 0),
            (FIRST + 2 * PART, PAGE, 0),
        ]
        assert maps_buffer(mock, FIRST, pages)
        assert ioas.unmap(mapped) == SIZE
        assert ioas.mappings == ()


def test_a_guests_ram_is_mapped_on_both_sides_of_a_hole() -> None:
    with opened_with_ram() as (iommufd, ram), ram.map() as pages:
        ioas = iommufd.alloc_ioas()
        mock = MockDevice(iommufd, ioas)
        high = FIRST + 16 * PAGE
        ioas.map_ram(ram, iova=FIRST, length=PAGE)
        ioas.map_ram(ram, iova=high, offset=PAGE, access=Access.READ)
        assert places(ioas) == [
            (FIRST, PAGE, 0),
            (high, PAGE, PAGE),
            (high + PAGE, PART, 0),
            (high + PAGE + PART, PAGE, 0),
        ]
        assert maps_buffer(mock, FIRST, memoryview(pages)[:PAGE])
        assert maps_buffer(mock, high, memoryview(pages)[PAGE:])
        assert {one.access for one in ioas.mappings[1:]} == {Access.READ}


def test_a_ram_of_which_one_part_cannot_be_mapped_is_not_mapped_at_all() -> None:
    with opened_with_ram() as (iommufd, ram), Memfd.create("rom", PAGE) as rom:
        ioas = iommufd.alloc_ioas()
        taken = ioas.map_file(rom, iova=FIRST + SIZE - PAGE)
        with pytest.raises(IommuError):
            ioas.map_ram(ram, iova=FIRST)
        assert ioas.mappings == (taken,)
        assert not ioas.maps(IovaRange(FIRST, FIRST + PAGE - 1))
        MockDevice(iommufd, ioas)
        with pytest.raises(RequestError) as caught:
            ioas.map_ram(ram, iova=LAST + 1 - PART)
        assert caught.value.errno == errno.EINVAL
        assert ioas.mappings == (taken,)
        ioas.unmap(taken)
        assert ioas.map_ram(ram, iova=FIRST) == WHOLE


def test_no_more_of_a_ram_is_mapped_than_there_is() -> None:
    with opened_with_ram() as (iommufd, ram):
        ioas = iommufd.alloc_ioas()
        for offset, length in [(0, SIZE + PAGE), (-PAGE, PAGE), (0, 0), (SIZE, None)]:
            with pytest.raises(ValueError, match="bytes at"):
                ioas.map_ram(ram, iova=FIRST, offset=offset, length=length)


def test_memory_that_is_mapped_outlives_the_ram() -> None:
    with opened_with_ram() as (iommufd, ram):
        ioas = iommufd.alloc_ioas()
        ioas.map_ram(ram, iova=FIRST)
        ram.write(b"abcd", PART - 2)
        ram.close()
        with CpuAccess(ioas) as access:
            assert access.read(FIRST + PART - 2, 4) == b"abcd"


def test_the_mapping_of_a_ram_is_mapped_by_its_address_in_one_piece() -> None:
    with opened_with_ram() as (iommufd, ram), ram.map() as pages:
        ioas = iommufd.alloc_ioas()
        mapping = ioas.map(pages, iova=FIRST)
        assert mapping.length == SIZE
        with pytest.raises(BufferError):
            pages.close()
        with CpuAccess(ioas) as access:
            access.write(FIRST + PART - 2, b"abcd")
        assert ram.read(4, PART - 2) == b"abcd"
        ioas.unmap(mapping)


def test_a_layout_knows_a_ram_by_one_name() -> None:
    with opened_with_ram() as (iommufd, ram), Memfd.create("rom", PAGE) as rom:
        ioas = iommufd.alloc_ioas()
        high = FIRST + 16 * PAGE
        ioas.map_ram(ram, iova=FIRST, length=PAGE)
        ioas.map_file(rom, iova=FIRST + 8 * PAGE, access=Access.READ)
        ioas.map_ram(ram, iova=high, offset=PAGE)
        files: dict[str, Memfd | GuestRam] = {"rom": rom, "ram": ram}
        layout = IoasLayout.record(ioas, files)
        assert layout.mappings == (
            NamedMapping(FIRST, PAGE, READ_WRITE, "ram", 0),
            NamedMapping(FIRST + 8 * PAGE, PAGE, Access.READ, "rom", 0),
            NamedMapping(high, PAGE, READ_WRITE, "ram", PAGE),
            NamedMapping(high + PAGE, PART, READ_WRITE, "ram", PART),
            NamedMapping(high + PAGE + PART, PAGE, READ_WRITE, "ram", 2 * PART),
        )
        again = IoasLayout.from_json(layout.as_json())
        rebuilt = again.rebuild(iommufd, files)
        assert rebuilt.ioas.mappings == ioas.mappings
        check_that_an_ioas_maps(rebuilt.ioas, ram, {FIRST: (0, PAGE), high: (PAGE, SIZE - PAGE)})


def test_one_mapping_of_a_layout_may_cross_from_one_memfd_to_the_next() -> None:
    layout = IoasLayout((NamedMapping(FIRST, SIZE - 2 * PAGE, READ_WRITE, "ram", PAGE),))
    with opened_with_ram() as (iommufd, ram):
        ioas = layout.rebuild(iommufd, {"ram": ram}).ioas
        assert places(ioas) == [(FIRST, PAGE, PAGE), (FIRST + PAGE, PART, 0)]
        check_that_an_ioas_maps(ioas, ram, {FIRST: (PAGE, SIZE - 2 * PAGE)})


def test_a_layout_with_a_ram_is_adopted_and_each_mapping_can_be_unmapped() -> None:
    layout = IoasLayout((NamedMapping(FIRST, SIZE, READ_WRITE, "ram", 0),))
    with opened_with_ram() as (first, ram):
        ioas = layout.rebuild(first, {"ram": ram}).ioas
        number, mappings = ioas.id, ioas.mappings
        with IommuFd.from_fd(first.detach()) as second:
            adopted = layout.adopt(second, number, {"ram": ram})
            assert adopted.mappings == mappings
            assert [adopted.unmap(one) for one in adopted.mappings] == [PART, PART, PAGE]


def test_a_hole_among_adjacent_mappings_is_told_and_nothing_is_adopted() -> None:
    plans = [NamedMapping(FIRST + n * PAGE, PAGE, READ_WRITE, "ram", n * PAGE) for n in range(5)]
    layout = IoasLayout(tuple(plans))
    with opened_with_ram() as (iommufd, ram):
        ioas = layout.rebuild(iommufd, {"ram": ram}).ioas
        with IommuFd.from_fd(os.dup(iommufd.fileno())) as other:
            assert layout.adopt(other, ioas.id, {"ram": ram}).mappings == ioas.mappings
        ioas.unmap(plans[1].range)
        with IommuFd.from_fd(os.dup(iommufd.fileno())) as other:
            with pytest.raises(IoasLayoutError) as caught:
                layout.adopt(other, ioas.id, {"ram": ram})
            assert f"{plans[1].range} of IOAS {ioas.id} is not mapped. " in str(caught.value)
            assert f"{plans[0].range}" not in str(caught.value)
            assert other.objects == ()


def test_a_ram_that_is_too_small_for_a_layout_is_told_as_such() -> None:
    layout = IoasLayout((NamedMapping(FIRST, PART, READ_WRITE, "ram", SIZE - PAGE),))
    with opened_with_ram() as (iommufd, ram):
        with pytest.raises(IoasLayoutError, match=f"'ram', which has {SIZE}") as caught:
            layout.rebuild(iommufd, {"ram": ram})
        assert caught.value.errno == errno.EFBIG
        assert iommufd.objects == ()


def places(ioas: Ioas) -> list[tuple[int, int, int]]:
    """Return the IOVA, the length and the offset in its memfd of each mapping."""
    return [(one.iova, one.length, one.offset) for one in ioas.mappings]


def check_that_an_ioas_maps(ioas: Ioas, ram: GuestRam, ranges: dict[int, tuple[int, int]]) -> None:
    """Check that each IOVA has the RAM from an offset on, for a length."""
    ram.write(bytes(range(256)) * (SIZE // 256), 0)
    for offset in range(0, SIZE, PAGE):
        ram.write(f"page {offset}".encode(), offset)
    with CpuAccess(ioas) as access:
        for iova, (offset, length) in ranges.items():
            assert access.read(iova, length) == ram.read(length, offset)
