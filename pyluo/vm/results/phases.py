"""The phases of a live update, for the drawings of it: what happened up to each event."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyluo.vm.machine import timeline

if TYPE_CHECKING:
    from pyluo.vm.machine.timeline import Jump

__all__ = ["MARKED", "STYLES", "VM", "Phase", "phases"]

MARKED = "restore"
"""The style of phases that end with an event which the guest has marked."""
VM = "vm"
"""The style of the time in which a VM stands still."""
# For each event, the name of the phase that it ends, and the style of the phase's bar. The events
# that a guest has marked come after these.
_NAMES = {
    timeline.LOADED: ("loading the next kernel", "load"),
    timeline.REBOOT_CALLED: ("up to the call of reboot() or systemctl", "leave"),
    timeline.SYSTEMCTL_CALLED: ("up to the call of reboot() or systemctl", "leave"),
    timeline.NEW_KERNEL: ("leaving the old kernel", "jump"),
    timeline.WORKER_UP: ("booting the new kernel", "boot"),
}
STYLES: dict[str, str] = {
    **{style: name for name, style in _NAMES.values()},
    MARKED: "what the guest marked",
    VM: "a VM stands still",
}
"""What each style stands for."""


@dataclass(frozen=True, slots=True)
class Phase:
    """A phase of a live update; `start` and `end` are seconds since the update began."""

    name: str
    style: str
    start: float
    end: float


def phases(jump: Jump) -> list[Phase]:
    """Return a phase for each event, which begins at the event before it.

    If several events have the same name, there is one phase for them.
    """
    moments = {event.name: jump.timeline.at(event.name) for event in jump.timeline.events}
    found, start = [], 0.0
    for name, at in moments.items():
        what, style = _NAMES.get(name, (f"up to: {name}", MARKED))
        found.append(Phase(what, style, start, at))
        start = at
    return found
