"""The times of the events in a live update."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Event", "GuestLog", "Jump", "Timeline"]

LOADED = "loaded"
REBOOT_CALLED = "reboot called"
NEW_KERNEL = "first sign of the new kernel"
WORKER_UP = "worker up"
DESCRIPTOR_RETRIEVED = "descriptor retrieved"


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened in a live update.

    Attributes:
        name: what happened.
        at: when the host learned of it, in seconds on the host's monotonic clock.
    """

    name: str
    at: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """The events of one live update, in order.

    Attributes:
        started: when the live update was asked for, in seconds on the host's monotonic clock.
        events: the events from then on.
    """

    started: float
    events: tuple[Event, ...]

    def at(self, name: str) -> float:
        """Return the seconds from the start to the first event of this name.

        Raises:
            KeyError: there is no such event.
        """
        for event in self.events:
            if event.name == name:
                return event.at - self.started
        raise KeyError(name)

    def between(self, first: str, last: str) -> float:
        """Return the seconds from one event to another.

        Raises:
            KeyError: one of the events is missing.
        """
        return self.at(last) - self.at(first)

    @property
    def blackout(self) -> float:
        """Seconds from the call of reboot() until the guest marked "descriptor retrieved", or, if
        it did not, until the new kernel's worker was up."""
        marked = any(event.name == DESCRIPTOR_RETRIEVED for event in self.events)
        return self.between(REBOOT_CALLED, DESCRIPTOR_RETRIEVED if marked else WORKER_UP)


@dataclass(frozen=True, slots=True)
class Jump:
    """A live update that was tried and was not refused.

    Attributes:
        origin: the name of the kernel that the guest left.
        target: the name of the kernel that it jumped into.
        landed: whether the worker in that kernel spoke.
        timeline: the events so far.
    """

    origin: str
    target: str
    landed: bool
    timeline: Timeline

    @property
    def blackout(self) -> float | None:
        """The blackout in seconds; None if the jump did not land, or no event tells its start."""
        try:
            return self.timeline.blackout if self.landed else None
        except KeyError:
            return None


@dataclass(frozen=True, slots=True)
class GuestLog:
    """What a guest leaves behind when it has ended.

    Attributes:
        kernel: the name of the kernel that it booted.
        jumps: its live updates, in order.
        console: everything that came over its serial line.
    """

    kernel: str
    jumps: tuple[Jump, ...]
    console: str
