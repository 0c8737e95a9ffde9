"""`VirtualMachine`: a VM, with interrupt controllers and a timer in the kernel."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from pyluo._sys import Ioctl, PlainIoctl, constant
from pyluo.descriptor import OwnedFd, fileno_of
from pyluo.errors import KvmError
from pyluo.kvm.system import CHECK_EXTENSION, Capability
from pyluo.kvm.vcpu import Vcpu

if TYPE_CHECKING:
    from pyluo.descriptor import Descriptor
    from pyluo.guest_ram import RamMapping
    from pyluo.kvm.system import Kvm
    from pyluo.registers import MappedRegisters

__all__ = ["Clock", "VirtualMachine"]

_CREATE_VM = PlainIoctl("KVM_CREATE_VM", KvmError)
_GET_VCPU_MMAP_SIZE = PlainIoctl("KVM_GET_VCPU_MMAP_SIZE", KvmError)
_SET_TSS_ADDR = PlainIoctl("KVM_SET_TSS_ADDR", KvmError)
_CREATE_IRQCHIP = PlainIoctl("KVM_CREATE_IRQCHIP", KvmError)
_SET_TSC_KHZ = PlainIoctl("KVM_SET_TSC_KHZ", KvmError)
_CREATE_VCPU = PlainIoctl(
    "KVM_CREATE_VCPU",
    KvmError,
    {errno.EINVAL: "`Kvm.check(Capability.MAX_VCPUS)` is how many can be"},
)

_SET_REGION = Ioctl(
    "KVM_SET_USER_MEMORY_REGION",
    "kvm_userspace_memory_region",
    KvmError,
    {errno.EEXIST: "Another slot has memory at these addresses"},
    size=None,
)
_CREATE_PIT = Ioctl("KVM_CREATE_PIT2", "kvm_pit_config", KvmError, size=None)
_IRQ_LINE = Ioctl("KVM_IRQ_LINE", "kvm_irq_level", KvmError, size=None)
_IRQFD = Ioctl(
    "KVM_IRQFD",
    "kvm_irqfd",
    KvmError,
    {errno.EBUSY: "The eventfd raises a line already"},
    size=None,
)
_GET_CLOCK = Ioctl("KVM_GET_CLOCK", "kvm_clock_data", KvmError, size=None)
_SET_CLOCK = Ioctl("KVM_SET_CLOCK", "kvm_clock_data", KvmError, size=None)
_READONLY = constant("KVM_MEM_READONLY")
_REALTIME = constant("KVM_CLOCK_REALTIME")
_HOST_TSC = constant("KVM_CLOCK_HOST_TSC")

# KVM answers for XSAVE2 only on a VM. A VM can do without another frequency of its TSC.
_NEEDED = sorted(set(Capability) - {Capability.XSAVE2, Capability.TSC_CONTROL})
_TSS = 0xFFFBD000  # three pages below the firmware of a PC, where no RAM may be


@dataclass(frozen=True, slots=True)
class Clock:
    """The kvmclock of a VM at one moment.

    Attributes:
        nanoseconds: what the clock shows.
        realtime: the host's CLOCK_REALTIME at this moment, in nanoseconds since 1970; None if KVM
            does not tell, because the clock of the host is not its time-stamp counter.
        host_tsc: the host's time-stamp counter at this moment; None as `realtime`.

    Source: include/uapi/linux/kvm.h, struct kvm_clock_data
    """

    nanoseconds: int
    realtime: int | None
    host_tsc: int | None


class VirtualMachine(OwnedFd):
    """A VM, with local APICs, an I/O APIC, two PICs and a PIT in the kernel.

    The VM lives as long as this descriptor, one of a vCPU, or a mapping of one is open.

    Attributes:
        msr_indices: the numbers of the model-specific registers that are part of a vCPU's state.
        run_size: the size of the memory that a vCPU shares, in bytes.
        adjusts_tsc: whether the CPU can give a VM a TSC of another frequency than its own.
    """

    __slots__ = ("_slots", "adjusts_tsc", "msr_indices", "run_size")

    def __init__(
        self, fd: int, msr_indices: tuple[int, ...], run_size: int, *, adjusts_tsc: bool
    ) -> None:
        super().__init__(fd)
        self._slots: dict[int, RamMapping | MappedRegisters] = {}
        self.msr_indices: tuple[int, ...] = msr_indices
        self.run_size: int = run_size
        self.adjusts_tsc: bool = adjusts_tsc

    @classmethod
    def create(cls, kvm: Kvm) -> Self:
        """Create a VM with interrupt controllers and a timer, without RAM or vCPUs.

        Raises:
            KvmError: the kernel lacks something that saving the state of a VM needs (EOPNOTSUPP),
                or memory (ENOMEM).

        Source: include/uapi/linux/kvm.h, KVM_CREATE_VM, KVM_CREATE_IRQCHIP, KVM_CREATE_PIT2,
        KVM_GET_VCPU_MMAP_SIZE, KVM_SET_TSS_ADDR, KVM_SET_TSC_KHZ. Linux 5.19.
        """
        if lacking := [each.name for each in _NEEDED if not kvm.check(each)]:
            hint = f"This kernel, or this CPU, lacks {', '.join(lacking)}"
            raise KvmError(errno.EOPNOTSUPP, "KVM_CREATE_VM", "/dev/kvm", hint)
        vm = cls(
            _CREATE_VM(kvm.fileno(), "/dev/kvm"),
            kvm.msr_indices(),
            _GET_VCPU_MMAP_SIZE(kvm.fileno(), "/dev/kvm"),
            adjusts_tsc=bool(kvm.check(Capability.TSC_CONTROL)),
        )
        try:
            _SET_TSS_ADDR(vm.fileno(), "a VM", _TSS)
            _CREATE_IRQCHIP(vm.fileno(), "a VM")
            _CREATE_PIT(vm.fileno(), "a VM")
            # 0 means the present frequency of the host. KVM's default can be an earlier estimate of
            # it, with which the clocks of the vCPUs would be wrong: see kernel-bugs.md.
            _SET_TSC_KHZ(vm.fileno(), "a VM")
        except BaseException:
            vm.close()
            raise
        return vm

    def check(self, capability: Capability) -> int:
        """Return what the kernel answers for a capability of this VM; 0 if it lacks it.

        Source: include/uapi/linux/kvm.h, KVM_CHECK_EXTENSION. Linux 3.17.
        """
        return CHECK_EXTENSION(self.fileno(), capability.name, capability)

    def set_memory(
        self,
        slot: int,
        ram: RamMapping | MappedRegisters,
        address: int,
        *,
        offset: int = 0,
        length: int | None = None,
        readonly: bool = False,
    ) -> None:
        """Show a part of a mapped RAM to the VM, or registers of a device.

        The VM keeps the mapping alive.

        Args:
            slot: a number for this piece of memory, from 0.
            ram: the mapping; see `GuestRam.map`, and for a device `Region.map` in `pyluo.vfio`.
            address: the physical address in the VM, a multiple of the page size.
            offset: where in the mapping the piece begins, in bytes; a multiple of the page size.
            length: the length in bytes; by default the piece reaches to the end of the mapping.
            readonly: whether writes of the VM are exits instead.

        Raises:
            ValueError: the piece does not lie within the mapping.
            KvmError: another slot has memory there (EEXIST), or something is not a multiple of the
                page size (EINVAL).

        Source: include/uapi/linux/kvm.h, KVM_SET_USER_MEMORY_REGION. Linux 2.6.25.
        """
        length = len(ram) - offset if length is None else length
        if offset < 0 or length <= 0 or offset + length > len(ram):
            raise ValueError(f"{length} bytes at {offset} do not lie within {len(ram)} bytes")
        _SET_REGION(
            self.fileno(),
            f"slot {slot}: {length} bytes at {address:#x}",
            slot=slot,
            flags=_READONLY if readonly else 0,
            guest_phys_addr=address,
            memory_size=length,
            userspace_addr=ram.address + offset,
        )
        self._slots[slot] = ram

    def create_vcpu(self, number: int) -> Vcpu:
        """Create a vCPU in the state after a reset.

        The first one runs at once, the others wait for the VM to start them.

        Args:
            number: the id of its local APIC.

        Raises:
            KvmError: there is such a vCPU (EEXIST), or there are too many (EINVAL).

        Source: include/uapi/linux/kvm.h, KVM_CREATE_VCPU. Linux 2.6.22.
        """
        fd = _CREATE_VCPU(self.fileno(), f"vCPU {number}", number)
        return Vcpu(fd, number, self.run_size, self.msr_indices, self.check(Capability.XSAVE2))

    def set_irq_line(self, line: int, *, level: bool) -> None:
        """Set the level of an interrupt line of the interrupt controllers.

        A line that is edge-triggered needs both: first True, then False. It can be called while the
        vCPUs run.

        Args:
            line: the number of a pin: 0 to 15 of the PICs and the I/O APIC, to 23 of the latter.
            level: the level.

        Source: include/uapi/linux/kvm.h, KVM_IRQ_LINE. Linux 2.6.25.
        """
        _IRQ_LINE(self.fileno(), f"line {line}", irq=line, level=int(level))

    def connect_irq(self, event: Descriptor | int, line: int) -> None:
        """Let an eventfd raise an interrupt line, with an edge for each time it is signalled.

        The kernel does so by itself, for example for interrupts of a device that VFIO signals. When
        the last descriptor of the eventfd is closed, that ends, whoever still signals it.

        Args:
            event: the eventfd.
            line: as for `set_irq_line`.

        Raises:
            KvmError: the eventfd raises a line of this VM already (EBUSY), or is none (EINVAL).

        Source: include/uapi/linux/kvm.h, KVM_IRQFD. Linux 2.6.32.
        """
        number = fileno_of(event)
        _IRQFD(self.fileno(), f"descriptor {number}, line {line}", fd=number, gsi=line)

    def disconnect_irq(self, event: Descriptor | int, line: int) -> None:
        """Undo `connect_irq`; what was signalled before has reached the interrupt controller then.

        Raises:
            KvmError: see `connect_irq`.

        Source: include/uapi/linux/kvm.h, KVM_IRQFD, KVM_IRQFD_FLAG_DEASSIGN. Linux 2.6.32.
        """
        number = fileno_of(event)
        _IRQFD(
            self.fileno(),
            f"descriptor {number}, line {line}",
            fd=number,
            gsi=line,
            flags=constant("KVM_IRQFD_FLAG_DEASSIGN"),
        )

    def get_clock(self) -> Clock:
        """Read the kvmclock.

        Source: include/uapi/linux/kvm.h, KVM_GET_CLOCK. Linux 2.6.33; `realtime` and `host_tsc`
        Linux 5.16.
        """
        reply = _GET_CLOCK(self.fileno(), "kvmclock")
        flags = reply.integer("flags")
        return Clock(
            nanoseconds=reply.integer("clock"),
            realtime=reply.integer("realtime") if flags & _REALTIME else None,
            host_tsc=reply.integer("host_tsc") if flags & _HOST_TSC else None,
        )

    def set_clock(self, nanoseconds: int, realtime: int | None = None) -> None:
        """Set the kvmclock.

        Args:
            nanoseconds: what it is to show, in nanoseconds.
            realtime: when it showed that, in nanoseconds since 1970; the time that has passed since
                then, by CLOCK_REALTIME of this kernel, is added. None if it shows that now.

        Source: include/uapi/linux/kvm.h, KVM_SET_CLOCK. Linux 2.6.33; `realtime` Linux 5.16.
        """
        flags = 0 if realtime is None else _REALTIME
        _SET_CLOCK(
            self.fileno(), "kvmclock", clock=nanoseconds, realtime=realtime or 0, flags=flags
        )
