"""Layouts of IOASes for one device and for several: functions that run in the guest."""

from __future__ import annotations

import os
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from pyluo import (
    IncomingStore,
    IoasLayout,
    IoasLayoutError,
    KeeperChoice,
    Memfd,
    OutgoingStore,
    RequestError,
)
from pyluo.iommu_layout import NamedMapping
from pyluo.iommufd import IommuFd, IovaRange
from pyluo.vfio import PciDevice, VfioDevice
from vfio import guest_dma, guest_edu
from vfio.guest_dma import IOVA, PAGE, READ_WRITE, SIZE, pattern, slot
from vfio.guest_edu import BUFFER, Edu

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyluo.iommufd import Ioas

GUEST = {
    "devices": [
        "intel-iommu,intremap=on,aw-bits=39",
        "edu,multifunction=on,addr=0x5.0",
        "edu,addr=0x5.1",
        "edu,addr=0x6",
    ],
    "append": guest_edu.GUEST["append"],
}
"""The options of a guest with three devices, of which the first two are one IOMMU group."""


@contextmanager
def machine() -> Iterator[tuple[IommuFd, Memfd, Edu, Edu, Edu]]:
    """Open the devices, bound but not attached: two of one group, and one in a group of its own."""
    with ExitStack() as stack:
        iommufd = stack.enter_context(IommuFd())
        ram = stack.enter_context(Memfd.create("ram", SIZE))
        devices = []
        for place in sorted(PciDevice.find(guest_edu.VENDOR, guest_edu.DEVICE)):
            device = stack.enter_context(VfioDevice.open(place))
            device.bind(iommufd)
            devices.append(Edu(device, iommufd))
        one, other, alone = devices
        assert one.device.group == other.device.group != alone.device.group
        yield iommufd, ram, one, other, alone


LAYOUT = IoasLayout((NamedMapping(IOVA, SIZE, READ_WRITE, "ram", 0),))


def can_do_dma(edu: Edu, ram: Memfd, number: int) -> bool:
    """Return whether a device can read and write RAM."""
    guest_dma.copy_through(edu, ram, number)
    return ram.read(BUFFER, slot(number)) == pattern(number)


def rebuild_for_a_fresh_group() -> None:
    with machine() as (iommufd, ram, one, other, alone):
        devices = [one.device, other.device, alone.device]
        rebuilt = LAYOUT.rebuild(iommufd, {"ram": ram}, devices)
        assert len(rebuilt.hwpts) == 1  # they are behind one IOMMU
        assert rebuilt.replaced == ()
        assert all(device.attached is rebuilt.hwpts[0] for device in devices)
        assert all(can_do_dma(edu, ram, number) for number, edu in enumerate((one, other, alone)))


def rebuild_for_a_group_that_is_attached() -> None:
    with machine() as (iommufd, ram, one, other, _):
        old = attach_to_own_ioas(iommufd, ram, one, other)
        rebuilt = LAYOUT.rebuild(iommufd, {"ram": ram}, [one.device, other.device])
        assert one.device.attached is other.device.attached is rebuilt.hwpts[0]
        assert rebuilt.replaced == (old,)
        old.destroy()
        assert can_do_dma(one, ram, 0)
        assert can_do_dma(other, ram, 1)


def move_a_group() -> None:
    with machine() as (iommufd, ram, one, other, alone):
        old = attach_to_own_ioas(iommufd, ram, one, other, alone)
        new = attach_to_own_ioas(iommufd, ram, one)
        assert other.device.attached is new
        assert alone.device.attached is old
        alone.device.detach_pt()
        old.destroy()
        assert can_do_dma(other, ram, 0)


def attach_to_own_ioas(iommufd: IommuFd, ram: Memfd, *edus: Edu) -> Ioas:
    ioas = iommufd.alloc_ioas()
    ioas.map_file(ram, iova=IOVA)
    for edu in edus:
        edu.device.attach(ioas)
    return ioas


def rebuild_fails_after_a_device_was_moved() -> list[str]:
    """Rebuild for a device that cannot be attached, as its group is attached elsewhere.

    Returns:
        The notes of the error.
    """
    with machine() as (iommufd, ram, one, other, alone):
        old = attach_to_own_ioas(iommufd, ram, alone)
        attach_to_own_ioas(iommufd, ram, other)
        before = iommufd.objects
        try:
            LAYOUT.rebuild(iommufd, {"ram": ram}, [one.device, alone.device])
        except RequestError as error:
            notes = list(getattr(error, "__notes__", ()))
        assert iommufd.objects == before
        assert alone.device.attached is old
        assert one.device.attached is None
        assert can_do_dma(alone, ram, 0)
        assert can_do_dma(other, ram, 1)
        return notes


def rebuild_in_the_iommufd_of_another_device() -> None:
    with machine() as (_, ram, one, _, _), IommuFd() as elsewhere:
        LAYOUT.rebuild(elsewhere, {"ram": ram}, [one.device])


def rebuild_with_several_faults() -> tuple[int | None, str]:
    plans = (
        NamedMapping(0, PAGE, READ_WRITE, "nvram", 0),
        NamedMapping(IOVA, 2 * PAGE, READ_WRITE, "short", 0),
        NamedMapping(1 << 60, PAGE, READ_WRITE, "short", 0),
    )
    with machine() as (iommufd, _, one, _, _), Memfd.create("short", PAGE) as short:
        before = iommufd.objects
        try:
            IoasLayout(plans).rebuild(iommufd, {"short": short}, [one.device])
        except IoasLayoutError as error:
            assert iommufd.objects == before
            return error.errno, str(error)
    raise AssertionError("the faulty layout was rebuilt")


def rebuild_allowed_ranges() -> tuple[IovaRange, ...]:
    with machine() as (iommufd, ram, one, _, _):
        ioas = attach_to_own_ioas(iommufd, ram)
        ioas.allow_iovas([IovaRange(0, (1 << 32) - (1 << 25) - 1)])
        recorded = IoasLayout.record(ioas, {"ram": ram})
        rebuilt = recorded.rebuild(iommufd, {"ram": ram}, [one.device])
        assert rebuilt.ioas.allowed == ioas.allowed
        # The kernel chooses from what is allowed.
        return rebuilt.ioas.map_file(ram).range, *rebuilt.ioas.allowed


def record_what_is_mapped_by_address() -> None:
    with IommuFd() as iommufd, Memfd.create("ram", SIZE) as ram, ram.map() as mapped:
        ioas = iommufd.alloc_ioas()
        ioas.map(mapped, iova=IOVA)
        try:
            IoasLayout.record(ioas, {"ram": ram})
        finally:
            ioas.destroy()


def record_what_has_no_name() -> None:
    with IommuFd() as iommufd, Memfd.create("ram", SIZE) as ram, Memfd.create("b", PAGE) as b:
        ioas = iommufd.alloc_ioas()
        ioas.map_file(ram, iova=IOVA)
        ioas.map_file(b, iova=0)
        IoasLayout.record(ioas, {"ram": ram})


def save_layouts_under_two_keys() -> None:
    store = OutgoingStore.create("two", keeper=KeeperChoice.NONE)
    try:
        store.set_meta({"machine": "q35"})
        LAYOUT.save(store)
        empty = IoasLayout(())
        empty.save(store, "second")
        assert store.meta["machine"] == "q35"
        assert IoasLayout.load(store) == LAYOUT
        assert IoasLayout.load(store, "second") == empty
        IoasLayout.load(store, "third")
    finally:
        store.discard()


def adopt_what_is_not_mapped() -> tuple[str, str]:
    """Return the refusals to adopt a layout whose file is missing, and one that is out of date."""
    refusals = []
    with IommuFd() as iommufd, Memfd.create("ram", SIZE) as ram:
        ioas = iommufd.alloc_ioas()
        mapping = ioas.map_file(ram, iova=IOVA)
        number = ioas.id
        with IommuFd.from_fd(os.dup(iommufd.fileno())) as successor:
            known = LAYOUT.adopt(successor, number, {"ram": ram})
            assert known.mappings == (mapping,)
            known.forget()
            ioas.unmap_all()
            for files in ({}, {"ram": ram}):
                try:
                    LAYOUT.adopt(successor, number, files)
                except IoasLayoutError as error:
                    refusals.append(str(error))
                assert successor.objects == ()
    first, second = refusals
    return first, second


def finish_after_rebuilding() -> None:
    """Finish the store although nothing but the IOMMU has got the memory back."""
    store = IncomingStore.retrieve("vm0", keeper=KeeperChoice.NONE)
    with machine() as (iommufd, _, one, _, _):
        IoasLayout.load(store).rebuild(iommufd, store, [one.device])
        store.finish()


def preserve() -> OutgoingStore:
    store = OutgoingStore.create("vm0", keeper=KeeperChoice.NONE)
    with Memfd.create("ram", SIZE) as ram:
        store.add("ram", ram)
    LAYOUT.save(store)
    return store
