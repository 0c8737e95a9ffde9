"""Why a vCPU returned to the VMM: one class for each exit that a VMM has to handle."""

from __future__ import annotations

from dataclasses import dataclass

from pyluo._sys import constant

__all__ = [
    "EntryFailure",
    "Exit",
    "Halt",
    "InternalError",
    "Interrupted",
    "MemoryAccess",
    "OtherExit",
    "PortAccess",
    "Shutdown",
    "SystemEvent",
    "exit_name",
]


@dataclass(frozen=True, slots=True)
class PortAccess:
    """An instruction that reads or writes an I/O port.

    The instruction is complete only after the next `Vcpu.run`.

    Attributes:
        port: the number of the port.
        size: the size of each access in bytes: 1, 2 or 4.
        count: how many accesses there are; a string instruction can make many at once.
        is_write: whether the VM writes.
        data: the bytes of all accesses, in memory that the vCPU shares: what the VM wrote, or where
            the VMM puts what the VM reads. It is valid until the next `Vcpu.run`.

    Source: include/uapi/linux/kvm.h, KVM_EXIT_IO
    """

    port: int
    size: int
    count: int
    is_write: bool
    data: memoryview


@dataclass(frozen=True, slots=True)
class MemoryAccess:
    """An access to a physical address of the VM at which there is no RAM.

    The instruction is complete only after the next `Vcpu.run`.

    Attributes:
        address: the physical address.
        is_write: whether the VM writes.
        data: the bytes, as in `PortAccess`.

    Source: include/uapi/linux/kvm.h, KVM_EXIT_MMIO
    """

    address: int
    is_write: bool
    data: memoryview


@dataclass(frozen=True, slots=True)
class Interrupted:
    """A signal, or `Vcpu.kick`; no instruction waits for its completion.

    Only after this exit can the state of the vCPU be saved.

    KVM_RUN returns EINTR then.
    """


@dataclass(frozen=True, slots=True)
class Halt:
    """The VM executed HLT; a VM with an interrupt controller in the kernel waits there instead.

    Source: include/uapi/linux/kvm.h, KVM_EXIT_HLT
    """


@dataclass(frozen=True, slots=True)
class Shutdown:
    """A triple fault, or another way to reset the CPU.

    Source: include/uapi/linux/kvm.h, KVM_EXIT_SHUTDOWN
    """


@dataclass(frozen=True, slots=True)
class SystemEvent:
    """An event of the whole VM, such as a crash that it reports through the Hyper-V interface.

    Attributes:
        type: the KVM_SYSTEM_EVENT_* number.

    Source: include/uapi/linux/kvm.h, KVM_EXIT_SYSTEM_EVENT
    """

    type: int


@dataclass(frozen=True, slots=True)
class EntryFailure:
    """The CPU refused the state of the vCPU.

    Attributes:
        reason: the reason that the hardware gave.

    Source: include/uapi/linux/kvm.h, KVM_EXIT_FAIL_ENTRY
    """

    reason: int


@dataclass(frozen=True, slots=True)
class InternalError:
    """KVM could not emulate an instruction, or deliver an event.

    Attributes:
        suberror: the KVM_INTERNAL_ERROR_* number.
        data: what KVM knows about it.

    Source: include/uapi/linux/kvm.h, KVM_EXIT_INTERNAL_ERROR
    """

    suberror: int
    data: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class OtherExit:
    """An exit that has no class here, because a VM gets it only if its VMM asks for it.

    Attributes:
        reason: the KVM_EXIT_* number.
        name: its name.
    """

    reason: int
    name: str


Exit = (
    PortAccess
    | MemoryAccess
    | Interrupted
    | Halt
    | Shutdown
    | SystemEvent
    | EntryFailure
    | InternalError
    | OtherExit
)

_OTHERS = (
    "UNKNOWN", "EXCEPTION", "HYPERCALL", "DEBUG", "IRQ_WINDOW_OPEN", "INTR", "SET_TPR",
    "TPR_ACCESS", "NMI", "WATCHDOG", "IOAPIC_EOI", "HYPERV", "X86_RDMSR", "X86_WRMSR",
    "DIRTY_RING_FULL", "AP_RESET_HOLD", "X86_BUS_LOCK", "XEN", "NOTIFY", "MEMORY_FAULT", "TDX",
)  # fmt: skip
_NAMES = {constant(f"KVM_EXIT_{name}"): f"KVM_EXIT_{name}" for name in _OTHERS}


def exit_name(reason: int) -> str:
    """Return the name of an exit reason on x86."""
    return _NAMES.get(reason, f"exit {reason}")
