"""`Vcpu`: a virtual CPU, which a thread of the VMM runs."""

from __future__ import annotations

import errno
import mmap
import signal
import struct
import threading
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pyluo._sys import Exported, Ioctl, PlainIoctl, Struct, constant
from pyluo.descriptor import OwnedFd
from pyluo.errors import KvmError
from pyluo.kvm.cpuid import pack_entries
from pyluo.kvm.exits import (
    EntryFailure,
    Exit,
    Halt,
    InternalError,
    Interrupted,
    MemoryAccess,
    OtherExit,
    PortAccess,
    Shutdown,
    SystemEvent,
    exit_name,
)
from pyluo.kvm.registers import Registers, SpecialRegisters
from pyluo.operation import raising

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyluo.kvm.cpuid import CpuidEntry

__all__ = ["KICK_SIGNAL", "Vcpu", "accept_kicks"]

_RUN_VCPU = PlainIoctl("KVM_RUN", KvmError)
_GET_TSC_KHZ = PlainIoctl("KVM_GET_TSC_KHZ", KvmError)
_SET_TSC_KHZ = PlainIoctl("KVM_SET_TSC_KHZ", KvmError)
_KVMCLOCK_CTRL = PlainIoctl("KVM_KVMCLOCK_CTRL", KvmError)

KICK_SIGNAL = signal.SIGRTMIN
"""The signal that `Vcpu.kick` sends to the thread that runs a vCPU."""

_RUN = Struct("kvm_run")
_IMMEDIATE_EXIT = _RUN.offset("immediate_exit")
_MMIO_DATA = _RUN.offset("mmio", "data")
_GET_REGS = Ioctl("KVM_GET_REGS", "kvm_regs", KvmError, size=None)
_SET_REGS = Ioctl("KVM_SET_REGS", "kvm_regs", KvmError, size=None)
_GET_SREGS = Ioctl("KVM_GET_SREGS2", "kvm_sregs2", KvmError, size=None)
_SET_SREGS = Ioctl(
    "KVM_SET_SREGS2",
    "kvm_sregs2",
    KvmError,
    {
        errno.EINVAL: (
            "The registers contradict one another, or need what CPUID does not tell the VM of"
        )
    },
    size=None,
)
_SET_MP_STATE = Ioctl("KVM_SET_MP_STATE", "kvm_mp_state", KvmError, size=None)
_SET_CPUID = Ioctl("KVM_SET_CPUID2", "kvm_cpuid2", KvmError, size=None)
_HAS_ATTR = Ioctl("KVM_HAS_DEVICE_ATTR", "kvm_device_attr", KvmError, size=None)
_GET_ATTR = Ioctl("KVM_GET_DEVICE_ATTR", "kvm_device_attr", KvmError, size=None)
_SET_ATTR = Ioctl("KVM_SET_DEVICE_ATTR", "kvm_device_attr", KvmError, size=None)
_TSC = {"group": constant("KVM_VCPU_TSC_CTRL"), "attr": constant("KVM_VCPU_TSC_OFFSET")}

_IO = constant("KVM_EXIT_IO")
_MMIO = constant("KVM_EXIT_MMIO")
_HLT = constant("KVM_EXIT_HLT")
_SHUTDOWN = constant("KVM_EXIT_SHUTDOWN")
_SYSTEM_EVENT = constant("KVM_EXIT_SYSTEM_EVENT")
_FAIL_ENTRY = constant("KVM_EXIT_FAIL_ENTRY")
_INTERNAL_ERROR = constant("KVM_EXIT_INTERNAL_ERROR")
_OUT = constant("KVM_EXIT_IO_OUT")
_RUNNABLE = constant("KVM_MP_STATE_RUNNABLE")


def accept_kicks() -> None:
    """Install a handler for `KICK_SIGNAL` that does nothing; call it once, in the main thread.

    Without a handler, the signal would end the process.
    """
    signal.signal(KICK_SIGNAL, lambda number, frame: None)


class Vcpu(OwnedFd):
    """A virtual CPU; `VirtualMachine.create_vcpu` creates it.

    One thread runs it. The state of the vCPU may be read and written, by any thread, only while no
    thread is in `run`; `kick` may be called at any time.

    Attributes:
        number: the id of its local APIC.
        msr_indices: the numbers of the model-specific registers that are part of its state.
        xsave_size: the size of its XSAVE area in bytes.
    """

    __slots__ = ("_area", "_memory", "_run", "_thread", "msr_indices", "number", "xsave_size")

    def __init__(
        self, fd: int, number: int, run_size: int, msr_indices: tuple[int, ...], xsave_size: int
    ) -> None:
        super().__init__(fd)
        self.number: int = number
        self.msr_indices: tuple[int, ...] = msr_indices
        self.xsave_size: int = max(xsave_size, Struct("kvm_xsave").size)
        self._thread: int | None = None
        with raising("mmap", f"vCPU {number}"):
            self._area = mmap.mmap(fd, run_size)
        self._memory = Exported(self._area)
        self._run = _RUN.view(self._memory)

    def close(self) -> None:
        """Close the descriptor, and unmap the shared memory; closing it twice does nothing.

        Raises:
            BufferError: somebody still has the data of an exit.
        """
        self._memory.release()
        self._area.close()
        super().close()

    def run(self) -> Exit:
        """Run the vCPU until it needs the VMM. Other threads run meanwhile.

        Returns:
            Why it returned. A `PortAccess` or a `MemoryAccess` is complete after the next call.

        Raises:
            KvmError: the vCPU cannot run, for example because the VM has no memory where a table of
                it should be (EFAULT).

        Source: include/uapi/linux/kvm.h, KVM_RUN. Linux 2.6.22.
        """
        self._thread = threading.get_ident()
        number = _RUN_VCPU.attempt_once(self.fileno())
        self._thread = None
        if number in (errno.EINTR, errno.EAGAIN):
            return Interrupted()
        if number:
            raise _RUN_VCPU.error(number, f"vCPU {self.number}")
        return self._exit()

    def _exit(self) -> Exit:
        run = self._run
        reason = run.integer("exit_reason")
        if reason == _IO:
            io = run.member("io")
            size, count, start = io.integer("size"), io.integer("count"), io.integer("data_offset")
            is_write = io.integer("direction") == _OUT
            data = memoryview(self._area)[start : start + size * count]
            return PortAccess(io.integer("port"), size, count, is_write, data)
        if reason == _MMIO:
            mmio = run.member("mmio")
            data = memoryview(self._area)[_MMIO_DATA : _MMIO_DATA + mmio.integer("len")]
            return MemoryAccess(mmio.integer("phys_addr"), bool(mmio.integer("is_write")), data)
        if reason == _HLT:
            return Halt()
        if reason == _SHUTDOWN:
            return Shutdown()
        if reason == _SYSTEM_EVENT:
            return SystemEvent(run.member("system_event").integer("type"))
        if reason == _FAIL_ENTRY:
            failure = run.member("fail_entry")
            return EntryFailure(failure.integer("hardware_entry_failure_reason"))
        if reason == _INTERNAL_ERROR:
            error = run.member("internal")
            data_words = error.integers("data")[: error.integer("ndata")]
            return InternalError(error.integer("suberror"), data_words)
        return OtherExit(reason, exit_name(reason))

    def kick(self) -> None:
        """Make `run` return `Interrupted`: now if it runs, else the next call, until `rearm`.

        An instruction that waits for its completion is completed first; if that needs the VMM once
        more, `run` returns that exit before. `accept_kicks` must have been called, and the thread
        that runs the vCPU must not end meanwhile.

        Source: Documentation/virt/kvm/api.rst, immediate_exit. Linux 4.12.
        """
        self._memory.store(_IMMEDIATE_EXIT, 8, 1)
        thread = self._thread
        if thread is not None and thread != threading.get_ident():
            signal.pthread_kill(thread, KICK_SIGNAL)

    def rearm(self) -> None:
        """Let `run` enter the VM again after `kick`."""
        self._memory.store(_IMMEDIATE_EXIT, 8, 0)

    def set_cpuid(self, entries: Sequence[CpuidEntry]) -> None:
        """Set what CPUID tells the VM, before the vCPU first runs.

        Source: include/uapi/linux/kvm.h, KVM_SET_CPUID2. Linux 2.6.28.
        """
        _SET_CPUID(self.fileno(), self._subject(), pack_entries(entries), nent=len(entries))

    def get_registers(self) -> Registers:
        """Return the general registers.

        Source: include/uapi/linux/kvm.h, KVM_GET_REGS. Linux 2.6.22.
        """
        reply = _GET_REGS(self.fileno(), self._subject())
        return Registers(**{name: reply.integer(name) for name in Registers.__slots__})

    def set_registers(self, registers: Registers) -> None:
        """Set the general registers.

        Source: include/uapi/linux/kvm.h, KVM_SET_REGS. Linux 2.6.22.
        """
        _SET_REGS(self.fileno(), self._subject(), **asdict(registers))

    def get_special_registers(self) -> SpecialRegisters:
        """Return the segments, descriptor tables and control registers.

        Source: include/uapi/linux/kvm.h, KVM_GET_SREGS2. Linux 5.14.
        """
        return SpecialRegisters.of(_GET_SREGS(self.fileno(), self._subject()))

    def set_special_registers(self, registers: SpecialRegisters) -> None:
        """Set the segments, descriptor tables and control registers.

        Raises:
            KvmError: the CPU cannot have such registers, or not with its CPUID (EINVAL).

        Source: include/uapi/linux/kvm.h, KVM_SET_SREGS2. Linux 5.14.
        """
        fields: dict[str, Any] = registers.as_fields()
        _SET_SREGS(self.fileno(), self._subject(), **fields)

    def start(self) -> None:
        """Let the vCPU run without waiting until the VM starts it.

        Source: include/uapi/linux/kvm.h, KVM_SET_MP_STATE, KVM_MP_STATE_RUNNABLE. Linux 2.6.26.
        """
        _SET_MP_STATE(self.fileno(), self._subject(), mp_state=_RUNNABLE)

    @property
    def tsc_khz(self) -> int:
        """The frequency of the time-stamp counter that the VM sees, in kHz.

        Setting it to 0 makes it the host's. Another one needs a CPU that can scale the counter, or
        to be the host's but for some 250 millionths.

        Source: include/uapi/linux/kvm.h, KVM_GET_TSC_KHZ, KVM_SET_TSC_KHZ. Linux 3.3.
        """
        return _GET_TSC_KHZ(self.fileno(), self._subject())

    @tsc_khz.setter
    def tsc_khz(self, frequency: int) -> None:
        _SET_TSC_KHZ(self.fileno(), self._subject(), frequency)

    @property
    def tsc_offset(self) -> int | None:
        """What is added to the host's time-stamp counter for the VM; None before Linux 5.16.

        Source: Documentation/virt/kvm/devices/vcpu.rst, KVM_VCPU_TSC_OFFSET. Linux 5.16.
        """
        if _HAS_ATTR.attempt(self.fileno(), **_TSC).errno:
            return None
        value = bytearray(8)
        _GET_ATTR(self.fileno(), self._subject(), addr=value, **_TSC)
        return int(struct.unpack("=Q", value)[0])

    @tsc_offset.setter
    def tsc_offset(self, offset: int) -> None:
        value = struct.pack("=Q", offset % (1 << 64))
        _SET_ATTR(self.fileno(), self._subject(), addr=value, **_TSC)

    def announce_pause(self) -> bool:
        """Tell the VM, through its kvmclock, that it was stopped on purpose.

        A Linux in the VM then does not take the pause for a lockup.

        Returns:
            Whether the VM uses a kvmclock.

        Source: include/uapi/linux/kvm.h, KVM_KVMCLOCK_CTRL. Linux 3.5.
        """
        try:
            _KVMCLOCK_CTRL(self.fileno(), self._subject())
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return False
        return True

    def _subject(self) -> str:
        return f"vCPU {self.number}"
