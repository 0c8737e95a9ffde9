"""Faults in the next kernel of a live update: it does not boot, or retrieves nothing.

Faults that are injected in the running guest are in `pyluo.guest.faults`.
"""

from __future__ import annotations

import enum
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pyluo.vm.kernels.kernel import Kernel

if TYPE_CHECKING:
    import os

    from pyluo.vm.machine.timeline import Timeline
    from pyluo.vm.machine.vm import VM

__all__ = ["SPARE_PROCESSOR", "Next", "live_update", "words"]

SPARE_PROCESSOR = "isolcpus=1 irqaffinity=0"
"""Words for the command line of a guest with two CPUs, for `pyluo.guest.faults.lock_up_cpu`."""


class Next(enum.Enum):
    """A fault of the next kernel; the value describes it."""

    HEADLESS = "the image ends soon after its header"
    TRUNCATED = "the image ends half way"
    CORRUPT = "a page in the middle of the image is changed"
    EARLY_PANIC = "it has too little memory to boot"
    NO_KHO = "KHO is off"
    NO_LUO = "live update is off"


_WORDS = {
    Next.EARLY_PANIC: "mem=24M",
    Next.NO_KHO: "kho=off",
    Next.NO_LUO: "liveupdate=off",
}
# The first bytes of an image: they contain the header and the version, and no code that could run.
_HEADER_SIZE = 10_000
_PAGE = 4096


def live_update(vm: VM, fault: Next, to: Kernel | str | os.PathLike[str] | None = None) -> Timeline:
    """Live-update a guest to a kernel that has a fault; pyluo's own checks do not prevent it.

    Args:
        vm: the guest.
        fault: the fault of the next kernel.
        to: the next kernel, to a copy of which the fault is added; if None, the running kernel.

    Returns:
        The events of the live update, if the next kernel boots (as with NO_KHO and NO_LUO).

    Raises:
        ImageRejectedError: the running kernel refused the image (ENOEXEC); the guest runs on, and
            nothing is lost.
        GuestCrash: the guest died, or the next kernel never spoke.
    """
    kernel = vm.kernel if to is None else Kernel.find(to)
    if fault in _WORDS:
        return vm.live_update(kernel, append=f"{vm.append} {_WORDS[fault]}")
    # The image is in QEMU's folder, because the keeper removes that even if this process is killed.
    with tempfile.TemporaryDirectory(prefix="fault-", dir=vm.console_log.parent) as folder:
        image = Path(folder, f"{fault.name.lower()}-bzImage")
        image.write_bytes(_damage(kernel.image.read_bytes(), fault))
        return vm.live_update(image)


def words(fault: Next) -> str:
    """Return the words for the next kernel's command line that cause a fault.

    The result is empty if the fault is in the image.
    """
    return _WORDS.get(fault, "")


def _damage(image: bytes, fault: Next) -> bytes:
    middle = len(image) // 2
    match fault:
        case Next.HEADLESS:
            return image[:_HEADER_SIZE]
        case Next.TRUNCATED:
            return image[:middle]
        case _:
            page = bytes(each ^ 0xFF for each in image[middle : middle + _PAGE])
            return image[:middle] + page + image[middle + _PAGE :]
