"""Low power: letting a device sleep while it is not used."""

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
    """The parts of a device that `LowPower` needs.

    Attributes:
        may_sleep: whether this process let the device sleep.
    """

    may_sleep: bool


class LowPower:
    """The device's permission to sleep; see `VfioDevice.low_power`.

    The kernel decides whether the device really sleeps; without CONFIG_PM it never does. Requests
    and accesses by system call wake it for as long as they take. Mapped regions cannot be accessed
    until `exit`, whether the device sleeps or not: pyluo refuses the access.

    Source: include/uapi/linux/vfio.h, VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY. Linux 6.1.
    """

    __slots__ = ("_device", "_features")

    def __init__(self, device: SleepingDevice) -> None:
        self._device = device
        self._features = Features(device)

    @property
    def entered(self) -> bool:
        """Whether this process called `enter`, and not `exit` since."""
        return self._device.may_sleep

    def enter(self, *, wakeup: Descriptor | int | None = None) -> None:
        """Let the device sleep.

        Args:
            wakeup: an eventfd that is signalled when the device wakes from a sleep. It does not
                sleep again after that, but `exit` must still be called.

        Raises:
            LuoError: the device may sleep already (EINVAL); `wakeup` is not an eventfd (EBADF or
                EINVAL).
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
