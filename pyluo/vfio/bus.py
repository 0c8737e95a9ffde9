"""Devices on the PCI bus: finding them, and binding them to drivers such as VFIO's."""

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
_UNSET = "(null)"  # what sysfs shows if no driver_override is set

_NO_CDEV_HINT = (
    "The kernel gives the device no node in /dev/vfio/devices: the kernel needs "
    "CONFIG_VFIO_DEVICE_CDEV (Linux 6.6 or newer), and the device an IOMMU"
)


@dataclass(frozen=True, slots=True)
class DriverBinding:
    """A device's driver and driver_override, for `PciDevice.restore_driver`.

    Attributes:
        driver: the name of the driver; None for no driver.
        override: the only driver that is allowed; None for any that knows the device.
    """

    driver: str | None
    override: str | None


@dataclass(frozen=True, slots=True, order=True)
class PciDevice:
    """A PCI device, identified by its address. Every property is read from sysfs anew.

    Attributes:
        address: domain, bus, slot and function, such as ``0000:00:04.0``.

    Source: Documentation/ABI/testing/sysfs-bus-pci
    """

    address: str

    @classmethod
    def at(cls, address: str) -> Self:
        """Return the device at an address.

        Args:
            address: with or without the domain, such as ``0000:00:04.0`` or ``00:04.0``.

        Raises:
            ValueError: this is not an address.
            PciDeviceNotFoundError: there is no device at the address (ENOENT).
        """
        match = _ADDRESS.fullmatch(address)
        if not match:
            raise ValueError(f"{address!r} is not the address of a PCI device, like 0000:00:04.0")
        domain, bus, slot = (int(match[part] or "0", 16) for part in ("domain", "bus", "slot"))
        device = cls(f"{domain:04x}:{bus:02x}:{slot:02x}.{match['fn']}")
        if not os.path.isdir(device.path):
            raise PciDeviceNotFoundError(errno.ENOENT, "open", device.path)
        return device

    @classmethod
    def find(cls, vendor_id: int, device_id: int | None = None) -> tuple[Self, ...]:
        """Return all devices of a vendor, or all of one model, in the order of their addresses.

        Args:
            vendor_id: such as 0x1234.
            device_id: such as 0x11e8; by default any.
        """
        found = []
        for device in cls.all():
            with suppress(PciDeviceNotFoundError):  # the device may be unplugged meanwhile
                wanted = device_id in (None, device.device_id)
                if device.vendor_id == vendor_id and wanted:
                    found.append(device)
        return tuple(found)

    @classmethod
    def all(cls) -> tuple[Self, ...]:
        """Return all devices, in the order of their addresses; none on a system without PCI."""
        try:
            return tuple(cls(name) for name in sorted(os.listdir(f"{_BUS}/devices")))
        except FileNotFoundError:
            return ()

    @property
    def path(self) -> str:
        """The device's folder in sysfs."""
        return f"{_BUS}/devices/{self.address}"

    @property
    def vendor_id(self) -> int:
        """The number of the vendor."""
        return int(self._read("vendor"), 16)

    @property
    def device_id(self) -> int:
        """The vendor's number for this model."""
        return int(self._read("device"), 16)

    @property
    def class_code(self) -> int:
        """The base class, subclass and programming interface, 8 bits each."""
        return int(self._read("class"), 16)

    @property
    def driver(self) -> str | None:
        """The name of the device's driver; None if it has none."""
        return self._link("driver")

    @property
    def driver_override(self) -> str | None:
        """The only driver that the device may be bound to; None for any that knows it."""
        name = self._read("driver_override")
        return None if name in ("", _UNSET) else name

    @property
    def iommu_group(self) -> int | None:
        """The number of the device's IOMMU group; None without an IOMMU."""
        group = self._link("iommu_group")
        return None if group is None else int(group)

    @property
    def group_devices(self) -> tuple[PciDevice, ...]:
        """The devices of the same IOMMU group, including this one: all have one owner at a time."""
        try:
            names = os.listdir(f"{self.path}/iommu_group/devices")
        except FileNotFoundError:
            return ()
        return tuple(PciDevice(name) for name in sorted(names))

    @property
    def vfio_name(self) -> str | None:
        """VFIO's name for the device, such as ``vfio0``; None unless a VFIO driver has it."""
        try:
            return next(iter(os.listdir(f"{self.path}/vfio-dev")), None)
        except FileNotFoundError:
            return None

    @property
    def node(self) -> str:
        """The path of the device's character device.

        Raises:
            LuoError: the device is not bound to a VFIO driver (ENODEV).
        """
        if (name := self.vfio_name) is None:
            driver = self.driver
            raise LuoError(
                errno.ENODEV,
                "vfio open",
                str(self),
                f"It is bound to {f'the driver {driver}' if driver else 'no driver'}, not to one "
                "of VFIO's: `bind_driver()` binds it to vfio-pci",
            )
        return f"{_NODES}/{name}"

    def bind_driver(
        self, driver: str = "vfio-pci", *, timeout: float = _NODE_TIMEOUT
    ) -> DriverBinding:
        """Bind the device to a driver, after unbinding it from the one that it has.

        If this fails, the previous driver is restored. If the driver is one of VFIO's, the
        character device exists when this returns. The previous driver keeps nothing of the device:
        a disk disappears, with all file systems mounted from it.

        Args:
            driver: the name of the driver.
            timeout: how many seconds the character device may take to appear.

        Returns:
            The previous driver, for `restore_driver`.

        Raises:
            DriverNotFoundError: the kernel has no driver of this name (ENOENT).
            DeviceInUseError: the device is bound to a VFIO driver, and open in a process (EBUSY).
            LuoPermissionError: the caller may not do this (EACCES or EPERM).
            LuoError: the driver refuses the device (EINVAL), as vfio-pci does with a device without
                IOMMU and with a bridge; there is no character device: see the hint (ENODEV).
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
                self._wait_for_node(timeout)
        except BaseException:
            self.restore_driver(previous)
            raise
        return previous

    def restore_driver(self, previous: DriverBinding) -> None:
        """Give the device back to its previous driver, or leave it without one.

        Raises:
            DeviceInUseError: the device is bound to a VFIO driver, and open in a process (EBUSY).
            LuoPermissionError: the caller may not do this (EACCES or EPERM).
            LuoError: the driver refuses the device, or is gone.
        """
        if self.driver != previous.driver:
            self.unbind_driver()
        self._write("driver_override", f"{previous.override or ''}\n")
        if previous.driver is not None and self.driver is None:
            self._bind(previous.driver)

    def unbind_driver(self) -> None:
        """Unbind the device from its driver, if it has one.

        If a process has a VFIO device open, the kernel waits until it is closed, without a limit
        and without reacting to signals; so this call refuses then. (A process that opens the device
        at the same moment is not seen. It is notified by `PciIrq.REQUEST`.)

        Raises:
            DeviceInUseError: the device is open in a process (EBUSY).
            LuoPermissionError: the caller may not do this (EACCES or EPERM).
        """
        if self.driver is None:
            return
        self._check_not_open()
        self._write("driver/unbind", self.address)

    def _check_not_open(self) -> None:
        if (name := self.vfio_name) is None:
            return
        users = ", ".join(sorted(set(_find_users(f"{_NODES}/{name}"))))
        if users:
            raise DeviceInUseError(
                errno.EBUSY, "driver unbind", str(self), f"It is open in {users}: close it there"
            )

    def _bind(self, driver: str) -> None:
        """Bind by the driver's name: unlike a probe, this returns the driver's error."""
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
                "The device is not behind an IOMMU: the machine needs one, and the kernel must "
                "use it, for example by intel_iommu=on on its command line",
            ) from None

    def _wait_for_node(self, timeout: float) -> None:
        """Wait for the character device, which udev may still be creating or setting up."""
        if not os.path.exists(f"{self.path}/vfio-dev/{self.vfio_name}/dev"):
            raise LuoError(errno.ENODEV, "driver bind", str(self), _NO_CDEV_HINT)
        deadline = time.monotonic() + timeout
        while not os.path.exists(self.node):
            if time.monotonic() >= deadline:
                raise TimeoutError(f"{self.node} of {self} did not appear within {timeout} s")
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


def _find_users(node: str) -> Iterator[str]:
    """Yield the processes that have a character device open, as far as the caller may see."""
    with suppress(FileNotFoundError):
        device = os.stat(node).st_rdev
        for pid in filter(str.isdecimal, os.listdir("/proc")):
            with suppress(OSError):
                if any(
                    _is_device(f"/proc/{pid}/fd/{fd}", device)
                    for fd in os.listdir(f"/proc/{pid}/fd")
                ):
                    with open(f"/proc/{pid}/comm", errors="replace") as file:
                        yield f"{file.read().strip()!r} (PID {pid})"


def _is_device(path: str, device: int) -> bool:
    try:
        found = os.stat(path)
    except OSError:
        return False
    return stat.S_ISCHR(found.st_mode) and found.st_rdev == device
