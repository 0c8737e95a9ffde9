"""The regions of a device: registers and memory, accessed by system calls or through a mapping."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Protocol

from pyluo._sys import Ioctl, constant
from pyluo.errors import VfioError
from pyluo.operation import Operation
from pyluo.registers import MappedRegisters, Registers
from pyluo.vfio.info import RegionFlags
from pyluo.vfio.requests import OpenDevice, fileno, request, subject

if TYPE_CHECKING:
    from pyluo._sys import Buffer
    from pyluo.descriptor import Descriptor
    from pyluo.vfio.capabilities import Area
    from pyluo.vfio.info import RegionInfo

__all__ = ["Region", "RegionMapping"]

_NO_MEMORY_ACCESS = (
    "Memory access is off in the device's command register (see `ConfigSpace.command`), the device "
    "is in D3, or it returned fewer bytes than requested"
)
_PREAD = Operation("pread", VfioError, {errno.EIO: _NO_MEMORY_ACCESS})
_PWRITE = Operation("pwrite", VfioError, {errno.EIO: _NO_MEMORY_ACCESS})
_IOEVENTFD = Ioctl(
    "VFIO_DEVICE_IOEVENTFD",
    "vfio_device_ioeventfd",
    VfioError,
    {
        errno.EEXIST: "An eventfd is set for this register and value already",
        errno.ENODEV: "No eventfd is set for this register and value",
        errno.EINVAL: "Only registers of a BAR, outside the MSI-X table, can have an eventfd",
    },
    size="argsz",
)
_IOEVENTFD_WIDTHS = {
    8: constant("VFIO_DEVICE_IOEVENTFD_8"),
    16: constant("VFIO_DEVICE_IOEVENTFD_16"),
    32: constant("VFIO_DEVICE_IOEVENTFD_32"),
    64: constant("VFIO_DEVICE_IOEVENTFD_64"),
}
_WIDTHS = tuple(_IOEVENTFD_WIDTHS)


class MappableDevice(OpenDevice, Protocol):
    """The attributes and methods of a device that its regions and mappings use."""

    @property
    def may_sleep(self) -> bool:
        """Whether the device may sleep, so that an access to a mapping may raise SIGBUS."""

    @property
    def mappings(self) -> tuple[RegionMapping, ...]:
        """The open mappings of the device's regions."""

    def add_mapping(self, mapping: RegionMapping) -> None:
        """Add a mapping to `mappings`, so that it is closed with the device."""

    def drop_mapping(self, mapping: RegionMapping) -> None:
        """Remove a mapping from `mappings`."""


class Region(Registers):
    """A region of a device, as returned by `VfioDevice.region`.

    Each register access is one system call; accesses through the result of `map` need no system
    call. A system call is safer: it wakes a device in low power, and it fails with EIO if memory
    access is off, whereas an access through a mapping would kill the process.

    Attributes:
        info: the kernel's description of the region.

    Source: drivers/vfio/pci/vfio_pci_rdwr.c. Linux 3.6.
    """

    __slots__ = ("_device", "info")

    widths = _WIDTHS

    def __init__(self, device: MappableDevice, info: RegionInfo) -> None:
        self._device = device
        self.info: RegionInfo = info

    def read(self, length: int, offset: int) -> bytes:
        """Return exactly `length` bytes from `offset`; the kernel chooses the width of accesses.

        Raises:
            ValueError: the range does not lie within the region.
            VfioError: memory access is off in the device's command register, or the device is in D3
                (EIO); the region cannot be read (EINVAL); another driver uses the BAR (EBUSY).
        """
        self._check_range(offset, length)
        chunks = []
        with _PREAD.raising(self._subject(f"{length} bytes at {offset:#x}")):
            while length:
                chunk = os.pread(self._device.fileno(), length, self.info.offset + offset)
                if not chunk:
                    raise OSError(errno.EIO, "")
                chunks.append(chunk)
                offset += len(chunk)
                length -= len(chunk)
        return b"".join(chunks)

    def write(self, data: Buffer, offset: int) -> None:
        """Write all of `data` at `offset`; the kernel chooses the width of accesses.

        Raises:
            ValueError: the range does not lie within the region.
            VfioError: see `read`; the region cannot be written to (EINVAL).
        """
        view = memoryview(data).cast("B")
        self._check_range(offset, len(view))
        with _PWRITE.raising(self._subject(f"{len(view)} bytes at {offset:#x}")):
            while view:
                written = os.pwrite(self._device.fileno(), view, self.info.offset + offset)
                if not written:
                    raise OSError(errno.EIO, "")
                view = view[written:]
                offset += written

    def map(self, area: Area | None = None) -> RegionMapping:
        """Map an area, so that its registers can be accessed without system calls.

        Closing the device closes the mapping.

        Args:
            area: one of `info.areas`; it can be omitted if there is exactly one.

        Raises:
            ValueError: `area` is not in `info.areas`; or is omitted, and there is not exactly one;
                or the area does not begin at a page boundary.
            VfioError: another driver uses the BAR (EBUSY); the kernel cannot map the area (EINVAL).
        """
        if area is None:
            if len(self.info.areas) != 1:
                raise ValueError(
                    f"{self._subject()} has {len(self.info.areas)} areas that can be mapped"
                )
            (area,) = self.info.areas
        if area not in self.info.areas:
            allowed = ", ".join(map(str, self.info.areas)) or "nothing"
            raise ValueError(f"{area} of {self._subject()} cannot be mapped, only {allowed}")
        return RegionMapping(self._device, self.info, area)

    def set_ioeventfd(
        self, offset: int, bits: int, value: int, eventfd: Descriptor | int | None
    ) -> None:
        """Make the kernel write a value to a register whenever an eventfd is signalled.

        Args:
            offset: the offset of the register.
            bits: the width of the register: 8, 16, 32 or 64.
            value: the value to write.
            eventfd: the eventfd, to which the kernel keeps a reference; None removes the eventfd
                that is set for the same register and value.

        Raises:
            ValueError: the offset, the width or the value is invalid; see `Registers`.
            VfioError: an eventfd is already set for this register and value (EEXIST); there is no
                eventfd to remove (ENODEV); the region is not a BAR, or the register is in the MSI-X
                table (EINVAL); the device would have more than 1000 such eventfds (ENOSPC).

        Source: include/uapi/linux/vfio.h, VFIO_DEVICE_IOEVENTFD. Linux 4.17.
        """
        self._check_access(offset, bits, value)
        request(
            self._device,
            _IOEVENTFD,
            f"{self._name()}, {value:#x} to {offset:#x}",
            flags=_IOEVENTFD_WIDTHS[bits],
            offset=self.info.offset + offset,
            data=value,
            fd=fileno(eventfd),
        )

    def _load(self, offset: int, bits: int) -> int:
        self._check_access(offset, bits)
        with _PREAD.raising(self._subject(f"{bits} bits at {offset:#x}")):
            data = os.pread(self._device.fileno(), bits // 8, self.info.offset + offset)
            if len(data) * 8 != bits:
                raise OSError(errno.EIO, "")
        return int.from_bytes(data, "little")

    def _store(self, offset: int, bits: int, value: int) -> None:
        self._check_access(offset, bits, value)
        data = value.to_bytes(bits // 8, "little")
        with _PWRITE.raising(self._subject(f"{bits} bits at {offset:#x}")):
            if os.pwrite(self._device.fileno(), data, self.info.offset + offset) != len(data):
                raise OSError(errno.EIO, "")

    def _check_access(self, offset: int, bits: int, value: int = 0) -> None:
        if bits not in self.widths:
            raise ValueError(f"an access of {bits} bits: {self.widths} are possible")
        if offset % (bits // 8):
            raise ValueError(f"{bits} bits at {offset:#x}: the offset is no multiple of the width")
        if value < 0 or value >> bits:
            raise ValueError(f"{value:#x} does not fit into {bits} bits")
        self._check_range(offset, bits // 8)

    def _check_range(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.info.size:
            raise ValueError(
                f"{length} bytes at {offset:#x} do not lie within {self._subject()} of "
                f"{self.info.size:#x} bytes"
            )

    def _name(self) -> str:
        return f"region {self.info.index}"

    def _subject(self, detail: str = "") -> str:
        name = subject(self._device, self._name())
        return f"{name}: {detail}" if detail else name

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.info.index} of {self._device}>"


class RegionMapping(MappedRegisters):
    """A mapped area of a region. Offsets are relative to the region, not to the area.

    An access kills the process by SIGBUS while memory access is off in the device's command
    register, or while the device is in D3 or in low power. pyluo prevents two of these cases: it
    refuses accesses while the device may sleep, and `ConfigSpace.command` refuses to turn memory
    access off while there are mappings.

    A mapping keeps the device's file open. So the device stays bound to its iommufd until its
    mappings are closed, even if the descriptor that `VfioDevice.detach` returned is closed before.

    Attributes:
        area: the area of the region that is mapped.
    """

    __slots__ = ("_device", "area")

    def __init__(self, device: MappableDevice, info: RegionInfo, area: Area) -> None:
        super().__init__(
            device.fileno(),
            info.offset + area.offset,
            area.size,
            writable=RegionFlags.WRITE in info.flags,
            subject=subject(device, f"region {info.index}: {area}"),
        )
        self._device = device
        self.area: Area = area
        device.add_mapping(self)

    def close(self) -> None:
        """Unmap the area; closing it twice does nothing."""
        super().close()
        self._device.drop_mapping(self)

    def _load(self, offset: int, bits: int) -> int:
        self._check_awake()
        return super()._load(offset - self.area.offset, bits)

    def _store(self, offset: int, bits: int, value: int) -> None:
        self._check_awake()
        super()._store(offset - self.area.offset, bits, value)

    def _check_awake(self) -> None:
        if self._device.may_sleep:
            raise VfioError(
                errno.EIO,
                "mmap",
                f"{self._device}, a mapped region",
                "The device is in low power, where this access would end the process by SIGBUS: "
                "call `VfioDevice.low_power.exit()` first",
            )

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.area}"
        return f"<{type(self).__name__} {state} of {self._device}>"
