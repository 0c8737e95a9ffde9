"""What this process has done with guests so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from pyluo.vm.errors import Cause
    from pyluo.vm.machine.timeline import GuestLog

__all__ = ["RunningGuest", "Usage", "usage"]


class RunningGuest(Protocol):
    """The part of a running `VM` that the pytest plugin uses."""

    requests: int

    @property
    def log(self) -> GuestLog:
        """What happened in the guest so far."""

    def check(self, *expected: Cause) -> None:
        """Raise an error if the kernel complained of something else since the last check."""

    def expecting(self, *causes: Cause) -> AbstractContextManager[None]:
        """Allow these complaints and deaths in the block."""


@dataclass(slots=True)
class Usage:
    """Counts of what was done with guests, and the guests themselves.

    Attributes:
        boots: how many guests were started.
        requests: how many requests they were sent, not counting jumps.
        live_updates: how many jumps they made.
        running: the guests that exist, dead or alive.
        ended: what the guests that have ended left behind; None if that is not to be kept.
    """

    boots: int = 0
    requests: int = 0
    live_updates: int = 0
    running: list[RunningGuest] = field(default_factory=list)
    ended: list[GuestLog] | None = None


usage = Usage()
