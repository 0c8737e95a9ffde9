"""The mini VMM with a PCI device assigned to its VM, which outlives its host's kernel.

The VM drives QEMU's `edu` device by itself: its registers are in the VM's memory, its DMA goes to
the VM's RAM through the IOMMU, and its interrupts reach the VM without this process. Before the
jump the device comes to rest, and after it another process opens the device, maps the RAM for it as
it was mapped before, and connects its interrupts again.

The commands are those of the mini VMM; ``--device ADDRESS`` before them says what a new VM gets.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, os.fspath(Path(__file__).parents[1] / "mini_vmm"))

from machine import Machine
from mini_vmm import Lost, carry_out, make_parser

from pyluo import IoasLayout, OwnedFd, RequestError
from pyluo.iommufd import IommuFd
from pyluo.vfio import KvmVfio, PciDevice, PciIrq, PciRegion, VfioDevice

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyluo import GuestRam, IncomingStore, OutgoingStore

_PROGRAM = Path(__file__).with_name("program.elf")
# Where the program expects the device; see program/edu.c.
_REGISTERS = 0xE0000000
_LINE = 20
_SLOT = 1  # KVM's number for the registers; the RAM has 0
_COMMAND, _RUN = 0x98, 1
_KEY = "device"  # in the metadata of the store
_PATIENCE = 10.0  # seconds for a transfer to end
_POLL = 0.001  # seconds


class PassthroughMachine(Machine):
    """A VM with an assigned device.

    Args:
        ram: the RAM of the VM.
        cpus: how many vCPUs it has.
        address: the PCI address of the device, if the VM is new.
    """

    is_movable = False  # the device would have to: see `pyluo.handoff`

    def __init__(self, ram: GuestRam, cpus: int, address: str | None = None) -> None:
        super().__init__(ram, cpus)
        self._ram = ram
        self._address = address
        self._device: VfioDevice
        self._event = OwnedFd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        self._line_is_connected = self._msi_is_enabled = False

    def record(self, store: OutgoingStore) -> None:
        """Give the VM the device, and add to the store where it is and what it reaches."""
        if self._address is None:
            raise Lost("--device ADDRESS says which device a new VM gets")
        iommufd = self._open(self._address)
        ioas = iommufd.alloc_ioas()
        ioas.map_ram(self._ram, iova=0)
        self._device.attach(ioas)
        store.update_meta(_KEY, self._address)
        IoasLayout.record(ioas, store).save(store)

    def rebuild(self, store: IncomingStore) -> None:
        """Give the VM the device that it had, which reaches what it reached."""
        iommufd = self._open(str(store.meta[_KEY]))
        IoasLayout.load(store).rebuild(iommufd, store, [self._device])
        self._connect()  # now, while this can still be tried again

    def run(self) -> None:
        """Let the device do DMA, and run the VM."""
        self._connect()
        self._device.config.set_bus_master(True)
        super().run()

    def pause(self) -> None:
        """Stop all vCPUs, and bring the device to rest.

        Raises:
            RequestError: the device does not come to rest (ETIMEDOUT). `run` goes on.
        """
        super().pause()
        # A real device may do more than one can wait for: then it needs `VfioDevice.migration`.
        until = time.monotonic() + _PATIENCE
        while self._registers.read64(_COMMAND) & _RUN:
            if time.monotonic() > until:
                raise RequestError(errno.ETIMEDOUT, "wait for the device", str(self._device))
            time.sleep(_POLL)
        self._disconnect()
        self._device.config.set_bus_master(False)

    def _connect(self) -> None:
        """Connect the device's interrupts with the VM, as far as they are not."""
        if not self._line_is_connected:
            self.vm.connect_irq(self._event, _LINE)
            self._line_is_connected = True
        if not self._msi_is_enabled:
            self._device.irq(PciIrq.MSI).enable([self._event])
            self._msi_is_enabled = True

    def _disconnect(self) -> None:
        """Undo `_connect`: each interrupt is in the VM's interrupt controller then."""
        if self._msi_is_enabled:
            self._device.irq(PciIrq.MSI).disable()
            self._msi_is_enabled = False
        if self._line_is_connected:
            self.vm.disconnect_irq(self._event, _LINE)
            self._line_is_connected = False

    def _open(self, address: str) -> IommuFd:
        """Open the device, show its registers to the VM, and bind it to a new iommufd."""
        self._device = VfioDevice.open(PciDevice.at(address))
        self._kvm_device = KvmVfio.create(self.vm)
        self._kvm_device.add(self._device)
        iommufd = IommuFd()
        self._device.bind(iommufd)
        self._registers = self._device.region(PciRegion.BAR0)
        self._shown = self._registers.map()
        self.vm.set_memory(_SLOT, self._shown, _REGISTERS)
        return iommufd


def main(words: Sequence[str] | None = None) -> int:
    parser = make_parser(_PROGRAM)
    parser.add_argument("--device", metavar="ADDRESS", help="the PCI device of a new VM")
    chosen = parser.parse_args(words)
    if chosen.command in ("take-over", "inherit"):
        parser.error("a VM with a device is carried over by a jump only")
    return carry_out(chosen, partial(PassthroughMachine, address=chosen.device))


if __name__ == "__main__":
    sys.exit(main())
