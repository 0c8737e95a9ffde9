"""QEMU's `edu` device in the guest, driven through VFIO: a DMA engine, registers, an interrupt.

Source: docs/specs/edu.rst of QEMU
"""

from __future__ import annotations

import os
import select
import time

from pyluo import Memfd
from pyluo.iommufd import Ioas, IommuFd, IommuObject
from pyluo.vfio import PciDevice, PciIrq, PciRegion, VfioDevice

VENDOR, DEVICE = 0x1234, 0x11E8
GUEST = {
    "devices": ["intel-iommu,intremap=on,aw-bits=39", "edu"],
    "append": "intel_iommu=on vfio-pci.ids=1234:11e8",
}
"""What a guest needs to have it: an IOMMU, the device, and vfio-pci as its driver.

The width of addresses is said, since newer versions of QEMU have another one by default.
"""

BUFFER = 2048
"""Bytes of a transfer at most; half of what the device has, since QEMU 7.2 aborts at its end."""

_IDENTITY, _RAISE_IRQ, _ACK_IRQ = 0x00, 0x60, 0x64
_SOURCE, _TARGET, _LENGTH, _COMMAND = 0x80, 0x88, 0x90, 0x98
_RUN, _TO_RAM, _WITH_IRQ = 1, 2, 4
_BUFFER_AT = 0x40000
_PATIENCE = 30.0  # seconds; a transfer takes 0.1 of the device's time


class Edu:
    """The device, bound to an iommufd and free to do DMA.

    Args:
        device: opened; bound here, unless it is already.
        iommufd: to which.
        pt: what to attach it to; None leaves it as it is.
    """

    def __init__(self, device: VfioDevice, iommufd: IommuFd, pt: IommuObject | None = None) -> None:
        self.device = device
        self.iommufd = iommufd
        if not device.bound:
            device.bind(iommufd)
        if pt is not None:
            device.attach(pt)
        device.config.set_bus_master(True)
        self.registers = device.region(PciRegion.BAR0)
        assert self.registers.read32(_IDENTITY) == 0x010000ED

    @classmethod
    def open(cls, iommufd: IommuFd, pt: IommuObject | None = None) -> Edu:
        return cls(VfioDevice.open(place()), iommufd, pt)

    @property
    def busy(self) -> bool:
        """Whether a transfer is running."""
        return bool(self.registers.read64(_COMMAND) & _RUN)

    def start(self, iova: int, length: int, *, to_ram: bool, irq: bool = False) -> None:
        """Begins a transfer between its buffer and RAM."""
        assert not self.busy
        source, target = (_BUFFER_AT, iova) if to_ram else (iova, _BUFFER_AT)
        self.registers.write64(_SOURCE, source)
        self.registers.write64(_TARGET, target)
        self.registers.write64(_LENGTH, length)
        command = _RUN | (_TO_RAM if to_ram else 0) | (_WITH_IRQ if irq else 0)
        self.registers.write64(_COMMAND, command)

    def wait(self) -> None:
        """Waits for the transfer to end."""
        deadline = time.monotonic() + _PATIENCE
        while self.busy:
            assert time.monotonic() < deadline, "the transfer does not end"

    def load(self, iova: int, length: int = BUFFER) -> None:
        """Reads RAM into its buffer."""
        self.start(iova, length, to_ram=False)
        self.wait()

    def store(self, iova: int, length: int = BUFFER) -> None:
        """Writes its buffer to RAM."""
        self.start(iova, length, to_ram=True)
        self.wait()

    def acknowledge(self) -> None:
        """Tells it that its interrupt was seen."""
        self.registers.write32(_ACK_IRQ, 0xFFFFFFFF)

    def raise_irq(self) -> None:
        """Makes it interrupt."""
        self.registers.write32(_RAISE_IRQ, 1)

    def enable_msi(self) -> int:
        """An eventfd that counts its interrupts; the caller's to close."""
        event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.device.irq(PciIrq.MSI).enable([event])
        return event

    def close(self) -> None:
        self.device.close()


def place() -> PciDevice:
    """Where it is on the bus."""
    [device] = PciDevice.find(VENDOR, DEVICE)
    return device


def interrupts(event: int) -> int:
    """How many interrupts came, waiting for the first."""
    ready, _, _ = select.select([event], [], [], _PATIENCE)
    assert ready, "no interrupt came"
    return os.eventfd_read(event)


def with_ram(size: int, iova: int) -> tuple[Edu, Ioas, Memfd]:
    """The device, with a memfd mapped at an address."""
    iommufd = IommuFd()
    ioas = iommufd.alloc_ioas()
    ram = Memfd.create("ram", size)
    ioas.map_file(ram, iova=iova)
    return Edu.open(iommufd, ioas), ioas, ram
