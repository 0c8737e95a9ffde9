"""Make many live updates in a row, and count how many of them succeed."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

from pyluo import kho
from pyluo.vm import progress
from pyluo.vm.errors import GuestFailure, HarnessError

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyluo.vm.machine.timeline import Jump
    from pyluo.vm.machine.vm import VM

__all__ = ["Tally", "run_hops"]


@dataclass(slots=True)
class Tally:
    """The results of many live updates.

    Attributes:
        asked: how many live updates the caller asked for.
        hops: how many live updates were tried; fewer than `asked` if a guest did not boot.
        blackouts: the blackout of each live update that succeeded, in seconds.
        failures: the failure of each other live update, of a guest that did not boot, and what a
            kernel complained of after the last live update.
        jumps: the live updates that the kernel did not refuse, with their timelines.
    """

    asked: int
    hops: int = 0
    blackouts: list[float] = field(default_factory=list)
    failures: list[GuestFailure] = field(default_factory=list)
    jumps: list[Jump] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether all live updates that the caller asked for succeeded, and nothing else failed."""
        return self.landed == self.asked and not self.failures

    @property
    def landed(self) -> int:
        """How many live updates succeeded."""
        return len(self.blackouts)

    @property
    def median(self) -> float | None:
        """The median blackout in seconds; None if no live update succeeded."""
        return median(self.blackouts) if self.blackouts else None


def run_hops(boot: Callable[[], VM], hops: int) -> Tally:
    """Live-update a guest again and again, and return the results.

    A guest that dies is replaced by a fresh one, because the rate of failures should come from the
    number of live updates that was asked for.

    Args:
        boot: returns a new guest, not booted yet, with the kernel that it jumps to.
        hops: how many live updates to make.

    Raises:
        HarnessError: a guest could not be started, or its kernel cannot live-update.
    """
    tally = Tally(hops)
    with progress.bar("live updates", hops) as move_bar:
        while tally.hops < hops:
            try:
                with boot() as vm:
                    _jump_until_death(vm, hops, tally, move_bar)
            except GuestFailure as failure:
                tally.failures.append(failure)
                if tally.hops == hops:
                    progress.say(f"after the last live update: {failure}")
                else:
                    # Stop: if guests do not boot, no live updates can be counted.
                    progress.say(f"a guest did not boot. {failure}")
                    break
    return tally


def _jump_until_death(vm: VM, hops: int, tally: Tally, move_bar: progress.MoveBar) -> None:
    before = len(tally.jumps)
    while tally.hops < hops:
        tally.hops += 1
        try:
            _check_live_update(vm)
            timeline = vm.live_update()
            vm.check()
            tally.blackouts.append(timeline.blackout)
        except GuestFailure as failure:
            tally.failures.append(failure)
            progress.say(f"live update {tally.hops} did not come back. {failure}")
            # Close the guest here: if the end of the caller's block found another complaint, that
            # would count as a failed boot.
            vm.close()
            return
        finally:
            tally.jumps[before:] = vm.jumps
            move_bar(tally.hops)


def _check_live_update(vm: VM) -> None:
    """Raise an error if live update is off, because a jump would succeed and preserve nothing."""
    if not (status := vm.call(kho.status)).live_update:
        raise HarnessError(
            f"the kernel {vm.kernel.name} cannot live-update here: "
            + "; ".join(each.missing for each in status.obstacles),
            "; ".join(each.remedy for each in status.obstacles),
        )
