"""Carry a memfd through one live update of a real kernel, and compare."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyluo.guest import demo
from pyluo.vm.machine.vm import VM

if TYPE_CHECKING:
    from pyluo.vm.machine.timeline import Timeline

__all__ = ["RoundTrip", "run_round_trip"]


@dataclass(frozen=True, slots=True)
class RoundTrip:
    """The result of a live update with one preserved memfd.

    Attributes:
        before: the release of the kernel that preserved the memfd.
        after: the release of the kernel that gave it back.
        size: the size of the memfd in bytes.
        preserved: the memfd's SHA-256 before the jump.
        retrieved: its SHA-256 after the jump.
        survivors: what was not preserved and is there all the same; should be empty.
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
        """Whether the memfd survived unchanged, and nothing else did."""
        return self.preserved == self.retrieved and not self.survivors


def run_round_trip(kernel: str, to: str | None, *, size: int, corrupt: bool) -> RoundTrip:
    """Boot a guest, preserve a memfd of random bytes, live-update, and compare.

    Args:
        kernel: the kernel to boot.
        to: the kernel to jump to; None for the same one.
        size: the size of the memfd in bytes.
        corrupt: flip one byte before the comparison, to see the comparison fail.

    Raises:
        GuestFailure: the guest died, or its kernel complained.
        HarnessError: the guest could not be started.
    """
    with VM(kernel, to=to) as vm:
        before = vm.life.release
        held = vm.hold(demo.preserve, size)
        preserved = vm.call(demo.digest, held)
        vm.live_update()
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
