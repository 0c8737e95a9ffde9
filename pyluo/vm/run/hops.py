"""Make many live updates in a row, and count those that come back."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

from pyluo import kho
from pyluo.vm import progress
from pyluo.vm.errors import GuestFailure, HarnessError

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyluo.vm.machine.vm import VM

__all__ = ["Tally", "run_hops"]


@dataclass(slots=True)
class Tally:
    """The results of a number of live updates.

    Attributes:
        asked: how many live updates were asked for.
        hops: how many were tried; fewer if a guest did not even boot.
        blackouts: the blackouts of those that landed, in seconds.
        failures: what the guest died of or its kernel complained of, for each of the others.
    """

    asked: int
    hops: int = 0
    blackouts: list[float] = field(default_factory=list)
    failures: list[GuestFailure] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether all live updates that were asked for came back."""
        return self.landed == self.asked

    @property
    def landed(self) -> int:
        """How many came back."""
        return len(self.blackouts)

    @property
    def median(self) -> float | None:
        """The median blackout in seconds; None if none came back."""
        return median(self.blackouts) if self.blackouts else None


def run_hops(boot: Callable[[], VM], hops: int) -> Tally:
    """Live-update a guest again and again.

    A guest that dies is counted and replaced by a fresh one, since a rate of failures needs all the
    tries.

    Args:
        boot: returns a new guest that knows which kernel it jumps to.
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
                # A guest that does not even boot says nothing about the rate of jumps.
                tally.failures.append(failure)
                progress.say(f"a guest did not boot. {failure}")
                break
    return tally


def _jump_until_death(vm: VM, hops: int, tally: Tally, move_bar: progress.MoveBar) -> None:
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
            vm.close()  # now: a complaint at the end of the block would count as a failed boot
            return
        finally:
            move_bar(tally.hops)


def _check_live_update(vm: VM) -> None:
    """Fail if live update is off: then a jump succeeds, and hands nothing over."""
    if not (status := vm.call(kho.status)).live_update:
        raise HarnessError(
            f"the kernel {vm.kernel.name} cannot live-update here: "
            + "; ".join(each.missing for each in status.obstacles),
            "; ".join(each.remedy for each in status.obstacles),
        )
