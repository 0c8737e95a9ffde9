"""Carry a memfd over a live update of a guest, and compare its content before and after."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyluo.guest import demo
from pyluo.vm import progress
from pyluo.vm.machine.vm import VM

if TYPE_CHECKING:
    from pyluo.vm.machine.timeline import Timeline

__all__ = ["RoundTrip", "run_round_trip"]


@dataclass(frozen=True, slots=True)
class RoundTrip:
    """The result of a live update with one preserved memfd.

    Attributes:
        before: the release of the kernel that preserved the memfd.
        after: the release of the kernel from which the memfd was retrieved.
        size: the size of the memfd in bytes.
        preserved: the SHA-256 of the memfd before the jump.
        retrieved: the SHA-256 of the memfd after the jump.
        survivors: the names of files that still exist but were not preserved; must be empty.
        timeline: the events of the live update.
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
        """Whether the memfd is unchanged, and no file survived that was not preserved."""
        return self.preserved == self.retrieved and not self.survivors


def run_round_trip(kernel: str, to: str | None, *, size: int, corrupt: bool) -> RoundTrip:
    """Boot a guest, preserve a memfd of random bytes, live-update, and retrieve the memfd.

    Args:
        kernel: the kernel to boot.
        to: the kernel to jump to; None for `kernel`.
        size: the size of the memfd in bytes.
        corrupt: whether to change a byte of the memfd after the jump, to see the check fail.

    Raises:
        GuestFailure: the guest died, or its kernel complained.
        HarnessError: the guest could not be started.
    """
    with progress.status("booting") as show, VM(kernel, to=to) as vm:
        before = vm.life.release
        show("preserving")
        held = vm.hold(demo.preserve, size)
        preserved = vm.call(demo.digest, held)
        show("live-updating")
        vm.live_update()
        show("retrieving")
        retrieved, survivors = vm.call(demo.retrieve, corrupt)
        return RoundTrip(
            before=before,
            after=vm.life.release,
            size=size,
            preserved=preserved,
            retrieved=retrieved,
            survivors=tuple(survivors),
            timeline=vm.timeline,
        )
