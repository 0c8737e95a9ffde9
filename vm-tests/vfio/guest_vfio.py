"""The devices of the tests of VFIO, and functions that find and drive them in the guest.

An `edu`, which has no reset, is on the root bus. An `e1000e` and an `nvme` are behind a port, as
two functions of one slot, so that a hot reset and an IOMMU group include both. The port is limited
to 5 GT/s: on faster links, the kernel waits after a bus reset for a bit that QEMU 7.2 leaves clear.
"""

from __future__ import annotations

import mmap
import os
import select
import struct
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pyluo.iommufd import IommuFd
from pyluo.vfio import Command, PciDevice, PciRegion, VfioDevice

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pyluo import Memfd
    from pyluo.vfio import Region

DEVICES = (
    "intel-iommu,intremap=on,aw-bits=39",  # newer versions of QEMU have another default width
    "edu",
    "virtio-rng-pci",
    "pcie-root-port,id=below,chassis=1,x-speed=5",
    "e1000e,bus=below,addr=0.0,multifunction=on,romfile=",
    "nvme,bus=below,addr=0.1,serial=pyluo,msix_qsize=256",
)
CMDLINE = "intel_iommu=on vfio-pci.ids=1234:11e8"

EDU_ID, EDU_LIVENESS, EDU_RAISE, EDU_ACKNOWLEDGE = 0x00, 0x04, 0x60, 0x64
EDU_IS = 0x010000ED

E1000E_VLAN_TYPE, E1000E_IVAR = 0x38, 0xE4
VECTORS_OF_E1000E, VECTORS_OF_NVME = 5, 256  # 256 is more than one CPU has

NVME_CONFIGURATION, NVME_STATUS = 0x14, 0x1C
NVME_QUEUE_SIZES, NVME_SUBMISSIONS, NVME_COMPLETIONS, NVME_DOORBELL = 0x24, 0x28, 0x30, 0x1000
NVME_SERIAL = "pyluo"

TIMEOUT = 30.0  # seconds


def edu() -> PciDevice:
    [device] = PciDevice.find(0x1234, 0x11E8)
    return device


def e1000e() -> PciDevice:
    [device] = PciDevice.find(0x8086, 0x10D3)
    return device


def nvme() -> PciDevice:
    [device] = PciDevice.find(0x1B36, 0x0010)
    return device


def port() -> PciDevice:
    [device] = PciDevice.find(0x1B36, 0x000C)
    return device


def random_numbers() -> PciDevice:
    return PciDevice.find(0x1AF4, 0x1005)[-1]


@contextmanager
def driven(device: PciDevice) -> Iterator[PciDevice]:
    """Bind a device to vfio-pci during the block."""
    before = device.bind_driver()
    try:
        yield device
    finally:
        device.restore_driver(before)


@contextmanager
def bound(device: PciDevice, iommufd: IommuFd | None = None) -> Iterator[VfioDevice]:
    """Open a device and bind it to an iommufd, by default to one of its own."""
    with driven(device), VfioDevice.open(device) as opened:
        if iommufd is not None:
            opened.bind(iommufd)
            yield opened
        else:
            with IommuFd() as own:
                opened.bind(own)
                yield opened


@contextmanager
def mapped_by_sysfs(device: PciDevice) -> Iterator[memoryview[int]]:
    """Map the first registers, of 32 bits each, of a device without a driver.

    The device may be bound to a driver during the block.
    """
    folder = Path("/sys/bus/pci/devices", device.address)
    (folder / "enable").write_text("1")
    with (
        (folder / "resource0").open("r+b", buffering=0) as file,
        mmap.mmap(file.fileno(), mmap.PAGESIZE) as mapping,
        memoryview(mapping) as view,
        view.cast("I") as registers,
    ):
        yield registers
    (folder / "enable").write_text("0")


@contextmanager
def registers_of_edu() -> Iterator[Region]:
    with bound(edu()) as device:
        yield device.region(PciRegion.BAR0)


@contextmanager
def eventfds(count: int) -> Iterator[list[int]]:
    numbers = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(count)]
    try:
        yield numbers
    finally:
        for number in numbers:
            os.close(number)


def signalled(eventfd: int, timeout: float = TIMEOUT) -> int:
    """Wait until an eventfd is signalled; return how often it was, or 0 after `timeout` seconds."""
    ready, _, _ = select.select([eventfd], [], [], timeout)
    return os.eventfd_read(eventfd) if ready else 0


def signalled_by_now(eventfd: int, registers: Region) -> int:
    """Return how often an eventfd was signalled by previous accesses to an edu.

    The read of a register completes only after what the device sent before, and the guest's only
    CPU takes the interrupts before it continues.
    """
    assert registers.read32(EDU_ID) == EDU_IS
    return signalled(eventfd, 0)


def enable_bus_master(device: VfioDevice) -> None:
    device.config.set_bus_master(True)
    assert Command.BUS_MASTER in device.config.command


def wait_for_register(read: Callable[[int], int], offset: int, mask: int, value: int) -> None:
    deadline = time.monotonic() + TIMEOUT
    while read(offset) & mask != value:
        assert time.monotonic() < deadline, f"the register at {offset:#x} is never {value:#x}"


def identify_nvme(device: VfioDevice, ram: Memfd, iova: int) -> None:
    """Make the controller identify itself in memory, and raise the interrupt of its first vector.

    The memory, mapped at `iova`, gets the submission queue, the completion queue and the answer,
    one page each.
    """
    submissions, completions, answer = iova, iova + 4096, iova + 8192
    registers = device.region(PciRegion.BAR0)
    registers.write32(NVME_QUEUE_SIZES, 1 << 16 | 1)  # two entries each
    registers.write64(NVME_SUBMISSIONS, submissions)
    registers.write64(NVME_COMPLETIONS, completions)
    registers.write32(NVME_CONFIGURATION, 0x00460001)
    wait_for_register(registers.read32, NVME_STATUS, 1, 1)
    identify = struct.pack("<IIQQQQIIQQ", 0x06, 0, 0, 0, answer, 0, 1, 0, 0, 0)
    ram.write(identify, 0)
    registers.write32(NVME_DOORBELL, 1)


def read_serial_of_nvme(ram: Memfd) -> str:
    """Return the serial number in the answer to `identify_nvme`."""
    return ram.read(20, 8192 + 4).decode().rstrip()
