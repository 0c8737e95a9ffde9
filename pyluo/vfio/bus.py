"""Devices on the PCI bus: which there are, who drives them, and how VFIO comes to."""

from __future__ import annotations

import errno
import os
import re
import stat
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from pyluo._sys import raising
from pyluo.errors import (
    DeviceInUseError,
    DriverNotFoundError,
    LuoError,
    PciDeviceNotFoundError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["DriverBinding", "PciDevice"]

_BUS = "/sys/bus/pci"
_NODES = "/dev/vfio/devices"
_ADDRESS = re.compile(
    r"(?:(?P<domain>[0-9a-f]{1,8}):)?(?P<bus>[0-9a-f]{1,2}):(?P<slot>[01]?[0-9a-f])\.(?P<fn>[0-7])",
    re.IGNORECASE,
)
_NODE_TIMEOUT = 10.0
_POLL = 0.01
_UNSET = "(null)"  # how sysfs shows a driver_override that is not there

_NO_CDEV = (
    "The kernel gives the device no node in /dev/vfio/devices: it needs "
    "CONFIG_VFIO_DEVICE_CDEV (Linux 6.6 or newer), and the device an IOMMU"
)


@dataclass(frozen=True, slots=True)
class DriverBinding:
    """Who drove a device, for `PciDevice.restore_driver`.

    Attributes:
        driver: its name; None for no driver.
        override: the only driver that was allowed; None for any that knows the device.
    """

    driver: str | None
    override: str | None


@dataclass(frozen=True, slots=True, order=True)
class PciDevice:
    """A PCI device, by its place on the bus. What it is and who drives it is asked anew each time.

    Attributes:
        address: domain, bus, slot and function, such as ``0000:00:04.0``.

    Source: Documentation/ABI/testing/sysfs-bus-pci
    """

    address: str

    @classmethod
    def at(cls, address: str) -> Self:
        """The device at an address.

        Args:
            address: with or without the domain, such as ``0000:00:04.0`` or ``00:04.0``.

        Raises:
            ValueError: it is no address.
            PciDeviceNotFoundError: ENOENT, there is no device.
        """
        match = _ADDRESS.fullmatch(address)
        if not match:
            raise ValueError(f"{address!r} is no address of a PCI device, such as 0000:00:04.0")
        domain, bus, slot = (int(match[part] or "0", 16) for part in ("domain", "bus", "slot"))
        device = cls(f"{domain:04x}:{bus:02x}:{slot:02x}.{match['fn']}")
        if not os.path.isdir(device.path):
            raise PciDeviceNotFoundError(errno.ENOENT, "open", device.path)
        return device

    @classmethod
    def find(cls, vendor_id: int, device_id: int | None = None) -> tuple[Self, ...]:
        """All devices of a vendor, or of one kind, in the order of their addresses.

        Args:
            vendor_id: such as 0x1234.
            device_id: such as 0x11e8; without it, any.
        """
        found = []
        for device in cls.all():
            with suppress(PciDeviceNotFoundError):  # it may be unplugged meanwhile
                wanted = device_id in (None, device.device_id)
                if device.vendor_id == vendor_id and wanted:
                    found.append(device)
        return tuple(found)

    @classmethod
    def all(cls) -> tuple[Self, ...]:
        """All devices, in the order of their addresses; none on a system without PCI."""
        try:
            return tuple(cls(name) for name in sorted(os.listdir(f"{_BUS}/devices")))
        except FileNotFoundError:
            return ()

    @property
    def path(self) -> str:
        """Its folder in sysfs."""
        return f"{_BUS}/devices/{self.address}"

    @property
    def vendor_id(self) -> int:
        """Who made it."""
        return int(self._read("vendor"), 16)

    @property
    def device_id(self) -> int:
        """What it is, of that vendor's devices."""
        return int(self._read("device"), 16)

    @property
    def class_code(self) -> int:
        """Base class, subclass and programming interface, 8 bits each."""
        return int(self._read("class"), 16)

    @property
    def driver(self) -> str | None:
        """The name of the driver that has it; None for no driver."""
        return self._link("driver")

    @property
    def driver_override(self) -> str | None:
        """The only driver that may have it; None for any that knows it."""
        name = self._read("driver_override")
        return None if name in ("", _UNSET) else name

    @property
    def iommu_group(self) -> int | None:
        """The group of devices that the IOMMU cannot tell apart; None without an IOMMU."""
        group = self._link("iommu_group")
        return None if group is None else int(group)

    @property
    def group_devices(self) -> tuple[PciDevice, ...]:
        """The devices of its IOMMU group, this one among them: all have one owner at a time."""
        try:
            names = os.listdir(f"{self.path}/iommu_group/devices")
        except FileNotFoundError:
            return ()
        return tuple(PciDevice(name) for name in sorted(names))

    @property
    def vfio_name(self) -> str | None:
        """What VFIO calls it, such as ``vfio0``; None while no VFIO driver has it."""
        try:
            return next(iter(os.listdir(f"{self.path}/vfio-dev")), None)
        except FileNotFoundError:
            return None

    @property
    def node(self) -> str:
        """The path of its character device.

        Raises:
            LuoError: ENODEV, no VFIO driver has it.
        """
        if (name := self.vfio_name) is None:
            had = self.driver
            raise LuoError(
                errno.ENODEV,
                "vfio open",
                str(self),
                f"{f'The driver {had}' if had else 'No driver'} has it, and no VFIO driver: "
                "`bind_driver()` gives it to vfio-pci",
            )
        return f"{_NODES}/{name}"

    def bind_driver(
        self, driver: str = "vfio-pci", *, timeout: float = _NODE_TIMEOUT
    ) -> DriverBinding:
        """Gives the device to a driver, and takes it from the one that has it.

        If that fails, it is as before. If the driver is one of VFIO's, its character device is
        there when this returns. Nothing of the device is kept by the driver it is taken from: a
        disk disappears, with what is mounted from it.

        Args:
            driver: its name.
            timeout: seconds that the character device may take to appear.

        Returns:
            Who had it, for `restore_driver`.

        Raises:
            DriverNotFoundError: ENOENT, the kernel has no driver of this name.
            DeviceInUseError: EBUSY, a VFIO driver has it and somebody has it open.
            LuoPermissionError: EACCES or EPERM.
            LuoError: EINVAL, the driver refuses it: vfio-pci does so to a device without IOMMU, and
                to bridges; ENODEV, no character device: see the hint.
            TimeoutError: the character device did not appear.
        """
        previous = DriverBinding(self.driver, self.driver_override)
        if not os.path.isdir(f"{_BUS}/drivers/{driver}"):
            raise DriverNotFoundError(errno.ENOENT, "driver bind", f"{driver} to {self}")
        if previous.driver != driver:
            self.unbind_driver()
        try:
            if previous.driver != driver:
                self._write("driver_override", driver)
                self._bind(driver)
            if self.vfio_name is not None:
                self._await_node(timeout)
        except BaseException:
            self.restore_driver(previous)
            raise
        return previous

    def restore_driver(self, previous: DriverBinding) -> None:
        """Gives the device back to who had it, if only to nobody.

        Raises:
            DeviceInUseError: EBUSY, a VFIO driver has it and somebody has it open.
            LuoPermissionError: EACCES or EPERM.
            LuoError: the driver refuses it, or is gone.
        """
        if self.driver != previous.driver:
            self.unbind_driver()
        self._write("driver_override", f"{previous.override or ''}\n")
        if previous.driver is not None and self.driver is None:
            self._bind(previous.driver)

    def unbind_driver(self) -> None:
        """Takes the device from its driver, if it has one.

        The kernel waits without end for whoever has a VFIO device open, and cannot be interrupted;
        so this is refused while somebody has. (Who opens it at the same moment is not seen. He is
        told by `PciIrq.REQUEST`.)

        Raises:
            DeviceInUseError: EBUSY, somebody has it open.
            LuoPermissionError: EACCES or EPERM.
        """
        if self.driver is None:
            return
        self._refuse_open()
        self._write("driver/unbind", self.address)

    def _refuse_open(self) -> None:
        if (name := self.vfio_name) is None:
            return
        users = ", ".join(sorted(set(_users(f"{_NODES}/{name}"))))
        if users:
            raise DeviceInUseError(
                errno.EBUSY, "driver unbind", str(self), f"It is open in {users}: close it there"
            )

    def _bind(self, driver: str) -> None:
        """Binds by name: unlike a probe, this answers with what the driver said."""
        try:
            with (
                raising("driver bind", f"{driver} to {self}"),
                open(f"{_BUS}/drivers/{driver}/bind", "w") as file,
            ):
                file.write(self.address)
        except LuoError as error:
            if error.errno != errno.EINVAL or self.iommu_group is not None:
                raise
            raise LuoError(
                errno.EINVAL,
                error.operation,
                error.subject,
                "No IOMMU stands before the device: the kernel needs one, switched on, such as by "
                "intel_iommu=on on its command line",
            ) from None

    def _await_node(self, timeout: float) -> None:
        """Waits for the character device, which udev may still be making or giving its mode."""
        if not os.path.exists(f"{self.path}/vfio-dev/{self.vfio_name}/dev"):
            raise LuoError(errno.ENODEV, "driver bind", str(self), _NO_CDEV)
        deadline = time.monotonic() + timeout
        while not os.path.exists(self.node):
            if time.monotonic() >= deadline:
                raise TimeoutError(f"{self.node}, of {self}, did not appear in {timeout} s")
            time.sleep(_POLL)

    def _read(self, attribute: str) -> str:
        try:
            with open(f"{self.path}/{attribute}") as file:
                return file.read().strip()
        except FileNotFoundError:
            raise PciDeviceNotFoundError(errno.ENOENT, "open", f"{self.path}/{attribute}") from None

    def _write(self, attribute: str, value: str) -> None:
        with (
            raising(attribute.replace("/", " "), str(self)),
            open(f"{self.path}/{attribute}", "w") as file,
        ):
            file.write(value)

    def _link(self, attribute: str) -> str | None:
        try:
            return os.path.basename(os.readlink(f"{self.path}/{attribute}"))
        except FileNotFoundError:
            if not os.path.isdir(self.path):
                raise PciDeviceNotFoundError(errno.ENOENT, "open", self.path) from None
            return None

    def __str__(self) -> str:
        return f"PCI device {self.address}"


def _users(node: str) -> Iterator[str]:
    """The processes that have a character device open, as far as the caller may look."""
    with suppress(FileNotFoundError):
        device = os.stat(node).st_rdev
        for pid in filter(str.isdecimal, os.listdir("/proc")):
            with suppress(OSError):
                if any(_is(f"/proc/{pid}/fd/{fd}", device) for fd in os.listdir(f"/proc/{pid}/fd")):
                    with open(f"/proc/{pid}/comm", errors="replace") as file:
                        yield f"{file.read().strip()!r} (PID {pid})"


def _is(path: str, device: int) -> bool:
    try:
        found = os.stat(path)
    except OSError:
        return False
    return stat.S_ISCHR(found.st_mode) and found.st_rdev == device
