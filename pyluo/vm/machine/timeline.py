"""The times of the events in a live update, and of the VMs that the guest is the host of."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from pyluo.guest.port import PAUSED, RESUMED

__all__ = ["Event", "Gap", "GuestLog", "Jump", "Timeline", "VmEvent", "VmEvents"]

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
class VmEvent:
    """Something that happened to a VM whose host the guest is, and what the VM itself knew then.

    Attributes:
        vm: the name of the VM.
        name: the name of the event.
        at: when the harness learned of the event, in seconds on its host's monotonic clock.
        clock: the VM's own clock in nanoseconds; None if nobody has read it.
        counter: what the VM counts; None if nobody has read it.
    """

    vm: str
    name: str
    at: float
    clock: int | None = None
    counter: int | None = None


@dataclass(frozen=True, slots=True)
class Gap:
    """The gap in a VM's life over a live update of its host.

    Attributes:
        vm: the name of the VM.
        events: what happened to it, in order: it was paused before the jump, and went on after it.
    """

    vm: str
    events: tuple[VmEvent, ...]

    @property
    def end(self) -> float | None:
        """When the VM went on, on the clock of the harness; None if it did not."""
        return next((event.at for event in self.events if event.name == RESUMED), None)

    @property
    def length(self) -> float | None:
        """Seconds that the VM stood still, on the harness's clock; None if it never went on."""
        return None if self.end is None else self.end - self.events[0].at

    @property
    def clock(self) -> float | None:
        """Seconds that the VM's own clock went on in the gap; None if it was not read twice."""
        read = [event.clock for event in self.events if event.clock is not None]
        return (read[-1] - read[0]) / 1e9 if len(read) > 1 else None

    @property
    def counted(self) -> int | None:
        """How far the VM's counter went on; None if it was not read twice."""
        read = [event.counter for event in self.events if event.counter is not None]
        return read[-1] - read[0] if len(read) > 1 else None

    @property
    def regressions(self) -> tuple[str, ...]:
        """A sentence for each time that the VM's clock or its counter went back."""
        found = []
        for what in ("clock", "counter"):
            read = [event for event in self.events if getattr(event, what) is not None]
            for before, after in pairwise(read):
                first, second = getattr(before, what), getattr(after, what)
                if second < first:
                    text = (
                        f"the {what} of the VM {self.vm} went back: {first} when it was "
                        f"{before.name}, {second} when it was {after.name}"
                    )
                    found.append((after.at, text))
        return tuple(text for _, text in sorted(found))


@dataclass(frozen=True, slots=True)
class Timeline:
    """The events of one live update, in order.

    Attributes:
        started: when the harness asked for the live update, in seconds on the host's monotonic
            clock.
        events: the events since then.
        vm_events: the events of VMs whose host the guest is; a VM is paused before `started`.
    """

    started: float
    events: tuple[Event, ...]
    vm_events: tuple[VmEvent, ...] = ()

    @property
    def gaps(self) -> tuple[Gap, ...]:
        """The gap in the life of each VM, in the order in which they were paused."""
        names = dict.fromkeys(event.vm for event in self.vm_events)
        return tuple(
            Gap(name, tuple(event for event in self.vm_events if event.vm == name))
            for name in names
        )

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


class VmEvents:
    """The events of the VMs whose host a guest is, as they come in.

    Attributes:
        regressions: a sentence for each time that the clock or the counter of a VM went back.
    """

    def __init__(self) -> None:
        self._last_jump: list[VmEvent] = []
        self._next_jump: dict[str, list[VmEvent]] = {}  # of VMs that were paused since the last one
        self.regressions: list[str] = []

    def add(self, event: VmEvent) -> None:
        """Add an event: to the gap of its VM, or as the first of a new gap."""
        if event.name == PAUSED:
            self._next_jump[event.vm] = [event]
            return
        events = self._next_jump.get(event.vm, self._last_jump)
        before = self._regressions(event.vm, events)
        events.append(event)
        after = self._regressions(event.vm, events)
        self.regressions += after[len(before) :]

    def begin_jump(self) -> None:
        """Take what comes from now on for what happens after this jump."""
        self._last_jump = [event for gap in self._next_jump.values() for event in gap]
        self._next_jump.clear()

    def of_last_jump(self) -> tuple[VmEvent, ...]:
        """Return the events of the VMs that were paused before the last jump."""
        return tuple(self._last_jump)

    @staticmethod
    def _regressions(vm: str, events: list[VmEvent]) -> tuple[str, ...]:
        return Gap(vm, tuple(event for event in events if event.vm == vm)).regressions


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
