"""Low power: letting a device sleep while nobody uses it."""

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
    """What `LowPower` needs to know of a device.

    Attributes:
        may_sleep: whether this process let the device sleep.
    """

    may_sleep: bool


class LowPower:
    """Whether a device may sleep, as `VfioDevice.low_power`.

    Whether it does is the kernel's to say; without CONFIG_PM it never does. Requests and accesses
    through a system call wake it for as long as they take. Mapped regions cannot be accessed until
    `exit`, asleep or not: pyluo refuses it.

    Source: include/uapi/linux/vfio.h, VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY. Linux 6.1.
    """

    __slots__ = ("_device", "_features")

    def __init__(self, device: SleepingDevice) -> None:
        self._device = device
        self._features = Features(device)

    @property
    def entered(self) -> bool:
        """Whether this process let the device sleep, and has not called `exit` since."""
        return self._device.may_sleep

    def enter(self, *, wakeup: Descriptor | int | None = None) -> None:
        """Lets the device sleep.

        Args:
            wakeup: an eventfd that is signalled when it wakes from a sleep, after which it does not
                sleep again: `exit` is still to be called.

        Raises:
            LuoError: EINVAL, it may sleep already; EBADF or EINVAL, no eventfd.
        """
        if wakeup is None:
            self._features.set(Feature.LOW_POWER_ENTRY)
        else:
            data = _WITH_WAKEUP.pack(wakeup_eventfd=fileno(wakeup))
            self._features.set(Feature.LOW_POWER_ENTRY_WITH_WAKEUP, data)
        self._device.may_sleep = True

    def exit(self) -> None:
        """Wakes the device, and keeps it awake; a second time does nothing."""
        self._features.set(Feature.LOW_POWER_EXIT)
        self._device.may_sleep = False
