"""Tests of iommufd when the kernel has no memory: each allocation of each request fails once.

Afterwards pyluo must know of exactly what the iommufd contains, and nothing may be left behind.
"""

from __future__ import annotations

import errno
import mmap
from typing import TYPE_CHECKING, Any

import pytest

from iommufd import guest_faults, guest_mock
from iommufd.guest_mock import (
    EVENTS,
    FIRST,
    HW_QUEUE,
    MockDevice,
    cache_invalidation,
    opened,
    readable,
)
from pyluo import Memfd, RequestError
from pyluo.errors import InvalidationError
from pyluo.guest.faults import failslab
from pyluo.iommufd import HwptFlags, IommuFd, IovaRange

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyluo.iommufd import IommuObject
    from pyluo.vm import VM

pytestmark = pytest.mark.in_guest

SIZE = 16384
VIRTUAL_ID = 7  # the device's ID in the guest
SLOTS = [IovaRange(FIRST + slot * SIZE, FIRST + (slot + 1) * SIZE - 1) for slot in range(4)]


@pytest.fixture
def shared_vm(mock_vm: Callable[[], VM]) -> VM:
    return mock_vm()


class Scene:
    """Objects of every kind in an iommufd, with a file mapped in the first slot of both IOASes."""

    def __init__(self, iommufd: IommuFd) -> None:
        self.iommufd = iommufd
        self.ram = Memfd.create("ram", SIZE)
        self.pages = self.ram.map()
        self.buffer = mmap.mmap(-1, SIZE)
        self.ioas, self.other = iommufd.alloc_ioas(), iommufd.alloc_ioas()
        self.mock = MockDevice(iommufd, self.ioas)
        self.second = MockDevice(iommufd, self.ioas)
        self.device = self.mock.device
        self.ioas.map_file(self.ram, iova=FIRST)
        self.other.map_file(self.ram, iova=FIRST)
        self.dirty = self.device.alloc_hwpt(self.ioas, flags=HwptFlags.DIRTY_TRACKING)
        self.faults = iommufd.alloc_fault_queue()
        self.parent = guest_mock.alloc_nesting_parent(self.ioas, self.device)
        self.viommu = self.device.alloc_viommu(guest_mock.VIOMMU, self.parent)
        self.viommu.alloc_vdevice(self.device, VIRTUAL_ID)
        self.nested = self.device.alloc_nested_hwpt(
            self.viommu, guest_mock.hwpt_data(), fault_queue=self.faults
        )
        self.mock.attach(self.nested)
        # Makes what is made on the first use, so that later states do not differ by it.
        self.state()

    def close(self) -> None:
        self.iommufd.close()
        self.buffer.close()
        self.pages.close()
        self.ram.close()

    def state(self) -> dict[str, object]:
        """Return what pyluo knows of the iommufd, and what can be observed of it."""
        ioases = (self.ioas, self.other)
        probe = self.iommufd.alloc_ioas()
        free = probe.id
        probe.destroy()
        return {
            "objects": self.iommufd.objects,
            "mappings": [ioas.mappings for ioas in ioases],
            "mapped": [[ioas.maps(slot) for slot in SLOTS] for ioas in ioases],
            "the next id": free,
            "descriptors": sorted(guest_mock.iommufd_links()),
            "pinned": guest_mock.is_pinned(self.iommufd, self.buffer, 0),
            "the accounting": self.iommufd.accounting,
        }


def find_changes(before: dict[str, object], after: dict[str, object]) -> dict[str, object]:
    return {name: (before[name], after[name]) for name in before if before[name] != after[name]}


def destroy(_: Scene, made: IommuObject) -> None:
    made.destroy()


def do_nothing(_: Scene, __: object) -> None:
    pass


def map_again(scene: Scene, _: object) -> None:
    scene.ioas.map_file(scene.ram, iova=FIRST)


OPERATIONS: dict[str, tuple[Callable[[Scene], Any], Callable[[Scene, Any], object]]] = {
    "open": (lambda scene: IommuFd(), lambda scene, made: made.close()),
    "alloc_ioas": (lambda scene: scene.iommufd.alloc_ioas(), destroy),
    "alloc_fault_queue": (lambda scene: scene.iommufd.alloc_fault_queue(), destroy),
    "iova_ranges": (lambda scene: scene.ioas.iova_ranges(), do_nothing),
    "allow_iovas": (
        lambda scene: scene.ioas.allow_iovas(SLOTS),
        lambda scene, _: scene.ioas.allow_iovas([]),
    ),
    "map": (
        lambda scene: scene.ioas.map(scene.buffer, iova=SLOTS[1].start),
        lambda scene, made: scene.ioas.unmap(made),
    ),
    "map_file": (
        lambda scene: scene.ioas.map_file(scene.ram, iova=SLOTS[1].start),
        lambda scene, made: scene.ioas.unmap(made),
    ),
    "map anywhere": (
        lambda scene: scene.ioas.map_file(scene.ram),
        lambda scene, made: scene.ioas.unmap(made),
    ),
    "copy": (
        lambda scene: scene.ioas.copy(scene.other, SLOTS[0], iova=SLOTS[2].start),
        lambda scene, made: scene.ioas.unmap(made),
    ),
    "unmap": (lambda scene: scene.ioas.unmap(SLOTS[0]), map_again),
    "unmap_all": (lambda scene: scene.ioas.unmap_all(), map_again),
    "hw_info": (lambda scene: scene.device.hw_info(), do_nothing),
    "alloc_hwpt": (
        lambda scene: scene.device.alloc_hwpt(scene.ioas, fault_queue=scene.faults),
        destroy,
    ),
    "alloc_nested_hwpt": (
        lambda scene: scene.device.alloc_nested_hwpt(
            scene.parent, guest_mock.hwpt_data(), fault_queue=scene.faults
        ),
        destroy,
    ),
    "alloc_nested_hwpt on a vIOMMU": (
        lambda scene: scene.device.alloc_nested_hwpt(
            scene.viommu, guest_mock.hwpt_data(), fault_queue=scene.faults
        ),
        destroy,
    ),
    "alloc_viommu": (
        lambda scene: scene.device.alloc_viommu(
            guest_mock.VIOMMU, scene.parent, guest_mock.viommu_data(1)
        ),
        destroy,
    ),
    "alloc_vdevice": (
        lambda scene: scene.viommu.alloc_vdevice(scene.second.device, VIRTUAL_ID + 1),
        destroy,
    ),
    "alloc_event_queue": (
        lambda scene: scene.viommu.alloc_event_queue(EVENTS, 8, size=4),
        destroy,
    ),
    "alloc_hw_queue": (
        lambda scene: scene.viommu.alloc_hw_queue(HW_QUEUE, 0, IovaRange(FIRST, FIRST + 4095)),
        destroy,
    ),
    "set_dirty_tracking": (
        lambda scene: scene.dirty.set_dirty_tracking(True),
        lambda scene, _: scene.dirty.set_dirty_tracking(False),
    ),
    "dirty_bitmap": (lambda scene: scene.dirty.dirty_bitmap(SLOTS[0]), do_nothing),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_fails_for_want_of_memory_has_changed_nothing(name: str) -> None:
    attempt, undo = OPERATIONS[name]
    with opened() as iommufd:
        scene = Scene(iommufd)
        before = scene.state()
        failures = 0
        for outcome in guest_faults.try_with_each_allocation_failing(lambda: attempt(scene)):
            if isinstance(outcome, OSError):
                assert isinstance(outcome, RequestError), f"{outcome!r}"
                failures += 1
            else:
                undo(scene, outcome)
            assert find_changes(before, scene.state()) == {}
        assert not isinstance(outcome, OSError), f"{outcome!r}"
        assert failures
        scene.close()


def test_an_object_for_whose_end_memory_was_missing_is_destroyed_all_the_same() -> None:
    with opened() as iommufd:
        scene = Scene(iommufd)
        before = scene.state()
        made = [scene.device.alloc_hwpt(scene.ioas)]
        for outcome in guest_faults.try_with_each_allocation_failing(lambda: made.pop().destroy()):
            assert outcome is None
            assert find_changes(before, scene.state()) == {}
            made.append(scene.device.alloc_hwpt(scene.ioas))
        scene.close()


def test_a_change_of_process_for_which_there_is_no_memory_has_changed_nothing() -> None:
    with opened() as iommufd:
        scene = Scene(iommufd)
        before = scene.state()
        with pytest.raises(OSError, match="memory") as caught, failslab():
            iommufd.change_process()
        assert caught.value.errno == errno.ENOMEM
        assert find_changes(before, scene.state()) == {}
        iommufd.change_process()
        scene.close()


def test_an_invalidation_for_which_there_is_no_memory_is_told_as_not_carried_out() -> None:
    with opened() as iommufd:
        scene = Scene(iommufd)
        entries = [cache_invalidation(VIRTUAL_ID, 0), cache_invalidation(VIRTUAL_ID, 1)]
        answers = []
        for outcome in guest_faults.try_with_each_allocation_failing(
            lambda: scene.viommu.invalidate(entries)
        ):
            if isinstance(outcome, InvalidationError):
                answers.append((outcome.errno, outcome.handled))
                assert scene.mock.cache_entries_unchanged() == [True] * 4
        assert (errno.ENOMEM, 0) in answers
        assert {handled for _, handled in answers} == {0}
        assert outcome == 2
        scene.close()


def test_faults_that_could_not_be_read_are_still_there() -> None:
    with opened() as iommufd:
        scene = Scene(iommufd)
        scene.mock.raise_fault(FIRST)
        with pytest.raises(RequestError) as caught, failslab():
            scene.faults.read()
        assert caught.value.errno == errno.ENOMEM
        assert readable(scene.faults.fileno())
        [fault] = scene.faults.read()
        scene.faults.respond(fault, resolved=True)
        scene.close()


def test_events_that_could_not_be_read_are_still_there() -> None:
    with opened() as iommufd:
        scene = Scene(iommufd)
        queue = scene.viommu.alloc_event_queue(EVENTS, 1, size=4)
        for _ in range(3):
            scene.mock.raise_event()
        events = []
        for outcome in guest_faults.try_with_each_allocation_failing(queue.read):
            assert isinstance(outcome, (list, RequestError))
            events += outcome if isinstance(outcome, list) else []
        assert [event.lost for event in events] == [0, 2]
        scene.close()


def test_an_event_for_which_there_is_no_memory_is_counted_as_lost() -> None:
    with opened() as iommufd:
        scene = Scene(iommufd)
        queue = scene.viommu.alloc_event_queue(EVENTS, 8, size=4)
        lost = 0
        for outcome in guest_faults.try_with_each_allocation_failing(scene.mock.raise_event):
            if isinstance(outcome, OSError) and outcome.errno == errno.ENOMEM:
                lost += 1
        events = queue.read()
        assert lost
        assert (len([event for event in events if event.data]), events[-1].lost) == (1, lost)
        scene.close()
