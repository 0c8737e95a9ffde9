"""What a kernel needs of its guest, by what it was built with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyluo.vm.kernels.kernel import Kernel

__all__ = ["PLAIN", "Needs", "needs"]


@dataclass(frozen=True, slots=True)
class Needs:
    """What is given to a guest that was not told otherwise.

    Attributes:
        memory: in bytes.
        boot_timeout: seconds that the kernel has to speak, after the boot and after each jump.
        words: for its command line, before those of the user.
    """

    memory: int
    boot_timeout: float
    words: str = ""


PLAIN = Needs(memory=1 << 30, boot_timeout=60.0)
_SANITIZED = Needs(
    # KASAN's shadow is an eighth of the memory, and the scratch areas are to hold that of the next
    # kernel. There are two: without CONFIG_NUMA the first is s times what the kernel takes in its
    # boot, the second s times that and the first. With the default, 200 %, both are eight times
    # what it takes: for that there is no room in 1, 2 or 4 GiB, and KHO switches itself off. With
    # 75 % they are twice what it takes. (With 100 %, in 2 GiB, one cold boot in twelve found no
    # room, by where KASLR had put the kernel.)
    memory=2 << 30,
    # Under TCG the boot takes six times as long as that of a kernel without KASAN.
    boot_timeout=6 * PLAIN.boot_timeout,
    # no5lvl: with five levels KASAN takes each access for a wild one while identify_cpu() has the
    # processor's features cleared, and a timer's interrupt in that moment is a report.
    words="kho_scratch=75% no5lvl",
)


def needs(kernel: Kernel) -> Needs:
    """What this kernel needs, as far as its configuration is known."""
    return _SANITIZED if kernel.has("CONFIG_KASAN") else PLAIN
