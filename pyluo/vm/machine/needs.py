"""The memory, time and command line that a kernel needs, by its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyluo.vm.kernels.kernel import Kernel

__all__ = ["PLAIN", "Needs", "needs"]


@dataclass(frozen=True, slots=True)
class Needs:
    """The settings of a guest, unless the user gives others.

    Attributes:
        memory: the size of the memory in bytes.
        boot_timeout: seconds that the kernel has to speak, after the boot and after each jump.
        words: words for the kernel's command line, before those of the user.
    """

    memory: int
    boot_timeout: float
    words: str = ""


PLAIN = Needs(memory=1 << 30, boot_timeout=60.0)
_SANITIZED = Needs(
    # KASAN's shadow takes an eighth of the memory, and KHO's scratch areas must hold the shadow of
    # the next kernel. There are two areas, and kho_scratch= sets a factor s: without CONFIG_NUMA,
    # the size of the first is s times what the kernel allocates in its boot, and the size of the
    # second is s times the sum of that and the first. With the default of 200 %, both together are
    # eight times what the kernel allocates: no guest of 1, 2 or 4 GiB has room for that, and KHO
    # switches itself off. With 75 % they are twice what the kernel allocates. (With 100 % in 2 GiB,
    # one cold boot in twelve found no room, depending on where KASLR had put the kernel.)
    memory=2 << 30,
    # Under TCG a boot with KASAN takes six times as long as one without.
    boot_timeout=6 * PLAIN.boot_timeout,
    # no5lvl: with five page-table levels, KASAN takes every access for an invalid one while
    # identify_cpu() has cleared the processor's features, and reports any timer interrupt then.
    words="kho_scratch=75% no5lvl",
)


def needs(kernel: Kernel) -> Needs:
    """Return what a kernel needs, as far as its configuration is known."""
    return _SANITIZED if kernel.has("CONFIG_KASAN") else PLAIN
