"""A small VMM whose VMs live through an update of their host's kernel.

`run NAME` starts a VM. SIGUSR1 pauses it and stores its state beside its RAM, which is in the store
from the beginning; then the host may jump. `resume NAME`, after the jump, goes on where it was.
SIGUSR2 lets a VM that was stored run on without a jump; SIGTERM ends the VM, unless it is stored.

What a VM consists of here: RAM, vCPUs, one serial port, and what KVM emulates, which is a timer and
interrupt controllers.
"""

from __future__ import annotations

import argparse
import os
import signal
import struct
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyluo import (
    GuestRam,
    IncomingStore,
    KeeperChoice,
    Memfd,
    OutgoingStore,
    RequestError,
    SessionNotFoundError,
    kvm,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

_PROGRAM = Path(__file__).with_name("program.elf")
_PAGE = 4096
_MIB = 1 << 20
_RAM_LIMIT = 3 << 30  # below the interrupt controllers
_STATE_ROOM = 64 << 10  # bytes of state for each vCPU, and for the rest; it needs some 10 KiB
_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)


class Lost(Exception):
    """The VM cannot go on."""


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
    """A VM, its vCPUs with a thread each, and its serial port. It is paused until `run`."""

    def __init__(self, ram: GuestRam, cpus: int) -> None:
        self.lock = ram.lock()  # until this process ends
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
                        raise Lost(f"vCPU {vcpu.number}: {event}")
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
_PATTERN = 16 * _MIB  # the pages from here on are the program's to fill


def _lay_out(memory: Any, cpus: int) -> None:
    """Write page tables that map the first 4 GiB to themselves, and what the program must know."""
    boot = struct.pack("<IIQ", cpus, (len(memory) - _PATTERN) // _PAGE, _PATTERN)
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


def run(name: str, *, memory: int, cpus: int, program: Path, keeper: KeeperChoice) -> None:
    """Start a VM, and keep it until it is told to end."""
    ram = GuestRam.create(name, memory)
    machine = Machine(ram, cpus)
    machine.load(program)
    store = OutgoingStore.create(name, keeper=keeper)
    try:
        store.add("ram", ram)
        # Preserved now, so that storing the state needs no memory; the entry comes with the state.
        state_file = Memfd.create(f"{name}.state", _STATE_ROOM * (cpus + 1))
        store.add("state", state_file)
        store.remove("state")
    except BaseException:
        store.discard()
        raise
    machine.start()
    tell(f"{name} runs")
    serve(name, machine, store, state_file)


def resume(name: str, *, keeper: KeeperChoice) -> None:
    """Go on with a VM that was stored before the jump."""
    began = time.monotonic()
    try:
        incoming = IncomingStore.retrieve(name, keeper=keeper)
    except SessionNotFoundError as error:
        raise Lost(str(error)) from error
    if "state" not in incoming:
        raise Lost("its state was not stored when the host jumped; its RAM is in the store")
    ram = incoming.get_ram("ram")
    state_file = incoming.get("state", Memfd)
    state = kvm.VmState.read(state_file)
    machine = Machine(ram, len(state.vcpus))
    restored = machine.restore(state)
    # Until here, nothing has changed, so that this can be tried again. From the removal of the
    # state on, the VM is in this process only, and nobody else can go on from there.
    store = incoming.renew()
    store.remove("state")
    machine.start()
    tell(f"{name} runs again: paused for {restored.paused / 1e6:.0f} ms by its own clock")
    tell(f"{name}: resumed in {(time.monotonic() - began) * 1000:.0f} ms; {restored}")
    serve(name, machine, store, state_file)


def serve(name: str, machine: Machine, store: OutgoingStore, state_file: Memfd) -> None:
    """Do what signals ask for, until the VM ends."""
    stored = False
    while True:
        number = signal.sigwait(_SIGNALS)
        if machine.failure:
            store.discard()
            raise Lost(machine.failure)
        if number == signal.SIGUSR1 and not stored:
            stored = put_into_store(name, machine, store, state_file)
        elif number == signal.SIGUSR2 and stored:
            # In this order: a VM that runs has no state that could be taken for its present one.
            store.remove("state")
            stored = False
            machine.run()
            tell(f"{name} runs on")
        elif number in (signal.SIGTERM, signal.SIGINT):
            if not stored:
                store.discard()
            return


def put_into_store(name: str, machine: Machine, store: OutgoingStore, state_file: Memfd) -> bool:
    """Pause the VM and store its state, or let it run on if that fails; return whether it did."""
    began = time.monotonic()
    machine.pause()
    try:
        machine.save().write(state_file)
        store.add("state", state_file, requires=["ram"])
    except (RequestError, ValueError) as error:
        machine.run()
        tell(f"{name} runs on: {error}")
        return False
    tell(f"{name} is stored: {(time.monotonic() - began) * 1000:.1f} ms")
    return True


def tell(text: str) -> None:
    print(f"mini_vmm: {text}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="run a VM that lives through live updates")
    parser.add_argument("--no-keeper", action="store_true", help="nothing keeps what it stores")
    commands = parser.add_subparsers(dest="command", required=True)
    start = commands.add_parser("run", help="start a VM")
    start.add_argument("name")
    start.add_argument("--memory", type=int, default=80, metavar="MIB")
    start.add_argument("--cpus", type=int, default=2)
    start.add_argument("--program", type=Path, default=_PROGRAM)
    commands.add_parser("resume", help="go on with a VM after the jump").add_argument("name")
    chosen = parser.parse_args(arguments)
    keeper = KeeperChoice.NONE if chosen.no_keeper else KeeperChoice.DEFAULT
    # In all threads: the main thread waits for them.
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        if chosen.command == "resume":
            resume(chosen.name, keeper=keeper)
        else:
            memory = chosen.memory * _MIB
            if not _PATTERN < memory <= _RAM_LIMIT:
                parser.error(f"--memory is more than {_PATTERN // _MIB} and up to 3072 MiB")
            run(
                chosen.name,
                memory=memory,
                cpus=chosen.cpus,
                program=chosen.program,
                keeper=keeper,
            )
    except (RequestError, Lost) as error:
        tell(f"{chosen.name}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
