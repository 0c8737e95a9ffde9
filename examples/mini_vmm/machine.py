"""The machine of the mini VMM: RAM, vCPUs with a thread each, a serial port, and KVM's devices."""

from __future__ import annotations

import os
import signal
import struct
import sys
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pyluo import kvm

if TYPE_CHECKING:
    from pathlib import Path

    from pyluo import GuestRam, IncomingStore, OutgoingStore

__all__ = ["PATTERN", "Machine", "SerialPort", "VcpuFailure"]

_PAGE = 4096
_MIB = 1 << 20
PATTERN = 16 * _MIB
"""Where the pages begin that the program fills."""


class VcpuFailure(Exception):
    """A vCPU cannot go on."""


class SerialPort:
    """A 16550 UART that can send: enough for a VM that polls.

    The state is that of its registers; a byte that the VM sends is written at once.
    """

    PORTS = range(0x3F8, 0x400)
    _NAMES = (
        "data",
        "interrupts",
        "fifo",
        "line",
        "modem",
        "line status",
        "modem status",
        "scratch",
    )
    _DIVISOR_ACCESS = 0x80  # in the line control register
    _EMPTY = 0x60  # in the line status register: ready for the next byte

    def __init__(self) -> None:
        self.registers = dict.fromkeys(self._NAMES, 0) | {"divisor low": 1, "divisor high": 0}

    def access(self, event: kvm.PortAccess) -> None:
        """Carry out an access of a vCPU."""
        name = self._register(event.port - self.PORTS.start)
        if event.is_write and name == "data":
            os.write(sys.stdout.fileno(), event.data)
        elif event.is_write:
            self.registers[name] = event.data[-1]
        else:
            value = self._EMPTY if name == "line status" else self.registers[name]
            event.data[:] = bytes([value] * len(event.data))

    def _register(self, offset: int) -> str:
        if offset < 2 and self.registers["line"] & self._DIVISOR_ACCESS:
            return ("divisor low", "divisor high")[offset]
        return self._NAMES[offset]


class Machine:
    """A VM, its vCPUs with a thread each, and its serial port. It is paused until `run`.

    A machine with more than that overrides `record` and `rebuild`.

    Attributes:
        is_movable: whether it can move to another process of the same kernel by its state alone.
    """

    is_movable = True

    def __init__(self, ram: GuestRam, cpus: int) -> None:
        self.serial = SerialPort()
        self.failure = ""
        self._memory = ram.map()
        with kvm.Kvm.open() as device:
            self.vm = kvm.VirtualMachine.create(device)
            supported = device.supported_cpuid()
        self.vm.set_memory(0, self._memory, 0)
        self.vcpus = [self.vm.create_vcpu(number) for number in range(cpus)]
        for vcpu in self.vcpus:
            vcpu.set_cpuid(kvm.cpuid_of_vcpu(supported, vcpu.number, cpus))
        self._condition = threading.Condition()
        self._paused = True
        self._parked = 0
        kvm.accept_kicks()

    def load(self, program: Path) -> None:
        """Put a program into the RAM, and the vCPUs to its beginning, in 64-bit mode."""
        entry = _load_elf(self._memory, program.read_bytes())
        _lay_out(self._memory, len(self.vcpus))
        for vcpu in self.vcpus:
            vcpu.set_special_registers(_in_64_bit_mode(vcpu.get_special_registers()))
            vcpu.set_registers(kvm.Registers(rip=entry, rdi=vcpu.number))
            vcpu.start()

    def record(self, store: OutgoingStore) -> None:
        """Add to a store, which has the RAM, what another kernel needs to make the machine again.

        What `save` returns is not part of that.
        """

    def rebuild(self, store: IncomingStore) -> None:
        """Make again what `record` has recorded."""

    def start(self) -> None:
        """Start the threads, and run the VM."""
        for vcpu in self.vcpus:
            threading.Thread(target=self._run_vcpu, args=(vcpu,), daemon=True).start()
        self.run()

    def run(self) -> None:
        """Run the VM, or let it go on after `pause`."""
        with self._condition:
            self._paused = False
            self._condition.notify_all()

    def pause(self) -> None:
        """Stop all vCPUs between two instructions."""
        with self._condition:
            self._paused = True
            for vcpu in self.vcpus:
                vcpu.kick()
            self._condition.wait_for(lambda: self._parked == len(self.vcpus))

    def save(self) -> kvm.VmState:
        """Return the state of the VM, which must be paused."""
        return kvm.save(self.vm, self.vcpus, devices={"serial": self.serial.registers})

    def restore(self, state: kvm.VmState) -> kvm.Restored:
        """Give this VM, which has not run yet, the state of another one."""
        self.serial.registers.update(state.devices["serial"])
        return kvm.restore(self.vm, self.vcpus, state)

    def _run_vcpu(self, vcpu: kvm.Vcpu) -> None:
        try:
            while True:
                event = vcpu.run()
                match event:
                    case kvm.Interrupted():
                        self._wait_while_paused(vcpu)
                    case kvm.PortAccess() if event.port in SerialPort.PORTS:
                        self.serial.access(event)
                    case kvm.PortAccess() | kvm.MemoryAccess():
                        if not event.is_write:  # nothing is there
                            event.data[:] = b"\xff" * len(event.data)
                    case _:
                        raise VcpuFailure(f"vCPU {vcpu.number}: {event}")
        except Exception as error:
            self.failure = str(error)
            os.kill(os.getpid(), signal.SIGTERM)

    def _wait_while_paused(self, vcpu: kvm.Vcpu) -> None:
        with self._condition:
            if self._paused:
                self._parked += 1
                self._condition.notify_all()
                self._condition.wait_for(lambda: not self._paused)
                self._parked -= 1
            vcpu.rearm()


def _load_elf(memory: Any, image: bytes) -> int:
    """Copy the segments of an ELF file to their physical addresses; return its entry point."""
    entry, headers = struct.unpack_from("<QQ", image, 24)
    size, count = struct.unpack_from("<HH", image, 54)
    for start in range(headers, headers + size * count, size):
        kind, _, offset, _, address, length = struct.unpack_from("<IIQQQQ", image, start)
        if kind == 1:  # PT_LOAD
            memory[address : address + length] = image[offset : offset + length]
    return int(entry)


# Where the program finds what it must know, its page tables and its segments.
_BOOT, _TABLES, _SEGMENTS = 0x1000, 0x2000, 0x8000


def _lay_out(memory: Any, cpus: int) -> None:
    """Write page tables that map the first 4 GiB to themselves, and what the program must know."""
    boot = struct.pack("<IIQ", cpus, (len(memory) - PATTERN) // _PAGE, PATTERN)
    memory[_BOOT : _BOOT + len(boot)] = boot
    tables = [[_TABLES + _PAGE | 3], [_TABLES + (2 + each) * _PAGE | 3 for each in range(4)]]
    for gib in range(4):
        uncached = 0x18 if gib == 3 else 0  # the interrupt controllers are there
        tables.append([gib << 30 | each << 21 | 0x83 | uncached for each in range(512)])
    for number, table in enumerate(tables):
        start = _TABLES + number * _PAGE
        memory[start : start + 8 * len(table)] = struct.pack(f"<{len(table)}Q", *table)
    segments = struct.pack("<3Q", 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF)
    memory[_SEGMENTS : _SEGMENTS + len(segments)] = segments


def _in_64_bit_mode(registers: kvm.SpecialRegisters) -> kvm.SpecialRegisters:
    code = kvm.Segment(limit=0xFFFFFFFF, selector=8, type=11, present=1, s=1, l=1, g=1)
    data = kvm.Segment(limit=0xFFFFFFFF, selector=16, type=3, present=1, s=1, db=1, g=1)
    return replace(
        registers,
        cs=code,
        ds=data,
        es=data,
        fs=data,
        gs=data,
        ss=data,
        gdt=kvm.DescriptorTable(base=_SEGMENTS, limit=23),
        cr0=0x80010033,  # paging, write protection, and an FPU that reports its errors
        cr3=_TABLES,
        cr4=0x620,  # 64-bit page table entries, SSE
        efer=0x500,  # 64-bit mode, enabled and active
    )
