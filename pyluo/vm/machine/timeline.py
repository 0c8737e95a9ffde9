"""When things happened in a live update."""

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
    """One moment.

    Attributes:
        name: what happened.
        at: seconds on the host's monotonic clock, when word of it reached the host.
    """

    name: str
    at: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """The moments of one live update, in order.

    Attributes:
        started: seconds on the host's monotonic clock, when it was asked for.
        events: what happened from then on.
    """

    started: float
    events: tuple[Event, ...]

    def at(self, name: str) -> float:
        """Seconds from the start to the first event of this name.

        Raises:
            KeyError: there is none.
        """
        for event in self.events:
            if event.name == name:
                return event.at - self.started
        raise KeyError(name)

    def between(self, first: str, last: str) -> float:
        """Seconds from one event to another."""
        return self.at(last) - self.at(first)

    @property
    def blackout(self) -> float:
        """Seconds from the call of reboot() until the guest marked "descriptor retrieved"; without
        such a mark, until the new kernel's worker was up."""
        marked = any(event.name == DESCRIPTOR_RETRIEVED for event in self.events)
        return self.between(REBOOT_CALLED, DESCRIPTOR_RETRIEVED if marked else WORKER_UP)


@dataclass(frozen=True, slots=True)
class Jump:
    """A live update that was tried, and was not refused.

    Attributes:
        origin: the name of the kernel that was left.
        target: the name of the one that was jumped into.
        landed: whether that one spoke.
        timeline: what happened, up to now.
    """

    origin: str
    target: str
    landed: bool
    timeline: Timeline

    @property
    def blackout(self) -> float | None:
        """That of the timeline; None if it did not land, or nobody saw when it began."""
        try:
            return self.timeline.blackout if self.landed else None
        except KeyError:
            return None


@dataclass(frozen=True, slots=True)
class GuestLog:
    """What is left of a guest when it is gone.

    Attributes:
        kernel: the name of the one it was booted with.
        jumps: its live updates, in order.
        console: everything that came over its serial line.
    """

    kernel: str
    jumps: tuple[Jump, ...]
    console: str
