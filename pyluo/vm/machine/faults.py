"""Next kernels that do not come up, or take nothing over: live updates that go wrong.

What goes wrong in the guest itself is in `pyluo.guest.faults`.
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
"""For a guest's command line, so that its second processor can be locked up.

See `pyluo.guest.faults.lock_up_cpu`.
"""


class Next(enum.Enum):
    """What is wrong with the next kernel."""

    HEADLESS = "the image ends soon after its header"
    TRUNCATED = "the image ends half way"
    CORRUPT = "a page in the middle of the image is not what it was"
    EARLY_PANIC = "it has less memory than it takes to boot"
    NO_KHO = "KHO is off"
    NO_LUO = "live update is off"


_WORDS = {
    Next.EARLY_PANIC: "mem=24M",
    Next.NO_KHO: "kho=off",
    Next.NO_LUO: "liveupdate=off",
}
_HEAD = 10_000  # bytes: the header and the version are in it, and nothing that could run
_PAGE = 4096


def live_update(vm: VM, fault: Next, to: Kernel | str | os.PathLike[str] | None = None) -> Timeline:
    """Live-updates a guest into a kernel with a fault, past all guards.

    Args:
        vm: the guest.
        fault: what is wrong with the next kernel.
        to: which kernel that would be; without it, the one that runs now.

    Returns:
        What happened, if the kernel comes up: without KHO or LUO it does.

    Raises:
        ImageRejectedError: ENOEXEC; the guest runs on, and nothing is lost.
        GuestCrash: the guest died, or the next kernel never spoke.
    """
    kernel = vm.kernel if to is None else Kernel.find(to)
    if fault in _WORDS:
        return vm.live_update(kernel, append=f"{vm.append} {_WORDS[fault]}")
    # In the run's folder, which its keeper removes if nobody else does.
    with tempfile.TemporaryDirectory(prefix="fault-", dir=vm.console_log.parent) as folder:
        image = Path(folder, f"{fault.name.lower()}-bzImage")
        image.write_bytes(_spoilt(kernel.image.read_bytes(), fault))
        return vm.live_update(image)


def words(fault: Next) -> str:
    """What a fault adds to the next kernel's command line; nothing if it is the image's."""
    return _WORDS.get(fault, "")


def _spoilt(image: bytes, fault: Next) -> bytes:
    middle = len(image) // 2
    match fault:
        case Next.HEADLESS:
            return image[:_HEAD]
        case Next.TRUNCATED:
            return image[:middle]
        case _:
            page = bytes(each ^ 0xFF for each in image[middle : middle + _PAGE])
            return image[:middle] + page + image[middle + _PAGE :]
