"""Counts of what this process has done with guests, for pytest's summary, and its guests."""

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
        """The record of what happened in the guest so far."""

    def check(self, *expected: Cause) -> None:
        """Raise an error if the kernel has made an unexpected complaint since the last check."""

    def expecting(self, *causes: Cause) -> AbstractContextManager[None]:
        """Allow these complaints and deaths in the block."""


@dataclass(slots=True)
class Usage:
    """What this process has done with guests so far.

    Attributes:
        boots: how many guests were started.
        requests: how many requests the guests were sent, without jumps.
        live_updates: how many jumps the guests made.
        running: the guests that are not closed yet, dead or alive.
        ended: the records of the guests that were closed; None if they are not to be kept.
    """

    boots: int = 0
    requests: int = 0
    live_updates: int = 0
    running: list[RunningGuest] = field(default_factory=list)
    ended: list[GuestLog] | None = None


usage = Usage()
