"""Tests of iommufd, its objects and its IOASes, with the kernel's mock device."""

from __future__ import annotations

import errno
import mmap
import os
import resource
from typing import TYPE_CHECKING

import pytest

from iommufd import guest_mock
from iommufd.guest_mock import FIRST, LAST, CpuAccess, MockDevice, fill, maps_buffer, opened
from pyluo import (
    GuestRam,
    IoasLayout,
    IommuError,
    IommuUnavailableError,
    IommuUnsupportedError,
    Memfd,
    NotPermittedError,
    RequestError,
    UserMappingError,
)
from pyluo.iommufd import (
    Access,
    Accounting,
    HwptFlags,
    Ioas,
    IommuFd,
    IovaRange,
    IovaRanges,
    Mapping,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyluo.vm import VM

pytestmark = pytest.mark.in_guest

SIZE = 16384
EVERYWHERE = IovaRange(0, (1 << 64) - 1)


@pytest.fixture
def shared_vm(mock_vm: Callable[[], VM]) -> VM:
    return mock_vm()


# The iommufd itself.


def test_a_kernel_without_iommufd_is_told_with_what_it_needs() -> None:
    with pytest.raises(IommuUnavailableError, match="CONFIG_IOMMUFD"):
        IommuFd("/dev/no-iommu")


def test_the_device_is_opened_by_those_who_may() -> None:
    with guest_mock.unprivileged(), pytest.raises(NotPermittedError, match="/dev/iommu"):
        IommuFd()


def test_the_objects_of_an_iommufd_are_known_in_the_order_of_their_making() -> None:
    with opened() as iommufd:
        ioas = iommufd.alloc_ioas()
        queue = iommufd.alloc_fault_queue()
        other = iommufd.alloc_ioas()
        assert list(iommufd.objects) == [ioas, queue, other]
        queue.destroy()
        assert list(iommufd.objects) == [ioas, other]


def test_closing_an_iommufd_ends_its_objects() -> None:
    with opened() as iommufd:
        ioas = iommufd.alloc_ioas()
        device = MockDevice(iommufd, ioas)
        iommufd.close()
        assert os.listdir(guest_mock.DEVICES) == []
        assert iommufd.objects == ()
        assert [one.destroyed for one in (ioas, device, device.device)] == [True] * 3
        with pytest.raises(ValueError, match="IommuFd is closed"):
            ioas.iova_ranges()


def test_an_object_is_destroyed_once_and_says_so() -> None:
    with opened() as iommufd:
        ioas = iommufd.alloc_ioas()
        assert str(ioas) == f"IOAS {ioas.id}"
        ioas.destroy()
        ioas.destroy()
        assert str(ioas) == "destroyed IOAS"


def test_an_object_that_is_destroyed_is_not_asked_of_the_kernel_by_its_old_id() -> None:
    with opened() as iommufd:
        ioas = iommufd.alloc_ioas()
        mock = MockDevice(iommufd, iommufd.alloc_ioas())
        ioas.destroy()
        with pytest.raises(ValueError, match="the IOAS is destroyed"):
            mock.device.alloc_hwpt(ioas)


def test_an_iommufd_is_given_up_with_all_that_is_in_it_and_taken_over_by_its_ids() -> None:
    with opened() as first, Memfd.create("ram", SIZE) as ram:
        ioas = first.alloc_ioas()
        number = ioas.id
        mapping = ioas.map_file(ram, iova=FIRST)
        with IommuFd.from_fd(first.detach()) as second:
            assert ioas.destroyed
            adopted = Ioas(second, number)
            adopted.adopt([mapping])
            assert adopted.mappings == (mapping,)
            assert adopted.unmap(mapping) == SIZE
            adopted.destroy()


def test_an_id_belongs_to_one_object() -> None:
    with opened() as iommufd:
        ioas = iommufd.alloc_ioas()
        with pytest.raises(ValueError, match=f"the id {ioas.id} belongs to IOAS {ioas.id} already"):
            Ioas(iommufd, ioas.id)
        assert iommufd.objects == (ioas,)


def test_an_object_that_another_process_destroyed_is_destroyed() -> None:
    with opened() as iommufd, IommuFd.from_fd(os.dup(iommufd.fileno())) as other:
        ioas = iommufd.alloc_ioas()
        Ioas(other, ioas.id).destroy()
        with pytest.raises(RequestError, match=str(ioas)) as caught:
            ioas.iova_ranges()
        assert caught.value.errno == errno.ENOENT
        ioas.destroy()
        assert ioas.destroyed


def test_an_object_of_another_iommufd_is_not_taken_for_one_of_this() -> None:
    with IommuFd() as other, opened() as iommufd:
        stranger = other.alloc_ioas()
        ioas = iommufd.alloc_ioas()
        mock = MockDevice(iommufd, ioas)
        with pytest.raises(ValueError, match="lives in another iommufd"):
            mock.device.alloc_hwpt(stranger)
        with pytest.raises(ValueError, match="lives in another iommufd"):
            ioas.copy(stranger, EVERYWHERE)
        with pytest.raises(ValueError, match="lives in another iommufd"):
            iommufd.vfio_ioas = stranger
        iommufd.close()
        other.close()


def test_an_object_that_another_iommufd_object_destroyed_makes_room_for_the_next() -> None:
    with opened() as iommufd, IommuFd.from_fd(os.dup(iommufd.fileno())) as other:
        stale = iommufd.alloc_ioas()
        Ioas(other, stale.id).destroy()
        new = iommufd.alloc_ioas()
        assert stale.destroyed
        assert iommufd.objects == (new,)


def test_a_descriptor_of_something_else_is_not_adopted_and_stays_the_callers() -> None:
    with Memfd.create("ram", SIZE) as ram:
        with pytest.raises(RequestError) as caught:
            IommuFd.from_fd(ram.fileno())
        assert caught.value.errno == errno.ENODEV
        assert ram.size == SIZE


def test_memory_counts_for_the_user_unless_told_otherwise_before_the_first_object() -> None:
    with opened() as iommufd:
        assert iommufd.accounting is Accounting.USER
        iommufd.accounting = Accounting.PROCESS
        assert iommufd.accounting is Accounting.PROCESS
        iommufd.alloc_ioas()
        with pytest.raises(IommuError, match="before the first object"):
            iommufd.accounting = Accounting.USER
        assert iommufd.accounting is Accounting.PROCESS


def test_the_accounting_is_roots_to_choose() -> None:
    refused = pytest.raises(NotPermittedError, match="CAP_SYS_RESOURCE")
    with opened() as iommufd, guest_mock.unprivileged(), refused:
        iommufd.accounting = Accounting.PROCESS


@pytest.mark.parametrize("accounting", Accounting)
def test_memory_beyond_the_limit_is_refused_with_the_name_of_the_limit(
    accounting: Accounting,
) -> None:
    with opened() as iommufd, Memfd.create("ram", SIZE) as ram:
        iommufd.accounting = accounting
        ioas = iommufd.alloc_ioas()
        MockDevice(iommufd, ioas)
        with (
            guest_mock.limited(resource.RLIMIT_MEMLOCK, 4096),
            guest_mock.unprivileged(),
            pytest.raises(RequestError, match="RLIMIT_MEMLOCK") as caught,
        ):
            ioas.map_file(ram)
        assert caught.value.errno == errno.ENOMEM
        assert ioas.mappings == ()
        assert ioas.map_file(ram).length == SIZE


def test_what_is_mapped_by_file_can_change_its_process() -> None:
    with opened() as iommufd, Memfd.create("ram", SIZE) as ram:
        ioas = iommufd.alloc_ioas()
        MockDevice(iommufd, ioas)
        mapping = ioas.map_file(ram)
        iommufd.change_process()
        assert ioas.mappings == (mapping,)


def test_what_is_mapped_by_address_keeps_an_iommufd_in_its_process() -> None:
    with opened() as iommufd, mmap.mmap(-1, SIZE) as buffer:
        ioas = iommufd.alloc_ioas()
        mapping = ioas.map(buffer)
        with pytest.raises(UserMappingError, match="map_file"):
            iommufd.change_process()
        ioas.unmap(mapping)
        iommufd.change_process()


def test_the_ioas_of_vfios_containers_is_set_read_and_cleared() -> None:
    with opened() as iommufd:
        assert iommufd.vfio_ioas is None
        ioas = iommufd.alloc_ioas()
        iommufd.vfio_ioas = ioas
        assert iommufd.vfio_ioas is ioas
        del iommufd.vfio_ioas
        assert iommufd.vfio_ioas is None


def test_an_ioas_that_another_made_vfios_is_made_known_here() -> None:
    with opened() as iommufd, IommuFd.from_fd(os.dup(iommufd.fileno())) as other:
        ioas = iommufd.alloc_ioas()
        iommufd.vfio_ioas = ioas
        known = other.vfio_ioas
        assert known is not None
        assert known.id == ioas.id
        assert other.objects == (known,)


def test_the_end_of_vfios_ioas_leaves_none() -> None:
    with opened() as iommufd:
        ioas = iommufd.alloc_ioas()
        iommufd.vfio_ioas = ioas
        ioas.destroy()
        assert iommufd.vfio_ioas is None


# Dependencies between objects.


def test_what_something_hangs_on_is_destroyed_after_it() -> None:
    with opened() as iommufd:
        ioas = iommufd.alloc_ioas()
        queue = iommufd.alloc_fault_queue()
        mock = MockDevice(iommufd, ioas)
        parent = mock.device.alloc_hwpt(ioas, flags=HwptFlags.NEST_PARENT)
        viommu = mock.device.alloc_viommu(guest_mock.VIOMMU, parent)
        viommu.alloc_vdevice(mock.device, 7)
        data = guest_mock.hwpt_data()
        nested = mock.device.alloc_nested_hwpt(viommu, data, fault_queue=queue)
        events = viommu.alloc_event_queue(guest_mock.EVENTS, 8, size=4)
        mock.attach(nested)
        for used in (mock.device, nested, queue, viommu, parent, ioas):
            with pytest.raises(IommuError, match=f"{used}: .* must be destroyed, detached"):
                used.destroy()
            assert not used.destroyed
        for each in (mock, nested, queue, events, viommu, parent, ioas):
            each.destroy()


def test_a_vdevice_ends_with_its_device() -> None:
    with opened() as iommufd:
        ioas = iommufd.alloc_ioas()
        mock, other = MockDevice(iommufd, ioas), MockDevice(iommufd, ioas)
        viommu = mock.device.alloc_viommu(
            guest_mock.VIOMMU, guest_mock.alloc_nesting_parent(ioas, mock.device)
        )
        vdevice = viommu.alloc_vdevice(mock.device, 7)
        mock.destroy()
        vdevice.destroy()
        assert vdevice.destroyed
        again = viommu.alloc_vdevice(other.device, 7)
        again.destroy()
        viommu.destroy()


def test_a_queue_whose_descriptor_another_process_has_too_is_not_destroyed_before_that_ends() -> (
    None
):
    with opened() as iommufd:
        queue = iommufd.alloc_fault_queue()
        with guest_mock.forked():
            with pytest.raises(IommuError, match="also in other processes"):
                queue.destroy()
            assert not queue.destroyed
        queue.destroy()
        assert queue.destroyed


def test_an_ioas_of_which_another_process_has_the_iommufd_is_destroyed_all_the_same() -> None:
    with opened() as iommufd:
        ioas = iommufd.alloc_ioas()
        with guest_mock.forked():
            ioas.destroy()


def test_what_a_signal_handler_asks_of_an_iommufd_in_use_is_refused() -> None:
    """A descriptor is asked for its number in the middle of a request, as a handler could run."""
    with opened() as iommufd, Memfd.create("ram", SIZE) as ram:
        ioas = iommufd.alloc_ioas()
        refusals = []

        class Interrupting:
            def fileno(self) -> int:
                for request in (
                    lambda: ioas.mappings,
                    lambda: ioas.map_file(ram, iova=FIRST + SIZE),
                    ioas.unmap_all,
                    ioas.destroy,
                    iommufd.detach,
                    iommufd.close,
                ):
                    with pytest.raises(RequestError, match="signal handler") as caught:
                        request()
                    refusals.append(caught.value.errno)
                return ram.fileno()

        mapping = ioas.map_file(Interrupting(), iova=FIRST)
        assert set(refusals) == {errno.EDEADLK}
        assert ioas.mappings == (mapping,)


# Mappings.


def test_a_device_sees_the_pages_of_a_file() -> None:
    with opened() as iommufd, Memfd.create("ram", SIZE) as ram, ram.map() as pages:
        ioas = iommufd.alloc_ioas()
        mock = MockDevice(iommufd, ioas)
        mapping = ioas.map_file(ram, offset=4096, length=8192, iova=FIRST + 4096)
        part = memoryview(pages)[4096 : 4096 + 8192]
        assert maps_buffer(mock, FIRST + 4096, part)
        assert not maps_buffer(mock, FIRST, memoryview(pages)[:4096])
        stat = os.fstat(ram.fileno())
        access = Access.READ | Access.WRITE
        identity = (stat.st_dev, stat.st_ino)
        assert mapping == Mapping(FIRST + 4096, 8192, access, identity, 4096)
        assert ioas.unmap(mapping) == 8192
        assert not maps_buffer(mock, FIRST + 4096, part)
        assert ioas.mappings == ()
        part.release()


def test_a_device_sees_the_pages_of_a_buffer() -> None:
    with opened() as iommufd, mmap.mmap(-1, SIZE) as buffer:
        ioas = iommufd.alloc_ioas()
        mock = MockDevice(iommufd, ioas)
        mapping = ioas.map(buffer, access=Access.READ)
        assert mapping == Mapping(mapping.iova, SIZE, Access.READ, None, 0)
        assert maps_buffer(mock, mapping.iova, buffer)
        assert guest_mock.is_pinned(iommufd, buffer, 1)
        ioas.unmap(mapping)
        assert guest_mock.is_pinned(iommufd, buffer, 0)


def test_what_is_written_to_an_address_is_in_the_file() -> None:
    with opened() as iommufd, Memfd.create("ram", SIZE) as ram:
        contents = fill(ram)
        ioas = iommufd.alloc_ioas()
        mapping = ioas.map_file(ram)
        with CpuAccess(ioas) as access:
            assert access.read(mapping.iova + 6000, 5000) == contents[6000:11000]
            access.write(mapping.iova + 4090, b"across pages")
        assert ram.read(12, 4090) == b"across pages"


def test_a_buffer_is_read_where_it_is() -> None:
    with opened() as iommufd, mmap.mmap(-1, SIZE) as buffer:
        ioas = iommufd.alloc_ioas()
        mapping = ioas.map(buffer)
        buffer[100:105] = b"after"
        with CpuAccess(ioas) as access:
            assert access.read(mapping.iova + 100, 5) == b"after"
        ioas.destroy()


def test_memory_of_a_file_is_there_after_its_descriptor_was_closed() -> None:
    with opened() as iommufd:
        ram = Memfd.create("ram", SIZE)
        contents = fill(ram)
        ioas = iommufd.alloc_ioas()
        mapping = ioas.map_file(ram)
        ram.close()
        with CpuAccess(ioas) as access:
            assert access.read(mapping.iova, SIZE) == contents


@pytest.mark.parametrize("end", ["unmap", "unmap_all", "destroy", "close"])
def test_a_buffer_that_is_mapped_cannot_be_freed_until_it_is_not(end: str) -> None:
    with opened() as iommufd:
        buffer = mmap.mmap(-1, SIZE)
        ioas = iommufd.alloc_ioas()
        mapping = ioas.map(buffer)
        with pytest.raises(BufferError):
            buffer.close()
        ends: dict[str, Callable[[], object]] = {
            "unmap": lambda: ioas.unmap(mapping),
            "unmap_all": ioas.unmap_all,
            "destroy": ioas.destroy,
            "close": iommufd.close,
        }
        ends[end]()
        buffer.close()


def test_a_buffer_that_could_not_be_mapped_can_be_freed_while_the_error_is_looked_at() -> None:
    with opened() as iommufd:
        ioas = iommufd.alloc_ioas()
        MockDevice(iommufd, ioas)
        buffer = mmap.mmap(-1, SIZE)
        with pytest.raises(RequestError) as caught:
            ioas.map(buffer, iova=0)
        buffer.close()
        assert caught.value.errno == errno.EINVAL
        assert ioas.mappings == ()


def test_read_only_memory_is_mapped_for_reading_alone() -> None:
    with opened() as iommufd, Memfd.create("ram", SIZE) as ram, ram.map(writable=False) as pages:
        contents = fill(ram)
        ioas = iommufd.alloc_ioas()
        with pytest.raises(TypeError, match="writable"):
            ioas.map(pages)
        mapping = ioas.map(pages, access=Access.READ)
        with CpuAccess(ioas) as access:
            assert access.read(mapping.iova, SIZE) == contents
        ioas.destroy()


def test_an_iommufd_is_not_given_up_with_memory_that_could_be_freed_under_it() -> None:
    with opened() as iommufd, mmap.mmap(-1, SIZE) as buffer:
        ioas = iommufd.alloc_ioas()
        mapping = ioas.map(buffer)
        with pytest.raises(UserMappingError, match="detach"):
            iommufd.detach()
        assert not ioas.destroyed
        ioas.unmap(mapping)
        os.close(iommufd.detach())


def test_what_is_mapped_for_reading_is_not_written_to() -> None:
    with opened() as iommufd, Memfd.create("ram", SIZE) as ram:
        ioas = iommufd.alloc_ioas()
        mapping = ioas.map_file(ram, access=Access.READ)
        with CpuAccess(ioas) as access, pytest.raises(PermissionError):
            access.write(mapping.iova, b"x")


def test_addresses_that_the_kernel_chooses_can_be_used() -> None:
    with opened() as iommufd, Memfd.create("ram", SIZE) as ram:
        ioas = iommufd.alloc_ioas()
        MockDevice(iommufd, ioas)
        mapped = [ioas.map_file(ram) for _ in range(8)]
        allowed = ioas.iova_ranges()
        assert all(allowed.allow(each.range) for each in mapped)
        assert len({each.iova for each in mapped}) == 8
        assert ioas.mappings == tuple(sorted(mapped, key=lambda each: each.iova))


@pytest.mark.parametrize("iova", [-1, -4096, 1 << 64])
def test_an_address_of_more_than_64_bits_changes_nothing(iova: int) -> None:
    with opened() as iommufd, Memfd.create("ram", SIZE) as ram, GuestRam.create("r", SIZE) as guest:
        ioas, other = iommufd.alloc_ioas(), iommufd.alloc_ioas()
        mapping = ioas.map_file(ram, iova=FIRST)
        buffer = mmap.mmap(-1, SIZE)
        for attempt in (
            lambda: ioas.map(buffer, iova=iova),
            lambda: ioas.map_file(ram, iova=iova),
            lambda: ioas.map_ram(guest, iova=iova),
            lambda: other.copy(ioas, mapping.range, iova=iova),
            lambda: ioas.unmap(Mapping(iova, 4096, Access.READ, None, 0)),
        ):
            with pytest.raises(ValueError, match=r"does not fit|not a range"):
                attempt()
        buffer.close()
        assert (ioas.mappings, other.mappings) == ((mapping,), ())
        IoasLayout.record(ioas, {"ram": ram})


def test_address_zero_is_an_address() -> None:
    with opened() as iommufd, Memfd.create("ram", SIZE) as ram:
        ioas = iommufd.alloc_ioas()
        assert ioas.map_file(ram, iova=0).iova == 0
        with mmap.mmap(-1, SIZE) as buffer:
            assert ioas.map(buffer, iova=SIZE).iova == SIZE
            ioas.unmap_all()


def test_an_address_that_is_taken_is_told_as_such() -> None:
    with opened() as iommufd, Memfd.create("ram", SIZE) as ram, mmap.mmap(-1, SIZE) as buffer:
        ioas = iommufd.alloc_ioas()
        mapping = ioas.map_file(ram, iova=FIRST)
        with pytest.raises(IommuError, match=f"at {FIRST + 4096:#x}"):
            ioas.map_file(ram, iova=FIRST + 4096)
        with pytest.raises(IommuError):
            ioas.map(buffer, iova=FIRST)
        with pytest.raises(IommuError):
            ioas.copy(ioas, mapping.range, iova=FIRST)
        assert ioas.mappings == (mapping,)


@pytest.mark.parametrize(
    ("iova", "length"),
    [(FIRST + 1024, 4096), (FIRST, 4096 + 1024), (0, 4096), (LAST - 4095, 8192), (LAST + 1, 4096)],
    ids=["address", "length", "before", "across the end", "behind"],
)
def test_what_a_device_cannot_reach_is_not_mapped(iova: int, length: int) -> None:
    with opened() as iommufd, Memfd.create("ram", SIZE) as ram:
        ioas = iommufd.alloc_ioas()
        MockDevice(iommufd, ioas)
        with pytest.raises(RequestError, match="iova_ranges") as caught:
            ioas.map_file(ram, iova=iova, length=length)
        assert caught.value.errno == errno.EINVAL
        assert ioas.mappings == ()


def test_nothing_is_mapped_in_a_reserved_range() -> None:
    with opened() as iommufd, Memfd.create("ram", SIZE) as ram:
        ioas = iommufd.alloc_ioas()
        guest_mock.reserve(ioas, IovaRange(FIRST + 8192, FIRST + 12287))
        with pytest.raises(RequestError) as caught:
            ioas.map_file(ram, iova=FIRST)
        assert caught.value.errno == errno.EINVAL
        ioas.map_file(ram, iova=FIRST, length=8192)


def test_where_there_is_no_gap_of_the_size_the_kernel_chooses_none() -> None:
    with opened() as iommufd, Memfd.create("ram", SIZE) as ram:
        ioas = iommufd.alloc_ioas()
        ioas.allow_iovas([IovaRange(FIRST, FIRST + SIZE - 1)])
        ioas.map_file(ram, length=4096)
        with pytest.raises(RequestError, match="no free gap of this size") as caught:
            ioas.map_file(ram)
        assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize(("offset", "length"), [(0, SIZE + 1), (SIZE, None), (-4096, 8192), (0, 0)])
def test_what_is_not_within_the_file_is_not_mapped(offset: int, length: int | None) -> None:
    with opened() as iommufd, Memfd.create("ram", SIZE) as ram:
        ioas = iommufd.alloc_ioas()
        with pytest.raises(ValueError, match=f"do not lie within {SIZE} bytes"):
            ioas.map_file(ram, offset=offset, length=length)


def test_a_file_that_the_kernel_cannot_map_is_told_as_such() -> None:
    with opened() as iommufd, open(os.__file__) as source:
        ioas = iommufd.alloc_ioas()
        MockDevice(iommufd, ioas)
        with pytest.raises(RequestError, match="use a memfd") as caught:
            ioas.map_file(source, length=4096, access=Access.READ)
        assert caught.value.errno == errno.EINVAL


def test_a_file_that_has_no_size_is_told_as_such() -> None:
    read, write = os.pipe()
    with open(read, "rb") as pipe, open(write, "wb"), opened() as iommufd:
        ioas = iommufd.alloc_ioas()
        with pytest.raises(ValueError, match="do not lie within 0 bytes"):
            ioas.map_file(pipe, length=4096)


# Copies.


def test_a_copy_spans_mappings_and_parts_of_them_and_says_what_it_shows() -> None:
    with opened() as iommufd, Memfd.create("a", SIZE) as a, Memfd.create("b", SIZE) as b:
        contents = fill(a)[-4096:] + b.read(SIZE, 0)[:8192]
        source, target = iommufd.alloc_ioas(), iommufd.alloc_ioas()
        first = source.map_file(a, iova=FIRST)
        second = source.map_file(b, iova=FIRST + SIZE)
        wanted = IovaRange(FIRST + SIZE - 4096, FIRST + SIZE + 8191)
        copied = target.copy(source, wanted, iova=FIRST, access=Access.READ)
        assert copied == IovaRange(FIRST, FIRST + 12287)
        assert target.mappings == (
            Mapping(FIRST, 4096, Access.READ, first.file, SIZE - 4096),
            Mapping(FIRST + 4096, 8192, Access.READ, second.file, 0),
        )
        source.unmap_all()
        with CpuAccess(target) as access:
            assert access.read(FIRST, 12288) == contents


def test_a_copy_of_a_part_is_unmapped_as_a_whole() -> None:
    with opened() as iommufd, Memfd.create("ram", SIZE) as ram:
        ioas = iommufd.alloc_ioas()
        mapping = ioas.map_file(ram, iova=FIRST)
        copied = ioas.copy(ioas, IovaRange(FIRST + 4096, FIRST + 12287))
        assert ioas.unmap(copied) == 8192
        assert ioas.mappings == (mapping,)


def test_a_copy_is_shown_to_a_device_of_the_same_pages_pinned_once() -> None:
    with opened() as iommufd, mmap.mmap(-1, SIZE) as buffer:
        source, target = iommufd.alloc_ioas(), iommufd.alloc_ioas()
        MockDevice(iommufd, source)
        mock = MockDevice(iommufd, target)
        copied = target.copy(source, source.map(buffer).range)
        assert maps_buffer(mock, copied.start, buffer)
        assert guest_mock.is_pinned(iommufd, buffer, 1)
        iommufd.close()


def test_a_range_with_a_hole_is_not_copied() -> None:
    with opened() as iommufd, Memfd.create("ram", SIZE) as ram:
        source, target = iommufd.alloc_ioas(), iommufd.alloc_ioas()
        source.map_file(ram, iova=FIRST, length=4096)
        source.map_file(ram, iova=FIRST + 8192, length=4096)
        with pytest.raises(RequestError, match="The range is not fully mapped") as caught:
            target.copy(source, IovaRange(FIRST, FIRST + 12287))
        assert caught.value.errno == errno.ENOENT
        assert target.mappings == ()


def test_a_copy_gives_no_more_access_than_there_is() -> None:
    with opened() as iommufd, Memfd.create("ram", SIZE) as ram:
        source, target = iommufd.alloc_ioas(), iommufd.alloc_ioas()
        mapping = source.map_file(ram, access=Access.READ)
        with pytest.raises(RequestError, match="mapped without write access") as caught:
            target.copy(source, mapping.range)
        assert caught.value.errno == errno.EPERM
        assert target.mappings == ()


# Unmapping.


def test_unmapping_a_range_unmaps_all_that_lies_in_it() -> None:
    with opened() as iommufd, Memfd.create("ram", SIZE) as ram:
        ioas = iommufd.alloc_ioas()
        mapped = [ioas.map_file(ram, iova=FIRST + index * 2 * SIZE) for index in range(3)]
        assert ioas.unmap(IovaRange(FIRST, mapped[1].range.last + 1)) == 2 * SIZE
        assert ioas.mappings == (mapped[2],)


def test_unmapping_everything_says_how_much_that_was() -> None:
    with opened() as iommufd, Memfd.create("ram", SIZE) as ram:
        ioas = iommufd.alloc_ioas()
        ioas.map_file(ram, iova=0)
        ioas.map_file(ram)
        assert ioas.unmap_all() == 2 * SIZE
        assert ioas.mappings == ()
        assert ioas.unmap_all() == 0


def test_all_addresses_are_a_range_to_unmap() -> None:
    with opened() as iommufd, Memfd.create("ram", SIZE) as ram:
        ioas = iommufd.alloc_ioas()
        ioas.map_file(ram)
        assert ioas.unmap(EVERYWHERE) == SIZE
        assert ioas.mappings == ()


def test_where_nothing_is_mapped_there_is_nothing_to_unmap() -> None:
    with opened() as iommufd:
        with pytest.raises(RequestError, match="Nothing is mapped there") as caught:
            iommufd.alloc_ioas().unmap(IovaRange(FIRST, FIRST + 4095))
        assert caught.value.errno == errno.ENOENT


def test_a_mapping_is_not_cut_and_what_went_before_it_is_known_to_be_gone() -> None:
    with opened() as iommufd, Memfd.create("ram", SIZE) as ram:
        ioas = iommufd.alloc_ioas()
        ioas.map_file(ram, iova=FIRST, length=4096)
        cut = ioas.map_file(ram, iova=FIRST + 4096, length=8192)
        with pytest.raises(RequestError, match="unmapped as a whole") as caught:
            ioas.unmap(IovaRange(FIRST, FIRST + 8191))
        assert caught.value.errno == errno.ENOENT
        assert ioas.mappings == (cut,)
        assert ioas.unmap(cut) == 8192


def test_what_a_driver_has_pinned_is_let_go_of_when_it_is_unmapped() -> None:
    with opened() as iommufd, mmap.mmap(-1, SIZE) as buffer:
        ioas = iommufd.alloc_ioas()
        mapping = ioas.map(buffer)
        with CpuAccess(ioas, pins=True) as access:
            number = access.pin(mapping.iova, SIZE)
            assert guest_mock.is_pinned(iommufd, buffer, 1)
            access.unpin(number)
            assert guest_mock.is_pinned(iommufd, buffer, 0)
            access.pin(mapping.iova, SIZE)
            assert ioas.unmap(mapping) == SIZE
            assert guest_mock.is_pinned(iommufd, buffer, 0)


def test_a_driver_that_looks_at_an_ioas_is_a_user_that_this_process_does_not_know() -> None:
    with opened() as iommufd:
        ioas, other = iommufd.alloc_ioas(), iommufd.alloc_ioas()
        with CpuAccess(ioas) as access:
            with pytest.raises(IommuError, match="also in other processes"):
                ioas.destroy()
            access.move(other)
            ioas.destroy()


# Ranges of IOVAs.


def test_an_ioas_has_all_addresses_until_a_device_narrows_them() -> None:
    with opened() as iommufd:
        ioas = iommufd.alloc_ioas()
        assert ioas.iova_ranges() == IovaRanges((EVERYWHERE,), 1)
        mock = MockDevice(iommufd, ioas)
        assert ioas.iova_ranges() == IovaRanges((IovaRange(FIRST, LAST),), guest_mock.PAGE)
        mock.destroy()
        assert ioas.iova_ranges() == IovaRanges((EVERYWHERE,), 1)


@pytest.mark.parametrize("holes", [15, 16, 40])
def test_all_ranges_are_told_however_many_there_are(holes: int) -> None:
    with opened() as iommufd:
        ioas = iommufd.alloc_ioas()
        edges = [1 << 20 | index << 24 for index in range(holes)]
        for edge in edges:
            guest_mock.reserve(ioas, IovaRange(edge, edge + 4095))
        starts = [0, *(edge + 4096 for edge in edges)]
        ends = [*(edge - 1 for edge in edges), EVERYWHERE.last]
        expected = tuple(map(IovaRange, starts, ends))
        assert ioas.iova_ranges().ranges == expected


def test_the_kernel_chooses_among_what_is_allowed() -> None:
    with opened() as iommufd, Memfd.create("ram", SIZE) as ram:
        ioas = iommufd.alloc_ioas()
        allowed = [IovaRange(FIRST, FIRST + SIZE - 1), IovaRange(2 * FIRST, 2 * FIRST + SIZE - 1)]
        ioas.allow_iovas(allowed)
        assert ioas.allowed == tuple(allowed)
        assert sorted(ioas.map_file(ram).iova for _ in allowed) == [FIRST, 2 * FIRST]
        ioas.allow_iovas([])
        assert ioas.allowed == ()
        assert ioas.map_file(ram).iova not in (FIRST, 2 * FIRST)


def test_what_a_device_does_not_have_is_not_allowed() -> None:
    with opened() as iommufd:
        ioas = iommufd.alloc_ioas()
        MockDevice(iommufd, ioas)
        ioas.allow_iovas([IovaRange(FIRST, LAST)])
        with pytest.raises(RequestError, match="cannot reach the whole range") as caught:
            ioas.allow_iovas([IovaRange(FIRST, LAST + 1)])
        assert caught.value.errno == errno.EADDRINUSE
        assert ioas.allowed == (IovaRange(FIRST, LAST),)


def test_a_device_that_does_not_have_what_is_allowed_gets_no_page_table() -> None:
    with opened() as iommufd:
        ioas, other = iommufd.alloc_ioas(), iommufd.alloc_ioas()
        ioas.allow_iovas([IovaRange(0, LAST)])
        mock = MockDevice(iommufd, other)
        with pytest.raises(RequestError, match="where this device cannot reach") as caught:
            mock.device.alloc_hwpt(ioas)
        assert caught.value.errno == errno.EADDRINUSE
        ioas.allow_iovas([])
        mock.device.alloc_hwpt(ioas).destroy()


def test_ranges_that_overlap_are_not_allowed() -> None:
    ranges = [IovaRange(FIRST, FIRST + 8191), IovaRange(FIRST + 4096, FIRST + 12287)]
    with opened() as iommufd:
        ioas = iommufd.alloc_ioas()
        with pytest.raises(RequestError, match=f"IOAS {ioas.id}: {ranges[0]}") as caught:
            ioas.allow_iovas(ranges)
        assert caught.value.errno == errno.EINVAL
        assert ioas.allowed == ()


# Options of an IOAS.


def test_pages_are_combined_unless_told_otherwise_by_anyone() -> None:
    with opened() as iommufd, guest_mock.unprivileged():
        ioas = iommufd.alloc_ioas()
        assert ioas.huge_pages
        ioas.huge_pages = False
        assert not ioas.huge_pages
        assert ioas.iova_ranges().alignment == 4096
        ioas.huge_pages = True
        assert ioas.huge_pages
        assert ioas.iova_ranges().alignment == 1


def test_pages_that_a_device_has_already_stay_combined() -> None:
    with opened() as iommufd, Memfd.create("ram", SIZE) as ram:
        ioas = iommufd.alloc_ioas()
        MockDevice(iommufd, ioas)
        ioas.map_file(ram)
        with pytest.raises(RequestError, match="Huge pages can be turned off only") as caught:
            ioas.huge_pages = False
        assert caught.value.errno == errno.EINVAL
        assert ioas.huge_pages


def test_a_mapping_that_is_smaller_than_a_page_keeps_pages_combined() -> None:
    with opened() as iommufd, Memfd.create("ram", SIZE) as ram:
        ioas = iommufd.alloc_ioas()
        ioas.map_file(ram, iova=FIRST + 512, length=512, offset=512)
        with pytest.raises(RequestError, match="Huge pages can be turned off only") as caught:
            ioas.huge_pages = False
        assert caught.value.errno == errno.EADDRINUSE
        assert ioas.huge_pages


def test_the_physical_address_is_no_secret_only_where_there_is_no_iommu() -> None:
    with opened() as iommufd, Memfd.create("ram", SIZE) as ram:
        ioas = iommufd.alloc_ioas()
        MockDevice(iommufd, ioas)
        mapping = ioas.map_file(ram)
        with pytest.raises(IommuUnsupportedError, match=f"{mapping.iova:#x}"):
            ioas.noiommu_get_pa(mapping.iova, 4096)


# Mappings that others made.


def test_a_range_is_mapped_if_all_of_it_is_by_whomever() -> None:
    with opened() as iommufd, Memfd.create("ram", SIZE) as ram:
        ioas = iommufd.alloc_ioas()
        MockDevice(iommufd, ioas)
        ioas.map_file(ram, iova=FIRST, access=Access.READ)
        with IommuFd.from_fd(os.dup(iommufd.fileno())) as other:
            Ioas(other, ioas.id).map_file(ram, iova=FIRST + SIZE)
        assert ioas.maps(IovaRange(FIRST, FIRST + 2 * SIZE - 1))
        assert ioas.maps(IovaRange(FIRST + 1, FIRST + 1))
        assert not ioas.maps(IovaRange(FIRST, FIRST + 2 * SIZE))
        assert not ioas.maps(IovaRange(0, 4095))
        assert ioas.unmap_all() == 2 * SIZE


# Adopting mappings, for which the kernel has no request.


def test_a_mapping_is_noted_unless_it_overlaps_one_that_is_known() -> None:
    with opened() as iommufd, Memfd.create("ram", SIZE) as ram:
        ioas = iommufd.alloc_ioas()
        mapping = ioas.map_file(ram, iova=FIRST)
        beside = Mapping(FIRST + SIZE, 4096, Access.READ, None, 0)
        ioas.adopt([beside])
        with pytest.raises(ValueError, match="overlaps"):
            ioas.adopt([Mapping(FIRST + SIZE - 1, 1, Access.READ, None, 0)])
        assert ioas.mappings == (mapping, beside)
