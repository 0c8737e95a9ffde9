"""Tests of the queues of I/O page faults and of vIOMMU events, with the kernel's mock device."""

from __future__ import annotations

import errno
import os
import resource
from typing import TYPE_CHECKING

import pytest

from iommufd import guest_mock
from iommufd.guest_mock import EVENTS, FIRST, MockDevice, MockFlags, make_event, opened, readable
from pyluo import IommuError, IommuUnsupportedError, RequestError
from pyluo.descriptor import OwnedFd
from pyluo.iommufd import (
    FaultAccess,
    FaultQueue,
    HwptFlags,
    IommuFd,
    PageFault,
    Viommu,
    VirtualEvent,
    VirtualEventQueue,
    VirtualEventType,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyluo.iommufd import PagingHwpt
    from pyluo.vm import VM

pytestmark = pytest.mark.in_guest

VIRTUAL_ID = 7  # the device's ID in the guest


@pytest.fixture
def shared_vm(mock_vm: Callable[[], VM]) -> VM:
    return mock_vm()


def attach_with_fault_queue(iommufd: IommuFd) -> tuple[MockDevice, PagingHwpt, FaultQueue]:
    """Attach a device to an HWPT whose page faults are reported to a queue."""
    ioas = iommufd.alloc_ioas()
    queue = iommufd.alloc_fault_queue()
    mock = MockDevice(iommufd, ioas, MockFlags.PASID)
    hwpt = mock.device.alloc_hwpt(ioas, flags=HwptFlags.PASID, fault_queue=queue)
    mock.attach(hwpt)
    return mock, hwpt, queue


def attach_with_event_queue(
    iommufd: IommuFd, depth: int
) -> tuple[MockDevice, Viommu, VirtualEventQueue]:
    """Attach a device to a vIOMMU that reports its events to a queue."""
    ioas = iommufd.alloc_ioas()
    mock = MockDevice(iommufd, ioas)
    parent = guest_mock.alloc_nesting_parent(ioas, mock.device)
    viommu = mock.device.alloc_viommu(guest_mock.VIOMMU, parent)
    viommu.alloc_vdevice(mock.device, VIRTUAL_ID)
    mock.attach(mock.device.alloc_nested_hwpt(viommu, guest_mock.hwpt_data()))
    queue = viommu.alloc_event_queue(EVENTS, depth, size=len(make_event(VIRTUAL_ID)))
    return mock, viommu, queue


# Page faults.


def test_a_fault_is_told_with_all_that_is_known_of_it() -> None:
    with opened() as iommufd:
        mock, _, queue = attach_with_fault_queue(iommufd)
        mock.raise_fault(FIRST + 123, group=9, access=FaultAccess.READ | FaultAccess.WRITE)
        [fault] = queue.read()
        assert fault == PageFault(
            device_id=mock.device.id,
            pasid=None,
            group=9,
            access=FaultAccess.READ | FaultAccess.WRITE,
            address=FIRST + 123,
            length=0,
            cookie=fault.cookie,
            last=True,
        )


def test_a_fault_of_a_pasid_names_it() -> None:
    with opened() as iommufd:
        mock, hwpt, queue = attach_with_fault_queue(iommufd)
        mock.attach_pasid(5, hwpt)
        mock.raise_fault(
            (1 << 64) - 1, pasid=5, access=FaultAccess.EXECUTE | FaultAccess.PRIVILEGED
        )
        [fault] = queue.read()
        assert (fault.pasid, fault.address) == (5, (1 << 64) - 1)
        assert fault.access == FaultAccess.EXECUTE | FaultAccess.PRIVILEGED
        queue.respond(fault, resolved=False)
        mock.detach_pasid(5)


def test_a_queue_can_be_read_when_there_is_something_in_it() -> None:
    with opened() as iommufd:
        mock, _, queue = attach_with_fault_queue(iommufd)
        assert not readable(queue.fileno())
        assert queue.read() == []
        mock.raise_fault(FIRST)
        assert readable(queue.fileno())
        assert len(queue.read()) == 1
        assert not readable(queue.fileno())
        assert queue.read() == []


def test_as_many_faults_as_there_are_come_in_their_order() -> None:
    with opened() as iommufd:
        mock, _, queue = attach_with_fault_queue(iommufd)
        for number in range(250):
            mock.raise_fault(FIRST + number, group=number)
        faults = []
        while readable(queue.fileno()):
            faults += queue.read()
        assert [fault.address - FIRST for fault in faults] == list(range(250))
        assert len({fault.cookie for fault in faults}) == 250
        queue.respond(faults, resolved=True)


def test_a_group_is_answered_once() -> None:
    with opened() as iommufd:
        mock, _, queue = attach_with_fault_queue(iommufd)
        mock.raise_fault(FIRST)
        [fault] = queue.read()
        queue.respond([fault, fault], resolved=True)
        with pytest.raises(IommuError, match=f"{queue}, group of cookie {fault.cookie}") as caught:
            queue.respond(fault, resolved=True)
        assert caught.value.errno == errno.EINVAL


def test_the_groups_around_one_that_cannot_be_answered_are_answered() -> None:
    with opened() as iommufd:
        mock, _, queue = attach_with_fault_queue(iommufd)
        for number in range(3):
            mock.raise_fault(FIRST, group=number)
        first, second, third = queue.read()
        queue.respond(second, resolved=False)
        with pytest.raises(RequestError, match=f"cookie {second.cookie}"):
            queue.respond([first, second, third], resolved=True)
        for answered in (first, third):
            with pytest.raises(RequestError, match=f"cookie {answered.cookie}"):
                queue.respond(answered, resolved=True)


def test_what_was_not_answered_ends_with_the_attachment() -> None:
    with opened() as iommufd:
        mock, _, queue = attach_with_fault_queue(iommufd)
        mock.raise_fault(FIRST)
        mock.raise_fault(FIRST + 4096)
        [read, *_] = queue.read()
        mock.raise_fault(FIRST + 8192)
        mock.attach(iommufd.alloc_ioas())
        assert not readable(queue.fileno())
        assert queue.read() == []
        with pytest.raises(RequestError) as caught:
            queue.respond(read, resolved=True)
        assert caught.value.errno == errno.EINVAL


def test_the_faults_of_several_page_tables_come_by_one_queue() -> None:
    with opened() as iommufd:
        first, _, queue = attach_with_fault_queue(iommufd)
        ioas = iommufd.alloc_ioas()
        second = MockDevice(iommufd, ioas)
        second.attach(second.device.alloc_hwpt(ioas, fault_queue=queue))
        second.raise_fault(FIRST)
        first.raise_fault(FIRST)
        assert [fault.device_id for fault in queue.read()] == [second.device.id, first.device.id]


def test_a_page_table_of_the_guests_reports_faults_too() -> None:
    with opened() as iommufd:
        ioas = iommufd.alloc_ioas()
        mock = MockDevice(iommufd, ioas)
        queue = iommufd.alloc_fault_queue()
        parent = guest_mock.alloc_nesting_parent(ioas, mock.device)
        nested = mock.device.alloc_nested_hwpt(parent, guest_mock.hwpt_data(), fault_queue=queue)
        mock.attach(nested)
        mock.raise_fault(FIRST)
        assert len(queue.read()) == 1
        with pytest.raises(IommuError, match=str(queue)):
            queue.destroy()


def test_a_queue_that_is_destroyed_before_its_page_table_stays_as_it_was() -> None:
    with opened() as iommufd:
        mock, hwpt, queue = attach_with_fault_queue(iommufd)
        mock.raise_fault(FIRST)
        with pytest.raises(IommuError, match=str(queue)):
            queue.destroy()
        assert len(queue.read()) == 1
        mock.destroy()
        hwpt.destroy()
        queue.destroy()
        assert queue.destroyed


def test_a_queue_that_is_gone_is_neither_read_nor_answered() -> None:
    with opened() as iommufd:
        mock, hwpt, queue = attach_with_fault_queue(iommufd)
        mock.raise_fault(FIRST)
        [fault] = queue.read()
        mock.destroy()
        hwpt.destroy()
        queue.destroy()
        queue.destroy()
        for attempt in (queue.fileno, queue.read, lambda: queue.respond(fault, resolved=True)):
            with pytest.raises(ValueError, match="closed"):
                attempt()


def test_the_end_of_an_iommufd_closes_the_descriptors_of_its_queues() -> None:
    with opened() as iommufd:
        _, _, faults = attach_with_fault_queue(iommufd)
        *_, events = attach_with_event_queue(iommufd, 1)
        descriptors = [faults.fileno(), events.fileno()]
        iommufd.close()
        for descriptor in descriptors:
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(descriptor)


def test_a_queue_whose_descriptor_is_open_a_second_time_outlives_the_first() -> None:
    with opened() as iommufd:
        queue = iommufd.alloc_fault_queue()
        second = os.dup(queue.fileno())
        with pytest.raises(IommuError, match="in other processes"):
            queue.destroy()
        assert queue in iommufd.objects
        os.close(second)
        queue.destroy()
        assert iommufd.objects == ()


def test_a_process_with_no_room_for_a_descriptor_gets_no_queue_and_loses_nothing() -> None:
    with opened() as iommufd:
        *_, viommu, old = attach_with_event_queue(iommufd, 1)
        old.destroy()
        objects = iommufd.objects
        full = max(map(int, os.listdir("/proc/self/fd"))) + 1
        fillers = [os.open("/dev/null", os.O_RDONLY)]
        while fillers[-1] < full:
            fillers.append(os.open("/dev/null", os.O_RDONLY))
        with guest_mock.limited(resource.RLIMIT_NOFILE, fillers[-1] + 1):
            for attempt in (
                iommufd.alloc_fault_queue,
                lambda: viommu.alloc_event_queue(EVENTS, 1, size=4),
            ):
                with pytest.raises(RequestError) as caught:
                    attempt()
                assert caught.value.errno == errno.EMFILE
        for filler in fillers:
            os.close(filler)
        assert iommufd.objects == objects
        viommu.alloc_event_queue(EVENTS, 1, size=4).destroy()
        iommufd.alloc_fault_queue().destroy()


def test_a_queue_of_an_iommufd_that_was_given_up_can_still_be_read() -> None:
    with opened() as iommufd:
        mock, _, queue = attach_with_fault_queue(iommufd)
        mock.raise_fault(FIRST)
        fd = iommufd.detach()
        assert queue.destroyed
        assert [fault.address for fault in queue.read()] == [FIRST]
        queue.destroy()
        os.close(fd)


# Events of a virtual IOMMU.


def test_events_come_with_their_numbers_and_in_their_order() -> None:
    with opened() as iommufd:
        mock, _, queue = attach_with_event_queue(iommufd, 8)
        assert not readable(queue.fileno())
        assert queue.read() == []
        for _ in range(3):
            mock.raise_event()
        assert readable(queue.fileno())
        data = make_event(VIRTUAL_ID)
        assert queue.read() == [VirtualEvent(number, data, 0) for number in range(3)]
        assert not readable(queue.fileno())
        mock.raise_event()
        assert queue.read() == [VirtualEvent(3, data, 0)]


def test_events_that_did_not_fit_are_counted() -> None:
    with opened() as iommufd:
        mock, _, queue = attach_with_event_queue(iommufd, 2)
        data = make_event(VIRTUAL_ID)
        for _ in range(5):
            mock.raise_event()
        assert queue.read() == [
            VirtualEvent(0, data, 0),
            VirtualEvent(1, data, 0),
            VirtualEvent(4, b"", 3),
        ]
        mock.raise_event()
        assert queue.read() == [VirtualEvent(5, data, 0)]


def test_events_that_were_lost_before_one_that_came_are_counted_with_it() -> None:
    with opened() as iommufd:
        mock, _, queue = attach_with_event_queue(iommufd, 1)
        data = make_event(VIRTUAL_ID)
        for _ in range(4):
            mock.raise_event()
        room = 8 + len(data)
        assert len(os.read(queue.fileno(), room)) == room
        mock.raise_event()
        assert queue.read() == [VirtualEvent(4, data, 4)]


def test_more_events_than_one_read_takes_are_all_told() -> None:
    with opened() as iommufd:
        mock, _, queue = attach_with_event_queue(iommufd, 200)
        for _ in range(200):
            mock.raise_event()
        events = []
        while readable(queue.fileno()):
            events += queue.read()
        assert [event.sequence for event in events] == list(range(200))
        assert {event.lost for event in events} == {0}


def test_a_queue_that_was_taken_over_tells_of_no_loss_before_its_first_event() -> None:
    with opened() as iommufd, IommuFd.from_fd(os.dup(iommufd.fileno())) as other:
        mock, _, queue = attach_with_event_queue(iommufd, 2)
        for _ in range(2):
            mock.raise_event()
        queue.read()
        for _ in range(4):
            mock.raise_event()
        file = OwnedFd(os.dup(queue.fileno()))
        taken = VirtualEventQueue(other, queue.id, file, len(make_event(VIRTUAL_ID)))
        assert [(event.sequence, event.lost) for event in taken.read()] == [(2, 0), (3, 0), (5, 2)]


def test_a_viommu_has_one_queue_of_each_kind() -> None:
    with opened() as iommufd:
        _, viommu, queue = attach_with_event_queue(iommufd, 1)
        with pytest.raises(RequestError, match=str(viommu)) as caught:
            viommu.alloc_event_queue(EVENTS, 1, size=4)
        assert caught.value.errno == errno.EEXIST
        other = viommu.alloc_event_queue(VirtualEventType.ARM_SMMUV3, 1)
        queue.destroy()
        viommu.alloc_event_queue(EVENTS, 1, size=4)
        assert other.read() == []


@pytest.mark.parametrize("depth", [0, 1 << 20])
def test_a_queue_has_a_sensible_depth(depth: int) -> None:
    with opened() as iommufd:
        _, viommu, queue = attach_with_event_queue(iommufd, 1)
        queue.destroy()
        with pytest.raises(RequestError) as caught:
            viommu.alloc_event_queue(EVENTS, depth, size=4)
        assert caught.value.errno == errno.EINVAL


def test_a_queue_of_no_kind_is_refused() -> None:
    with opened() as iommufd:
        _, viommu, _ = attach_with_event_queue(iommufd, 1)
        with pytest.raises(IommuUnsupportedError):
            viommu.alloc_event_queue(0, 1, size=4)


def test_the_length_of_an_event_that_is_not_known_is_to_be_given() -> None:
    with opened() as iommufd:
        _, viommu, queue = attach_with_event_queue(iommufd, 1)
        queue.destroy()
        with pytest.raises(ValueError, match="0xbeefbeef"):
            viommu.alloc_event_queue(EVENTS, 1)


def test_an_event_that_is_longer_than_was_said_is_not_taken_for_two() -> None:
    with opened() as iommufd:
        mock, viommu, queue = attach_with_event_queue(iommufd, 8)
        queue.destroy()
        queue = viommu.alloc_event_queue(EVENTS, 8, size=2)
        mock.raise_event()
        with pytest.raises(ValueError, match="does not lie within 12 bytes"):
            queue.read()
