"""The memory, the time and the command line that a kernel needs because of its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyluo.vm.kernels.kernel import Kernel

__all__ = ["PLAIN", "Needs", "needs"]


@dataclass(frozen=True, slots=True)
class Needs:
    """Default settings of a guest.

    Attributes:
        memory: the size of the memory in bytes.
        boot_timeout: seconds after a boot or a jump within which the guest must have spoken.
        words: words for the kernel's command line, before those of the user.
    """

    memory: int
    boot_timeout: float
    words: str = ""


PLAIN = Needs(memory=1 << 30, boot_timeout=60.0)
_SANITIZED = Needs(
    # KASAN's shadow takes an eighth of the memory, and KHO's scratch areas must hold the shadow of
    # the next kernel. There are two scratch areas, and kho_scratch= sets a factor s. Without
    # CONFIG_NUMA, and if the kernel allocates A bytes while it boots, the first area has s * A
    # bytes and the second s * (A + s * A). With the default of 200 % both have 8 * A bytes: no
    # guest of 1, 2 or 4 GiB has room for that, and KHO switches itself off. With 75 % they have
    # about 2 * A bytes. With 100 % in 2 GiB, one cold boot in twelve found no room, depending on
    # where KASLR had put the kernel.
    memory=2 << 30,
    # Under TCG a boot with KASAN takes six times as long as one without.
    boot_timeout=6 * PLAIN.boot_timeout,
    # no5lvl: with five page-table levels, KASAN takes every access for an invalid one for as long
    # as identify_cpu() has the processor's features cleared, and so it reports any timer interrupt
    # at that time.
    words="kho_scratch=75% no5lvl",
)


def needs(kernel: Kernel) -> Needs:
    """Return what a kernel needs; a kernel whose configuration is not known gets the defaults."""
    return _SANITIZED if kernel.has("CONFIG_KASAN") else PLAIN
