"""Saving the whole state of a VM in KVM, and restoring it, in the order that KVM needs."""

from __future__ import annotations

import errno
import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pyluo._sys import Ioctl, constant
from pyluo.errors import KvmError
from pyluo.kvm.state import VcpuState, VmState

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pyluo.kvm.vcpu import Vcpu
    from pyluo.kvm.vm import Clock, VirtualMachine

__all__ = ["Restored", "restore", "save"]


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of a state: the struct that one ioctl returns and another one takes."""

    name: str
    get: Ioctl
    set: Ioctl


def _part(name: str, kernel_name: str, kind: str, *, get: str = "") -> _Part:
    return _Part(
        name,
        Ioctl(f"KVM_GET_{get or kernel_name}", kind, KvmError, size=None),
        Ioctl(f"KVM_SET_{kernel_name}", kind, KvmError, size=None),
    )


_MP_STATE = _part("mp_state", "MP_STATE", "kvm_mp_state")
_EVENTS = _part("events", "VCPU_EVENTS", "kvm_vcpu_events")
_REGS = _part("regs", "REGS", "kvm_regs")
_SREGS = _part("sregs", "SREGS2", "kvm_sregs2")
_XSAVE = _part("xsave", "XSAVE", "kvm_xsave", get="XSAVE2")
_XCRS = _part("xcrs", "XCRS", "kvm_xcrs")
_DEBUGREGS = _part("debugregs", "DEBUGREGS", "kvm_debugregs")
_LAPIC = _part("lapic", "LAPIC", "kvm_lapic_state")
_PIT = _part("pit", "PIT2", "kvm_pit_state2")
_IRQCHIP = _part("irqchip", "IRQCHIP", "kvm_irqchip")

# Reading the MP state first lets KVM act on an INIT or a startup IPI that has arrived, which
# changes registers. Reading the events lets it deliver what an exception carries, which changes
# CR2 and DR6. The MSRs come before the local APIC: a timer that fires in between is then restored
# as armed, and fires once more; the other way round, its interrupt would be lost.
_SAVED_BEFORE_MSRS = (_MP_STATE, _EVENTS, _REGS, _SREGS, _DEBUGREGS, _XSAVE, _XCRS)
_SAVED_AFTER_MSRS = (_LAPIC,)
# EFER, CR4 and the APIC's mode decide which values the others may have. MSRs come after the local
# APIC: what they tell of its timer, and of paravirtual interrupts, needs its registers. Events and
# MP state come last, because setting registers drops pending exceptions.
_RESTORED_BEFORE_MSRS = (_SREGS, _REGS, _XSAVE, _XCRS, _DEBUGREGS, _LAPIC)
_RESTORED_AFTER_MSRS = (_EVENTS, _MP_STATE)
_CHIPS = {
    "pic master": constant("KVM_IRQCHIP_PIC_MASTER"),
    "pic slave": constant("KVM_IRQCHIP_PIC_SLAVE"),
    "ioapic": constant("KVM_IRQCHIP_IOAPIC"),
}

_GET_CPUID = Ioctl("KVM_GET_CPUID2", "kvm_cpuid2", KvmError, size=None)
_SET_CPUID = Ioctl("KVM_SET_CPUID2", "kvm_cpuid2", KvmError, size=None)
_GET_MSRS = Ioctl("KVM_GET_MSRS", "kvm_msrs", KvmError, size=None)
_SET_MSRS = Ioctl("KVM_SET_MSRS", "kvm_msrs", KvmError, size=None)
_CPUID_ROOM = 256 * 40  # the kernel's limit, of entries of 40 bytes
_MSR = struct.Struct("=IIQ")  # struct kvm_msr_entry
_EVENTS_VALID = (
    constant("KVM_VCPUEVENT_VALID_NMI_PENDING")
    | constant("KVM_VCPUEVENT_VALID_SIPI_VECTOR")
    | constant("KVM_VCPUEVENT_VALID_SHADOW")
    | constant("KVM_VCPUEVENT_VALID_SMM")
)

# Restored when the clock is: they depend on the time, or on each other.
_TSC = 0x10
_TSC_DEADLINE = 0x6E0


@dataclass(frozen=True, slots=True)
class Restored:
    """What was restored otherwise than it was.

    Attributes:
        paused: for how many nanoseconds the VM did not run, by its own kvmclock.
        tsc_khz: the frequency of the time-stamp counter, in kHz, if it is no longer what it was;
            this CPU cannot imitate another one. The kvmclock allows for that.
        dropped_msrs: the numbers of the MSRs that this kernel does not have, all of which were 0.
    """

    paused: int
    tsc_khz: int | None
    dropped_msrs: tuple[int, ...]


def save(
    vm: VirtualMachine, vcpus: Sequence[Vcpu], *, devices: dict[str, Any] | None = None
) -> VmState:
    """Return the state of a VM, without its RAM. The VM can run on afterwards.

    No vCPU may be running, and `Vcpu.run` of each must have returned `Interrupted` last: otherwise
    an instruction may be half executed. The state of virtualization in the VM is not saved; see
    `cpuid_of_vcpu`.

    Args:
        vm: the VM.
        vcpus: all its vCPUs.
        devices: the state of the devices that the VMM emulates; JSON must be able to represent it.

    Raises:
        KvmError: the kernel refused a request.

    Source: Documentation/virt/kvm/api.rst, KVM_GET_CPUID2, KVM_GET_DEBUGREGS, KVM_GET_IRQCHIP,
    KVM_GET_LAPIC, KVM_GET_MP_STATE, KVM_GET_MSRS, KVM_GET_PIT2, KVM_GET_REGS, KVM_GET_SREGS2,
    KVM_GET_VCPU_EVENTS, KVM_GET_XCRS, KVM_GET_XSAVE2. Linux 5.19.
    """
    saved = tuple(_save_vcpu(vcpu) for vcpu in vcpus)
    parts = {name: _get_chip(vm, number) for name, number in _CHIPS.items()}
    parts[_PIT.name] = _PIT.get(vm.fileno(), "PIT").data()
    clock, realtime = vm.get_clock(), time.time_ns()
    return VmState(saved, parts, clock, clock.realtime or realtime, devices=devices or {})


def restore(
    vm: VirtualMachine, vcpus: Sequence[Vcpu], state: VmState, *, count_pause: bool = True
) -> Restored:
    """Give a new VM the state of a saved one.

    The VM must have its RAM, and its vCPUs must not have run yet. If this fails, the state can be
    restored into another new VM.

    Args:
        vm: the new VM.
        vcpus: its vCPUs, as many as the state has.
        state: the state.
        count_pause: whether the VM's clocks count the time since the state was saved, by the host's
            CLOCK_REALTIME. If that went back, they count nothing.

    Raises:
        ValueError: the vCPUs are not those of the state.
        KvmError: this CPU or this kernel cannot have such a state (EINVAL).

    Source: Documentation/virt/kvm/api.rst, KVM_SET_CPUID2, KVM_SET_DEBUGREGS, KVM_SET_IRQCHIP,
    KVM_SET_LAPIC, KVM_SET_MP_STATE, KVM_SET_MSRS, KVM_SET_PIT2, KVM_SET_REGS, KVM_SET_SREGS2,
    KVM_SET_VCPU_EVENTS, KVM_SET_XCRS, KVM_SET_XSAVE;
    Documentation/virt/kvm/devices/vcpu.rst, KVM_HAS_DEVICE_ATTR, KVM_GET_DEVICE_ATTR,
    KVM_SET_DEVICE_ATTR. Linux 5.19.
    """
    numbers = [vcpu.number for vcpu in state.vcpus]
    if [vcpu.number for vcpu in vcpus] != numbers:
        raise ValueError(f"the state is of the vCPUs {numbers}")
    dropped: set[int] = set()
    scaled = False
    for vcpu, saved in zip(vcpus, state.vcpus, strict=True):
        scaled |= _set_tsc_frequency(vm, vcpu, saved)
        dropped.update(_restore_vcpu(vcpu, saved))
    # After the local APICs: an I/O APIC that has an interrupt pending delivers it at once.
    for name in _CHIPS:
        _IRQCHIP.set.put(vm.fileno(), name, state.parts[name])
    _PIT.set.put(vm.fileno(), "PIT", state.parts[_PIT.name])
    vm.set_clock(state.clock.nanoseconds, state.realtime if count_pause else None)
    now = vm.get_clock()
    _restore_tsc(vcpus, state, now, scaled=scaled)
    for vcpu, saved in zip(vcpus, state.vcpus, strict=True):
        # Not before the counter that the deadline refers to.
        deadline = [msr for msr in _unpack_msrs(saved.parts["msrs"]) if msr[0] == _TSC_DEADLINE]
        dropped.update(_set_msrs(vcpu, deadline))
        vcpu.announce_pause()
    frequency = vcpus[0].tsc_khz
    return Restored(
        paused=now.nanoseconds - state.clock.nanoseconds,
        tsc_khz=frequency if frequency != state.vcpus[0].tsc_khz else None,
        dropped_msrs=tuple(sorted(dropped)),
    )


def _save_vcpu(vcpu: Vcpu) -> VcpuState:
    parts = {}
    for part in _SAVED_BEFORE_MSRS:
        size = part.get.struct.size
        room = bytes(vcpu.xsave_size - size) if part is _XSAVE else b""
        parts[part.name] = part.get(vcpu.fileno(), f"vCPU {vcpu.number}", room).data()
    parts["msrs"] = _get_msrs(vcpu)
    for part in _SAVED_AFTER_MSRS:
        parts[part.name] = part.get(vcpu.fileno(), f"vCPU {vcpu.number}").data()
    parts["cpuid"] = _get_cpuid(vcpu)
    return VcpuState(vcpu.number, vcpu.tsc_khz, vcpu.tsc_offset, parts)


def _restore_vcpu(vcpu: Vcpu, saved: VcpuState) -> list[int]:
    """Restore a vCPU but for what depends on time; return the numbers of the dropped MSRs."""
    subject = f"vCPU {vcpu.number}"
    _SET_CPUID.put(vcpu.fileno(), subject, saved.parts["cpuid"])
    for part in _RESTORED_BEFORE_MSRS:
        part.set.put(vcpu.fileno(), subject, _fitting(vcpu, part, saved.parts[part.name]))
    msrs = _unpack_msrs(saved.parts["msrs"])
    dropped = _set_msrs(vcpu, [msr for msr in msrs if msr[0] not in (_TSC, _TSC_DEADLINE)])
    for part in _RESTORED_AFTER_MSRS:
        part.set.put(vcpu.fileno(), subject, saved.parts[part.name])
    return dropped


def _fitting(vcpu: Vcpu, part: _Part, data: bytes) -> bytes:
    """Return the bytes of a part; those of an XSAVE area as long as this kernel wants it."""
    return data.ljust(vcpu.xsave_size, b"\0") if part is _XSAVE else data


def _get_chip(vm: VirtualMachine, number: int) -> bytes:
    return _IRQCHIP.get(vm.fileno(), f"interrupt controller {number}", chip_id=number).data()


def _get_cpuid(vcpu: Vcpu) -> bytes:
    reply = _GET_CPUID(vcpu.fileno(), f"vCPU {vcpu.number}", bytes(_CPUID_ROOM), nent=256)
    return reply.data()[: _GET_CPUID.struct.size + reply.integer("nent") * 40]


def _get_msrs(vcpu: Vcpu) -> bytes:
    """Return the model-specific registers that can be read, as structs kvm_msr_entry."""
    wanted, found = list(vcpu.msr_indices), bytearray()
    while wanted:
        # The kernel stops at the first one that it cannot read, and returns how many it read.
        room = b"".join(_MSR.pack(index, 0, 0) for index in wanted)
        reply = _GET_MSRS(vcpu.fileno(), f"vCPU {vcpu.number}", room, nmsrs=len(wanted))
        start = _GET_MSRS.struct.size
        found += reply.data()[start : start + reply.result * _MSR.size]
        wanted = wanted[reply.result + 1 :]
    return bytes(found)


def _unpack_msrs(data: bytes) -> list[tuple[int, int]]:
    return [(index, value) for index, _, value in _MSR.iter_unpack(data)]


def _set_msrs(vcpu: Vcpu, msrs: Iterable[tuple[int, int]]) -> list[int]:
    """Set model-specific registers; return the numbers of those that do not exist and were 0."""
    left, dropped = list(msrs), []
    while left:
        data = b"".join(_MSR.pack(index, 0, value) for index, value in left)
        reply = _SET_MSRS(vcpu.fileno(), f"vCPU {vcpu.number}", data, nmsrs=len(left))
        if reply.result == len(left):
            break
        index, value = left[reply.result]
        if value and _read_msr(vcpu, index) != value:
            hint = f"This kernel does not set MSR {index:#x} to {value:#x}, which the VM had there"
            raise KvmError(errno.EINVAL, _SET_MSRS.name, f"vCPU {vcpu.number}", hint)
        dropped.append(index)
        left = left[reply.result + 1 :]
    return dropped


def _read_msr(vcpu: Vcpu, index: int) -> int | None:
    reply = _GET_MSRS(vcpu.fileno(), f"MSR {index:#x}", _MSR.pack(index, 0, 0), nmsrs=1)
    return _unpack_msrs(reply.data()[_GET_MSRS.struct.size :])[0][1] if reply.result else None


def _set_tsc_frequency(vm: VirtualMachine, vcpu: Vcpu, saved: VcpuState) -> bool:
    """Give the time-stamp counter its frequency, if this CPU can; return whether it was changed."""
    if vcpu.tsc_khz == saved.tsc_khz or not vm.adjusts_tsc:
        return False
    vcpu.tsc_khz = saved.tsc_khz
    return True


def _restore_tsc(vcpus: Sequence[Vcpu], state: VmState, now: Clock, *, scaled: bool) -> None:
    """Set the time-stamp counters, so that they have advanced as much as the kvmclock has.

    With the offsets, their differences stay what they were. Where KVM tells the host's counter
    together with the clock, the result is exact; see KVM_VCPU_TSC_OFFSET in
    Documentation/virt/kvm/devices/vcpu.rst.
    """
    elapsed = now.nanoseconds - state.clock.nanoseconds
    first, first_saved = vcpus[0], state.vcpus[0]
    ticks = elapsed * first_saved.tsc_khz // 1_000_000
    offsets = [saved.tsc_offset for saved in state.vcpus]
    before, after = state.clock.host_tsc, now.host_tsc
    exact = before is not None and after is not None and not scaled
    for vcpu, saved in zip(vcpus, state.vcpus, strict=True):
        if vcpu is first or None in offsets:
            msrs = dict(_unpack_msrs(saved.parts["msrs"]))
            _set_msrs(vcpu, [(_TSC, (msrs[_TSC] + ticks) % (1 << 64))])
    base = first.tsc_offset
    if base is None or first_saved.tsc_offset is None:
        return
    if exact:
        assert before is not None
        assert after is not None
        base = first_saved.tsc_offset + ticks + before - after
    for vcpu, offset in zip(vcpus, offsets, strict=True):
        assert offset is not None
        vcpu.tsc_offset = base + offset - first_saved.tsc_offset
