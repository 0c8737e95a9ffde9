"""What CPUID tells a VM."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from pyluo._sys import Struct

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["CpuidEntry", "cpuid_of_vcpu", "pack_entries", "unpack_entries"]

_ENTRY = Struct("kvm_cpuid_entry2")
_NAMES = ("function", "index", "flags", "eax", "ebx", "ecx", "edx")

_TOPOLOGY = (0xB, 0x1F)
_SVM, _VMX = 1 << 2, 1 << 5  # in ECX of leaves 0x80000001 and 1


@dataclass(frozen=True, slots=True)
class CpuidEntry:
    """A leaf, or a subleaf, of CPUID.

    Attributes:
        function: the leaf, which the VM puts into EAX.
        index: the subleaf, which the VM puts into ECX.
        flags: 1 if the subleaf counts (KVM_CPUID_FLAG_SIGNIFCANT_INDEX).
        eax: the answer in EAX; likewise the others.
        ebx: see eax.
        ecx: see eax.
        edx: see eax.

    Source: arch/x86/include/uapi/asm/kvm.h, struct kvm_cpuid_entry2
    """

    function: int
    index: int
    flags: int
    eax: int
    ebx: int
    ecx: int
    edx: int


def cpuid_of_vcpu(supported: Iterable[CpuidEntry], vcpu: int, count: int) -> tuple[CpuidEntry, ...]:
    """Return what CPUID tells on one vCPU of a VM whose vCPUs are threads of one package.

    Virtualization in the VM is left out, because its state is not saved.

    Args:
        supported: what `Kvm.supported_cpuid` returns.
        vcpu: the number of the vCPU, which is the id of its local APIC.
        count: the number of vCPUs.
    """
    entries = []
    for entry in supported:
        if entry.function == 1:
            ebx = entry.ebx & 0xFFFF | count << 16 | vcpu << 24
            entry = replace(entry, ebx=ebx, ecx=entry.ecx & ~_VMX)
        elif entry.function == 0x80000001:
            entry = replace(entry, ecx=entry.ecx & ~_SVM)
        elif entry.function in _TOPOLOGY:
            entry = replace(entry, edx=vcpu)
        if entry.function != 0x8000000A:  # the features of SVM
            entries.append(entry)
    return tuple(entries)


def pack_entries(entries: Sequence[CpuidEntry]) -> bytes:
    """Return the structs of these entries, one behind the other."""
    return b"".join(bytes(_ENTRY.pack(**asdict(entry))) for entry in entries)


def unpack_entries(data: bytes, count: int) -> tuple[CpuidEntry, ...]:
    """Read `count` entries from their structs."""
    replies = [_ENTRY.unpack(data, number * _ENTRY.size) for number in range(count)]
    return tuple(CpuidEntry(**{name: reply.integer(name) for name in _NAMES}) for reply in replies)
