"""KVM on x86-64: virtual machines whose whole state can be saved, and restored elsewhere.

This is what a VMM needs to carry its VMs over a live update, and no more: RAM from a `GuestRam`,
vCPUs, the interrupt controllers and the timer in the kernel, and the state of all of them.
"""

from __future__ import annotations

from pyluo.kvm.cpuid import CpuidEntry, cpuid_of_vcpu
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
)
from pyluo.kvm.registers import DescriptorTable, Registers, Segment, SpecialRegisters
from pyluo.kvm.saving import Restored, restore, save
from pyluo.kvm.state import VcpuState, VmState
from pyluo.kvm.system import Capability, Kvm
from pyluo.kvm.vcpu import KICK_SIGNAL, Vcpu, accept_kicks
from pyluo.kvm.vm import Clock, VirtualMachine

__all__ = [
    "KICK_SIGNAL",
    "Capability",
    "Clock",
    "CpuidEntry",
    "DescriptorTable",
    "EntryFailure",
    "Exit",
    "Halt",
    "InternalError",
    "Interrupted",
    "Kvm",
    "MemoryAccess",
    "OtherExit",
    "PortAccess",
    "Registers",
    "Restored",
    "Segment",
    "Shutdown",
    "SpecialRegisters",
    "SystemEvent",
    "Vcpu",
    "VcpuState",
    "VirtualMachine",
    "VmState",
    "accept_kicks",
    "cpuid_of_vcpu",
    "restore",
    "save",
]
