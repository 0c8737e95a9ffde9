"""`pyluo demo`: a live update of a real kernel, told moment by moment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyluo.guest import survival
from pyluo.vm.machine.vm import VM

if TYPE_CHECKING:
    from pyluo.vm.machine.timeline import Timeline

__all__ = ["Report", "run"]


@dataclass(frozen=True, slots=True)
class Report:
    """What the demonstration saw.

    Attributes:
        before: the release of the kernel that preserved the memfd.
        after: the release of the one that gave it back.
        size: of the memfd, in bytes.
        preserved: its SHA-256 before the jump.
        retrieved: its SHA-256 after it.
        survivors: what was not preserved, and is there all the same; there should be nothing.
        timeline: the live update.
    """

    before: str
    after: str
    size: int
    preserved: str
    retrieved: str
    survivors: tuple[str, ...]
    timeline: Timeline

    @property
    def passed(self) -> bool:
        """Whether what should survive did, and nothing else."""
        return self.preserved == self.retrieved and not self.survivors


def run(kernel: str, to: str | None, *, size: int, corrupt: bool) -> Report:
    """Boots a guest, preserves a memfd of random bytes, live-updates, and looks.

    Args:
        kernel: to boot.
        to: to jump into; None for the same one.
        size: of the memfd, in bytes.
        corrupt: flip one byte before the comparison, to see the comparison fail.

    Raises:
        GuestCrash: the guest died.
        HarnessError: it could not be started.
    """
    with VM(kernel, to=to) as vm:
        before = vm.life.release
        held = vm.hold(survival.preserve, size)
        preserved = vm.call(survival.digest, held)
        vm.live_update()
        retrieved, survivors = vm.call(survival.retrieve, corrupt)
        return Report(
            before=before,
            after=vm.life.release,
            size=size,
            preserved=preserved,
            retrieved=retrieved,
            survivors=tuple(survivors),
            timeline=vm.timeline,
        )
