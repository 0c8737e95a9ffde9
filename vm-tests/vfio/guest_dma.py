"""DMA between QEMU's `edu` device and preserved memory, run in the guest."""

from __future__ import annotations

import itertools
import mmap
import os
import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pyluo import FdStore, IoasLayout, LiveUpdate, LuoError, Memfd, NotPreservableError
from pyluo.guest.port import mark
from pyluo.iommu_layout import NamedMapping
from pyluo.iommufd import Access, HwptFlags, IommuFd, IovaRange
from pyluo.kernel_log import KernelLog
from pyluo.vfio import VfioDevice
from vfio import guest_edu
from vfio.guest_edu import BUFFER, Edu

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyluo.iommufd import Ioas

IOVA = 1 << 20
SIZE = 1 << 20
PAGE = 4096
OUTSIDE = 1 << 24
READ_WRITE = Access.READ | Access.WRITE
_FIRST_BUSY, _BUSY_SLOTS = 100, 10
DRIVEN = "device driven"
"""The mark of the moment from which the next kernel's process drives the device."""
ROM_IOVA = IOVA + SIZE
"""Where one page is mapped read-only."""


def pattern(number: int) -> bytes:
    """What no other transfer carries."""
    return (number.to_bytes(4, "little") + b"slot") * (BUFFER // 8)


def slot(number: int) -> int:
    """Where in RAM a transfer's page is; the first one is for passing through."""
    return (number + 1) * PAGE


def copy_through(edu: Edu, ram: Memfd, number: int) -> None:
    """Has the device read a page of RAM and write it to another one."""
    ram.write(pattern(number), 0)
    edu.load(IOVA)
    edu.store(IOVA + slot(number))


def seen_by_device(edu: Edu, ram: Memfd, number: int) -> bytes:
    """A page of RAM as the device reads it."""
    ram.write(bytes(BUFFER), 0)
    edu.load(IOVA + slot(number))
    edu.store(IOVA)
    return ram.read(BUFFER, 0)


def faults() -> list[str]:
    """What the IOMMU has reported so far."""
    return [message for message in KernelLog().messages if "fault addr" in message]


@contextmanager
def machine() -> Iterator[tuple[Edu, Ioas, Memfd]]:
    """The device, attached to an IOAS in which RAM is mapped; all of it closed in the end."""
    edu, ioas, ram = guest_edu.with_ram(SIZE, IOVA)
    try:
        yield edu, ioas, ram
    finally:
        edu.close()
        ioas.iommufd.close()
        ram.close()


def round_trip() -> bytes:
    with machine() as (edu, _, ram):
        copy_through(edu, ram, 7)
        return ram.read(BUFFER, slot(7))


def outside_the_map() -> tuple[bytes, bytes, list[str]]:
    """What the device read where nothing is mapped, what stayed in RAM, and the reports."""
    with machine() as (edu, ioas, ram):
        ram.write(pattern(1), 0)
        ram.write(pattern(2), slot(2))
        ram.write(pattern(3), slot(3))
        before = len(faults())
        edu.load(IOVA)  # so that its buffer is known
        edu.store(OUTSIDE)
        edu.load(OUTSIDE)
        edu.store(IOVA + slot(3))
        read = ram.read(BUFFER, slot(3))
        ioas.unmap_all()
        edu.store(IOVA + slot(2))
        return read, ram.read(BUFFER, slot(2)), faults()[before:]


def write_to_what_is_read_only() -> tuple[bytes, list[str]]:
    with machine() as (edu, ioas, ram), Memfd.create("rom", PAGE) as rom:
        rom.write(pattern(5), 0)
        ioas.map_file(rom, iova=ROM_IOVA, access=Access.READ)
        before = len(faults())
        ram.write(pattern(6), 0)
        edu.load(IOVA)
        edu.store(ROM_IOVA)
        edu.load(ROM_IOVA)
        edu.store(IOVA + slot(0))
        assert ram.read(BUFFER, slot(0)) == pattern(5)
        return rom.read(BUFFER, 0), faults()[before:]


def interrupts_by_msi() -> tuple[int, int, int]:
    """How many came of a request, of a transfer's end, and of nothing."""
    with machine() as (edu, _, _):
        event = edu.enable_msi()
        try:
            edu.raise_irq()
            asked = guest_edu.interrupts(event)
            edu.acknowledge()
            edu.start(IOVA, BUFFER, to_ram=True, irq=True)
            ended = guest_edu.interrupts(event)
            edu.acknowledge()
            edu.store(IOVA)
            try:
                none = os.eventfd_read(event)
            except BlockingIOError:
                none = 0
        finally:
            os.close(event)
        return asked, ended, none


def dma_while_preserved() -> bytes:
    with machine() as (edu, _, ram):
        with LiveUpdate() as device:
            session = device.create_session("dma")
        try:
            session.preserve(ram, 1)
            copy_through(edu, ram, 9)
        finally:
            session.discard()
        return ram.read(BUFFER, slot(9))


def offers() -> dict[str, str]:
    """What the kernel answers to the descriptors that it cannot preserve yet."""
    answers = {}
    with machine() as (edu, _, _):
        with LiveUpdate() as device:
            session = device.create_session("offers")
        try:
            for token, file in enumerate((edu.iommufd, edu.device)):
                try:
                    session.preserve(file, token)
                except NotPreservableError as error:
                    answers[type(file).__name__] = str(error)
        finally:
            session.discard()
    return answers


def replaced_under_dma(wanted: int) -> tuple[int, list[int], list[str]]:
    """Moves the device from page table to page table, while it does DMA.

    Args:
        wanted: how many transfers are to run across a move; one may end too early.

    Returns:
        How many did, which of all went wrong, and what the IOMMU reported.
    """
    before = len(faults())
    across = 0
    wrong = []
    with machine() as (edu, ioas, ram):
        layout = IoasLayout.record(ioas, {"ram": ram})
        old = None
        for number in range(5 * wanted):
            if across == wanted:
                break
            ram.write(pattern(number), 0)
            edu.load(IOVA)
            edu.start(IOVA + slot(number), BUFFER, to_ram=True)
            busy = edu.busy
            rebuilt = layout.rebuild(edu.iommufd, {"ram": ram}, [edu.device])
            across += busy and edu.busy
            edu.wait()
            if ram.read(BUFFER, slot(number)) != pattern(number):
                wrong.append(number)
            assert rebuilt.replaced == ((ioas,) if old is None else old.hwpts)
            for gone in (*rebuilt.replaced, *(() if old is None else (old.ioas,))):
                gone.destroy()
            old = rebuilt
        return across, wrong, faults()[before:]


def begin() -> tuple[FdStore, Edu, Memfd]:
    """A machine whose RAM is in a store, with the layout of its IOAS."""
    edu, ioas, ram = guest_edu.with_ram(SIZE, IOVA)
    rom = Memfd.create("rom", PAGE)
    rom.write(pattern(99), 0)
    ioas.map_file(rom, iova=ROM_IOVA, access=Access.READ)
    copy_through(edu, ram, 0)
    store = FdStore.create("vm0")
    store.add("ram", ram)
    store.add("rom", rom)
    rom.close()
    IoasLayout.record(ioas, store).save(store)
    copy_through(edu, ram, 1)  # preserved already
    keep_busy(edu, ram)
    return store, edu, ram


def go_on(hop: int) -> tuple[FdStore, Edu, Memfd]:
    """The same machine, on the next kernel; ready for one more jump."""
    store = FdStore.retrieve("vm0")
    device = VfioDevice.open(guest_edu.place())
    iommufd = IommuFd()
    device.bind(iommufd)
    rebuilt = IoasLayout.load(store).rebuild(iommufd, store, [device])
    assert rebuilt.replaced == ()
    edu = Edu(device, iommufd)
    ram = store.get("ram", Memfd)
    for number in range(hop + 1):
        assert seen_by_device(edu, ram, number) == pattern(number), f"slot {number}, hop {hop}"
    edu.load(ROM_IOVA)
    edu.store(IOVA)
    assert ram.read(BUFFER, 0) == pattern(99)
    check_what_ran_at_the_jump(ram)
    store.renew()
    copy_through(edu, ram, hop + 1)
    mark(DRIVEN)
    keep_busy(edu, ram)
    return store, edu, ram


def keep_busy(edu: Edu, ram: Memfd) -> None:
    """Has the device do DMA without end, into slots of its own; nobody else drives it from here."""

    def drive() -> None:
        for number in itertools.count(_FIRST_BUSY):
            ram.write(pattern(number), 0)
            edu.load(IOVA)
            edu.store(IOVA + slot(_busy_slot(number)))

    threading.Thread(target=drive, daemon=True).start()


def check_what_ran_at_the_jump(ram: Memfd) -> None:
    """Each slot has nothing yet or one whole transfer of its own; beside them nothing is."""
    for number in range(_FIRST_BUSY, _FIRST_BUSY + _BUSY_SLOTS):
        page = ram.read(PAGE, slot(number))
        assert page[BUFFER:] == bytes(PAGE - BUFFER), f"beside slot {number}"
        if page[:BUFFER] != bytes(BUFFER):
            came = int.from_bytes(page[:4], "little")
            assert _busy_slot(came) == number, f"slot {number} has what is of transfer {came}"
            assert page[:BUFFER] == pattern(came), f"slot {number} has a part of transfer {came}"


def _busy_slot(number: int) -> int:
    return _FIRST_BUSY + (number - _FIRST_BUSY) % _BUSY_SLOTS


def misfits() -> dict[str, str]:
    """What is said of layouts that the machine has no room for; nothing may be mapped."""
    said = {}
    with machine() as (edu, ioas, ram), Memfd.create("short", PAGE) as short:
        [reserved] = edu.device.reserved_iovas()
        plans = {
            "reserved": NamedMapping(reserved.start, PAGE, READ_WRITE, "ram", 0),
            "beyond": NamedMapping(1 << 60, PAGE, READ_WRITE, "ram", 0),
            "unaligned": NamedMapping(IOVA + 1, PAGE, READ_WRITE, "ram", 0),
            "short": NamedMapping(IOVA, 2 * PAGE, READ_WRITE, "short", 0),
            "missing": NamedMapping(IOVA, PAGE, READ_WRITE, "nvram", 0),
        }
        good = NamedMapping(0, PAGE, READ_WRITE, "ram", 0)
        for name, plan in plans.items():
            before = ioas.iommufd.objects
            try:
                IoasLayout((good, plan)).rebuild(
                    edu.iommufd, {"ram": ram, "short": short}, [edu.device]
                )
            except LuoError as error:
                said[name] = str(error)
            assert ioas.iommufd.objects == before
            assert edu.device.attached is ioas
        copy_through(edu, ram, 3)
        assert ram.read(BUFFER, slot(3)) == pattern(3)
    return said


def buffer_is_kept_while_a_device_may_write_to_it() -> bytes:
    """Closes the iommufd while the device is attached, and then the device.

    Returns:
        What the device wrote into the buffer after the iommufd was closed.
    """
    edu, ioas, ram = guest_edu.with_ram(SIZE, IOVA)
    buffer = mmap.mmap(-1, PAGE)
    ioas.map(buffer, iova=OUTSIDE)
    ioas.iommufd.close()
    ram.write(pattern(4), 0)
    edu.load(IOVA)
    edu.store(OUTSIDE)
    came = buffer[:BUFFER]
    try:
        buffer.close()
    except BufferError:
        edu.close()
        buffer.close()
        ram.close()
        return came
    raise AssertionError("the buffer could be freed under the device")


def give_up_an_iommufd_with_a_buffer() -> None:
    with IommuFd() as iommufd, mmap.mmap(-1, PAGE) as buffer:
        ioas = iommufd.alloc_ioas()
        mapping = ioas.map(buffer)
        try:
            iommufd.detach()
        finally:
            ioas.unmap(mapping)


def signal_while_mapping() -> tuple[bool, str, bool]:
    """A signal's handler raises while memory is mapped and pinned.

    Returns:
        Whether the IOAS says that it is known what is mapped, what is said when it is recorded, and
        whether it is known again after everything is unmapped.
    """

    class RungError(Exception):
        pass

    def ring(number: int, frame: object) -> None:
        raise RungError

    said = ""
    old = signal.signal(signal.SIGALRM, ring)
    try:
        with machine() as (_, ioas, _), Memfd.create("large", 64 << 20) as large:
            signal.setitimer(signal.ITIMER_REAL, 0.001)
            try:
                ioas.map_file(large, iova=OUTSIDE)
            except RungError:
                known = ioas.mappings_known
            try:
                IoasLayout.record(ioas, {"large": large})
            except LuoError as error:
                said = str(error)
            ioas.unmap_all()
            return known, said, ioas.mappings_known
    finally:
        signal.signal(signal.SIGALRM, old)


def ask_for_dirty_tracking() -> None:
    with machine() as (edu, ioas, _):
        edu.device.iommu_device.alloc_hwpt(ioas, flags=HwptFlags.DIRTY_TRACKING)


def narrowed() -> tuple[list[IovaRange], list[IovaRange], list[IovaRange]]:
    """The ranges of an IOAS before, while and after the device is attached."""
    with IommuFd() as iommufd:
        ioas = iommufd.alloc_ioas()
        fresh = ioas.iova_ranges()
        edu = Edu.open(iommufd, ioas)
        attached = ioas.iova_ranges()
        edu.close()
        return list(fresh.ranges), list(attached.ranges), list(ioas.iova_ranges().ranges)
