"""The interrupts of a device, which signal eventfds."""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

from pyluo._sys import Ioctl, constant
from pyluo.errors import VfioError
from pyluo.vfio.requests import fileno, request, subject

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyluo._sys import Request
    from pyluo.descriptor import Descriptor
    from pyluo.vfio.info import IrqInfo
    from pyluo.vfio.requests import OpenDevice

__all__ = ["Irq"]

_SET = Ioctl(
    "VFIO_DEVICE_SET_IRQS",
    "vfio_irq_set",
    VfioError,
    {
        errno.EINVAL: (
            "Only one of INTx, MSI and MSI-X can be enabled at a time: disable the other "
            "first. Masking, triggering and disabling need an enabled kind; the vectors "
            "of a kind with `IrqFlags.NORESIZE` must be enabled together"
        ),
        errno.ENOTTY: "The driver does not support this for interrupts of this kind",
        errno.EBUSY: (
            "An eventfd is already set for this vector; or the INTx line is shared with a"
            " device that cannot share it"
        ),
        errno.ENOSPC: ("The system has no interrupt vectors left for all of them: enable fewer"),
        errno.EBADF: "The descriptor is not open, or not of an eventfd",
    },
    size="argsz",
)
_NONE = constant("VFIO_IRQ_SET_DATA_NONE")
_BOOL = constant("VFIO_IRQ_SET_DATA_BOOL")
_EVENTFD = constant("VFIO_IRQ_SET_DATA_EVENTFD")
_MASK = constant("VFIO_IRQ_SET_ACTION_MASK")
_UNMASK = constant("VFIO_IRQ_SET_ACTION_UNMASK")
_TRIGGER = constant("VFIO_IRQ_SET_ACTION_TRIGGER")


class Irq:
    """The interrupts of one type of a device, as returned by `VfioDevice.irq`.

    The kernel keeps a reference to each eventfd until another one replaces it, the interrupts are
    disabled, or the device is closed.

    Attributes:
        info: the kernel's description of the interrupts.

    Source: include/uapi/linux/vfio.h, VFIO_DEVICE_SET_IRQS. Linux 3.6.
    """

    __slots__ = ("_device", "info")

    def __init__(self, device: OpenDevice, info: IrqInfo) -> None:
        self._device = device
        self.info: IrqInfo = info

    def enable(self, eventfds: Sequence[Descriptor | int | None], *, first: int = 0) -> None:
        """Connect vectors to eventfds, and enable this type of interrupts.

        With `IrqFlags.NORESIZE`, the first call must include all vectors that will ever be needed.
        If the call fails, the given vectors are disabled, except that INTx stays unchanged.

        Args:
            eventfds: an eventfd for each vector, from the vector `first` on; None for a vector that
                signals nothing.
            first: the number of the first vector.

        Raises:
            VfioError: another type is enabled (only one of INTx, MSI and MSI-X can be), or the
                vectors were not enabled by the first call, with `IrqFlags.NORESIZE` (EINVAL); the
                system has too few vectors left, see the hint (ENOSPC); the device shares the INTx
                line with a device that cannot share it (EBUSY).
            ValueError: the device has no such vectors, or `eventfds` is empty.

        Source: include/uapi/linux/vfio.h, VFIO_DEVICE_SET_IRQS. Linux 3.6.
        """
        self._check_vectors(first, len(eventfds))
        if not eventfds:
            raise ValueError("no eventfd: `disable()` switches this kind of interrupts off")
        numbers = [fileno(eventfd) for eventfd in eventfds]
        data = struct.pack(f"={len(numbers)}i", *numbers)
        reply = self._set(_EVENTFD | _TRIGGER, first, len(numbers), data)
        if reply.result > 0:
            raise VfioError(
                errno.ENOSPC,
                _SET.name,
                self._subject(first, len(numbers)),
                f"The system has {reply.result} left: enable no more than that",
            )

    def disable(self) -> None:
        """Disable all interrupts of this type.

        Raises:
            VfioError: they are not enabled (EINVAL).
        """
        self._set(_NONE | _TRIGGER, 0, 0)

    def set_eventfd(self, vector: int, eventfd: Descriptor | int | None) -> None:
        """Connect one vector to another eventfd, or to none; other vectors stay unchanged.

        Raises:
            VfioError: see `enable`.
        """
        self.enable([eventfd], first=vector)

    def mask(self, vector: int = 0) -> None:
        """Keep a vector from signalling until it is unmasked.

        Raises:
            VfioError: the kernel can mask only INTx (ENOTTY); the interrupt is not enabled
                (EINVAL).
        """
        self._check_vectors(vector, 1)
        self._set(_NONE | _MASK, vector, 1)

    def unmask(self, vector: int = 0) -> None:
        """Let a masked vector signal again; a pending interrupt is signalled immediately.

        Raises:
            VfioError: see `mask`.
        """
        self._check_vectors(vector, 1)
        self._set(_NONE | _UNMASK, vector, 1)

    def set_unmask_eventfd(self, eventfd: Descriptor | int | None, vector: int = 0) -> None:
        """Make the kernel unmask a vector whenever an eventfd is signalled; None stops that.

        Raises:
            VfioError: see `mask`; an eventfd is set for the vector already (EBUSY).
        """
        self._check_vectors(vector, 1)
        self._set(_EVENTFD | _UNMASK, vector, 1, struct.pack("=i", fileno(eventfd)))

    def set_mask_eventfd(self, eventfd: Descriptor | int | None, vector: int = 0) -> None:
        """Make the kernel mask a vector whenever an eventfd is signalled; None stops that.

        Raises:
            VfioError: vfio-pci does not support this, up to Linux 7.3 (ENOTTY).
        """
        self._check_vectors(vector, 1)
        self._set(_EVENTFD | _MASK, vector, 1, struct.pack("=i", fileno(eventfd)))

    def trigger(self, first: int = 0, count: int = 1) -> None:
        """Signal the eventfds of vectors, as interrupts would; the device itself is not involved.

        Vectors without an eventfd are skipped.

        Raises:
            VfioError: this type of interrupts is not enabled (EINVAL).
            ValueError: the device has no such vectors, or `count` is less than 1.
        """
        self._check_vectors(first, count)
        if count < 1:
            raise ValueError(f"{count} vectors: at least one is triggered")
        self._set(_NONE | _TRIGGER, first, count)

    def trigger_each(self, wanted: Sequence[bool], *, first: int = 0) -> None:
        """Signal the eventfds of some vectors; `wanted` has a bool for each vector from `first` on.

        Raises:
            VfioError: see `trigger`.
        """
        self._check_vectors(first, len(wanted))
        if not wanted:
            raise ValueError("no vector: at least one is named")
        self._set(_BOOL | _TRIGGER, first, len(wanted), bytes(map(bool, wanted)))

    def _check_vectors(self, first: int, count: int) -> None:
        if first < 0 or count < 0 or first + count > self.info.count:
            raise ValueError(
                f"vectors {first} to {first + count - 1} of {self._subject()}, which has "
                f"{self.info.count}"
            )

    def _set(self, flags: int, first: int, count: int, data: bytes = b"") -> Request:
        return request(
            self._device,
            _SET,
            self._detail(first, count),
            data,
            flags=flags,
            index=self.info.index,
            start=first,
            count=count,
        )

    def _detail(self, first: int = 0, count: int = 0) -> str:
        vectors = f", {count} vectors from {first}" if count else ""
        return f"interrupt {self.info.index}{vectors}"

    def _subject(self, first: int = 0, count: int = 0) -> str:
        return subject(self._device, self._detail(first, count))

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.info.index} of {self._device}>"
