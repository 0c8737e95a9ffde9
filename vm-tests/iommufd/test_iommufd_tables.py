"""Tests of page tables, dirty pages, nesting and vIOMMUs, with the kernel's mock device."""

from __future__ import annotations

import errno
import mmap
import struct
from typing import TYPE_CHECKING

import pytest

from iommufd import guest_mock
from iommufd.guest_mock import (
    FIRST,
    HW_QUEUE,
    MockDevice,
    MockFlags,
    cache_invalidation,
    hwpt_data,
    maps_buffer,
    opened,
    tlb_invalidation,
    write_pages,
)
from pyluo import IommuError, IommuUnsupportedError, Memfd, RequestError
from pyluo.errors import InvalidationError
from pyluo.iommufd import (
    DirtyBitmap,
    HwCapability,
    HwInfoType,
    HwptFlags,
    HwQueueType,
    IommuFd,
    IovaRange,
    NestedHwpt,
    PagingHwpt,
    RawData,
    SmmuV3Ste,
    Viommu,
    ViommuType,
    VtdInvalidate,
    VtdStage1,
    can_invalidate,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyluo.iommufd import HwptData, Ioas
    from pyluo.vm import VM

pytestmark = pytest.mark.in_guest

SIZE = 16384
FIRST_PAGE = IovaRange(FIRST, FIRST + 4095)


@pytest.fixture
def shared_vm(mock_vm: Callable[[], VM]) -> VM:
    return mock_vm()


def attach_to_nested_hwpt(iommufd: IommuFd) -> tuple[MockDevice, NestedHwpt]:
    """Attach a device to a nested HWPT."""
    ioas = iommufd.alloc_ioas()
    mock = MockDevice(iommufd, ioas)
    parent = mock.device.alloc_hwpt(ioas, flags=HwptFlags.NEST_PARENT)
    table = mock.device.alloc_nested_hwpt(parent, hwpt_data())
    mock.attach(table)
    return mock, table


def alloc_viommu(iommufd: IommuFd) -> tuple[Ioas, MockDevice, Viommu]:
    """Allocate a vIOMMU for a device; its parent is an HWPT of the device's IOAS."""
    ioas = iommufd.alloc_ioas()
    mock = MockDevice(iommufd, ioas)
    parent = guest_mock.alloc_nesting_parent(ioas, mock.device)
    return ioas, mock, mock.device.alloc_viommu(guest_mock.VIOMMU, parent)


def track_dirty_pages(iommufd: IommuFd, ram: Memfd) -> tuple[Ioas, PagingHwpt]:
    """Map a file at `FIRST` in an IOAS, and track its dirty pages in an HWPT.

    Huge pages are off, as they would become dirty as a whole.
    """
    ioas = iommufd.alloc_ioas()
    ioas.huge_pages = False
    device = MockDevice(iommufd, ioas).device
    hwpt = device.alloc_hwpt(ioas, flags=HwptFlags.DIRTY_TRACKING)
    ioas.map_file(ram, iova=FIRST)
    hwpt.set_dirty_tracking(True)
    return ioas, hwpt


# Capabilities of an IOMMU.


def test_information_of_a_format_that_is_not_known_comes_as_it_is() -> None:
    with opened() as iommufd:
        info = MockDevice(iommufd, iommufd.alloc_ioas()).device.hw_info()
        assert info.data_type == guest_mock.HW_INFO
        assert info.data == struct.pack("=2I", 0, guest_mock.HW_INFO_REGISTER)
        assert info.driver is None


def test_information_is_asked_for_by_its_format() -> None:
    with opened() as iommufd:
        device = MockDevice(iommufd, iommufd.alloc_ioas()).device
        assert device.hw_info(guest_mock.HW_INFO) == device.hw_info()
        with pytest.raises(IommuUnsupportedError, match=f"device {device.id}"):
            device.hw_info(HwInfoType.INTEL_VTD)


@pytest.mark.parametrize(
    ("flags", "capabilities", "pasid_bits"),
    [
        (MockFlags(0), HwCapability.DIRTY_TRACKING | HwCapability.ATS_NOT_SUPPORTED, 0),
        (MockFlags.NO_DIRTY, HwCapability.ATS_NOT_SUPPORTED, 0),
        (
            MockFlags.PASID,
            HwCapability.DIRTY_TRACKING | HwCapability.ATS_NOT_SUPPORTED,
            guest_mock.PASID_BITS,
        ),
    ],
    ids=["plain", "without dirty tracking", "with pasids"],
)
def test_what_any_iommu_may_be_able_to_do_is_told_of_each_device(
    flags: MockFlags, capabilities: HwCapability, pasid_bits: int
) -> None:
    with opened() as iommufd:
        info = MockDevice(iommufd, iommufd.alloc_ioas(), flags).device.hw_info()
        assert info.capabilities == capabilities
        assert info.pasid_bits == pasid_bits


# The host's page tables.


def test_a_page_table_shows_what_is_mapped_before_and_after_it_was_made() -> None:
    with opened() as iommufd, mmap.mmap(-1, SIZE) as before, mmap.mmap(-1, SIZE) as after:
        ioas = iommufd.alloc_ioas()
        mock = MockDevice(iommufd, ioas)
        first = ioas.map(before)
        hwpt = mock.device.alloc_hwpt(ioas)
        second = ioas.map(after)
        assert maps_buffer(hwpt, first.iova, before)
        assert maps_buffer(hwpt, second.iova, after)
        iommufd.close()


def test_a_device_moves_from_one_page_table_to_another() -> None:
    with opened() as iommufd, Memfd.create("ram", SIZE) as ram, ram.map() as pages:
        old, new = iommufd.alloc_ioas(), iommufd.alloc_ioas()
        mock = MockDevice(iommufd, old)
        hwpt = mock.device.alloc_hwpt(new)
        new.map_file(ram, iova=FIRST)
        mock.attach(hwpt)
        assert mock.hwpt_id == hwpt.id
        assert maps_buffer(mock, FIRST, pages)
        old.destroy()
        with pytest.raises(IommuError, match=str(hwpt)):
            hwpt.destroy()
        mock.attach(new)
        hwpt.destroy()


def test_a_page_table_is_not_made_of_what_a_device_cannot_reach() -> None:
    with opened() as iommufd, Memfd.create("ram", SIZE) as ram:
        ioas = iommufd.alloc_ioas()
        mock = MockDevice(iommufd, iommufd.alloc_ioas())
        mapping = ioas.map_file(ram, iova=0)
        with pytest.raises(RequestError, match="where this device cannot reach") as caught:
            mock.device.alloc_hwpt(ioas)
        assert caught.value.errno == errno.EADDRINUSE
        ioas.unmap(mapping)
        mock.device.alloc_hwpt(ioas)


def test_a_page_table_is_made_with_what_its_driver_wants_to_know() -> None:
    with opened() as iommufd:
        ioas = iommufd.alloc_ioas()
        device = MockDevice(iommufd, ioas).device
        assert device.alloc_hwpt(ioas, data=hwpt_data()).id > 0
        with pytest.raises(IommuUnsupportedError):
            device.alloc_hwpt(ioas, data=VtdStage1(FIRST, 48))
        with pytest.raises(RequestError) as caught:
            device.alloc_hwpt(ioas, data=RawData(guest_mock.HWPT_DATA, b""))
        assert caught.value.errno == errno.EINVAL


def test_a_device_that_cannot_track_dirty_pages_gets_no_page_table_that_does() -> None:
    with opened() as iommufd:
        ioas = iommufd.alloc_ioas()
        device = MockDevice(iommufd, ioas, MockFlags.NO_DIRTY).device
        with pytest.raises(IommuUnsupportedError, match="hw_info"):
            device.alloc_hwpt(ioas, flags=HwptFlags.DIRTY_TRACKING)


def test_a_device_that_cannot_track_dirty_pages_is_not_attached_to_a_page_table_that_does() -> None:
    with opened() as iommufd:
        ioas = iommufd.alloc_ioas()
        able = MockDevice(iommufd, ioas).device
        unable = MockDevice(iommufd, ioas, MockFlags.NO_DIRTY)
        tracking = able.alloc_hwpt(ioas, flags=HwptFlags.DIRTY_TRACKING)
        with pytest.raises(OSError, match="Invalid argument"):
            unable.attach(tracking)
        tracking.destroy()


def test_a_page_table_that_others_stand_on_reports_no_faults() -> None:
    with opened() as iommufd:
        ioas = iommufd.alloc_ioas()
        device = MockDevice(iommufd, ioas).device
        queue = iommufd.alloc_fault_queue()
        with pytest.raises(IommuUnsupportedError):
            device.alloc_hwpt(ioas, flags=HwptFlags.NEST_PARENT, fault_queue=queue)


def test_a_pasid_has_a_page_table_of_its_own() -> None:
    with opened() as iommufd:
        ioas, other = iommufd.alloc_ioas(), iommufd.alloc_ioas()
        mock = MockDevice(iommufd, ioas, MockFlags.PASID)
        everything = mock.device.alloc_hwpt(ioas, flags=HwptFlags.PASID)
        first = mock.device.alloc_hwpt(ioas, flags=HwptFlags.PASID)
        second = mock.device.alloc_hwpt(other, flags=HwptFlags.PASID)
        mock.attach(everything)
        mock.attach_pasid(5, first)
        assert mock.pasid_is_attached_to(5, first)
        mock.attach_pasid(5, second)
        assert mock.pasid_is_attached_to(5, second)
        first.destroy()
        with pytest.raises(IommuError, match=str(second)):
            second.destroy()
        mock.detach_pasid(5)
        assert mock.pasid_is_attached_to(5, None)
        second.destroy()


def test_a_pasid_is_not_attached_to_a_page_table_that_was_not_made_for_it() -> None:
    with opened() as iommufd:
        ioas = iommufd.alloc_ioas()
        mock = MockDevice(iommufd, ioas, MockFlags.PASID)
        mock.attach(mock.device.alloc_hwpt(ioas, flags=HwptFlags.PASID))
        with pytest.raises(OSError, match="Invalid argument"):
            mock.attach_pasid(5, mock.device.alloc_hwpt(ioas))
        assert mock.pasid_is_attached_to(5, None)


# Dirty pages.


def test_the_pages_that_were_written_to_are_told_once() -> None:
    with opened() as iommufd, Memfd.create("ram", SIZE) as ram:
        _, hwpt = track_dirty_pages(iommufd, ram)
        all_pages = IovaRange(FIRST, FIRST + SIZE - 1)
        write_pages(hwpt, FIRST, {0, 2, 3})
        assert list(hwpt.dirty_bitmap(all_pages)) == [FIRST, FIRST + 8192, FIRST + 12288]
        assert list(hwpt.dirty_bitmap(all_pages)) == []


def test_what_is_only_looked_at_is_told_again() -> None:
    with opened() as iommufd, Memfd.create("ram", SIZE) as ram:
        _, hwpt = track_dirty_pages(iommufd, ram)
        write_pages(hwpt, FIRST, {0})
        for _ in range(2):
            assert list(hwpt.dirty_bitmap(FIRST_PAGE, clear=False)) == [FIRST]
        assert list(hwpt.dirty_bitmap(FIRST_PAGE)) == [FIRST]


@pytest.mark.parametrize("page_size", [2048, 4096, 8192, 1 << 20])
def test_one_bit_stands_for_as_much_as_was_asked_for(page_size: int) -> None:
    size = 4 << 20
    with opened() as iommufd, Memfd.create("ram", size) as ram:
        _, hwpt = track_dirty_pages(iommufd, ram)
        written = {0, 5, 6, 700, size // 4096 - 1}
        write_pages(hwpt, FIRST, written)
        bitmap = hwpt.dirty_bitmap(IovaRange(FIRST, FIRST + size - 1), page_size=page_size)
        assert bitmap.pages == size // page_size
        halves = (number * 4096 + half for number in written for half in (0, 2048))
        assert list(bitmap) == sorted({FIRST + half // page_size * page_size for half in halves})


@pytest.mark.parametrize("pages", [1, 3, 63, 64, 65, 130])
def test_a_number_of_pages_that_fills_no_word_is_told_whole(pages: int) -> None:
    with opened() as iommufd, Memfd.create("ram", 1 << 20) as ram:
        _, hwpt = track_dirty_pages(iommufd, ram)
        write_pages(hwpt, FIRST, range(pages + 1))
        bitmap = hwpt.dirty_bitmap(IovaRange(FIRST, FIRST + pages * 4096 - 1))
        assert (bitmap.pages, len(bitmap)) == (pages, pages)
        assert list(bitmap) == [FIRST + number * 4096 for number in range(pages)]


def test_pages_of_mappings_side_by_side_are_told_together() -> None:
    with opened() as iommufd, Memfd.create("a", SIZE) as a, Memfd.create("b", SIZE) as b:
        ioas, hwpt = track_dirty_pages(iommufd, a)
        ioas.map_file(b, iova=FIRST + SIZE)
        write_pages(hwpt, FIRST, {2, 5})
        bitmap = hwpt.dirty_bitmap(IovaRange(FIRST, FIRST + 2 * SIZE - 1))
        assert list(bitmap) == [FIRST + 8192, FIRST + SIZE + 4096]


def test_a_range_with_a_hole_has_no_dirty_pages_to_tell_and_forgets_none() -> None:
    with opened() as iommufd, Memfd.create("a", SIZE) as a, Memfd.create("b", SIZE) as b:
        ioas, hwpt = track_dirty_pages(iommufd, a)
        behind = ioas.map_file(b, iova=FIRST + 2 * SIZE)
        write_pages(hwpt, FIRST, {0})
        write_pages(hwpt, behind.iova, {0})
        with pytest.raises(RequestError, match="GET_DIRTY_BITMAP") as caught:
            hwpt.dirty_bitmap(IovaRange(FIRST, behind.range.last))
        assert caught.value.errno == errno.ENOENT
        assert list(hwpt.dirty_bitmap(FIRST_PAGE)) == [FIRST]
        assert list(hwpt.dirty_bitmap(behind.range)) == [behind.iova]


def test_starting_to_track_forgets_what_was_written_before() -> None:
    with opened() as iommufd, Memfd.create("ram", SIZE) as ram:
        _, hwpt = track_dirty_pages(iommufd, ram)
        write_pages(hwpt, FIRST, {0})
        hwpt.set_dirty_tracking(False)
        hwpt.set_dirty_tracking(True)
        assert list(hwpt.dirty_bitmap(FIRST_PAGE)) == []


def test_what_was_written_is_told_after_the_tracking_has_stopped() -> None:
    with opened() as iommufd, Memfd.create("ram", SIZE) as ram:
        _, hwpt = track_dirty_pages(iommufd, ram)
        write_pages(hwpt, FIRST, {0})
        hwpt.set_dirty_tracking(False)
        assert list(hwpt.dirty_bitmap(FIRST_PAGE)) == [FIRST]


def test_a_page_table_that_was_not_made_for_it_tracks_nothing() -> None:
    with opened() as iommufd, Memfd.create("ram", SIZE) as ram:
        ioas = iommufd.alloc_ioas()
        hwpt = MockDevice(iommufd, ioas).device.alloc_hwpt(ioas)
        ioas.map_file(ram, iova=FIRST)
        with pytest.raises(IommuUnsupportedError):
            hwpt.set_dirty_tracking(True)
        with pytest.raises(IommuUnsupportedError):
            hwpt.dirty_bitmap(FIRST_PAGE)


@pytest.mark.parametrize(
    ("wanted", "page_size"),
    [
        (IovaRange(FIRST + 2048, FIRST + 6143), 4096),
        (IovaRange(FIRST, FIRST + 4095), 8192),
        (IovaRange(FIRST + 512, FIRST + 1023), 512),
    ],
    ids=["start", "length", "smaller than a page"],
)
def test_a_range_that_bits_do_not_fit_is_refused(wanted: IovaRange, page_size: int) -> None:
    with opened() as iommufd, Memfd.create("ram", SIZE) as ram:
        _, hwpt = track_dirty_pages(iommufd, ram)
        with pytest.raises(RequestError, match=f"by {page_size} bytes") as caught:
            hwpt.dirty_bitmap(wanted, page_size=page_size)
        assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("page_size", [0, -4096, 3000])
def test_a_bit_stands_for_a_power_of_two(page_size: int) -> None:
    with opened() as iommufd, Memfd.create("ram", SIZE) as ram:
        _, hwpt = track_dirty_pages(iommufd, ram)
        with pytest.raises(ValueError, match="not a power of two"):
            hwpt.dirty_bitmap(FIRST_PAGE, page_size=page_size)


def test_a_bitmap_says_what_it_is_about() -> None:
    with opened() as iommufd, Memfd.create("ram", SIZE) as ram:
        _, hwpt = track_dirty_pages(iommufd, ram)
        write_pages(hwpt, FIRST, {1})
        bitmap = hwpt.dirty_bitmap(IovaRange(FIRST, FIRST + SIZE - 1))
        assert bitmap == DirtyBitmap(FIRST, 4096, 4, b"\2" + bytes(7))
        assert FIRST + 4096 in bitmap
        assert FIRST not in bitmap


# Nested page tables.


def test_an_invalidation_drops_what_it_names_and_says_how_many_were_carried_out() -> None:
    with opened() as iommufd:
        _, table = attach_to_nested_hwpt(iommufd)
        assert guest_mock.tlb_entries_unchanged(table) == [True, True, True, True]
        assert table.invalidate([tlb_invalidation(0), tlb_invalidation(2)]) == 2
        assert guest_mock.tlb_entries_unchanged(table) == [False, True, False, True]
        assert table.invalidate([tlb_invalidation(None)]) == 1
        assert guest_mock.tlb_entries_unchanged(table) == [False] * 4


@pytest.mark.parametrize(
    ("wrong", "number"),
    [
        (tlb_invalidation(guest_mock.TLB_ENTRIES), errno.EINVAL),
        (tlb_invalidation(1, flags=2), errno.EOPNOTSUPP),
    ],
    ids=["entry", "flags"],
)
def test_an_invalidation_stops_at_the_first_that_is_refused(wrong: RawData, number: int) -> None:
    with opened() as iommufd:
        _, table = attach_to_nested_hwpt(iommufd)
        with pytest.raises(InvalidationError, match=f"{table}, entry 2") as caught:
            table.invalidate([tlb_invalidation(0), tlb_invalidation(1), wrong, tlb_invalidation(3)])
        assert (caught.value.errno, caught.value.handled) == (number, 2)
        assert guest_mock.tlb_entries_unchanged(table) == [False, False, True, True]


def test_an_invalidation_of_another_iommus_kind_is_refused() -> None:
    with opened() as iommufd:
        _, table = attach_to_nested_hwpt(iommufd)
        with pytest.raises(InvalidationError) as caught:
            table.invalidate([VtdInvalidate(0, 1)])
        assert (caught.value.errno, caught.value.handled) == (errno.EINVAL, 0)
        assert guest_mock.tlb_entries_unchanged(table) == [True] * 4


@pytest.mark.parametrize(
    "entries", [[], [tlb_invalidation(0), VtdInvalidate(0, 1)]], ids=["none", "of several kinds"]
)
def test_the_entries_of_an_invalidation_are_of_one_kind(entries: list[RawData]) -> None:
    with opened() as iommufd:
        _, table = attach_to_nested_hwpt(iommufd)
        with pytest.raises(ValueError, match="must all be of one kind"):
            table.invalidate(entries)


def test_whether_invalidations_of_a_kind_are_taken_is_asked_without_making_one() -> None:
    with opened() as iommufd:
        mock, table = attach_to_nested_hwpt(iommufd)
        assert can_invalidate(table, guest_mock.INVALIDATION)
        assert not can_invalidate(table, guest_mock.NO_INVALIDATION)
        assert guest_mock.tlb_entries_unchanged(table) == [True] * 4
        table_of_the_hosts = guest_mock.alloc_nesting_parent(iommufd.alloc_ioas(), mock.device)
        assert not can_invalidate(table_of_the_hosts, guest_mock.INVALIDATION)
        viommu = mock.device.alloc_viommu(guest_mock.VIOMMU, table_of_the_hosts)
        assert can_invalidate(viommu, guest_mock.INVALIDATION)
        assert not can_invalidate(viommu, guest_mock.NO_INVALIDATION)


def test_a_page_table_of_the_guests_stands_on_one_that_was_made_for_it() -> None:
    with opened() as iommufd:
        ioas = iommufd.alloc_ioas()
        mock = MockDevice(iommufd, ioas)
        plain = mock.device.alloc_hwpt(ioas)
        with pytest.raises(RequestError, match=f"{mock.device}, {plain}") as caught:
            mock.device.alloc_nested_hwpt(plain, hwpt_data())
        assert caught.value.errno == errno.EINVAL
        with pytest.raises(RequestError) as caught:
            mock.device.alloc_viommu(guest_mock.VIOMMU, plain)
        assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("data", [VtdStage1(FIRST, 48), SmmuV3Ste((1, 0))], ids=["VT-d", "SMMUv3"])
def test_a_page_table_of_another_iommus_format_is_refused(data: HwptData) -> None:
    with opened() as iommufd:
        ioas = iommufd.alloc_ioas()
        mock = MockDevice(iommufd, ioas)
        parent = guest_mock.alloc_nesting_parent(ioas, mock.device)
        viommu = mock.device.alloc_viommu(guest_mock.VIOMMU, parent)
        for below in (parent, viommu):
            with pytest.raises(IommuUnsupportedError):
                mock.device.alloc_nested_hwpt(below, data)


# Virtual IOMMUs.


def test_a_viommu_has_the_answer_of_its_driver() -> None:
    with opened() as iommufd:
        ioas = iommufd.alloc_ioas()
        mock = MockDevice(iommufd, ioas)
        parent = guest_mock.alloc_nesting_parent(ioas, mock.device)
        viommu = mock.device.alloc_viommu(guest_mock.VIOMMU, parent, guest_mock.viommu_data(77))
        given, answered, offset, length = struct.unpack("=2I2Q", viommu.data)
        assert (given, answered) == (77, 77)
        with viommu.map(offset, length) as page:
            assert page.read32(0) == 77
            page.write32(4, 78)
            assert page.read64(0) == 78 << 32 | 77
            with pytest.raises(ValueError, match="not within"):
                page.read32(length)
            with pytest.raises(IommuError):
                viommu.destroy()
        for wrong in ((offset + 2 * length, length), (offset, 2 * length)):
            with pytest.raises(RequestError, match=f"{wrong[1]} bytes at") as caught:
                viommu.map(*wrong)
            assert caught.value.errno == errno.ENXIO
        viommu.destroy()
        parent.destroy()


def test_closing_an_iommufd_unmaps_the_registers_of_its_viommus() -> None:
    with opened() as iommufd:
        ioas = iommufd.alloc_ioas()
        mock = MockDevice(iommufd, ioas)
        parent = guest_mock.alloc_nesting_parent(ioas, mock.device)
        viommu = mock.device.alloc_viommu(guest_mock.VIOMMU, parent, guest_mock.viommu_data(77))
        *_, offset, length = struct.unpack("=2I2Q", viommu.data)
        page = viommu.map(offset, length)
    assert page.closed
    with pytest.raises(ValueError, match="released"):
        page.read32(0)


def test_a_viommu_of_a_kind_that_the_iommu_does_not_have_is_refused() -> None:
    with opened() as iommufd:
        ioas = iommufd.alloc_ioas()
        mock = MockDevice(iommufd, ioas)
        parent = guest_mock.alloc_nesting_parent(ioas, mock.device)
        with pytest.raises(IommuUnsupportedError, match=f"{mock.device}, {parent}"):
            mock.device.alloc_viommu(ViommuType.ARM_SMMUV3, parent)


def test_a_viommu_drops_what_the_devices_of_its_guest_have_cached() -> None:
    with opened() as iommufd:
        _, mock, viommu = alloc_viommu(iommufd)
        assert viommu.alloc_vdevice(mock.device, 7).virtual_id == 7
        assert mock.cache_entries_unchanged() == [True] * 4
        assert viommu.invalidate([cache_invalidation(7, 1), cache_invalidation(7, 3)]) == 2
        assert mock.cache_entries_unchanged() == [True, False, True, False]
        assert viommu.invalidate([cache_invalidation(7, None)]) == 1
        assert mock.cache_entries_unchanged() == [False] * 4


@pytest.mark.parametrize(
    ("wrong", "number"),
    [
        (cache_invalidation(8, 2), errno.EINVAL),
        (cache_invalidation(7, guest_mock.CACHE_ENTRIES), errno.EINVAL),
        (cache_invalidation(7, 2, flags=2), errno.EOPNOTSUPP),
    ],
    ids=["device", "entry", "flags"],
)
def test_a_viommu_stops_at_the_first_invalidation_that_is_refused(
    wrong: RawData, number: int
) -> None:
    with opened() as iommufd:
        _, mock, viommu = alloc_viommu(iommufd)
        viommu.alloc_vdevice(mock.device, 7)
        with pytest.raises(InvalidationError) as caught:
            viommu.invalidate([cache_invalidation(7, 0), wrong, cache_invalidation(7, 3)])
        assert (caught.value.errno, caught.value.handled) == (number, 1)
        assert mock.cache_entries_unchanged() == [False, True, True, True]


def test_a_device_and_a_number_in_the_guest_are_one_anothers() -> None:
    with opened() as iommufd:
        _, mock, viommu = alloc_viommu(iommufd)
        other = MockDevice(iommufd, iommufd.alloc_ioas())
        vdevice = viommu.alloc_vdevice(mock.device, 7)
        for device, number in ((mock.device, 8), (other.device, 7)):
            with pytest.raises(RequestError, match=f"{viommu}, {device}") as caught:
                viommu.alloc_vdevice(device, number)
            assert caught.value.errno == errno.EEXIST
        vdevice.destroy()
        viommu.alloc_vdevice(other.device, 7)


def test_a_viommu_is_not_destroyed_before_its_vdevice() -> None:
    with opened() as iommufd:
        _, mock, viommu = alloc_viommu(iommufd)
        vdevice = viommu.alloc_vdevice(mock.device, 7)
        with pytest.raises(IommuError, match=str(viommu)):
            viommu.destroy()
        vdevice.destroy()
        viommu.destroy()


# Hardware queues.


def test_what_a_hardware_queue_is_in_cannot_be_unmapped_and_what_went_before_is_known() -> None:
    with opened() as iommufd, Memfd.create("ram", SIZE) as ram:
        ioas, _, viommu = alloc_viommu(iommufd)
        ioas.map_file(ram, iova=FIRST, length=4096)
        mapping = ioas.map_file(ram, iova=FIRST + 4096, length=4096)
        queue = viommu.alloc_hw_queue(HW_QUEUE, 0, mapping.range)
        ways: tuple[Callable[[], int], ...] = (
            lambda: ioas.unmap(IovaRange(FIRST, FIRST + 8191)),
            ioas.unmap_all,
        )
        for unmap in ways:
            with pytest.raises(RequestError, match="A hardware queue uses the mapping") as caught:
                unmap()
            assert caught.value.errno == errno.EBUSY
            assert ioas.mappings == (mapping,)
        queue.destroy()
        assert ioas.unmap(mapping) == 4096


def test_hardware_queues_come_in_the_order_of_their_numbers_and_go_in_the_other() -> None:
    with opened() as iommufd, Memfd.create("ram", SIZE) as ram:
        ioas, _, viommu = alloc_viommu(iommufd)
        ioas.map_file(ram, iova=FIRST)
        with pytest.raises(RequestError, match="queue 1 at") as caught:
            viommu.alloc_hw_queue(HW_QUEUE, 1, FIRST_PAGE)
        assert caught.value.errno == errno.EIO
        first = viommu.alloc_hw_queue(HW_QUEUE, 0, FIRST_PAGE)
        second = viommu.alloc_hw_queue(HW_QUEUE, 1, IovaRange(FIRST + 4096, FIRST + 8191))
        with pytest.raises(IommuError):
            first.destroy()
        second.destroy()
        first.destroy()


@pytest.mark.parametrize(
    ("index", "where", "number"),
    [
        (0, FIRST_PAGE, errno.EEXIST),
        (guest_mock.HW_QUEUES, FIRST_PAGE, errno.EINVAL),
        (1, IovaRange(FIRST + SIZE, FIRST + SIZE + 4095), errno.ENOENT),
        (1, IovaRange(FIRST + 4096, FIRST + 12287), errno.EFAULT),
    ],
    ids=["taken", "too many", "not mapped", "not contiguous"],
)
def test_a_hardware_queue_that_cannot_be_leaves_nothing_behind(
    index: int, where: IovaRange, number: int
) -> None:
    with opened() as iommufd, Memfd.create("ram", SIZE) as ram:
        ioas, _, viommu = alloc_viommu(iommufd)
        ioas.map_file(ram, iova=FIRST, length=4096)
        for twice in (FIRST + 4096, FIRST + 8192):
            ioas.map_file(ram, iova=twice, length=4096)
        queue = viommu.alloc_hw_queue(HW_QUEUE, 0, FIRST_PAGE)
        with pytest.raises(RequestError, match=f"queue {index} at {where}") as caught:
            viommu.alloc_hw_queue(HW_QUEUE, index, where)
        assert caught.value.errno == number
        queue.destroy()
        assert ioas.unmap_all() == 12288


def test_a_hardware_queue_of_a_kind_that_the_iommu_does_not_have_is_refused() -> None:
    with opened() as iommufd:
        *_, viommu = alloc_viommu(iommufd)
        with pytest.raises(IommuUnsupportedError):
            viommu.alloc_hw_queue(HwQueueType.TEGRA241_CMDQV, 0, FIRST_PAGE)


def test_a_hardware_queue_can_lie_anywhere_in_a_page() -> None:
    with opened() as iommufd, Memfd.create("ram", SIZE) as ram:
        ioas, _, viommu = alloc_viommu(iommufd)
        ioas.map_file(ram, iova=FIRST, length=4096)
        viommu.alloc_hw_queue(HW_QUEUE, 0, IovaRange(FIRST + 256, FIRST + 511)).destroy()
        assert ioas.unmap_all() == 4096
