"""DMA between QEMU's `edu` device and preserved memory: functions that run in the guest."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from pyluo import (
    IncomingStore,
    IoasLayout,
    KeeperChoice,
    LiveUpdate,
    Memfd,
    NotPreservableError,
    OutgoingStore,
    RequestError,
)
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
"""The mark in the timeline from which the next kernel's process drives the device."""
ROM_IOVA = IOVA + SIZE
"""Where one page is mapped read-only."""


def pattern(number: int) -> bytes:
    """Return the data of a transfer, which differs from that of every other."""
    return (number.to_bytes(4, "little") + b"slot") * (BUFFER // 8)


def slot(number: int) -> int:
    """Return the offset in RAM of a transfer's page; the first page is the source of all."""
    return (number + 1) * PAGE


def copy_through(edu: Edu, ram: Memfd, number: int) -> None:
    """Make the device read the first page of RAM and write it to the transfer's page."""
    ram.write(pattern(number), 0)
    edu.load(IOVA)
    edu.store(IOVA + slot(number))


def read_by_device(edu: Edu, ram: Memfd, number: int) -> bytes:
    """Return the data of a transfer's page of RAM as the device reads it."""
    ram.write(bytes(BUFFER), 0)
    edu.load(IOVA + slot(number))
    edu.store(IOVA)
    return ram.read(BUFFER, 0)


def read_faults() -> list[str]:
    """Return the faults that the IOMMU has reported so far."""
    return [message for message in KernelLog().messages if "fault addr" in message]


@contextmanager
def machine() -> Iterator[tuple[Edu, Ioas, Memfd]]:
    """Open the device, attached to an IOAS that maps RAM; close everything afterwards."""
    edu, ioas, ram = guest_edu.open_with_ram(SIZE, IOVA)
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


def access_outside_map() -> tuple[bytes, bytes, list[str]]:
    """Let the device access IOVAs where nothing is mapped.

    Returns:
        What the device read there, what is left in RAM that was unmapped, and the faults.
    """
    with machine() as (edu, ioas, ram):
        ram.write(pattern(1), 0)
        ram.write(pattern(2), slot(2))
        ram.write(pattern(3), slot(3))
        before = len(read_faults())
        edu.load(IOVA)  # so that the contents of its buffer are known
        edu.store(OUTSIDE)
        edu.load(OUTSIDE)
        edu.store(IOVA + slot(3))
        read = ram.read(BUFFER, slot(3))
        ioas.unmap_all()
        edu.store(IOVA + slot(2))
        return read, ram.read(BUFFER, slot(2)), read_faults()[before:]


def write_to_read_only() -> tuple[bytes, list[str]]:
    with machine() as (edu, ioas, ram), Memfd.create("rom", PAGE) as rom:
        rom.write(pattern(5), 0)
        ioas.map_file(rom, iova=ROM_IOVA, access=Access.READ)
        before = len(read_faults())
        ram.write(pattern(6), 0)
        edu.load(IOVA)
        edu.store(ROM_IOVA)
        edu.load(ROM_IOVA)
        edu.store(IOVA + slot(0))
        assert ram.read(BUFFER, slot(0)) == pattern(5)
        return rom.read(BUFFER, 0), read_faults()[before:]


def count_msi_interrupts() -> tuple[int, int, int]:
    """Count the interrupts of a request, of a transfer with interrupt, and of one without."""
    with machine() as (edu, _, _):
        event = edu.enable_msi()
        try:
            edu.raise_irq()
            requested = guest_edu.count_interrupts(event)
            edu.acknowledge()
            edu.start(IOVA, BUFFER, to_ram=True, irq=True)
            ended = guest_edu.count_interrupts(event)
            edu.acknowledge()
            edu.store(IOVA)
            try:
                none = os.eventfd_read(event)
            except BlockingIOError:
                none = 0
        finally:
            os.close(event)
        return requested, ended, none


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


def offer_iommufd_and_vfio() -> dict[str, str]:
    """Return the refusals of the descriptors that the kernel cannot preserve yet, by their type."""
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


def replace_page_table_under_dma(wanted: int) -> tuple[int, list[int], list[str]]:
    """Replace the device's page table again and again while it does DMA.

    Args:
        wanted: how many transfers must run during a replacement; one may end too early to count.

    Returns:
        How many did, the numbers of the transfers that went wrong, and the IOMMU's faults.
    """
    before = len(read_faults())
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
            for unused in (*rebuilt.replaced, *(() if old is None else (old.ioas,))):
                unused.destroy()
            old = rebuilt
        return across, wrong, read_faults()[before:]


def preserve_machine() -> tuple[OutgoingStore, Edu, Memfd]:
    """Set up a machine, and preserve its RAM and the layout of its IOAS in a store."""
    edu, ioas, ram = guest_edu.open_with_ram(SIZE, IOVA)
    rom = Memfd.create("rom", PAGE)
    rom.write(pattern(99), 0)
    ioas.map_file(rom, iova=ROM_IOVA, access=Access.READ)
    copy_through(edu, ram, 0)
    store = OutgoingStore.create("vm0", keeper=KeeperChoice.NONE)
    store.add("ram", ram)
    store.add("rom", rom)
    rom.close()
    IoasLayout.record(ioas, store).save(store)
    copy_through(edu, ram, 1)  # RAM is preserved already
    keep_busy(edu, ram)
    return store, edu, ram


def restore_machine(hop: int) -> tuple[OutgoingStore, Edu, Memfd]:
    """Restore and check the machine on the next kernel, ready for one more jump."""
    store = IncomingStore.retrieve("vm0", keeper=KeeperChoice.NONE)
    device = VfioDevice.open(guest_edu.find_edu())
    iommufd = IommuFd()
    device.bind(iommufd)
    rebuilt = IoasLayout.load(store).rebuild(iommufd, store, [device])
    assert rebuilt.replaced == ()
    edu = Edu(device, iommufd)
    ram = store.get("ram", Memfd)
    for number in range(hop + 1):
        assert read_by_device(edu, ram, number) == pattern(number), f"slot {number}, hop {hop}"
    edu.load(ROM_IOVA)
    edu.store(IOVA)
    assert ram.read(BUFFER, 0) == pattern(99)
    check_transfers_during_jump(ram)
    renewed = store.renew()
    copy_through(edu, ram, hop + 1)
    mark(DRIVEN)
    keep_busy(edu, ram)
    return renewed, edu, ram


def keep_busy(edu: Edu, ram: Memfd) -> None:
    """Make the device do DMA forever, into slots of its own; nothing else may drive it then."""

    def drive() -> None:
        for number in itertools.count(_FIRST_BUSY):
            ram.write(pattern(number), 0)
            edu.load(IOVA)
            edu.store(IOVA + slot(_busy_slot(number)))

    threading.Thread(target=drive, daemon=True).start()


def check_transfers_during_jump(ram: Memfd) -> None:
    """Check that each busy slot is empty or holds one complete transfer, and nothing beside it."""
    for number in range(_FIRST_BUSY, _FIRST_BUSY + _BUSY_SLOTS):
        page = ram.read(PAGE, slot(number))
        assert page[BUFFER:] == bytes(PAGE - BUFFER), f"beside slot {number}"
        if page[:BUFFER] != bytes(BUFFER):
            found = int.from_bytes(page[:4], "little")
            assert _busy_slot(found) == number, f"slot {number} has data of transfer {found}"
            assert page[:BUFFER] == pattern(found), f"slot {number} has a part of transfer {found}"


def _busy_slot(number: int) -> int:
    return _FIRST_BUSY + (number - _FIRST_BUSY) % _BUSY_SLOTS


def rebuild_layouts_that_do_not_fit() -> dict[str, str]:
    """Return the refusals of layouts that do not fit the machine; check that nothing is mapped."""
    refusals = {}
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
            except RequestError as error:
                refusals[name] = str(error)
            assert ioas.iommufd.objects == before
            assert edu.device.attached is ioas
        copy_through(edu, ram, 3)
        assert ram.read(BUFFER, slot(3)) == pattern(3)
    return refusals


def signal_while_mapping() -> int:
    """Let a signal's handler raise an exception while memory is mapped and unmapped.

    Check each time that the IOAS knows what the kernel has done.

    Returns:
        The number of requests that were interrupted.
    """

    class AlarmError(Exception):
        pass

    def raise_alarm(number: int, frame: object) -> None:
        raise AlarmError

    interrupted = 0
    old = signal.signal(signal.SIGALRM, raise_alarm)
    try:
        with machine() as (_, ioas, ram), Memfd.create("large", 64 << 20) as large:
            everything = IovaRange(OUTSIDE, OUTSIDE + large.size - 1)
            # On a slow machine an early signal comes before the request has begun.
            for milliseconds in (1, 2, 4, 8, 16, 32, 64):
                for request in (
                    lambda: ioas.map_file(large, iova=OUTSIDE),
                    lambda: ioas.unmap(everything),
                ):
                    try:
                        signal.setitimer(signal.ITIMER_REAL, milliseconds / 1000)
                        with suppress(RequestError):  # ENOENT: nothing is mapped
                            request()
                        signal.setitimer(signal.ITIMER_REAL, 0)
                    except AlarmError:
                        interrupted += 1
                    known = [mapping.range for mapping in ioas.mappings]
                    assert (everything in known) == ioas.maps(everything)
                    IoasLayout.record(ioas, {"ram": ram, "large": large})
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    return interrupted


def ask_for_dirty_tracking() -> None:
    with machine() as (edu, ioas, _):
        edu.device.iommu_device.alloc_hwpt(ioas, flags=HwptFlags.DIRTY_TRACKING)


def read_ranges_around_attachment() -> tuple[list[IovaRange], list[IovaRange], list[IovaRange]]:
    """Return the IOVA ranges of an IOAS before, while and after the device is attached."""
    with IommuFd() as iommufd:
        ioas = iommufd.alloc_ioas()
        fresh = ioas.iova_ranges()
        edu = Edu.open(iommufd, ioas)
        attached = ioas.iova_ranges()
        edu.close()
        return list(fresh.ranges), list(attached.ranges), list(ioas.iova_ranges().ranges)
