"""`Kvm`: the device /dev/kvm."""

from __future__ import annotations

import enum
import errno
import os
from typing import Self

from pyluo._sys import Ioctl, PlainIoctl, Struct, constant
from pyluo.descriptor import OwnedFd
from pyluo.errors import KvmError, NotPermittedError
from pyluo.kvm.cpuid import CpuidEntry, unpack_entries
from pyluo.operation import Operation

__all__ = ["Capability", "Kvm"]

_NO_KVM = (
    "The kernel needs CONFIG_KVM, with the module for the vendor of the CPU; the CPU and its "
    "firmware must offer virtualization"
)
_OPEN = Operation(
    "open /dev/kvm",
    KvmError,
    {errno.EACCES: NotPermittedError, errno.ENOENT: _NO_KVM, errno.ENODEV: _NO_KVM},
)
_GET_API_VERSION = PlainIoctl("KVM_GET_API_VERSION", KvmError)
CHECK_EXTENSION = PlainIoctl("KVM_CHECK_EXTENSION", KvmError)

_MSR_LIST = Ioctl("KVM_GET_MSR_INDEX_LIST", "kvm_msr_list", KvmError, size=None)
_SUPPORTED_CPUID = Ioctl("KVM_GET_SUPPORTED_CPUID", "kvm_cpuid2", KvmError, size=None)
_CPUID_ENTRY = Struct("kvm_cpuid_entry2").size
_CPUID_LIMIT = 1 << 12  # entries; the kernel's own limit is 256


class Capability(enum.IntEnum):
    """What a kernel's KVM may be able to do.

    Source: include/uapi/linux/kvm.h, KVM_CAP_*
    """

    IRQCHIP = constant("KVM_CAP_IRQCHIP")
    SET_TSS_ADDR = constant("KVM_CAP_SET_TSS_ADDR")
    NR_VCPUS = constant("KVM_CAP_NR_VCPUS")
    MP_STATE = constant("KVM_CAP_MP_STATE")
    PIT2 = constant("KVM_CAP_PIT2")
    ADJUST_CLOCK = constant("KVM_CAP_ADJUST_CLOCK")
    VCPU_EVENTS = constant("KVM_CAP_VCPU_EVENTS")
    DEBUGREGS = constant("KVM_CAP_DEBUGREGS")
    XSAVE = constant("KVM_CAP_XSAVE")
    XCRS = constant("KVM_CAP_XCRS")
    TSC_CONTROL = constant("KVM_CAP_TSC_CONTROL")
    GET_TSC_KHZ = constant("KVM_CAP_GET_TSC_KHZ")
    MAX_VCPUS = constant("KVM_CAP_MAX_VCPUS")
    KVMCLOCK_CTRL = constant("KVM_CAP_KVMCLOCK_CTRL")
    IMMEDIATE_EXIT = constant("KVM_CAP_IMMEDIATE_EXIT")
    SREGS2 = constant("KVM_CAP_SREGS2")
    XSAVE2 = constant("KVM_CAP_XSAVE2")


class Kvm(OwnedFd):
    """The device /dev/kvm, which creates virtual machines.

    Only x86-64 is supported: everything about the state of a VM depends on the architecture.
    """

    __slots__ = ()

    @classmethod
    def open(cls, path: str = "/dev/kvm") -> Self:
        """Open the device.

        Raises:
            NotPermittedError: the caller may not open the device (EACCES).
            KvmError: there is no such device, because the kernel lacks CONFIG_KVM and the module of
                the CPU's vendor, or the CPU or the firmware does (ENOENT, ENODEV); the machine is
                no x86-64 (EOPNOTSUPP); the device speaks another version (EPROTONOSUPPORT).

        Source: include/uapi/linux/kvm.h, KVM_GET_API_VERSION. Linux 2.6.22.
        """
        if os.uname().machine != "x86_64":
            raise KvmError(errno.EOPNOTSUPP, _OPEN.name, path, "pyluo.kvm is for x86-64 only")
        with _OPEN.raising(path):
            kvm = cls(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        try:
            version = _GET_API_VERSION(kvm.fileno(), path)
            if version != constant("KVM_API_VERSION"):
                hint = f"It speaks version {version}"
                raise KvmError(errno.EPROTONOSUPPORT, "KVM_GET_API_VERSION", path, hint)
        except BaseException:
            kvm.close()
            raise
        return kvm

    def check(self, capability: Capability) -> int:
        """Return what the kernel answers for a capability; 0 if it lacks it.

        Source: include/uapi/linux/kvm.h, KVM_CHECK_EXTENSION. Linux 2.6.22.
        """
        return CHECK_EXTENSION(self.fileno(), capability.name, capability)

    def supported_cpuid(self) -> tuple[CpuidEntry, ...]:
        """Return what CPUID can tell a VM, as far as this CPU and KVM support it.

        Raises:
            KvmError: the kernel refused the request, or has more entries than it may (E2BIG).

        Source: include/uapi/linux/kvm.h, KVM_GET_SUPPORTED_CPUID. Linux 2.6.28.
        """
        room = 64
        while True:
            reply = _SUPPORTED_CPUID.attempt(self.fileno(), bytes(room * _CPUID_ENTRY), nent=room)
            if not reply.errno:
                data = reply.data()[_SUPPORTED_CPUID.struct.size :]
                return unpack_entries(data, reply.integer("nent"))
            if reply.errno != errno.E2BIG or room >= _CPUID_LIMIT:
                raise _SUPPORTED_CPUID.error(reply.errno, "/dev/kvm")
            room *= 2

    def msr_indices(self) -> tuple[int, ...]:
        """Return the numbers of the model-specific registers that are part of a vCPU's state.

        Source: include/uapi/linux/kvm.h, KVM_GET_MSR_INDEX_LIST. Linux 2.6.22.
        """
        count = _MSR_LIST.attempt(self.fileno()).integer("nmsrs")  # E2BIG, and how many there are
        reply = _MSR_LIST(self.fileno(), "/dev/kvm", bytes(4 * count), nmsrs=count)
        view = memoryview(reply.data()[_MSR_LIST.struct.size :]).cast("I")
        return tuple(view[: reply.integer("nmsrs")])
