"""Tests of known bugs of iommufd, each expected to fail; one that passes turns the run red.

They issue the requests themselves, because pyluo works around the bugs. A precondition that does
not hold raises `Unmet`, which is not an expected failure.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest
from sessions.guest_bugs import require

from iommufd import guest_faults, guest_mock
from iommufd.guest_mock import FIRST, MockDevice, cache_invalidation, opened, write_pages
from pyluo import Memfd
from pyluo.iommufd import HwptFlags, IovaRange
from pyluo.iommufd.hwpt import _GET_DIRTY_BITMAP as GET_DIRTY_BITMAP
from pyluo.iommufd.hwpt import _INVALIDATE as INVALIDATE
from pyluo.vm import VM

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyluo.iommufd import IommuFd, PagingHwpt, Viommu

PAGE = 4096
VIRTUAL_ID = 7  # the device's ID in the guest
MANY_ENTRIES = 400_000  # entries, for which a driver requests more contiguous memory than there is


@pytest.fixture
def shared_vm(mock_vm: Callable[[], VM]) -> VM:
    return mock_vm()


def bug(reason: str) -> pytest.MarkDecorator:
    return pytest.mark.xfail(strict=True, raises=AssertionError, reason=reason)


def alloc_tracking_hwpt(iommufd: IommuFd, ram: Memfd) -> PagingHwpt:
    """Allocate an HWPT with dirty tracking, with two dirty pages and a hole between them."""
    ioas = iommufd.alloc_ioas()
    ioas.huge_pages = False
    device = MockDevice(iommufd, ioas).device
    hwpt = device.alloc_hwpt(ioas, flags=HwptFlags.DIRTY_TRACKING)
    for iova in (FIRST, FIRST + 2 * PAGE):
        ioas.map_file(ram, iova=iova, length=PAGE)
    hwpt.set_dirty_tracking(True)
    write_pages(hwpt, FIRST, {0, 2})
    for page in (0, 2):
        bitmap = hwpt.dirty_bitmap(page_range(page), clear=False)
        require(len(bitmap) == 1, "a page that was written to is not dirty")
    return hwpt


def page_range(number: int) -> IovaRange:
    start = FIRST + number * PAGE
    return IovaRange(start, start + PAGE - 1)


def request_dirty_bitmap(hwpt: PagingHwpt, pages: int, data: bytearray | int) -> int:
    """Request the dirty bitmap from the first page on, and return the errno."""
    return GET_DIRTY_BITMAP.attempt(
        hwpt.iommufd.fileno(),
        hwpt_id=hwpt.id,
        iova=FIRST,
        length=pages * PAGE,
        page_size=PAGE,
        data=data,
    ).errno


def alloc_viommu(iommufd: IommuFd) -> Viommu:
    ioas = iommufd.alloc_ioas()
    device = MockDevice(iommufd, ioas).device
    viommu = device.alloc_viommu(guest_mock.VIOMMU, guest_mock.alloc_nesting_parent(ioas, device))
    viommu.alloc_vdevice(device, VIRTUAL_ID)
    return viommu


def invalidate(viommu: Viommu, count: int) -> tuple[int, int]:
    """Invalidate this many entries; return the errno, and how many the kernel counts as done."""
    entry = cache_invalidation(VIRTUAL_ID, 0)
    reply = INVALIDATE.attempt(
        viommu.iommufd.fileno(),
        hwpt_id=viommu.id,
        data_uptr=entry.data * count,
        data_type=entry.data_type,
        entry_len=len(entry.data),
        entry_num=count,
    )
    return reply.errno, reply.integer("entry_num")


def invalidate_many() -> tuple[int, int]:
    with opened() as iommufd:
        return invalidate(alloc_viommu(iommufd), MANY_ENTRIES)


@bug("GET_DIRTY_BITMAP stops at a hole and answers 0: the dirty pages behind it look clean")
@pytest.mark.in_guest
def test_a_dirty_page_behind_a_hole_is_told_or_the_hole_is_refused() -> None:
    with opened() as iommufd, Memfd.create("ram", PAGE) as ram:
        hwpt = alloc_tracking_hwpt(iommufd, ram)
        bits = bytearray(8)
        answer = request_dirty_bitmap(hwpt, 3, bits)
        assert answer != 0 or bits[0] == 0b101


@bug("GET_DIRTY_BITMAP answers 0 where it could not write, and has forgotten the dirty pages")
@pytest.mark.in_guest
def test_dirty_pages_that_could_not_be_told_are_not_forgotten() -> None:
    with opened() as iommufd, Memfd.create("ram", PAGE) as ram:
        hwpt = alloc_tracking_hwpt(iommufd, ram)
        answer = request_dirty_bitmap(hwpt, 1, PAGE)  # an address where no memory is
        bits = bytearray(8)
        request_dirty_bitmap(hwpt, 1, bits)
        assert answer == errno.EFAULT or bits[0] == 1


@bug("HWPT_INVALIDATE of a vIOMMU that found no memory counts all entries as carried out")
@pytest.mark.in_guest
def test_an_invalidation_for_which_there_is_no_memory_counts_none() -> None:
    with opened() as iommufd:
        viommu = alloc_viommu(iommufd)
        answers = list(guest_faults.try_with_each_allocation_failing(lambda: invalidate(viommu, 2)))
        require((0, 2) in answers, f"{answers}")
        require(any(answer != (0, 2) for answer in answers), "no allocation failed")
        assert (errno.ENOMEM, 2) not in answers


@bug("HWPT_INVALIDATE asks for memory by a size that userspace chose, and warns when it is large")
def test_a_large_invalidation_is_no_reason_for_a_warning() -> None:
    with VM("selftest") as vm:
        answer, _ = vm.call(invalidate_many)
        require(answer in (0, errno.ENOMEM), f"{answer}")
        warned = "WARNING" in vm.dmesg and "mock_viommu_cache_invalidate" in vm.dmesg
        assert not warned
