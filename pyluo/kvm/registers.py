"""The registers that a VMM sets before a vCPU runs its first instruction."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from pyluo._sys import Reply

__all__ = ["DescriptorTable", "Registers", "Segment", "SpecialRegisters"]


@dataclass(frozen=True, slots=True)
class Registers:
    """The general registers of a vCPU.

    Source: arch/x86/include/uapi/asm/kvm.h, struct kvm_regs
    """

    rax: int = 0
    rbx: int = 0
    rcx: int = 0
    rdx: int = 0
    rsi: int = 0
    rdi: int = 0
    rsp: int = 0
    rbp: int = 0
    r8: int = 0
    r9: int = 0
    r10: int = 0
    r11: int = 0
    r12: int = 0
    r13: int = 0
    r14: int = 0
    r15: int = 0
    rip: int = 0
    rflags: int = 2
    """Bit 1 is always set."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A segment register, with the descriptor that was loaded into it.

    Attributes:
        base: the linear address at which the segment begins.
        limit: the offset of the segment's last byte.
        selector: the selector.
        type: the type field of the descriptor.
        present: 1 if the segment is present.
        dpl: the privilege level of the descriptor.
        db: the default operand size: 1 for 32 bits.
        s: 1 for a code or data segment, 0 for a system segment.
        l: 1 for 64-bit code.
        g: 1 if the limit counts pages.
        avl: the bit that is free for software.
        unusable: 1 if the register holds no segment.

    Source: arch/x86/include/uapi/asm/kvm.h, struct kvm_segment
    """

    base: int = 0
    limit: int = 0
    selector: int = 0
    type: int = 0
    present: int = 0
    dpl: int = 0
    db: int = 0
    s: int = 0
    l: int = 0  # noqa: E741  # as in the kernel and in the CPU's manual
    g: int = 0
    avl: int = 0
    unusable: int = 0


@dataclass(frozen=True, slots=True)
class DescriptorTable:
    """The address and the limit of a descriptor table, in bytes.

    Source: arch/x86/include/uapi/asm/kvm.h, struct kvm_dtable
    """

    base: int = 0
    limit: int = 0


@dataclass(frozen=True, slots=True)
class SpecialRegisters:
    """The segments, descriptor tables and control registers of a vCPU.

    Start from what `Vcpu.get_special_registers` returns, and change it with `dataclasses.replace`.

    Source: arch/x86/include/uapi/asm/kvm.h, struct kvm_sregs2
    """

    cs: Segment
    ds: Segment
    es: Segment
    fs: Segment
    gs: Segment
    ss: Segment
    tr: Segment
    ldt: Segment
    gdt: DescriptorTable
    idt: DescriptorTable
    cr0: int
    cr2: int
    cr3: int
    cr4: int
    cr8: int
    efer: int
    apic_base: int
    flags: int
    pdptrs: tuple[int, ...]

    @classmethod
    def of(cls, reply: Reply) -> Self:
        """Return the registers in a struct kvm_sregs2."""
        values: dict[str, object] = {"pdptrs": reply.integers("pdptrs")}
        for field in fields(cls):
            if field.type in ("Segment", "DescriptorTable"):
                kind = Segment if field.type == "Segment" else DescriptorTable
                part = reply.member(field.name)
                values[field.name] = kind(
                    **{each.name: part.integer(each.name) for each in fields(kind)}
                )
            elif field.name != "pdptrs":
                values[field.name] = reply.integer(field.name)
        return cls(**values)  # type: ignore[arg-type]

    def as_fields(self) -> dict[str, object]:
        """Return the value of each member of struct kvm_sregs2."""
        return asdict(self)
