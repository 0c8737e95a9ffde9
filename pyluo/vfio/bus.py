"""PCI devices: finding them, and binding them to drivers such as vfio-pci."""

from __future__ import annotations

import errno
import os
import re
import stat
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

from pyluo.errors import (
    DeviceInUseError,
    DriverNotFoundError,
    NotPermittedError,
    PciDeviceNotFoundError,
    RequestError,
    VfioError,
)
from pyluo.operation import Operation

__all__ = ["DriverBinding", "PciDevice"]

_BIND = Operation(
    "driver bind",
    VfioError,
    {
        errno.EACCES: NotPermittedError,
        errno.EPERM: NotPermittedError,
        errno.ENODEV: (
            "The driver does not support the device, or another driver has taken the device"
        ),
        errno.EBUSY: "Another driver has the device, or its virtual functions are in use",
    },
)
_WRITES = {
    "driver_override": Operation(
        "driver_override",
        VfioError,
        {errno.EACCES: NotPermittedError, errno.EPERM: NotPermittedError},
    ),
    "driver/unbind": Operation(
        "driver unbind",
        VfioError,
        {errno.EACCES: NotPermittedError, errno.EPERM: NotPermittedError},
    ),
}
_BUS = "/sys/bus/pci"
_NODES = "/dev/vfio/devices"
_ADDRESS = re.compile(
    r"(?:(?P<domain>[0-9a-f]{1,8}):)?(?P<bus>[0-9a-f]{1,2}):(?P<slot>[01]?[0-9a-f])\.(?P<fn>[0-7])",
    re.IGNORECASE,
)
_NODE_TIMEOUT = 10.0
_POLL = 0.01
_UNSET = "(null)"  # the contents of driver_override in sysfs if none is set

_NO_CDEV_HINT = (
    "The kernel gives the device no node in /dev/vfio/devices: the kernel needs "
    "CONFIG_VFIO_DEVICE_CDEV (Linux 6.6 or newer), and the device an IOMMU"
)


@dataclass(frozen=True, slots=True)
class DriverBinding:
    """A device's driver and driver_override, for `PciDevice.restore_driver`.

    Attributes:
        driver: the name of the driver; None if the device has no driver.
        override: the only driver that may have the device; None if any suitable driver may.
    """

    driver: str | None
    override: str | None


@dataclass(frozen=True, slots=True, order=True)
class PciDevice:
    """A PCI device, identified by its address. Properties are read from sysfs at each access.

    Attributes:
        address: the domain, bus, slot and function, such as ``0000:00:04.0``.

    Source: Documentation/ABI/testing/sysfs-bus-pci
    """

    address: str

    @classmethod
    def at(cls, address: str) -> Self:
        """Return the device at an address.

        Args:
            address: an address with or without the domain, such as ``0000:00:04.0`` or ``00:04.0``.

        Raises:
            ValueError: the text is not the address of a PCI device.
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
        """Return all devices of a vendor, or of one model, in the order of their addresses.

        Args:
            vendor_id: the number of the vendor, such as 0x1234.
            device_id: the vendor's number of the model, such as 0x11e8; by default any model.
        """
        found = []
        for device in cls.all():
            with suppress(PciDeviceNotFoundError):  # the device was unplugged in the meantime
                wanted = device_id in (None, device.device_id)
                if device.vendor_id == vendor_id and wanted:
                    found.append(device)
        return tuple(found)

    @classmethod
    def all(cls) -> tuple[Self, ...]:
        """Return all PCI devices, in the order of their addresses."""
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
        """The only driver that the device may be bound to; None if any suitable driver may."""
        name = self._read("driver_override")
        return None if name in ("", _UNSET) else name

    @property
    def iommu_group(self) -> int | None:
        """The number of the device's IOMMU group; None if the device is not behind an IOMMU."""
        group = self._link("iommu_group")
        return None if group is None else int(group)

    @property
    def group_devices(self) -> tuple[PciDevice, ...]:
        """The devices of the same IOMMU group, including this one.

        All devices of a group can have only one owner at a time.
        """
        try:
            names = os.listdir(f"{self.path}/iommu_group/devices")
        except FileNotFoundError:
            return ()
        return tuple(PciDevice(name) for name in sorted(names))

    @property
    def vfio_name(self) -> str | None:
        """VFIO's name of the device, such as ``vfio0``; None if no VFIO driver has the device."""
        try:
            return next(iter(os.listdir(f"{self.path}/vfio-dev")), None)
        except FileNotFoundError:
            return None

    @property
    def node(self) -> str:
        """The path of the device's character device.

        Raises:
            VfioError: the device is not bound to a VFIO driver (ENODEV).
        """
        if (name := self.vfio_name) is None:
            driver = self.driver
            raise VfioError(
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
        """Bind the device to a driver, after unbinding it from its present driver.

        If binding fails, the previous driver is restored. For a VFIO driver, the method returns
        when the character device exists. Unbinding takes the device away from the host: if it is a
        disk, the disk disappears even if file systems on it are mounted.

        Args:
            driver: the name of the driver.
            timeout: the number of seconds to wait for the character device.

        Returns:
            The previous driver, for `restore_driver`.

        Raises:
            DriverNotFoundError: the kernel has no driver of this name (ENOENT).
            DeviceInUseError: the device is bound to a VFIO driver, and open in a process (EBUSY).
            NotPermittedError: the caller may not do this (EACCES or EPERM).
            VfioError: the driver refuses the device (EINVAL), as vfio-pci does if the device is a
                bridge or not behind an IOMMU; the kernel creates no character device: see the hint
                (ENODEV).
            TimeoutError: the character device did not appear in time.
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
        """Bind the device to its previous driver again, or to no driver if it had none.

        Raises:
            DeviceInUseError: the device is bound to a VFIO driver, and open in a process (EBUSY).
            NotPermittedError: the caller may not do this (EACCES or EPERM).
            VfioError: the driver refuses the device, or no longer exists.
        """
        if self.driver != previous.driver:
            self.unbind_driver()
        self._write("driver_override", f"{previous.override or ''}\n")
        if previous.driver is not None and self.driver is None:
            self._bind(previous.driver)

    def unbind_driver(self) -> None:
        """Unbind the device from its driver, if it has one.

        While a process has a VFIO device open, the kernel would wait until the device is closed,
        without a timeout and without reacting to signals. So this method refuses such a device. It
        cannot detect a process that opens the device at the same moment; the kernel notifies that
        process through `PciIrq.REQUEST`.

        Raises:
            DeviceInUseError: the device is open in a process (EBUSY).
            NotPermittedError: the caller may not do this (EACCES or EPERM).
        """
        if self.driver is None:
            return
        self._check_not_open()
        self._write("driver/unbind", self.address)

    def _check_not_open(self) -> None:
        if (name := self.vfio_name) is None:
            return
        try:
            number = os.stat(f"{_NODES}/{name}").st_rdev
        except FileNotFoundError:
            return
        if users := ", ".join(find_users(number)):
            raise DeviceInUseError(
                errno.EBUSY, "driver unbind", str(self), f"It is open in {users}: close it there"
            )

    def _bind(self, driver: str) -> None:
        """Write the device's address to the driver's `bind` file, which returns the driver's error.

        Probing by the bus would hide that error.
        """
        try:
            with (
                _BIND.raising(f"{driver} to {self}"),
                open(f"{_BUS}/drivers/{driver}/bind", "w") as file,
            ):
                file.write(self.address)
        except RequestError as error:
            if error.errno != errno.EINVAL or self.iommu_group is not None:
                raise
            raise VfioError(
                errno.EINVAL,
                error.operation,
                error.subject,
                "The device is not behind an IOMMU: the machine needs one, and the kernel must "
                "use it, for example by intel_iommu=on on its command line",
            ) from None

    def _wait_for_node(self, timeout: float) -> None:
        """Wait until the character device exists; udev may still be creating it."""
        if not os.path.exists(f"{self.path}/vfio-dev/{self.vfio_name}/dev"):
            raise VfioError(errno.ENODEV, "driver bind", str(self), _NO_CDEV_HINT)
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
            _WRITES[attribute].raising(str(self)),
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


def find_users(device: int, *, besides: int = -1) -> list[str]:
    """Return the name and PID of each process that has a character device open.

    Processes that the caller may not inspect are left out.

    Args:
        device: the number of the device, as in st_rdev.
        besides: a descriptor of this process that does not count.
    """
    found = set()
    left_out = f"/proc/{os.getpid()}/fd/{besides}"
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError):
            paths = (f"/proc/{pid}/fd/{fd}" for fd in os.listdir(f"/proc/{pid}/fd"))
            if any(_is_device(path, device) for path in paths if path != left_out):
                with open(f"/proc/{pid}/comm", errors="replace") as file:
                    found.add(f"{file.read().strip()!r} (PID {pid})")
    return sorted(found)


def _is_device(path: str, device: int) -> bool:
    try:
        found = os.stat(path)
    except OSError:
        return False
    return stat.S_ISCHR(found.st_mode) and found.st_rdev == device
