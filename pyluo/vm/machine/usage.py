"""What this process has done with guests, and its guests: for the pytest plugin."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from pyluo.vm.errors import Cause
    from pyluo.vm.machine.timeline import GuestLog

__all__ = ["Position", "RunningGuest", "Usage", "usage"]


class Position(NamedTuple):
    """How far a guest has come.

    Attributes:
        requests: how many requests it was sent, including jumps.
        jumps: how many jumps were tried.
        console: the length of its console's text in characters.
    """

    requests: int = 0
    jumps: int = 0
    console: int = 0


class RunningGuest(Protocol):
    """The part of a running `VM` that the pytest plugin uses."""

    @property
    def position(self) -> Position:
        """How far the guest has come."""

    def log_since(self, position: Position) -> GuestLog:
        """Return the record of what happened in the guest after a position."""

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
        before: the positions that the guests had when the current test began, by their id().
        ended: the records of the guests that were closed since the current test began; None if they
            are not to be kept.
        on_first_boot: called once, before the first guest starts.
    """

    boots: int = 0
    requests: int = 0
    live_updates: int = 0
    running: list[RunningGuest] = field(default_factory=list)
    before: dict[int, Position] = field(default_factory=dict, compare=False)
    ended: list[GuestLog] | None = None
    on_first_boot: Callable[[], None] | None = None

    def count_boot(self) -> None:
        """Count a guest that is about to start."""
        if self.boots == 0 and self.on_first_boot is not None:
            self.on_first_boot()
        self.boots += 1

    def begin_test(self) -> None:
        """Keep the records of guests from now on."""
        self.before = {id(guest): guest.position for guest in self.running}
        self.ended = []

    def find_logs(self) -> list[GuestLog]:
        """Return the records of the guests that the current test booted or sent requests to."""
        used = [
            guest
            for guest in self.running
            if id(guest) not in self.before
            or guest.position.requests != self._position_before(guest).requests
        ]
        return [
            *(self.ended or ()),
            *(guest.log_since(self._position_before(guest)) for guest in used),
        ]

    def count_end(self, guest: RunningGuest) -> None:
        """Keep the record of a guest that ends; it is not running if it never came up."""
        if guest in self.running:
            self.running.remove(guest)
        if self.ended is not None:
            self.ended.append(guest.log_since(self._position_before(guest)))
        self.before.pop(id(guest), None)  # another guest may get the same id()

    def _position_before(self, guest: RunningGuest) -> Position:
        return self.before.get(id(guest), Position())


usage: Usage = Usage()
