"""`KvmVfio`: what tells a VM of KVM which VFIO devices it has."""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING, Self

from pyluo._sys import Ioctl, constant
from pyluo.descriptor import OwnedFd, fileno_of
from pyluo.errors import RequestError, VfioError
from pyluo.operation import Operation

if TYPE_CHECKING:
    from pyluo.descriptor import Descriptor
    from pyluo.vfio.requests import OpenDevice

__all__ = ["KvmVfio"]

_CREATE_DEVICE = Ioctl(
    "KVM_CREATE_DEVICE",
    "kvm_create_device",
    RequestError,
    {
        errno.EBUSY: "The VM has a VFIO pseudo device already",
        errno.ENODEV: "The kernel needs CONFIG_KVM_VFIO",
    },
    size=None,
)
_FILE_ADD = Operation(
    "KVM_DEV_VFIO_FILE_ADD",
    VfioError,
    {
        errno.EEXIST: "The VM has the device already",
        errno.EINVAL: "This is not a VFIO device, or the kernel too old",
    },
)
_FILE_DEL = Operation(
    "KVM_DEV_VFIO_FILE_DEL",
    VfioError,
    {
        errno.ENOENT: "The VM does not have the device",
    },
)
_SET_DEVICE_ATTR = Ioctl("KVM_SET_DEVICE_ATTR", "kvm_device_attr", VfioError, size=None)
_VFIO = constant("KVM_DEV_TYPE_VFIO")
_FILE = constant("KVM_DEV_VFIO_FILE")


class KvmVfio(OwnedFd):
    """The VFIO pseudo device of a VM, of which a VM has at most one.

    KVM has to know the devices of a VM if their DMA may be incoherent with the caches of the CPUs:
    then it lets the guest choose memory types, and flush caches. Some VFIO drivers refuse to open a
    device that no VM is known for. So add a device before `VfioDevice.bind`.

    The VM knows the devices until this object is closed.

    Source: Documentation/virt/kvm/devices/vfio.rst. Linux 3.10.
    """

    __slots__ = ()

    @classmethod
    def create(cls, vm: Descriptor | int) -> Self:
        """Create the pseudo device of a VM.

        Args:
            vm: the descriptor of the VM, from KVM_CREATE_VM.

        Raises:
            VfioError: the VM has one already (EBUSY); the kernel lacks CONFIG_KVM_VFIO (ENODEV);
                the descriptor is not of a VM (ENOTTY).

        Source: include/uapi/linux/kvm.h, KVM_CREATE_DEVICE. Linux 3.10.
        """
        reply = _CREATE_DEVICE(fileno_of(vm), f"descriptor {fileno_of(vm)}", type=_VFIO)
        return cls(reply.integer("fd"))

    def add(self, device: OpenDevice) -> None:
        """Tell the VM that it has a device.

        Args:
            device: the device, a `VfioDevice`. The VM keeps it open until `remove`, or until this
                object is closed.

        Raises:
            VfioError: the VM has the device already (EEXIST); the descriptor is not of a VFIO
                device (EINVAL).

        Source: include/uapi/linux/kvm.h, KVM_SET_DEVICE_ATTR, KVM_DEV_VFIO_FILE_ADD. Linux 6.6.
        """
        self._change(_FILE_ADD, device)

    def remove(self, device: OpenDevice) -> None:
        """Tell the VM that it no longer has a device.

        Raises:
            VfioError: the VM does not have the device (ENOENT).

        Source: include/uapi/linux/kvm.h, KVM_SET_DEVICE_ATTR, KVM_DEV_VFIO_FILE_DEL. Linux 6.6.
        """
        self._change(_FILE_DEL, device)

    def _change(self, operation: Operation, device: OpenDevice) -> None:
        reply = _SET_DEVICE_ATTR.attempt(
            self.fileno(),
            group=_FILE,
            attr=constant(operation.name),
            addr=struct.pack("=i", device.fileno()),
        )
        if reply.errno:
            raise operation.error(reply.errno, str(device))
