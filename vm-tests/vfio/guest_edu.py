"""QEMU's `edu` device, driven through VFIO in the guest: a DMA engine, registers, an interrupt.

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
DEVICES = ["intel-iommu,intremap=on,aw-bits=39", "edu"]
APPEND = "intel_iommu=on vfio-pci.ids=1234:11e8"
GUEST = {"devices": DEVICES, "append": APPEND}
"""The options of a guest with the device: an IOMMU, the device, and vfio-pci as its driver.

The width of addresses is set because newer versions of QEMU have another default.
"""

BUFFER = 2048
"""The most bytes of a transfer: half of the device's buffer, because QEMU 7.2 aborts at its end."""

_IDENTITY, _RAISE_IRQ, _ACK_IRQ = 0x00, 0x60, 0x64
_SOURCE, _TARGET, _LENGTH, _COMMAND = 0x80, 0x88, 0x90, 0x98
_RUN, _TO_RAM, _WITH_IRQ = 1, 2, 4
_BUFFER_AT = 0x40000
_TIMEOUT = 30.0  # seconds; a transfer takes 0.1 s of the device's time


class Edu:
    """The device, bound to an iommufd and free to do DMA.

    Args:
        device: the open device, which is bound unless it is bound already.
        iommufd: the iommufd to bind it to.
        pt: the page table or the IOAS to attach it to; None attaches it to nothing.
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
        return cls(VfioDevice.open(find_edu()), iommufd, pt)

    @property
    def busy(self) -> bool:
        """Whether a transfer is running."""
        return bool(self.registers.read64(_COMMAND) & _RUN)

    def start(self, iova: int, length: int, *, to_ram: bool, irq: bool = False) -> None:
        """Start a transfer between the device's buffer and RAM."""
        assert not self.busy
        source, target = (_BUFFER_AT, iova) if to_ram else (iova, _BUFFER_AT)
        self.registers.write64(_SOURCE, source)
        self.registers.write64(_TARGET, target)
        self.registers.write64(_LENGTH, length)
        command = _RUN | (_TO_RAM if to_ram else 0) | (_WITH_IRQ if irq else 0)
        self.registers.write64(_COMMAND, command)

    def wait(self) -> None:
        """Wait for the transfer to end."""
        deadline = time.monotonic() + _TIMEOUT
        while self.busy:
            assert time.monotonic() < deadline, "the transfer does not end"

    def load(self, iova: int, length: int = BUFFER) -> None:
        """Make the device read RAM into its buffer."""
        self.start(iova, length, to_ram=False)
        self.wait()

    def store(self, iova: int, length: int = BUFFER) -> None:
        """Make the device write its buffer to RAM."""
        self.start(iova, length, to_ram=True)
        self.wait()

    def acknowledge(self) -> None:
        """Acknowledge the device's interrupt."""
        self.registers.write32(_ACK_IRQ, 0xFFFFFFFF)

    def raise_irq(self) -> None:
        """Make the device raise an interrupt."""
        self.registers.write32(_RAISE_IRQ, 1)

    def enable_msi(self) -> int:
        """Return an eventfd that counts the device's MSIs; the caller must close it."""
        event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.device.irq(PciIrq.MSI).enable([event])
        return event

    def close(self) -> None:
        self.device.close()


def find_edu() -> PciDevice:
    """Return the device on the PCI bus."""
    [device] = PciDevice.find(VENDOR, DEVICE)
    return device


def count_interrupts(event: int) -> int:
    """Wait for an interrupt, and return how many came."""
    ready, _, _ = select.select([event], [], [], _TIMEOUT)
    assert ready, "no interrupt came"
    return os.eventfd_read(event)


def open_with_ram(size: int, iova: int) -> tuple[Edu, Ioas, Memfd]:
    """Open the device, attached to an IOAS that maps a memfd of `size` bytes at an IOVA."""
    iommufd = IommuFd()
    ioas = iommufd.alloc_ioas()
    ram = Memfd.create("ram", size)
    ioas.map_file(ram, iova=iova)
    return Edu.open(iommufd, ioas), ioas, ram
