"""Faults in the next kernel of a live update: it does not come up, or takes nothing over.

Faults in the guest itself are in `pyluo.guest.faults`.
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
"""Words for a guest's command line with which its second CPU can be locked up.

See `pyluo.guest.faults.lock_up_cpu`.
"""


class Next(enum.Enum):
    """A fault of the next kernel."""

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
_HEADER = 10_000  # bytes: these contain the header and the version, and no code that could run
_PAGE = 4096


def live_update(vm: VM, fault: Next, to: Kernel | str | os.PathLike[str] | None = None) -> Timeline:
    """Live-update a guest into a kernel with a fault, past all of pyluo's guards.

    Args:
        vm: the guest.
        fault: the fault of the next kernel.
        to: the next kernel, which is given the fault; without it, the kernel that runs now.

    Returns:
        The events of the live update, if the kernel comes up, as it does without KHO or LUO.

    Raises:
        ImageRejectedError: the kernel refused the image (ENOEXEC); the guest runs on, and nothing
            is lost.
        GuestCrash: the guest died, or the next kernel never spoke.
    """
    kernel = vm.kernel if to is None else Kernel.find(to)
    if fault in _WORDS:
        return vm.live_update(kernel, append=f"{vm.append} {_WORDS[fault]}")
    # In QEMU's folder, which the keeper removes even if this process is killed.
    with tempfile.TemporaryDirectory(prefix="fault-", dir=vm.console_log.parent) as folder:
        image = Path(folder, f"{fault.name.lower()}-bzImage")
        image.write_bytes(_damage(kernel.image.read_bytes(), fault))
        return vm.live_update(image)


def words(fault: Next) -> str:
    """Return the words of a fault for the next kernel's command line; empty if the image has it."""
    return _WORDS.get(fault, "")


def _damage(image: bytes, fault: Next) -> bytes:
    middle = len(image) // 2
    match fault:
        case Next.HEADLESS:
            return image[:_HEADER]
        case Next.TRUNCATED:
            return image[:middle]
        case _:
            page = bytes(each ^ 0xFF for each in image[middle : middle + _PAGE])
            return image[:middle] + page + image[middle + _PAGE :]
