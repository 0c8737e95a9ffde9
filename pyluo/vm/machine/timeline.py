"""The times of the events in a live update."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Event", "GuestLog", "Jump", "Timeline"]

LOADED = "loaded"
REBOOT_CALLED = "reboot called"
SYSTEMCTL_CALLED = "systemctl called"
NEW_KERNEL = "first sign of the new kernel"
WORKER_UP = "worker up"
DESCRIPTOR_RETRIEVED = "descriptor retrieved"


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened in a live update.

    Attributes:
        name: the name of the event.
        at: when the host learned of the event, in seconds on the host's monotonic clock.
    """

    name: str
    at: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """The events of one live update, in order.

    Attributes:
        started: when the harness asked for the live update, in seconds on the host's monotonic
            clock.
        events: the events since then.
    """

    started: float
    events: tuple[Event, ...]

    def at(self, name: str) -> float:
        """Return the seconds from the start to the first event of this name.

        Raises:
            KeyError: no event has this name.
        """
        for event in self.events:
            if event.name == name:
                return event.at - self.started
        raise KeyError(name)

    def between(self, first: str, last: str) -> float:
        """Return the seconds from the first event of one name to the first event of another.

        Raises:
            KeyError: one of the events is missing.
        """
        return self.at(last) - self.at(first)

    @property
    def blackout(self) -> float:
        """Seconds from the call of reboot() to the guest's event "descriptor retrieved".

        If systemd jumped, they begin when it was told to, before it stopped the services. If the
        guest did not mark that event, they end when the new kernel's worker was up.
        """
        marked = {event.name for event in self.events}
        first = SYSTEMCTL_CALLED if SYSTEMCTL_CALLED in marked else REBOOT_CALLED
        last = DESCRIPTOR_RETRIEVED if DESCRIPTOR_RETRIEVED in marked else WORKER_UP
        return self.between(first, last)


@dataclass(frozen=True, slots=True)
class Jump:
    """A live update that the guest's kernel did not refuse.

    Attributes:
        origin: the name of the kernel that the guest left.
        target: the name of the kernel that the guest jumped to.
        landed: whether the guest has spoken after the jump.
        timeline: the events so far.
    """

    origin: str
    target: str
    landed: bool
    timeline: Timeline

    @property
    def blackout(self) -> float | None:
        """The blackout in seconds; None if the jump did not land, or an event is missing."""
        try:
            return self.timeline.blackout if self.landed else None
        except KeyError:
            return None


@dataclass(frozen=True, slots=True)
class GuestLog:
    """The record of a guest, for use after the guest has ended.

    Attributes:
        kernel: the name of the kernel that the guest booted.
        jumps: the guest's live updates, in order.
        console: everything that the guest printed on its console.
    """

    kernel: str
    jumps: tuple[Jump, ...]
    console: str
