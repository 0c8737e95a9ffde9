"""Low power: allowing a device to sleep while it is not used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from pyluo._sys import Struct
from pyluo.vfio.features import Feature, Features
from pyluo.vfio.requests import OpenDevice, fileno

if TYPE_CHECKING:
    from pyluo.descriptor import Descriptor

__all__ = ["LowPower"]

_WITH_WAKEUP = Struct("vfio_device_low_power_entry_with_wakeup")


class SleepingDevice(OpenDevice, Protocol):
    """The attributes of a device that `LowPower` uses.

    Attributes:
        may_sleep: whether this process has allowed the device to sleep.
    """

    may_sleep: bool


class LowPower:
    """Control over whether a device may sleep; see `VfioDevice.low_power`.

    The kernel decides when the device really sleeps; without CONFIG_PM the device never sleeps.
    Each request, and each access to a region by system call, wakes the device until the call
    returns. Between `enter` and `exit`, pyluo refuses all accesses to mapped regions, because an
    access during a sleep would kill the process.

    Source: include/uapi/linux/vfio.h, VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY. Linux 6.1.
    """

    __slots__ = ("_device", "_features")

    def __init__(self, device: SleepingDevice) -> None:
        self._device = device
        self._features = Features(device)

    @property
    def entered(self) -> bool:
        """Whether this process has called `enter`, and has not called `exit` since."""
        return self._device.may_sleep

    def enter(self, *, wakeup: Descriptor | int | None = None) -> None:
        """Allow the device to sleep.

        Args:
            wakeup: an eventfd that the kernel signals when the device wakes up. After that the
                device does not sleep again, but `exit` must still be called.

        Raises:
            VfioError: the device is already allowed to sleep (EINVAL); `wakeup` is not an eventfd
                (EBADF or EINVAL).
        """
        if wakeup is None:
            self._features.set(Feature.LOW_POWER_ENTRY)
        else:
            data = _WITH_WAKEUP.pack(wakeup_eventfd=fileno(wakeup))
            self._features.set(Feature.LOW_POWER_ENTRY_WITH_WAKEUP, data)
        self._device.may_sleep = True

    def exit(self) -> None:
        """Wake the device and keep it awake; calling this twice does nothing."""
        self._features.set(Feature.LOW_POWER_EXIT)
        self._device.may_sleep = False
