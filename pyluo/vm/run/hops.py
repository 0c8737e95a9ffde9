"""Many live updates in a row, and what became of each."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

from pyluo import kho
from pyluo.vm import progress
from pyluo.vm.errors import GuestCrash, HarnessError

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyluo.vm.machine.vm import VM

__all__ = ["Tally", "run"]


@dataclass(slots=True)
class Tally:
    """What became of a number of live updates.

    Attributes:
        asked: how many were asked for.
        hops: how many were tried; fewer if a guest did not even boot.
        blackouts: seconds from reboot() to the next kernel's first word, of those that landed.
        crashes: the guest's death, of those that did not.
    """

    asked: int
    hops: int = 0
    blackouts: list[float] = field(default_factory=list)
    crashes: list[GuestCrash] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether all that were asked for came back."""
        return self.landed == self.asked

    @property
    def landed(self) -> int:
        """How many came back."""
        return len(self.blackouts)

    @property
    def median(self) -> float | None:
        """The median blackout in seconds; None if none came back."""
        return median(self.blackouts) if self.blackouts else None


def run(boot: Callable[[], VM], hops: int) -> Tally:
    """Live-updates a guest again and again.

    A guest that dies is replaced by a fresh one, and counted: a rate of failure needs the rest of
    the tries.

    Args:
        boot: makes a guest, which knows where it jumps.
        hops: how many live updates.

    Raises:
        HarnessError: a guest could not be started, or its kernel has nothing to hand over with.
    """
    tally = Tally(hops)
    with progress.bar("live updates", hops) as reached:
        while tally.hops < hops:
            try:
                with boot() as vm:
                    _until_death(vm, hops, tally, reached)
            except GuestCrash as crash:
                # A guest that does not even boot has nothing to say on the rate of jumps.
                tally.crashes.append(crash)
                progress.say(f"a guest did not boot. {crash}")
                break
    return tally


def _until_death(vm: VM, hops: int, tally: Tally, reached: progress.Reached) -> None:
    while tally.hops < hops:
        tally.hops += 1
        try:
            _see_that_it_can(vm)
            timeline = vm.live_update()
            vm.check()
            tally.blackouts.append(timeline.blackout)
        except GuestCrash as crash:
            tally.crashes.append(crash)
            progress.say(f"live update {tally.hops} did not come back. {crash}")
            vm.close()  # without a last look, which would be taken for a boot that failed
            return
        finally:
            reached(tally.hops)


def _see_that_it_can(vm: VM) -> None:
    """A jump from a kernel whose live update is off succeeds, and is none."""
    if not (status := vm.call(kho.status)).live_update:
        raise HarnessError(
            f"the kernel {vm.kernel.name} cannot live-update here: "
            + "; ".join(each.missing for each in status.obstacles),
            "; ".join(each.remedy for each in status.obstacles),
        )
